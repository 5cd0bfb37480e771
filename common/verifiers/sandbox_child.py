"""The part of the sandbox that runs inside it: sandbox.py sends this file's code object to a fresh
Python.

`serve` is the process that holds an untrusted program; `drive` holds the tests and never sees the
program. They talk through the parent. Start-up is most of the cost of a short program, so only what
Python has loaded or built in is imported.

    parent → serve   load (prelude, program, whether it is a script), call (name, args, kwargs), as
                     marshal data
    serve → parent   value, error (text), as JSON, for the program is not to be trusted
    parent → drive   job (setup, names, tests); value or error for each call
    drive → parent   call, passed, failed (text), unfit (text: the test cannot be run), done
"""
import builtins
import marshal
import os
import resource
import sys
from _json import encode_basestring_ascii as quote

READY, LOAD, CALL, VALUE, ERROR = b"r", b"l", b"c", b"v", b"e"  # kinds of messages
JOB, PASSED, FAILED, UNFIT, DONE = b"j", b"p", b"f", b"u", b"d"
MEMORY = 2**30  # bytes of address space, of each process
FILE = 2**26  # bytes of a file
PROCESSES = 8  # processes and threads of a program
DESCRIPTORS = 64  # of each process: a pipe or a socket has a buffer in the kernel
MAX_OUTPUT = 8 * 2**20  # bytes
SHOWN = 250  # characters of a value in feedback


def take_over() -> None:
    """Messages come from what was stdin and go to what was stdout; nothing else can read or write
    there."""
    global requests, replies
    requests, replies = open(os.dup(0), "rb"), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)


def main(role: str, seconds: int, uid: int, unsafe: bool) -> None:
    """Confine this process for good, then serve or drive. uid: whom to become if this is root; 0:
    nobody else."""
    with open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")  # if memory runs out, this goes first
    take_over()
    if uid:
        os.chmod("/tmp", 0o1777)  # it is root's, and must be another user's
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    for limit, value in limits(seconds).items():
        if unsafe and limit == resource.RLIMIT_NPROC:
            continue  # it counts a user's processes: see sandbox.confined
        resource.setrlimit(limit, (value, value))
    builtins.exit = builtins.quit = sys.exit  # python -S leaves them out, and programs use them
    send(READY)
    if role == "serve":
        serve()
    else:
        drive()


def limits(seconds: int) -> dict[int, int]:
    """Limit → value. seconds: CPU time."""
    return {
        resource.RLIMIT_AS: MEMORY, resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: FILE, resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: DESCRIPTORS, resource.RLIMIT_NPROC: PROCESSES,
    }


def send(kind: bytes, payload: bytes = b"") -> None:
    data = memoryview(kind + len(payload).to_bytes(4, "little") + payload)
    while data:
        data = data[os.write(replies, data) :]


def receive() -> tuple[bytes, bytes]:
    head = requests.read(5)
    if not head:
        os._exit(0)  # the parent has gone
    size = int.from_bytes(head[1:], "little")
    return head[:1], requests.read(size)


def describe(error: BaseException) -> bytes:
    """Type, message and line in the program."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "program":
            line = trace.tb_lineno
        trace = trace.tb_next
    message = f"{type(error).__name__}: {getattr(error, 'msg', error)}"[:SHOWN]
    if line:
        message += f" (line {line})"
    return message.encode(errors="replace")


# --------------------------------------------------------------------------------------------------
# the untrusted side: a program, calls of its functions, runs of it as a script
# --------------------------------------------------------------------------------------------------
def serve() -> None:
    here = os.getpid()
    while True:
        kind, payload = receive()
        try:
            if kind == LOAD:
                prelude, program, script = marshal.loads(payload)
                code, names = compile(program, "program", "exec"), new_module("program")
                result = ""
                exec(prelude, names)  # for a script, too: its runs find the modules loaded
                if script:
                    names["script"] = lambda text: run_script(prelude, code, text)
                else:
                    exec(code, names)
            else:
                name, args, kwargs = marshal.loads(payload)
                if hasattr(names.get("Solution"), name):  # as contests have it
                    function = getattr(names["Solution"](), name)
                else:
                    function = names[name]
                result = encode(function(*args, **kwargs))
            send(VALUE, result.encode())
        except BaseException as error:  # whatever the program raises, SystemExit too
            if os.getpid() != here:
                raise  # a script's own process: it ends as any script does
            send(ERROR, describe(error))


def new_module(name: str) -> dict:
    """The namespace of a fresh module; dataclasses and pickle look it up by its name."""
    sys.modules[name] = module = type(sys)(name)
    return module.__dict__


def run_script(prelude: str, code, text: str) -> str:
    """What the program prints when it runs as a script, in a process of its own, with `text` on its
    stdin."""
    files = []
    for name in (".stdin", ".stdout", ".stderr"):  # each run has files of its own, without a name
        files.append(os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL))
        os.unlink(name)
    with open(files[0], "w", closefd=False) as f:
        f.write(text)
        f.seek(0)
    child = os.fork()
    if child == 0:
        os.setsid()
        for fd, file in enumerate(files):
            os.dup2(file, fd)
        sys.stdin = open(0)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
        try:
            space = new_module("__main__")
            exec(prelude, space)
            exec(code, space)
        except Exception as error:
            os.ftruncate(files[1], 0)  # nobody reads it any more, and it may have filled the disk
            os.write(2, describe(error))
            os._exit(1)
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(status)
    try:
        os.killpg(child, 9)  # what it left running
    except ProcessLookupError:
        pass
    printed = os.pread(files[1], MAX_OUTPUT + 1, 0)
    failure = os.pread(files[2], SHOWN, 0).decode(errors="replace")
    for file in files:
        os.close(file)
    if status or len(printed) > MAX_OUTPUT:
        raise RuntimeError(failure or f"exit status {status}, {len(printed)} bytes printed")
    return printed.decode(errors="replace")


def encode(x) -> str:
    """Plain data as JSON. What JSON lacks is {kind: …}; of any other object truth and text remain.

    >>> encode((1, {"a": {2.5}}))
    '{"tuple": [1,{"dict": [["a",{"set": [2.5]}]]}]}'
    """
    if x is None or isinstance(x, bool):
        return {None: "null", True: "true", False: "false"}[x]
    if isinstance(x, int):
        if x.bit_length() < 10_000:
            return int.__repr__(x)
        return f'{{"int": "{int.__format__(x, "x")}"}}'
    if isinstance(x, float):
        return float.__repr__(x).replace("inf", "Infinity").replace("nan", "NaN")
    if isinstance(x, str):
        return quote(str.__str__(x))
    if isinstance(x, (bytes, bytearray)):
        return f'{{"bytes": "{x.hex()}"}}'
    if isinstance(x, complex):
        return f'{{"complex": [{encode(x.real)},{encode(x.imag)}]}}'
    if isinstance(x, dict):
        items = [f"[{encode(key)},{encode(value)}]" for key, value in x.items()]
        return f'{{"dict": [{",".join(items)}]}}'
    if not hasattr(type(x), "__iter__"):
        return f'{{"object": [{encode(bool(x))},{quote(repr(x)[:SHOWN])}]}}'
    items = f"[{','.join([encode(item) for item in x])}]"
    if isinstance(x, list):
        return items
    for base in (tuple, set, frozenset):
        if isinstance(x, base):
            return f'{{"{base.__name__}": {items}}}'
    return f'{{"iter": {items}}}'


# --------------------------------------------------------------------------------------------------
# the trusted side: tests whose calls go to the other process
# --------------------------------------------------------------------------------------------------
class Other:
    """A result that is not plain data. It equals nothing else."""

    def __init__(self, truth_and_text):
        self.truth, self.text = truth_and_text

    def __bool__(self):
        return self.truth is True

    def __repr__(self):
        return str(self.text)


class Unfit(BaseException):
    """A test that cannot be run this way."""


KINDS = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict, "iter": iter,
    "bytes": bytes.fromhex, "int": lambda text: int(text, 16),
    "complex": lambda parts: complex(*parts), "object": Other,
}


def decode(text: str | bytes):
    """What `encode` wrote, as built-in types whatever the text says.

    >>> decode(encode((1, {"a": {2.5}})))
    (1, {'a': {2.5}})
    """
    import json  # `drive` has loaded it; the other side does without

    def restore(tagged: dict):
        [(kind, value)] = tagged.items()
        return KINDS[kind](value)

    return json.loads(text, object_hook=restore)


def drive() -> None:
    """One job after the other, each in a fork, so that no test meets another's leftovers."""
    import json  # noqa: F401

    while True:
        kind, payload = receive()
        if kind != JOB:
            # an answer that a test did not live to read: it is the program's and must not be loaded
            os._exit(1)
        child = os.fork()
        if child == 0:
            run_tests(*marshal.loads(payload))
            os._exit(0)
        os.waitpid(child, 0)
        send(DONE)


def run_tests(setup: str, names: list[str], tests: list[str]) -> None:
    """Execute each test, with proxies of the untrusted program's functions under their names."""
    last, returned = "", False  # the latest call, in words; whether any has returned

    def proxy(name: str):
        def call(*args, **kwargs):
            nonlocal last, returned
            shown = [repr(value) for value in args]
            shown += [f"{key}={value!r}" for key, value in kwargs.items()]
            last = f"{name}({', '.join(shown)[:SHOWN]})"
            try:
                send(CALL, marshal.dumps((name, args, kwargs)))
            except ValueError:  # the test's fault, unless it passes on what the program returned
                fault = RuntimeError if returned else Unfit
                raise fault("an argument is not plain data") from None
            kind, reply = receive()
            if kind == ERROR:
                reply = reply.decode(errors="replace")
                last += f": {reply}"
                raise exception(reply.partition(":")[0])(last)
            returned, result = True, decode(reply)
            last += f" returned {repr(result)[:SHOWN]}"
            return result

        return call

    space = {"__name__": "tests"}
    try:
        exec(setup, space)
        space |= {name: proxy(name) for name in names}
        for test in tests:
            last = ""
            try:
                exec(test, space)
                send(PASSED)
            except Exception as error:
                send(FAILED, last.encode(errors="replace") or describe(error))
    except MemoryError:  # a program may return so much that even its failure cannot be told
        os._exit(1)
    except BaseException as error:
        place = last or "setup"
        send(UNFIT, f"{place}: ".encode(errors="replace") + describe(error))


def exception(name: str) -> type[Exception]:
    """The built-in exception of this name, for tests that expect one; else RuntimeError."""
    kind = vars(builtins).get(name)
    if isinstance(kind, type) and issubclass(kind, Exception):
        return kind
    return RuntimeError
