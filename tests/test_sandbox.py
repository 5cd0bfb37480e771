"""Programs that lie, attack, hang or fall over: each gets a clear verdict, gains nothing and leaves nothing running."""
import contextlib
import errno
import json
import marshal
import os
import platform
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, OrderedDict, deque, namedtuple
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from common.tasks import Problem
from common.tasks.contests import SCRIPT_SETUP
from common.verifiers import sandbox, seccomp
from common.verifiers.pool import Verifier
from common.verifiers.sandbox_child import CALL, DONE, ERROR, VALUE, decode, encode

LIMIT = 1.0


def bubblewrap_works() -> bool:
    with contextlib.suppress(SystemExit):
        return bool(sandbox.bubblewrap())
    return False


needs_bubblewrap = pytest.mark.skipif(not bubblewrap_works(), reason="bubblewrap (bwrap) does not work on this machine")
WAYS = [pytest.param(False, marks=needs_bubblewrap, id="bubblewrap"), pytest.param(True, id="unsafe")]


@pytest.fixture(scope="module", params=WAYS)
def verifier(request):
    v = Verifier(workers=2, limit=LIMIT, allow_unsafe_exec=request.param)
    yield v
    v.close()


@pytest.fixture(scope="module")
def contained():
    v = Verifier(workers=2, limit=LIMIT)
    yield v
    v.close()


def problem(*tests: str, names=("f",), setup: str = "", **meta) -> Problem:
    return Problem("test-problem", [], kind="code",
                   meta=dict(prelude="", setup=setup, names=list(names), tests=list(tests), **meta))


def script(*cases: tuple[str, str]) -> Problem:
    tests = [f"assert words(script({x!r})) == words({y!r})" for x, y in cases]
    return problem(*tests, names=["script"], setup=SCRIPT_SETUP, script=True)


NEXT = problem("assert f(1) == 2", "assert f(41) == 42")  # f(x) is x + 1
HONEST = "def f(x):\n    return x + 1"


def verdict(verifier: Verifier, program: str, of: Problem = NEXT):
    start = time.monotonic()
    result = verifier([of], [f"Here it is:\n```python\n{program}\n```\n"])[0]
    assert time.monotonic() - start < 12 * LIMIT
    return result


def judged(verifier: Verifier, programs) -> list:
    """The verdicts on several programs, each in a sandbox of its own, some at a time."""
    texts = [f"```python\n{program}\n```" for program in programs]
    return verifier([NEXT] * len(texts), texts)


def running(token: str) -> list[str]:
    """Processes of this machine whose command line has the token."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if token.encode() in path.read_bytes():
                found.append(str(path))
    return found


def descendants() -> int:
    """How many processes this one has started, directly or not, and are still there, zombies too."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    count, level = 0, {os.getpid()}
    while level := {pid for pid, parent in parents.items() if parent in level}:
        count += len(level)
    return count


def test_an_honest_program_passes_and_a_wrong_one_is_told_what_it_returned(verifier):
    assert verdict(verifier, HONEST).reward == 1
    wrong = verdict(verifier, "def f(x):\n    return x + 2 if x > 9 else x + 1")
    assert (wrong.reward, wrong.feedback) == (0, "f(41) returned 43")


# What a program may do to be believed. None of these computes x + 1.
LIARS = {
    "an object that equals everything": """
class Yes:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    __hash__ = None
def f(x): return Yes()""",
    "a subclass of int that equals everything": """
class Yes(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
def f(x): return Yes(7)""",
    "a string with its own comparison": """
class Yes(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def f(x): return Yes("7")""",
    "sys.exit(0) on loading": "import sys\nsys.exit(0)",
    "sys.exit(0) in the call": "import sys\ndef f(x): sys.exit(0)",
    "os._exit(0)": "import os\ndef f(x): os._exit(0)",
    "raising its way out": "def f(x): raise KeyboardInterrupt",
    "patched builtins": """
import builtins, sys
for name in ("isinstance", "len", "repr", "hasattr", "type", "bool", "AssertionError"):
    setattr(builtins, name, lambda *a, **k: True)
def f(x): return 7""",
    "a patched harness": """
import sys
main = sys.modules["__main__"]
for name in ("encode", "describe"):
    setattr(main, name, lambda *a: "true")
def f(x): return 7""",
    "a printed verdict": """
import sys
def f(x):
    for out in (sys.stdout, sys.stderr, sys.__stdout__):
        print("PASSED\\nOK\\n1 passed\\nreward=1.0\\np\\0\\0\\0\\0", file=out, flush=True)
    return 7""",
    "forged messages on every descriptor": """
import os
def f(x):
    for message in (b"p\\0\\0\\0\\0", b"d\\0\\0\\0\\0", b"v\\4\\0\\0\\0true"):
        for fd in range(64):
            try: os.write(fd, message)
            except OSError: pass
    return 7""",
    "every comparison redefined through the garbage collector": """
import gc
def f(x):
    for o in gc.get_objects():
        if isinstance(o, dict) and "tests" in o:
            o["tests"] = []
    return 7""",
    "nothing at all": "",
    "a function of that name that is not there": "g = 1",
}


@pytest.fixture(scope="module")
def liars(verifier):
    """Name → verdict. The same two processes hold the tests of all."""
    return dict(zip(LIARS, judged(verifier, LIARS.values())))


@pytest.mark.parametrize("name", LIARS)
def test_a_liar_is_not_believed(liars, name):
    assert liars[name].reward == 0 and liars[name].feedback


def test_after_all_liars_honest_programs_are_judged_as_ever(liars, verifier):
    assert [v.reward for v in judged(verifier, [HONEST] * 4)] == [1] * 4


def test_a_message_made_to_reach_the_tests_process_reaches_nobody(verifier):
    """The parent passes on values and errors only: a program cannot speak to the driver in the parent's voice."""
    job = marshal.dumps(("", [], ["1"] * 9))
    for kind in (0xC8, ord("j"), ord("d"), ord("p"), ord("u")):
        forged = bytes([kind]) + len(job).to_bytes(4, "little") + job
        liar = f"""
import os
def f(x):
    for fd in range(3, 20):
        try: os.write(fd, {forged!r} * 3)
        except OSError: pass"""
        assert verdict(verifier, liar).reward == 0
        assert verdict(verifier, "def f(x): return 0").reward == 0
        assert verdict(verifier, HONEST).reward == 1


def test_only_values_and_errors_are_passed_on_to_the_tests(verifier):
    """Whatever kind of message a program forges; and a tests process that meets another kind ends at once."""
    asked = []

    class Driver:
        def ask(self, *message, limit, watched):
            asked.append(message)
            return (CALL, marshal.dumps(("f", (1,), {}))) if len(asked) < 4 else (DONE, b"")

    liar = """
import os
def f(x):
    for fd in range(3, 6):
        for kind in b"jpdv\\xc8":
            try: os.write(fd, bytes([kind]) + b"\\1\\0\\0\\0x")
            except OSError: pass"""
    with pytest.raises(sandbox.Ended):  # no test has a result
        sandbox.run_functions(Driver(), liar, NEXT.meta, limit=LIMIT, unsafe=verifier.unsafe)
    assert len(asked) == 4 and {message[0] for message in asked[1:]} <= {VALUE, ERROR}
    with contextlib.closing(sandbox.confined("drive", unsafe=verifier.unsafe)) as driver:
        with pytest.raises(sandbox.Ended, match="ended before it answered"):
            driver.ask(VALUE, marshal.dumps(("", [], ["1"])), limit=5)


def test_tests_that_crash_pass_nothing(verifier):
    crash = problem("assert f(1) == 2", "import os\nos._exit(0)")
    full = problem("f(1)", setup="raise MemoryError")  # as after results of many megabytes: no error in the data
    for of in (crash, full):
        assert verdict(verifier, HONEST, of).feedback == "The check ended early."
    assert verdict(verifier, HONEST).reward == 1


def test_the_expected_result_is_nowhere_in_the_programs_process(verifier):
    """It looks through every frame, object, environment, argument and its own memory for the number it must return."""
    spy = """
import gc, os, re, sys
def f(x):
    half, digits = "73916", "40852"
    seen = [repr(sys.argv), repr(dict(os.environ))]
    frame = sys._getframe()
    while frame:
        seen += [repr(frame.f_locals), repr(frame.f_globals), repr(frame.f_code.co_consts)]
        frame = frame.f_back
    for o in gc.get_objects():
        if isinstance(o, (list, tuple, dict)) and len(o) < 2000:
            try: seen.append(repr(o)[:20000])
            except Exception: pass
    for path in ("/proc/self/cmdline", "/proc/self/environ", "/proc/1/cmdline", "/proc/1/environ"):
        try: seen.append(open(path, errors="replace").read())
        except OSError: pass
    try:
        with open("/proc/self/mem", "rb") as mem:
            for line in open("/proc/self/maps"):
                low, high = (int(v, 16) for v in line.split()[0].split("-"))
                if line.split()[1].startswith("rw") and high - low < 2**26:
                    mem.seek(low)
                    try: seen.append(mem.read(high - low).decode("latin-1"))
                    except OSError: pass
    except OSError: pass
    return any(re.search(half + digits, text) for text in seen), len(seen) > 100"""
    assert verdict(verifier, spy, problem("assert f(1) == 7391640852")).feedback == "f(1) returned (False, True)"
    assert verdict(verifier, spy, problem("assert f(7391640852) == (True, True)")).reward == 1  # it can see at all


TROUBLE = {  # program → words of the feedback
    "endless loop": ("def f(x):\n    while True: pass", "took longer than 1 s"),
    "endless loop on loading": ("while True: pass", "does not run: took longer than 1 s"),
    "sleep": ("import time\ndef f(x): time.sleep(1000)", "took longer than 1 s"),
    "a huge power": ("def f(x): return 9 ** 9 ** 9", "took longer than 1 s"),
    "a huge regular expression": ("import re\ndef f(x): return re.match('(a+)+$', 'a' * 64 + 'b')", "took longer"),
    "memory bomb": ("def f(x):\n    a = []\n    while True: a.append(bytearray(2 ** 27))", "f(1)"),
    "one enormous list": ("def f(x): return [0] * 10 ** 10", "MemoryError"),
    "1 GB on stdout": ("def f(x):\n    for i in range(1024): print('x' * 2 ** 20)\n    return 7", "f(1)"),
    "1 GB returned": ("def f(x): return 'x' * 2 ** 28", "f(1)"),
    "an endless generator": ("def f(x):\n    while True: yield x", "f(1)"),
    "a list that holds itself": ("def f(x):\n    a = []\n    a.append(a)\n    return a", "RecursionError"),
    "a deep list": ("def f(x):\n    a = []\n    for _ in range(10 ** 5): a = [a]\n    return a", "RecursionError"),
    "endless recursion": ("def f(x): return f(x)", "RecursionError"),
    "a crash": ("import ctypes\ndef f(x): ctypes.string_at(0)", "ended before it answered"),
    "stopping itself": ("import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)", "took longer than 1 s"),
    "closed descriptors": ("import os\ndef f(x):\n    os.closerange(0, 64)\n    return 2", "ended before it answered"),
    "a syntax error": ("def f(x)\n    return 1", "SyntaxError: expected ':' (line 1)"),
    "a NUL byte": ("def f(x):\n    return '\0'", "does not run"),
    "an exception": ("def f(x):\n\n    return 1 / 0", "f(1): ZeroDivisionError: division by zero (line 3)"),
    "a hostile exception": ("class E(Exception):\n    def __str__(self): raise self\ndef f(x): raise E", ""),
    "a hostile repr": ("class R:\n    def __repr__(self): return 1 / 0\ndef f(x): return R()", "ZeroDivisionError"),
    "much source": ("x = [" + "1, " * 30_000 + "]\ndef f(x): return 0", "f(1) returned 0"),
}


SLOW = [name for name, (_, words) in TROUBLE.items() if "took longer" in words or words == "f(1)"]


@pytest.fixture(scope="module")
def troubles(verifier):
    """Name → verdict. Those that run into the time limit do so at the same time."""
    quick = [name for name in TROUBLE if name not in SLOW]
    found = dict(zip(quick, judged(verifier, [TROUBLE[name][0] for name in quick])))
    with contextlib.closing(Verifier(len(SLOW), LIMIT, allow_unsafe_exec=verifier.unsafe)) as many:
        return found | dict(zip(SLOW, judged(many, [TROUBLE[name][0] for name in SLOW])))


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_has_a_clear_verdict(troubles, name):
    result, words = troubles[name], TROUBLE[name][1]
    assert result.reward == 0 and words in result.feedback and len(result.feedback) < 2000


def test_after_a_time_out_the_rest_is_not_waited_for(verifier):
    many = problem(*[f"assert f({i}) == {i + 1}" for i in range(50)])
    hang = verdict(verifier, "def f(x):\n    while x > 0: pass\n    return 1", many)
    assert hang.feedback == "f(1): took longer than 1 s\nf(2): not run"


def test_bytes_that_drip_in_win_no_time(verifier):
    drip = """
import os, time
def f(x):
    for fd in range(3, 6):
        try: os.write(fd, b"v\\xff\\xff\\x0f\\0")
        except OSError: pass
    while True:
        for fd in range(3, 6):
            try: os.write(fd, b"1")
            except OSError: pass"""
    assert verdict(verifier, drip).feedback == "f(1): took longer than 1 s\nf(41): not run"


def test_a_result_of_many_megabytes_is_refused(verifier):
    assert "returned too much" in verdict(verifier, "def f(x): return 'x' * 20_000_000").feedback


@needs_bubblewrap
def test_a_fork_bomb_is_contained(contained):
    bomb = "import os\ndef f(x):\n    while True:\n        try: os.fork()\n        except OSError: pass"
    assert verdict(contained, HONEST).reward == 1
    before = descendants()
    assert "took longer" in verdict(contained, bomb).feedback
    assert descendants() <= before
    count = """
import os, time
def f(x):
    n = 0
    try:
        while n < 99:
            if not os.fork(): time.sleep(9)
            n += 1
    except OSError: return n"""
    assert int(verdict(contained, count).feedback.split()[-1]) < 10


DAEMON = """
import os, sys
def f(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)  # {token}"])
        os._exit(0)
    import time; time.sleep(0.3)
    return {value}"""


@needs_bubblewrap
@pytest.mark.parametrize("value, reward", [("x + 1", 1), ("0", 0), ("time.sleep(99)", 0)])
def test_a_daemon_dies_with_its_sandbox(contained, value, reward):
    token = f"daemon-{os.getpid()}-{reward}"
    assert verdict(contained, DAEMON.format(token=token, value=value)).reward == reward
    assert not running(token)


def test_threads_do_not_outlive_the_test(verifier):
    program = ("import threading, time\nfor _ in range(3): threading.Thread(target=time.sleep, args=(600,)).start()\n"
               + HONEST)
    assert verdict(verifier, HONEST).reward == 1
    before = descendants()
    assert verdict(verifier, program).reward == 1
    assert descendants() <= before


def test_it_sees_no_environment_and_no_files_of_the_user(verifier, tmp_path, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "squeamish-ossifrage")
    secret = tmp_path / "secret.txt"
    secret.write_text("squeamish-ossifrage")
    look = f"""
import glob, os
def f(x):
    seen = repr(dict(os.environ))
    for path in [{str(secret)!r}, *glob.glob("/proc/*/environ"), *glob.glob("/proc/*/cmdline")]:
        try: seen += open(path).read()
        except (OSError, UnicodeDecodeError): pass
    return "ossifrage" in seen"""
    ask = problem("assert f(1) is False")
    if not verifier.unsafe:
        assert verdict(verifier, look, ask).reward == 1
    env = "import os\ndef f(x): return 'API_TOKEN' in os.environ"
    assert verdict(verifier, env, ask).reward == 1  # without bubblewrap the environment is empty all the same


@needs_bubblewrap
def test_it_writes_nowhere_but_in_its_own_folder(contained, tmp_path):
    tmp_path.chmod(0o777)
    attempt = f"""
import os
def f(x):
    done = []
    for path in ({str(tmp_path / "x")!r}, "/x", "/usr/x", "/dev/shm/x", "/dev/x", "/proc/x", "/root/x", "z", "/tmp/y"):
        try: open(path, "w").write("x"); done.append(path)
        except OSError: pass
    return done"""
    assert verdict(contained, attempt, problem("assert f(1) == ['z', '/tmp/y']")).reward == 1
    assert not list(tmp_path.iterdir())
    look = "import os\ndef f(x): return os.listdir('/tmp')"
    assert verdict(contained, look, problem("assert f(1) == []")).reward == 1
    fill = """
def f(x):
    try:
        for i in range(100): open(f"/tmp/{i}", "wb").write(bytes(2 ** 22))
    except OSError as error: return error.errno"""
    assert verdict(contained, fill, problem("assert f(1) == 28")).reward == 1  # ENOSPC: /tmp has a size


@needs_bubblewrap
def test_it_has_no_network(contained):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        call = f"""
import socket
def f(x):
    for address in (("127.0.0.1", {server.getsockname()[1]}), ("1.1.1.1", 53)):
        try: socket.create_connection(address, 1); return "connected"
        except OSError: pass
    return "alone" """
        assert verdict(contained, call, problem("assert f(1) == 'alone'")).reward == 1
        with pytest.raises(BlockingIOError):
            server.accept()


@needs_bubblewrap
def test_it_cannot_signal_anyone_outside(contained):
    victim = subprocess.Popen(["sleep", "60"])
    kill = f"""
import os, signal
def f(x):
    for pid in (os.getppid(), 1, {os.getpid()}, {victim.pid}, -{os.getpgid(0)}, -1):
        try: os.kill(pid, signal.SIGKILL)
        except OSError: pass
    return 2"""
    assert verdict(contained, kill).reward == 0  # kill(-1) takes itself
    assert victim.poll() is None
    victim.kill()
    victim.wait()


@needs_bubblewrap
def test_one_program_finds_no_trace_of_another(contained):
    leave = """
import os
def f(x):
    open("/tmp/answer", "w").write("2")
    return 0"""
    find = "import os\ndef f(x): return int(open('/tmp/answer').read()) + x - 1"
    assert verdict(contained, leave).reward == 0
    assert "FileNotFoundError" in verdict(contained, find).feedback


def test_nothing_leaks(verifier, tmp_path, monkeypatch):
    """No process, descriptor or temporary file is left by programs that pass, fail, hang, crash or fork."""
    programs = [HONEST, "def f(x): return 0", "import os\ndef f(x): os._exit(3)", "def f(x): 1 / 0", "syntax error"] * 8
    programs += ["while True: pass", "import os\ndef f(x):\n    while os.fork() == 0: pass\n    return 0"]
    verifier([NEXT] * 4, [f"```\n{HONEST}\n```"] * 4)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def state() -> tuple[int, int, int]:
        return len(os.listdir("/proc/self/fd")), descendants(), len(list(tmp_path.iterdir()))

    before = state()
    rewards = [v.reward for v in verifier([NEXT] * len(programs), [f"```\n{p}\n```" for p in programs])]
    assert sum(rewards) == 8 and rewards[0] == 1
    assert all(now <= then for now, then in zip(state(), before)), (before, state())


def test_close_ends_every_process():
    before = descendants()
    v = Verifier(workers=2, limit=LIMIT, allow_unsafe_exec=not bubblewrap_works())
    assert verdict(v, HONEST).reward == 1
    assert descendants() > before
    v.close()
    assert descendants() == before


def test_without_bubblewrap_nothing_runs_and_the_error_names_the_flag(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    sandbox.bubblewrap.cache_clear()
    v = Verifier(workers=1)
    try:
        with pytest.raises(SystemExit, match="--allow_unsafe_exec"):
            v([NEXT], [f"```python\n{HONEST}\n```"])
        with pytest.raises(SystemExit, match="bubblewrap"):
            v.check([NEXT])
    finally:
        sandbox.bubblewrap.cache_clear()
        v.close()


# ---------------------------------------------------------------------------------------------------------------------
# scripts
# ---------------------------------------------------------------------------------------------------------------------
DOUBLE = script(("2\n", "4\n"), ("21\n", "42\n"))


@pytest.mark.parametrize("program", [
    "print(int(input()) * 2)",
    "import sys\nprint(2 * int(sys.stdin.buffer.readline()))",
    "import os\nos.write(1, b'%d' % (2 * int(os.read(0, 99))))",
    "print(2 * int(open(0).read()), end='')",
    "import sys\nprint(2 * int(next(sys.stdin)))\nexit()",
    "import sys\nprint(2 * int(sys.stdin.read()), flush=True)\nsys.exit(0)",
    "import os\nprint(2 * int(input()), flush=True)\nos._exit(0)",
    "import atexit\nn = int(input())\natexit.register(lambda: print(2 * n))",
    "import threading\nthreading.Thread(target=lambda: print(2 * int(input()))).start()",
    "def main():\n    print(2 * int(input()))\nif __name__ == '__main__':\n    main()",
    "import sys, threading\nsys.setrecursionlimit(10 ** 6)\nthreading.stack_size(2 ** 27)\n"
    "t = threading.Thread(target=lambda: print(2 * int(input())))\nt.start()\nt.join()",
    "from dataclasses import dataclass\n@dataclass\nclass N:\n    n: int\nprint(N(int(input())).n * 2.0)",
    "print('  ', int(input()) * 2, ' \\n\\n')",
])
def test_a_script_runs_as_scripts_do(verifier, program):
    assert verdict(verifier, program, DOUBLE).reward == 1


@pytest.mark.parametrize("program, words", [
    ("print(int(input()) + 2)", "script('21\\n') returned '23\\n'"),
    ("print(int(input()) * 2)\nraise SystemExit(3)", "exit status 3"),
    ("import sys\nprint(int(input()) * 2)\nsys.exit('gave up')", "gave up"),
    ("print(2 * int(input()))\n1 / 0", "ZeroDivisionError: division by zero (line 2)"),
    ("import os\nos.lseek(1, 2 ** 26, 0)\nprint('x', flush=True)", "OSError: [Errno 27] File too large (line 3)"),
    ("import os\nos.ftruncate(1, 2 ** 24)", "8388609 bytes printed"),
    ("import os\nprint(2 * int(input()))\nos.symlink('x', '.stdout')", "FileExistsError"),
    ("import time\nprint(2 * int(input()))\ntime.sleep(99)", "took longer than 1 s"),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "exit status -11"),
    ("print(4", "SyntaxError"),
    ("", "returned ''"),
])
def test_a_script_that_fails_is_told_how(verifier, program, words):
    result = verdict(verifier, program, DOUBLE)
    assert result.reward == 0 and words in result.feedback


# ---------------------------------------------------------------------------------------------------------------------
# bounds: feedback, memory, rights, time
# ---------------------------------------------------------------------------------------------------------------------
FLOODS = {  # programs that send as much text as they can
    "an error message of its own on every descriptor": """
import os
SIZE = 2 ** 21
def f(x):
    message = memoryview(b"e" + SIZE.to_bytes(4, "little") + b"x" * SIZE)
    for fd in range(3, 20):
        try:
            while message: message = message[os.write(fd, message):]
        except OSError: pass""",
    "the same while it loads": """
import os
SIZE = 2 ** 21
message = memoryview(b"e" + SIZE.to_bytes(4, "little") + b"x" * SIZE)
for fd in range(3, 20):
    try:
        while message: message = message[os.write(fd, message):]
    except OSError: pass""",
    "a message": "def f(x): raise ValueError('x' * 10 ** 7)",
    "a message that is an attribute": "class E(Exception): msg = 'x' * 10 ** 7\ndef f(x): raise E",
    "a name of an exception": "def f(x): raise type('x' * 10 ** 6, (Exception,), {})",
    "a representation": "class R:\n    def __repr__(self): return 'x' * 10 ** 7\ndef f(x): return R()",
    "a result": "def f(x): return 'x' * 10 ** 6",
}


def test_feedback_has_a_bound_whatever_is_sent(verifier):
    for name, result in zip(FLOODS, judged(verifier, FLOODS.values())):
        assert result.reward == 0 and "xxx" in result.feedback and len(result.feedback) < 2100, name


@needs_bubblewrap
def test_a_script_that_fills_the_disk_is_told_so(contained):
    fill = """import os
os.posix_fallocate(os.open("large", os.O_CREAT | os.O_RDWR), 0, 2 ** 26 - 2 ** 15)
while True: print("x" * 2 ** 12)"""
    assert "No space left on device (line 3)" in verdict(contained, fill, DOUBLE).feedback


@needs_bubblewrap
def test_a_script_cannot_flood_feedback_either(contained):
    flood = "import sys\nsys.stderr.write('x' * 10 ** 6)\nsys.exit('y' * 10 ** 6)"
    assert 0 < len(verdict(contained, flood, DOUBLE).feedback) < 2100


CALLS = """
import ctypes, os, platform
libc, column = ctypes.CDLL(None, use_errno=True), ["x86_64", "aarch64"].index(platform.machine())
NEW = {"user": 0x10000000, "mounts": 0x20000, "PIDs": 0x20000000, "network": 0x40000000, "IPC": 0x8000000}
page, size = ctypes.create_string_buffer(4096), 2 ** 20
# what is tried: its number on either machine, arguments with which the kernel might do it
TRIED = {f"unshare {name}": ((272, 97), flag) for name, flag in NEW.items()}
TRIED |= {f"clone {name}": ((56, 220), flag | 17, 0, 0, 0, 0) for name, flag in NEW.items()}
TRIED |= {
    "setns": ((308, 268), os.open("/proc/self/ns/user", os.O_RDONLY), 0), "memfd_create": ((319, 279), b"x", 0),
    "shmget": ((29, 194), 0, size, 0o1600), "msgget": ((68, 186), 0, 0o1600), "semget": ((64, 190), 0, 9, 0o1600),
    "mq_open": ((240, 180), b"x", 0o102, 0o600, 0), "add_key": ((248, 217), b"user", b"x", page, 9, -2),
    "keyctl": ((250, 219), 0, -3, 1), "inotify_init1": ((294, 26), 0), "fanotify_init": ((300, 262), 0x200, 0),
    "io_setup": ((206, 0), 9, page), "io_uring_setup": ((425, 425), 1, page), "userfaultfd": ((323, 282), 1),
    "perf_event_open": ((298, 241), page, 0, -1, -1, 0), "bpf": ((321, 280), 0, page, 64),
    "ptrace": ((101, 117), 0, 0, 0, 0), "vmsplice": ((278, 75), os.pipe()[1], page, 1, 0),
    "mount": ((165, 40), b"none", b"/tmp", b"tmpfs", 0, 0), "chroot": ((161, 51), b"/tmp"),
    "setuid": ((105, 146), 0), "a 32-bit call": ((0x40000000 + 39, 10 ** 6),),
    "shared memory": ((9, 222), 0, size, 3, 0x21, -1, 0), "shared memory, checked": ((9, 222), 0, size, 3, 0x23, -1, 0),
    **{f"socket family {i}": ((41, 198), i, kind, 0) for i, kind in ((2, 2), (10, 2), (16, 3), (38, 5), (40, 1))},
}
def f(x):
    libc.prctl(4, 1)  # dumpable again: its files in /proc are its own
    libc.syscall.restype = ctypes.c_long
    done = []
    for name, (numbers, *arguments) in TRIED.items():
        result = libc.syscall(numbers[column], *(v if isinstance(v, (bytes, ctypes.Array)) else ctypes.c_long(v) for v in arguments))
        if result == 0 and name.startswith("clone"): os._exit(0)
        if result >= 0: done.append(name)
    return done"""


@needs_bubblewrap
def test_no_call_makes_a_namespace_or_memory_that_no_limit_sees(contained):
    assert verdict(contained, CALLS, problem("assert f(1) == []")).feedback == ""


@needs_bubblewrap
def test_what_honest_programs_use_works(contained):
    use = """
import asyncio, mmap, multiprocessing.pool, socket, subprocess, tempfile, threading
async def later(x):
    await asyncio.sleep(0)
    return x
def f(x):
    private = mmap.mmap(-1, 2 ** 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    private[:1] = b"1"
    with tempfile.TemporaryFile() as file:
        file.write(b"2" * 4096); file.flush()
        shared = mmap.mmap(file.fileno(), 0)
        shared[0] = 51
        threads = [threading.Thread(target=file.tell) for _ in range(3)]
        for t in threads: t.start()
        for t in threads: t.join()
    a, b = socket.socketpair()
    a.send(b"4")
    out = subprocess.run(["/bin/echo", "5"], capture_output=True).stdout
    return private[:1] + shared[:1] + b.recv(9) + out + str(asyncio.run(later(x))).encode()"""
    assert verdict(contained, use, problem("assert f(6) == b'1345\\n6'")).feedback == ""


RIGHTS = """
import ctypes, fcntl, os, resource, signal, termios
def f(x):
    done = []
    def attempt(name, action, *arguments):
        try: action(*arguments)
        except (OSError, ValueError): return
        done.append(name)
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):
        attempt(f"limit {limit}", resource.setrlimit, limit, (2 ** 33, 2 ** 33))
    if os.stat("/proc/1").st_uid == os.getuid():  # who writes to its memory gains nothing
        for path, words in ("limits", "address open processes file cpu"), ("status", "Seccomp NoNewPrivs CapEff CapPrm"):
            for word in words.split():
                mine, its = ([line for line in open(f"/proc/{pid}/{path}") if word in line] for pid in ("self", 1))
                if mine != its or not mine: done.append((mine, its))
    else: attempt("memory of 1", open, "/proc/1/mem", "r+b")
    for path in ("/proc/sysrq-trigger", "/dev/zero", "/dev/tty", "/dev/ptmx", "/dev/shm/x", "/proc/kcore", "/dev/kmsg"):
        attempt(path, open, path, "r+b")
    attempt("files of 1", os.listdir, "/proc/1/root/etc/ssl")
    attempt("a device", os.mknod, "/tmp/zero", 0o20666, os.makedev(1, 5))
    attempt("priority", os.nice, -1)
    attempt("real time", os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1))
    attempt("owner", os.chown, "/tmp", 0, 0)
    for fd in range(20):
        attempt(f"terminal {fd}", fcntl.ioctl, fd, termios.TIOCSTI, b"x")
    for path in os.scandir("/proc/self/fd"):  # what it has inherited: its socket, and nothing
        link = os.readlink(path)
        if not link.startswith(("socket:", "/dev/null", "/proc/")): done.append(link)
    return done"""


@needs_bubblewrap
def test_it_has_no_rights_and_cannot_raise_its_limits(contained):
    assert verdict(contained, RIGHTS, problem("assert f(1) == []")).feedback == ""


@needs_bubblewrap
def test_descriptors_processes_and_pipes_have_a_bound(contained):
    use_up = """
import fcntl, os
def f(x):
    zombies, pipes, held = 0, [], 0
    try:
        while zombies < 99:
            if os.fork() == 0: os._exit(0)
            zombies += 1
    except OSError: pass
    try:
        while len(pipes) < 999: pipes.append(os.pipe())
    except OSError: pass
    for _, end in pipes:
        try: fcntl.fcntl(end, 1031, 2 ** 20)
        except OSError: pass
        os.set_blocking(end, False)
        try:
            while True: held += os.write(end, b"x" * 2 ** 16)
        except OSError: pass
    return zombies < 10 and len(pipes) < 40 and held < 2 ** 26"""
    assert verdict(contained, use_up, problem("assert f(1)")).feedback == ""


HOARDS = {
    "many processes": """
import os, time
def f(x):
    for _ in range(5):
        if os.fork() == 0: block = bytearray(2 ** 23); time.sleep(99)
    time.sleep(99)""",
    "many empty files": """
import os, time
def f(x):
    for i in range(10 ** 9):
        os.close(os.open(f"/tmp/{i}", os.O_CREAT))""",
    "after it has answered, while a test goes on": """
import threading, time
def hoard():
    block = [bytearray(2 ** 23) for _ in range(5)]
    time.sleep(99)
def f(x):
    if x == 1: threading.Thread(target=hoard).start()
    else: time.sleep(99)
    return x + 1""",
}


@needs_bubblewrap
@pytest.mark.parametrize("name", HOARDS)
def test_what_the_processes_of_a_program_hold_together_is_bounded(name, monkeypatch):
    """32 MB here instead of 1 GB, so that it is soon reached."""
    monkeypatch.setattr(sandbox, "MEMORY", 2 ** 25)
    tests = problem("f(1)\nimport time\ntime.sleep(0.5)\nf(2)")
    with contextlib.closing(Verifier(workers=1, limit=20)) as patient:
        start = time.monotonic()
        result = patient([tests], [f"```python\n{HOARDS[name]}\n```"])[0]
    assert result.reward == 0 and "used more than 32 MB of memory" in result.feedback
    assert time.monotonic() - start < 15


@needs_bubblewrap
def test_an_old_bubblewrap_is_enough(monkeypatch):
    """Options of 0.4 only. --size came later; without it a look at /tmp bounds what is in it."""
    of_0_4 = ("--unshare-user --unshare-ipc --unshare-pid --unshare-net --unshare-uts --cap-add --new-session --chdir "
              "--die-with-parent --dir --symlink --ro-bind --dev-bind --proc --tmpfs --remount-ro").split()
    monkeypatch.setattr(sandbox, "trouble", lambda command: "unknown option" if "--size" in command else "")
    monkeypatch.setattr(sandbox, "bubblewrap", sandbox.bubblewrap.__wrapped__)
    assert {word for word in sandbox.bubblewrap() if word.startswith("--")} <= set(of_0_4)
    monkeypatch.setattr(sandbox, "MEMORY", 2 ** 27)
    fill = "def f(x):\n    for i in range(99): open(f'/tmp/{i}', 'wb').write(bytes(2 ** 22))\n    while True: pass"
    with contextlib.closing(Verifier(workers=1, limit=20)) as patient:
        assert "used more than 128 MB" in patient([NEXT], [f"```python\n{fill}\n```"])[0].feedback


def decision(program: bytes, audit: int, number: int, *arguments: int) -> int:
    """What the kernel's interpreter of filters returns for a call (linux/filter.h, linux/seccomp.h)."""
    data = struct.pack("=IIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    at = a = 0
    while True:
        code, yes, no, k = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if code == 0x06:
            return k
        if code == 0x20:
            a, = struct.unpack_from("=I", data, k)
        elif code == 0x54:
            a &= k
        else:
            at += yes if {0x15: a == k, 0x35: a >= k, 0x45: a & k}[code] else no


@pytest.mark.parametrize("machine, audit, other, column", [
    ("x86_64", 0xC000003E, 0x40000003, 0), ("aarch64", 0xC00000B7, 0x40000028, 1)])
def test_the_filter_refuses_what_it_must_and_nothing_else(monkeypatch, machine, audit, other, column):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    program = seccomp.compiled.__wrapped__()
    threads, fork = 0x3D0F00, 17
    allowed = [((0, 63), 3), ((1, 64), 1), ((257, 56), 3), ((56, 220), threads), ((56, 220), fork), ((41, 198), 1, 1),
               ((53, 199), 1, 1), ((9, 222), 0, 9, 3, 0x22, -1 % 2 ** 64), ((9, 222), 0, 9, 3, 0x01, 5), ((59, 221),),
               ((318, 278),), ((231, 94),)]
    refused = [((272, 97), 0x10000000), ((308, 268),), ((319, 279),), ((29, 194),), ((165, 40),), ((250, 219),),
               ((41, 198), 2, 1), ((41, 198), 16, 1), ((9, 222), 0, 9, 3, 0x21), ((9, 222), 0, 9, 3, 0x4023),
               *[((56, 220), 1 << bit | fork) for bit in (17, 25, 26, 27, 28, 29, 30)]]
    for numbers, *arguments in allowed:
        assert decision(program, audit, numbers[column], *arguments) == 0x7FFF0000, numbers
        assert decision(program, other, numbers[column], *arguments) == 0x50000 | errno.ENOSYS
    for numbers, *arguments in refused:
        assert decision(program, audit, numbers[column], *arguments) == 0x50000 | errno.EPERM, numbers
    assert decision(program, audit, 435) == decision(program, audit, 0x40000001) == 0x50000 | errno.ENOSYS


def test_on_another_machine_the_error_names_it_and_the_flag(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(SystemExit, match="not for riscv64; pass --allow_unsafe_exec"):
        seccomp.compiled.__wrapped__()


INTERRUPTED = """
from common.tasks import Problem
from common.verifiers.pool import Verifier
meta = dict(prelude="", setup="", names=["f"], tests=["f(1)"])
verifier = Verifier(workers=2, limit={limit}, allow_unsafe_exec={unsafe})
verifier([Problem("p", [], kind="code", meta=meta)] * 8, ["```python\\nimport time\\ndef f(x): time.sleep(9999)\\n```"] * 8)
"""


@pytest.mark.parametrize("unsafe", WAYS)
def test_one_interrupt_ends_the_run_and_all_that_it_started(unsafe):
    limit = 2000 + 2 * (os.getpid() % 1000) + unsafe  # seconds: in the sandboxes' command lines, so they can be found
    source, token = INTERRUPTED.format(limit=limit, unsafe=unsafe), f"main('serve', {6 * limit + 1},"
    run = subprocess.Popen(
        [sys.executable, "-c", source], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs ignore it
    deadline = time.monotonic() + 60
    while len(running(token)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    start = time.monotonic()
    _, said = run.communicate(timeout=30)
    assert time.monotonic() - start < 5 and said.count("Traceback") == 1 and said.endswith("KeyboardInterrupt\n")
    while running(token) and time.monotonic() < start + 5:  # killed, and perhaps not yet gone
        time.sleep(0.05)
    assert not running(token)


# ---------------------------------------------------------------------------------------------------------------------
# what passes between the two processes
# ---------------------------------------------------------------------------------------------------------------------
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-9, 9).map(lambda n: n + n * 2 ** 30_000) | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=[])) | st.binary() | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner)
    | st.frozensets(st.integers() | st.text()) | st.sets(st.tuples(st.integers(), st.text())), max_leaves=20)


@given(plain)
@settings(max_examples=60)
def test_plain_data_crosses_unchanged(x):
    y = decode(encode(x))
    assert type(y) is type(x) and y == x


@given(st.text() | st.binary() | st.recursive(
    st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
        st.sampled_from(["tuple", "set", "dict", "object", "int", "iter", "__class__", "eval"]), inner)).map(
            json.dumps))
@settings(max_examples=60)
def test_whatever_a_program_sends_becomes_built_in_data_or_an_error(sent):
    try:
        received = decode(sent)
    except Exception:
        return
    assert type(received).__module__ in ("builtins", "common.verifiers.sandbox_child")


def test_results_of_other_types_keep_their_truth_and_their_items():
    assert decode(encode(Counter("aab"))) == {"a": 2, "b": 1} and decode(encode(OrderedDict(a=1))) == {"a": 1}
    assert decode(encode(namedtuple("P", "x y")(1, 2))) == (1, 2)
    assert list(decode(encode(deque([1, 2])))) == [1, 2] and list(decode(encode(x for x in "ab"))) == ["a", "b"]
    assert decode(encode(re.match("a", "a"))) and not decode(encode(Fraction(0)))
    assert decode(encode(Fraction(1, 2))) != Fraction(1, 2)  # a limit: only plain data is compared


def test_what_the_program_returned_may_be_passed_on_or_not(verifier):
    """A result that is no plain data, given back to the program, fails the test; it is no error in the data."""
    chain = problem("assert f(f(1)) == 3")
    assert verdict(verifier, HONEST, chain).reward == 1
    assert verdict(verifier, "def f(x): return object()", chain).reward == 0
    with pytest.raises(SystemExit, match=r"problem test-problem: its tests cannot be run: f\(<function"):
        verdict(verifier, HONEST, problem("assert f(lambda: 1) == 2"))
    with pytest.raises(SystemExit, match="ModuleNotFoundError"):
        verdict(verifier, HONEST, problem("assert f(1) == 2", setup="import no_such_module"))


def test_a_test_may_expect_an_exception(verifier):
    expects = problem("try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass", "assert f(1) == 1")
    right = "def f(x):\n    if x < 0: raise ValueError('negative')\n    return x"
    assert verdict(verifier, right, expects).reward == 1
    for wrong in (right.replace("ValueError", "KeyError"), "def f(x): return x", "def f(x): raise SystemExit",
                  "class ValueError(Exception): pass\ndef f(x): raise print"):
        assert verdict(verifier, wrong, expects).reward == 0


def test_integers_of_thousands_of_digits_are_arguments_and_results_like_others(verifier):
    """Python refuses to print those above 4,300 digits unless it is told to."""
    large = problem("assert f(6000) == 10**6000", "assert f(10**5000) == 10**5000")
    assert verdict(verifier, "def f(n): return 10**n if n < 10**4 else n", large).reward == 1
    assert verdict(verifier, "def f(n): return 10**n + 1 if n < 10**4 else n", large).reward == 0


def test_tests_that_hang_are_a_verdict_of_their_own(verifier):
    hang = problem("f(1)\nwhile True: pass")
    assert verdict(verifier, HONEST, hang).feedback == "The check took longer than 1 s."
    assert verdict(verifier, HONEST).reward == 1
