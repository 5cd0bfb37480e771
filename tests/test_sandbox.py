"""Programs that lie, attack, hang or fall over: each gets a clear verdict, gains nothing and leaves nothing running."""
import contextlib
import json
import marshal
import os
import re
import socket
import subprocess
import tempfile
import time
from collections import Counter, OrderedDict, deque, namedtuple
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.tasks import Problem
from common.tasks.contests import SCRIPT_SETUP
from common.verifiers import sandbox
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


@pytest.mark.parametrize("name", LIARS)
def test_a_liar_is_not_believed(verifier, name):
    result = verdict(verifier, LIARS[name])
    assert result.reward == 0 and result.feedback
    assert verdict(verifier, HONEST).reward == 1  # and the next program is judged as ever


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
        def ask(self, *message, limit):
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
    assert verdict(verifier, HONEST, crash).feedback == "The check ended early."
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


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_has_a_clear_verdict(verifier, name):
    program, words = TROUBLE[name]
    result = verdict(verifier, program)
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
    ("while True: print('x' * 2 ** 25)", "line 1"),
    ("import time\nprint(2 * int(input()))\ntime.sleep(99)", "took longer than 1 s"),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "exit status -11"),
    ("print(4", "SyntaxError"),
    ("", "returned ''"),
])
def test_a_script_that_fails_is_told_how(verifier, program, words):
    result = verdict(verifier, program, DOUBLE)
    assert result.reward == 0 and words in result.feedback


# ---------------------------------------------------------------------------------------------------------------------
# what passes between the two processes
# ---------------------------------------------------------------------------------------------------------------------
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(2 ** 30_000, 2 ** 30_001) | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=[])) | st.binary() | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner)
    | st.frozensets(st.integers() | st.text()) | st.sets(st.tuples(st.integers(), st.text())), max_leaves=20)


@given(plain)
def test_plain_data_crosses_unchanged(x):
    y = decode(encode(x))
    assert type(y) is type(x) and y == x


@given(st.text() | st.binary() | st.recursive(
    st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
        st.sampled_from(["tuple", "set", "dict", "object", "int", "iter", "__class__", "eval"]), inner)).map(
            json.dumps))
@settings(max_examples=200)
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
