"""Untrusted Python programs, contained.

A program runs in a bubblewrap sandbox of its own: fresh process, network, mount and IPC namespaces,
the system's libraries read-only, an empty 64 MB /tmp, no environment, `python -I`, limits on
memory, CPU, files and processes, and a filter of system calls (seccomp.py) that allows no further
namespace and no memory which those limits do not see; all of it dies with the sandbox. What its
processes hold together is looked at while the caller waits. Expected results never enter that
process. Tests run in another sandbox, whose calls of the program's functions are passed on as plain
data, and the caller compares what a script prints. So nothing that a program does makes a wrong
result pass: no `__eq__`, no exit code, no printed verdict, no frame to walk. Nor is a line of
feedback longer than LINE characters, whatever was sent.

If bubblewrap does not work, nothing runs unless `unsafe` says so; then only `python -I`, rlimits,
an empty environment, a temporary directory and the killing of the process group remain.
"""
from __future__ import annotations

import contextlib
import functools
import marshal
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common.verifiers import seccomp
from common.verifiers.sandbox_child import (
    CALL,
    DONE,
    ERROR,
    JOB,
    LOAD,
    MAX_OUTPUT,
    MEMORY,
    UNFIT,
    VALUE,
    limits,
)

PYTHON = os.path.realpath(sys.executable)
SOURCE = Path(__file__).with_name("sandbox_child.py").read_bytes()
CODE = marshal.dumps(compile(SOURCE, "sandbox", "exec"))
START = f"import marshal, sys; exec(marshal.loads(sys.stdin.buffer.read({len(CODE)}))); "
WHOLE = 6  # a whole program may take this many time limits of one call
LINE = 1000  # characters of what is said about a test
BEAT = 0.05  # seconds between looks at what a program holds
TEMPORARY = 2**26  # bytes of /tmp
INODE = 2**11  # bytes of the kernel's for each file in /tmp, its name and directory entry
PAGE = os.sysconf("SC_PAGE_SIZE")


# --------------------------------------------------------------------------------------------------
# processes
# --------------------------------------------------------------------------------------------------
class Ended(Exception):
    """A process that will not answer any more; the text says why."""


class Child:
    """Another process, and messages to and from it: a kind (one byte), a length (four bytes), that
    many bytes."""

    alive: set[Child] = set()  # all that this process has started and not closed

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
        self.next_look = 0.0  # at what it holds
        self.first = 0  # the first process of its PID namespace, if it has one
        self.namespace = -1  # pidfd of that process
        self.folder = folder  # to remove when it ends
        self.end = "ended before it answered"  # what happened, if it will not answer any more
        Child.alive.add(self)

    def ask(self, kind: bytes = b"", payload: bytes = b"", *, limit: float,
            watched: Child | None = None) -> tuple[bytes, bytes]:
        """Send a message (bare bytes if it has no kind) and wait for one: → (kind, payload).

        watched: the process that may run meanwhile and hold only so much. Raises Ended if no
        message came within `limit` seconds, or none will.
        """
        deadline = time.monotonic() + limit
        if kind:
            payload = kind + len(payload).to_bytes(4, "little") + payload
        unsent = memoryview(payload)
        try:
            while unsent:
                unsent = unsent[self.wait(self.socket.send, unsent, deadline, watched) :]
            return self.receive(deadline, watched)
        except TimeoutError:
            raise Ended(f"took longer than {limit:g} s") from None
        except ConnectionError:
            raise Ended(self.end) from None

    def receive(self, deadline: float, watched: Child | None) -> tuple[bytes, bytes]:
        size = self.size()
        while len(self.buffer) < size:
            if size > 2 * MAX_OUTPUT:
                raise Ended("returned too much")
            part = self.wait(self.socket.recv, 2**18, deadline, watched)
            if not part:
                raise ConnectionError
            self.buffer += part
            size = self.size()
        message = bytes(self.buffer[:size])
        del self.buffer[:size]
        return message[:1], message[5:]

    def wait(self, action, argument, deadline: float, watched: Child | None):
        """action(argument), which the socket may not be ready for until the deadline."""
        while True:
            now = time.monotonic()
            if now >= deadline:  # also when bytes drip in without end
                raise TimeoutError
            if watched:
                watched.look(now)
            self.socket.settimeout(min(BEAT, deadline - now))
            with contextlib.suppress(TimeoutError):
                return action(argument)

    def size(self) -> int:
        """Bytes of the message that the buffer begins with, as far as its length is there."""
        return 5 + int.from_bytes(self.buffer[1:5], "little")

    def look(self, now: float) -> None:
        """Kill it if it holds more memory than one process may. A look comes BEAT after the last
        one, or after the start: a short program gets none."""
        if self.first and now >= self.next_look:
            self.next_look = now + BEAT
            if held(self.first) > MEMORY:
                self.end = f"used more than {MEMORY >> 20} MB of memory"
                self.kill()

    def kill(self) -> None:
        """Kill it and all that it started. bwrap must not be killed itself: it reaps the processes
        of the namespace."""
        with contextlib.suppress(OSError):  # it has ended; another thread has closed it
            if self.first:
                signal.pidfd_send_signal(self.namespace, signal.SIGKILL)
            elif self.process.returncode is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        self.process.wait()
        Child.alive.discard(self)
        self.socket.close()
        if self.first:
            os.close(self.namespace)
        if self.folder:
            self.folder.cleanup()


def held(first: int) -> int:
    """Bytes that the processes of a sandbox hold: pages of their own, and files in /tmp. What the
    kernel keeps for a file that is empty counts too.

    first: the first process of its PID namespace. The others descend from it. Raises SystemExit if
    that cannot be seen.
    """
    try:
        files = os.statvfs(f"/proc/{first}/root/tmp")
    except PermissionError:
        raise SystemExit("error: what a sandboxed program holds in /tmp cannot be seen here (a "
                         "setuid bwrap?); allow user namespaces and take the setuid bit away, or "
                         "pass --allow_unsafe_exec to run programs with your own rights") from None
    except OSError:
        return 0  # it has ended
    total = (files.f_blocks - files.f_bfree) * files.f_frsize
    total += (files.f_files - files.f_ffree) * INODE
    waiting = [str(first)]
    while waiting:
        place = Path("/proc", waiting.pop())
        with contextlib.suppress(OSError):  # it has ended
            _, resident, shared, *_ = map(int, (place / "statm").read_text().split())
            total += (resident - shared) * PAGE
            for thread in os.listdir(place / "task"):
                with contextlib.suppress(OSError):  # it alone has ended
                    waiting += (place / "task" / thread / "children").read_text().split()
    return total


# --------------------------------------------------------------------------------------------------
# sandboxes
# --------------------------------------------------------------------------------------------------
def confined(role: str, *, unsafe: bool = False, seconds: int = 10**6) -> Child:
    """A process of sandbox_child.py: "serve" holds a program, "drive" holds tests.

    seconds: CPU time that it may use. Raises SystemExit if there is no sandbox and `unsafe` is not
    set.
    """
    uid = 0
    if not unsafe and os.geteuid() == 0:
        # the limit on processes counts those of a user: root needs a uid that nobody else has,
        # others get a user namespace
        uid = 10**6 + random.SystemRandom().randrange(10**9)
    python = [PYTHON, "-I", "-S", "-X", "utf8", "-X", "int_max_str_digits=0"]
    python += ["-c", START + f"main({role!r}, {seconds}, {uid}, {unsafe})"]
    if unsafe:
        folder = tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True)
        child = Child(python, folder, env={}, cwd=folder.name)
    else:
        wrapped = bubblewrap()
        with filter_to_read() as fd:
            command = [*wrapped, "--seccomp", str(fd), *python]
            child = Child(command, env={}, cwd="/", pass_fds=[fd])
    try:
        child.ask(payload=CODE, limit=60)
        if not unsafe:
            pid = child.process.pid
            first = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
            child.namespace = os.pidfd_open(first)
            child.first, child.next_look = first, time.monotonic() + BEAT
            for limit, value in limits(seconds).items():
                # it is bwrap's; where nobody is root the program may write to its memory
                resource.prlimit(first, limit, (value, value))
    except (Ended, OSError, ValueError) as error:  # the latter two: no such process any more
        child.close()
        raise RuntimeError(f"the sandbox did not start: its process {error}") from None
    return child


@contextlib.contextmanager
def filter_to_read() -> Iterator[int]:
    """A descriptor with the filter of system calls. bwrap reads it to its end, so every sandbox
    needs one."""
    out, into = os.pipe()
    os.write(into, seccomp.compiled())
    os.close(into)
    yield out
    os.close(out)


@functools.cache
def bubblewrap() -> list[str]:
    """The bwrap command line that another command follows. Raises SystemExit if bwrap does not work
    here.

    Every option is one of bwrap 0.4, except --size, which came with 0.7; /tmp is looked at too.
    """
    rights = ["--unshare-user"]
    if os.geteuid() == 0:  # root needs no user namespace; inside it becomes an ordinary user
        rights = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    begin = [
        "bwrap", *rights,
        "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts",
        "--new-session", "--die-with-parent",
        *read_only(), *devices(),
        "--proc", "/proc",
    ]
    for size in (["--size", str(TEMPORARY)], []):
        command = [*begin, *size, "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
        why = trouble(command)
        if not why:
            return command
    raise SystemExit("error: a model's programs run in a bubblewrap sandbox, and bwrap does not "
                     f"work here ({why}); install bubblewrap and allow user namespaces, or pass "
                     "--allow_unsafe_exec to run them with your own rights")


def trouble(command: list[str]) -> str:
    """Why Python does not start after this command line of bwrap; "" if it does."""
    with filter_to_read() as fd:
        test = [*command, "--seccomp", str(fd), PYTHON, "-I", "-S", "-c", "pass"]
        try:
            done = subprocess.run(test, capture_output=True, text=True, timeout=60, pass_fds=[fd])
        except OSError as error:
            return error.strerror
    lines = done.stderr.strip().splitlines()
    if done.returncode:
        return (lines or ["it failed"])[-1]
    return ""


def devices() -> list[str]:
    """Arguments of bwrap that make /dev. Its own --dev has a /dev/zero too, of which memory can be
    mapped that no limit counts."""
    mounts = ["--dir", "/dev"]
    for name in ("null", "urandom"):
        mounts += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for name, target in {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}.items():
        mounts += ["--symlink", f"/proc/self/fd{target}", f"/dev/{name}"]
    return mounts


def read_only() -> list[str]:
    """Arguments of bwrap that mount the system's libraries and the interpreter."""
    paths = ["/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache"]
    if not sys.base_prefix.startswith("/usr"):
        paths.append(sys.base_prefix)
    mounts = []
    for path in paths:
        parents = list(Path(path).parents)[:-1]
        for parent in reversed(parents):  # bwrap would make them private to root
            mounts += ["--dir", str(parent)]
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
            kind, reply = self.child.ask(kind, payload, limit=self.limit, watched=self.child)
        except Ended as error:
            self.ended = True
            return ERROR, str(error).encode()
        if kind == VALUE:
            return VALUE, reply
        return ERROR, reply[:LINE]  # nothing else from there may reach the driver


def run_functions(driver: Child, program: str, meta: dict, *, limit: float,
                  unsafe: bool = False) -> list[str]:
    """Run meta["tests"], Python source, on `driver`; what they call by meta["names"] runs in the
    sandbox of `program`.

    meta["setup"] runs before the tests, meta["prelude"] before the program. Or meta["script"] is
    set: then the tests call script(text), which is what the program prints with that text on its
    stdin. limit: seconds for a call.
    → for each test "" if it passed, else what happened in at most LINE characters; a single text if
    the program does not even load. Raises ValueError if a test cannot be run, Ended if the tests
    themselves hang or crash; then close the driver.
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
        # what a program leaves running is watched while the tests run, too
        ask = functools.partial(driver.ask, limit=limit, watched=child)
        kind, payload = ask(JOB, job)
        while kind != DONE:
            if kind == CALL:
                kind, reply = served.ask(CALL, payload)
                kind, payload = ask(kind, reply)
                continue
            text = payload[:LINE].decode(errors="replace")
            if kind == UNFIT:
                raise ValueError(text)
            results.append(text)  # of a test that passed it is empty
            kind, payload = ask()
    if len(results) < len(meta["tests"]):
        raise Ended("ended early")
    return results
