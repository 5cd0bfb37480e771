"""Untrusted Python programs, contained.

A program runs in a bubblewrap sandbox of its own: fresh process, network, mount and IPC namespaces, the system's
libraries read-only, an empty 64 MB /tmp, no environment, `python -I`, limits on memory, CPU, files and processes; all
of it dies with the sandbox. Expected results never enter that process. Tests run in another sandbox, whose calls of
the program's functions are passed on as plain data, and what a script prints is compared by the caller. So nothing that
a program does makes a wrong result pass: no `__eq__`, no exit code, no printed verdict, no frame to walk.

Where bubblewrap does not work, nothing runs unless `unsafe` says so; then only `python -I`, rlimits, an empty
environment, a temporary directory and the killing of the process group remain.
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
CODE = marshal.dumps(compile(Path(__file__).with_name("sandbox_child.py").read_bytes(), "sandbox", "exec"))
START = f"import marshal, sys; exec(marshal.loads(sys.stdin.buffer.read({len(CODE)}))); "
WHOLE = 6  # time limits of one call that a whole program may take


class Ended(Exception):
    """A process that will not answer any more; the text says why."""


class Child:
    """Another process, and messages to and from it: a kind (one byte), a length (four bytes), that many bytes."""

    def __init__(self, command: list[str], folder: tempfile.TemporaryDirectory | None = None, **options):
        self.socket, other = socket.socketpair()
        # a job's SIGTERM goes to all its processes: this one is still to answer in the step that the run finishes
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        with other:
            self.process = subprocess.Popen(command, stdin=other, stdout=other, stderr=subprocess.DEVNULL,
                                            start_new_session=True, **options)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.buffer = bytearray()
        self.namespace: int | None = None  # pidfd of the first process of its PID namespace
        self.folder = folder  # to remove when it ends

    def ask(self, kind: bytes = b"", payload: bytes = b"", *, limit: float) -> tuple[bytes, bytes]:
        """Send a message (bare bytes where it has no kind) and wait for one: (kind, payload). Raises Ended where none
        came within `limit` seconds, or none will."""
        deadline = time.monotonic() + limit
        try:
            self.socket.settimeout(limit)
            self.socket.sendall(kind + len(payload).to_bytes(4, "little") + payload if kind else payload)
            while len(self.buffer) < (size := 5 + int.from_bytes(self.buffer[1:5], "little")):
                if size > 2 * MAX_OUTPUT:
                    raise Ended("returned too much")
                left = deadline - time.monotonic()
                if left <= 0:  # also where bytes drip in without end
                    raise TimeoutError
                self.socket.settimeout(left)
                part = self.socket.recv(2**18)
                if not part:
                    raise ConnectionError
                self.buffer += part
        except TimeoutError:
            raise Ended(f"took longer than {limit:g} s") from None
        except ConnectionError:
            raise Ended("ended before it answered") from None
        message = bytes(self.buffer[:1]), bytes(self.buffer[5:size])
        del self.buffer[:size]
        return message

    def close(self) -> None:
        """Kill it and all that it started. bwrap must not be killed itself: it is to reap the namespace's processes."""
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


def confined(role: str, *, unsafe: bool = False, seconds: int = 10**6) -> Child:
    """A process of sandbox_child.py: "serve" holds a program, "drive" holds tests. seconds: CPU time it may use.

    Raises SystemExit where there is no sandbox and `unsafe` is not set.
    """
    # the limit on processes counts those of a user: it needs a user namespace, or for root a uid that nobody else has
    uid = 0 if unsafe or os.geteuid() else 10**6 + random.SystemRandom().randrange(10**9)
    start = START + f"main({role!r}, {seconds}, {uid}, {unsafe})"
    command = [*([] if unsafe else bubblewrap()), PYTHON, "-I", "-S", "-X", "utf8", "-X", "int_max_str_digits=0",
               "-c", start]
    folder = tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) if unsafe else None
    child = Child(command, folder, env={}, cwd=folder.name if folder else "/")
    try:
        child.ask(payload=CODE, limit=60)
        if not unsafe:
            first = Path(f"/proc/{child.process.pid}/task/{child.process.pid}/children").read_text()
            child.namespace = os.pidfd_open(int(first))
    except Ended as error:
        child.close()
        raise RuntimeError(f"the sandbox did not start: its process {error}") from None
    return child


@functools.cache
def bubblewrap() -> list[str]:
    """The bwrap command line that another command follows. Raises SystemExit where it does not work here."""
    # root needs no user namespace; inside it becomes an ordinary user
    rights = ["--unshare-user"] if os.geteuid() else ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    mounts = []
    python = [] if sys.base_prefix.startswith("/usr") else [sys.base_prefix]
    for path in ["/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", *python]:
        for parent in reversed(Path(path).parents[:-1]):  # bwrap would make them private to root
            mounts += ["--perms", "0755", "--dir", str(parent)]
        if os.path.islink(path):
            mounts += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            mounts += ["--ro-bind", path, path]
    command = ["bwrap", *rights, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--new-session",
               "--die-with-parent", *mounts, "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev",
               "--perms", "1777", "--size", str(2**26), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
    try:
        test = subprocess.run([*command, PYTHON, "-I", "-S", "-c", "pass"], capture_output=True, text=True, timeout=60)
        why = test.returncode and (test.stderr.strip().splitlines() or ["it failed"])[-1]
    except OSError as error:
        why = error.strerror
    require(not why, f"a model's programs run in a bubblewrap sandbox, and bwrap does not work here ({why}); install "
            "bubblewrap and allow user namespaces, or pass --allow_unsafe_exec to run them with your own rights")
    return command


def run_functions(driver: Child, program: str, meta: dict, *, limit: float, unsafe: bool = False) -> list[str]:
    """Run meta["tests"], Python source, on `driver`; what they call by meta["names"] runs in `program`'s own sandbox.

    meta["setup"] runs before the tests, meta["prelude"] before the program. Or meta["script"] is set: then the tests
    call script(text), which is what the program prints with that text on its stdin. limit: seconds for a call.
    → for each test "" where it passed, else what happened; a single line where the program does not even load.
    Raises ValueError where a test cannot be run, Ended where the tests themselves hang or crash; then close the driver.
    """
    deadline, ended, results = time.monotonic() + WHOLE * limit, False, []

    def ask(kind: bytes, payload: bytes) -> tuple[bytes, bytes]:
        nonlocal ended
        if ended or time.monotonic() > deadline:
            return ERROR, b"not run"
        try:
            kind, reply = child.ask(kind, payload, limit=limit)
            return VALUE if kind == VALUE else ERROR, reply  # nothing else from there may reach the driver
        except Ended as error:
            ended = True
            return ERROR, str(error).encode()

    with contextlib.closing(confined("serve", unsafe=unsafe, seconds=round(WHOLE * limit) + 1)) as child:
        kind, reply = ask(LOAD, marshal.dumps((meta["prelude"], program, meta.get("script"))))
        if kind == ERROR:
            return [f"The program does not run: {reply.decode(errors='replace')}"]
        kind, payload = driver.ask(JOB, marshal.dumps((meta["setup"], meta["names"], meta["tests"])), limit=limit)
        while kind != DONE:
            if kind == UNFIT:
                raise ValueError(payload.decode(errors="replace"))
            if kind != CALL:
                results.append("" if kind == PASSED else payload.decode(errors="replace"))
            kind, payload = driver.ask(*(ask(CALL, payload) if kind == CALL else ()), limit=limit)
    if len(results) < len(meta["tests"]):
        raise Ended("ended early")
    return results
