"""Untrusted Python programs, contained.

A program runs in a bubblewrap sandbox of its own: fresh process, network, mount and IPC namespaces,
the system's libraries read-only, an empty 64 MB /tmp, no environment, `python -I`, limits on
memory, CPU, files and processes; all of it dies with the sandbox. Expected results never enter that
process. Tests run in another sandbox, whose calls of the program's functions are passed on as plain
data, and the caller compares what a script prints. So nothing that a program does makes a wrong
result pass: no `__eq__`, no exit code, no printed verdict, no frame to walk.

If bubblewrap does not work, nothing runs unless `unsafe` says so; then only `python -I`, rlimits,
an empty environment, a temporary directory and the killing of the process group remain.
"""
from __future__ import annotations

import contextlib
import functools
import marshal
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import require
from common.verifiers.sandbox_child import (
    CALL,
    DONE,
    ERROR,
    JOB,
    LOAD,
    MAX_OUTPUT,
    PASSED,
    UNFIT,
    VALUE,
)

PYTHON = os.path.realpath(sys.executable)
SOURCE = Path(__file__).with_name("sandbox_child.py").read_bytes()
CODE = marshal.dumps(compile(SOURCE, "sandbox", "exec"))
START = f"import marshal, sys; exec(marshal.loads(sys.stdin.buffer.read({len(CODE)}))); "
WHOLE = 6  # a whole program may take this many time limits of one call


# --------------------------------------------------------------------------------------------------
# processes
# --------------------------------------------------------------------------------------------------
class Ended(Exception):
    """A process that will not answer any more; the text says why."""


class Child:
    """Another process, and messages to and from it: a kind (one byte), a length (four bytes), that
    many bytes."""

    def __init__(self, command: list[str], folder: tempfile.TemporaryDirectory | None = None,
                 **options):
        self.socket, other = socket.socketpair()
        # a job's SIGTERM goes to all its processes; this one must answer until the step is done
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        with other:
            self.process = subprocess.Popen(
                command, stdin=other, stdout=other, stderr=subprocess.DEVNULL,
                start_new_session=True, **options,
            )
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.buffer = bytearray()
        self.namespace: int | None = None  # pidfd of the first process of its PID namespace
        self.folder = folder  # to remove when it ends

    def ask(self, kind: bytes = b"", payload: bytes = b"", *,
            limit: float) -> tuple[bytes, bytes]:
        """Send a message (bare bytes if it has no kind) and wait for one: → (kind, payload).

        Raises Ended if none came within `limit` seconds, or none will.
        """
        deadline = time.monotonic() + limit
        if kind:
            payload = kind + len(payload).to_bytes(4, "little") + payload
        try:
            self.socket.settimeout(limit)
            self.socket.sendall(payload)
            return self.receive(deadline)
        except TimeoutError:
            raise Ended(f"took longer than {limit:g} s") from None
        except ConnectionError:
            raise Ended("ended before it answered") from None

    def receive(self, deadline: float) -> tuple[bytes, bytes]:
        size = self.size()
        while len(self.buffer) < size:
            if size > 2 * MAX_OUTPUT:
                raise Ended("returned too much")
            left = deadline - time.monotonic()
            if left <= 0:  # also when bytes drip in without end
                raise TimeoutError
            self.socket.settimeout(left)
            part = self.socket.recv(2**18)
            if not part:
                raise ConnectionError
            self.buffer += part
            size = self.size()
        message = bytes(self.buffer[:size])
        del self.buffer[:size]
        return message[:1], message[5:]

    def size(self) -> int:
        """Bytes of the message that the buffer begins with, as far as its length is there."""
        return 5 + int.from_bytes(self.buffer[1:5], "little")

    def close(self) -> None:
        """Kill it and all that it started. bwrap must not be killed itself: it reaps the processes
        of the namespace."""
        with contextlib.suppress(ProcessLookupError):
            if self.namespace is None:
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                signal.pidfd_send_signal(self.namespace, signal.SIGKILL)
        self.process.wait()
        self.socket.close()
        if self.namespace is not None:
            os.close(self.namespace)
        if self.folder:
            self.folder.cleanup()


# --------------------------------------------------------------------------------------------------
# sandboxes
# --------------------------------------------------------------------------------------------------
def confined(role: str, *, unsafe: bool = False, seconds: int = 10**6) -> Child:
    """A process of sandbox_child.py: "serve" holds a program, "drive" holds tests.

    seconds: CPU time that it may use. Raises SystemExit if there is no sandbox and `unsafe` is not
    set.
    """
    command, folder, place = [], None, "/"
    if unsafe:
        folder = tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True)
        place = folder.name
    else:
        command += bubblewrap()
    uid = 0
    if not unsafe and os.geteuid() == 0:
        # the limit on processes counts those of a user: root needs a uid that nobody else has,
        # others get a user namespace
        uid = 10**6 + random.SystemRandom().randrange(10**9)
    command += [PYTHON, "-I", "-S", "-X", "utf8", "-X", "int_max_str_digits=0"]
    command += ["-c", START + f"main({role!r}, {seconds}, {uid}, {unsafe})"]
    child = Child(command, folder, env={}, cwd=place)
    try:
        child.ask(payload=CODE, limit=60)
        if not unsafe:
            pid = child.process.pid
            first = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            child.namespace = os.pidfd_open(int(first))
    except Ended as error:
        child.close()
        raise RuntimeError(f"the sandbox did not start: its process {error}") from None
    return child


@functools.cache
def bubblewrap() -> list[str]:
    """The bwrap command line that another command follows. Raises SystemExit if bwrap does not work
    here."""
    rights = ["--unshare-user"]
    if os.geteuid() == 0:  # root needs no user namespace; inside it becomes an ordinary user
        rights = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    command = [
        "bwrap", *rights,
        "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts",
        "--new-session", "--die-with-parent",
        *read_only(),
        "--proc", "/proc",
        "--dev", "/dev", "--remount-ro", "/dev",
        "--perms", "1777", "--size", str(2**26), "--tmpfs", "/tmp",
        "--remount-ro", "/", "--chdir", "/tmp",
    ]
    test = [*command, PYTHON, "-I", "-S", "-c", "pass"]
    why = ""
    try:
        done = subprocess.run(test, capture_output=True, text=True, timeout=60)
        if done.returncode:
            why = "it failed"
            if done.stderr.strip():
                why = done.stderr.strip().splitlines()[-1]
    except OSError as error:
        why = error.strerror
    require(not why, "a model's programs run in a bubblewrap sandbox, and bwrap does not work here "
            f"({why}); install bubblewrap and allow user namespaces, or pass --allow_unsafe_exec "
            "to run them with your own rights")
    return command


def read_only() -> list[str]:
    """Arguments of bwrap that mount the system's libraries and the interpreter."""
    paths = ["/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache"]
    if not sys.base_prefix.startswith("/usr"):
        paths.append(sys.base_prefix)
    mounts = []
    for path in paths:
        parents = list(Path(path).parents)[:-1]
        for parent in reversed(parents):  # bwrap would make them private to root
            mounts += ["--perms", "0755", "--dir", str(parent)]
        if os.path.islink(path):
            mounts += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            mounts += ["--ro-bind", path, path]
    return mounts


# --------------------------------------------------------------------------------------------------
# a program and its tests
# --------------------------------------------------------------------------------------------------
class Program:
    """An untrusted program in a sandbox of its own."""

    def __init__(self, child: Child, limit: float, deadline: float):
        self.child, self.limit, self.deadline = child, limit, deadline
        self.ended = False

    def ask(self, kind: bytes, payload: bytes) -> tuple[bytes, bytes]:
        """Pass a message on: → VALUE and JSON, or ERROR and a text, whatever the program does."""
        if self.ended or time.monotonic() > self.deadline:
            return ERROR, b"not run"
        try:
            kind, reply = self.child.ask(kind, payload, limit=self.limit)
        except Ended as error:
            self.ended = True
            return ERROR, str(error).encode()
        if kind == VALUE:
            return VALUE, reply
        return ERROR, reply  # nothing else from there may reach the driver


def run_functions(driver: Child, program: str, meta: dict, *, limit: float,
                  unsafe: bool = False) -> list[str]:
    """Run meta["tests"], Python source, on `driver`; what they call by meta["names"] runs in the
    sandbox of `program`.

    meta["setup"] runs before the tests, meta["prelude"] before the program. Or meta["script"] is
    set: then the tests call script(text), which is what the program prints with that text on its
    stdin. limit: seconds for a call.
    → for each test "" if it passed, else what happened; a single line if the program does not even
    load. Raises ValueError if a test cannot be run, Ended if the tests themselves hang or crash;
    then close the driver.
    """
    load = marshal.dumps((meta["prelude"], program, meta.get("script")))
    job = marshal.dumps((meta["setup"], meta["names"], meta["tests"]))
    seconds = round(WHOLE * limit) + 1
    deadline = time.monotonic() + WHOLE * limit
    results = []
    with contextlib.closing(confined("serve", unsafe=unsafe, seconds=seconds)) as child:
        served = Program(child, limit, deadline)
        kind, reply = served.ask(LOAD, load)
        if kind == ERROR:
            return [f"The program does not run: {reply.decode(errors='replace')}"]
        kind, payload = driver.ask(JOB, job, limit=limit)
        while kind != DONE:
            if kind == UNFIT:
                raise ValueError(payload.decode(errors="replace"))
            if kind == CALL:
                kind, reply = served.ask(CALL, payload)
                kind, payload = driver.ask(kind, reply, limit=limit)
                continue
            if kind == PASSED:
                results.append("")
            else:
                results.append(payload.decode(errors="replace"))
            kind, payload = driver.ask(limit=limit)
    if len(results) < len(meta["tests"]):
        raise Ended("ended early")
    return results
