"""The two processes that `alignment.sandbox` starts: one runs a model's code, the other the tests. Run as a script.

The warden holds the tests and the token of success; the prisoner is forked from it before it has either. The tests call
the functions of the answer by name; arguments and results cross a pipe as plain data (numbers, texts, lists, dicts, …).
So the answer's code never sees a test, an expected value or the token, and no object of its own, with an `__eq__` that
says yes to everything, ever reaches an assertion.

The standard library is all that is imported here: the file runs under `python -I -S`.
"""

import builtins
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

WALLS = ("files", "processes", "network")
LINE = 1 << 20  # the longest message, in bytes
CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
# System calls that code which computes an answer does not need: processes, programs, signals, the network, other
# processes' memory, limits, permissions, the machine's settings, memory outside the limits.
FORBIDDEN = {
    "x86_64": (
        0xC000003E,
        [56, 57, 58, 59, 322, 435, 62, 200, 234, 101, 109, 112, 41, 42, 53, 272, 308, 165, 161, 310, 311, 425, 434, 438]
        + [321, 323, 250, 248, 298, 160, 302, 157, 90, 91, 92, 93, 94, 260, 268, 452, 280, 132, 235, 261, 188, 189, 190]
        + [169, 164, 227, 170, 167, 168, 175, 313, 176, 246, 103, 179, 163, 29, 64, 68, 319],
    ),
    "aarch64": (
        0xC00000B7,
        [220, 221, 281, 435, 129, 130, 131, 117, 154, 157, 198, 199, 203, 97, 268, 40, 51, 270, 271, 425, 434, 438]
        + [280, 282, 219, 217, 241, 164, 261, 167, 52, 53, 54, 55, 452, 88, 5, 6, 7]
        + [142, 170, 112, 161, 224, 225, 105, 273, 106, 104, 116, 60, 89, 194, 190, 186, 279],
    ),
}
LIBC = ctypes.CDLL(None, use_errno=True)


class Broke(Exception):
    """The answer's code ended, or said something that is no plain data."""


class Caught:
    """Takes whatever its block raises, SystemExit too, and says what it was."""

    def __init__(self) -> None:
        self.kind, self.text = "", ""

    def __enter__(self) -> "Caught":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if kind is not None:
            self.kind = kind.__name__
            ours = type(error).__module__ in ("builtins", __name__)
            self.text = str(error)[:200] if isinstance(error, Exception) and ours else ""
        return True


def encode(value: object) -> object:
    """Return plain data in a form that JSON keeps; raises TypeError for anything else."""
    if value is None or isinstance(value, bool | str):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, list):
        return [encode(item) for item in value]
    for kind, mark in ((tuple, "tuple"), (set, "set"), (frozenset, "frozenset")):
        if isinstance(value, kind):
            return {mark: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"a {type(value).__name__} is no plain data")


def decode(value: object) -> object:
    """Return the plain data that `encode` wrote, in exact built-in types."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((mark, inside),) = value.items()
    if mark == "dict":
        return {decode(key): decode(item) for key, item in inside}
    if mark == "bytes":
        return bytes.fromhex(inside)
    if mark == "complex":
        return complex(*inside)
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[mark](decode(item) for item in inside)


def limit(limits: dict, processes: bool) -> None:
    """Set this process's limits; the hard ones, which it cannot raise again."""
    wanted = [(resource.RLIMIT_CPU, limits["cpu"]), (resource.RLIMIT_AS, limits["memory"])]
    wanted += [(resource.RLIMIT_FSIZE, limits["file"]), (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_CORE, 0)]
    for kind, most in wanted + ([] if processes else [(resource.RLIMIT_NPROC, 0)]):
        resource.setrlimit(kind, (most, most))


def restrict_files(own: str) -> bool:
    """Allow reading Python's own files and everything in the folder `own`, nothing else (Landlock, Linux 5.13)."""
    version = LIBC.syscall(444, None, 0, 1)
    if version < 1:
        return False
    every = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    rules = struct.pack("QQQ", every, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    ruleset = LIBC.syscall(444, rules, 8 if version < 4 else 16 if version < 6 else 24, 0)
    if ruleset < 0:
        return False
    read, folders = 1 | 1 << 2 | 1 << 3, [os.path.dirname(os.__file__), "/usr/lib", "/lib", "/lib64", "/usr/local/lib"]
    for folder, allowed in [(folder, read) for folder in folders if os.path.isdir(folder)] + [(own, every)]:
        handle = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        if LIBC.syscall(445, ruleset, 1, struct.pack("=Qi", allowed, handle), 0):
            return False
        os.close(handle)
    return LIBC.syscall(446, ruleset, 0) == 0


def forbid_calls() -> bool:
    """Refuse the system calls in FORBIDDEN with "not permitted" (seccomp)."""
    if platform.machine() not in FORBIDDEN:
        return False
    arch, numbers = FORBIDDEN[platform.machine()]
    checks = [(0x15, 0, 1, number) for number in numbers]
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]
    program += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, 0x00050001)]  # the x32 twins of all calls
    for check in checks:
        program += [check, (0x06, 0, 0, 0x00050001)]
    program.append((0x06, 0, 0, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    return LIBC.prctl(PR_SET_SECCOMP, 2, ctypes.c_void_p(ctypes.addressof(header)), 0, 0) == 0


def prisoner(limits: dict, source: int, sink: int) -> None:
    """Run the answer's code, then its functions as they are called; what it holds is `source` and `sink`."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.dup2(source, 3)
    os.dup2(sink, 4)
    os.closerange(5, 256)
    missing = []
    linux = sys.platform == "linux"
    limit(limits, processes=False)
    if linux:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if not (linux and restrict_files(os.getcwd())):
        missing.append("files")
    if not (linux and forbid_calls()):
        missing += ["processes"] if os.geteuid() == 0 else []
        if not limits["apart"]:  # no network namespace either: all that is left is to hide the modules
            missing.append("network")
            sys.modules.update({"socket": None, "_socket": None, "ssl": None})
    with os.fdopen(3, "rb") as inbox, os.fdopen(4, "wb") as outbox:
        serve(inbox, outbox, missing)


def serve(inbox: object, outbox: object, missing: list[str]) -> None:
    """Load the code of the first message, then answer calls until the pipe is closed."""
    space: dict = {"__name__": "answer"}
    with Caught() as caught:
        exec(compile(json.loads(inbox.readline(LINE))["code"], "answer", "exec"), space)
    names = {name: callable(value) for name, value in list(space.items()) if isinstance(name, str)}
    say(outbox, {"raised": caught.kind, "text": caught.text, "names": names, "missing": missing})
    for line in iter(lambda: inbox.readline(LINE), b""):
        asked, reply = json.loads(line), {}
        with Caught() as caught:
            value = space[asked["name"]]
            if "args" in asked:
                value = value(*decode(asked["args"]), **decode(asked["kwargs"]))
            reply = {"value": encode(value)}
        say(outbox, {"raised": caught.kind, "text": caught.text} if caught.kind else reply)


def say(outbox: object, message: dict) -> None:
    """Write one message; one that JSON cannot hold, or that is too long, becomes an error."""
    text = ""
    with Caught() as caught:
        text = json.dumps(message)
    if caught.kind or len(text) >= LINE:
        text = json.dumps({"raised": "ValueError", "text": "the value cannot be sent", "names": {}, "missing": []})
    outbox.write(text.encode() + b"\n")
    outbox.flush()


class Answer:
    """The answer's functions, seen from the tests.

    Attributes:
        touched: whether a test called or read anything of the answer.
    """

    def __init__(self, inbox: object, outbox: object):
        self.inbox, self.outbox, self.touched = inbox, outbox, False

    def ask(self, message: dict) -> dict:
        """Send a message and return the reply; raises Broke when there is none."""
        self.outbox.write(json.dumps(message).encode() + b"\n")
        self.outbox.flush()
        line = self.inbox.readline(LINE)
        if not line.endswith(b"\n"):
            raise Broke("the answer's code ended or said too much")
        reply = json.loads(line)
        if not isinstance(reply, dict):
            raise Broke("the answer's code replied with nonsense")
        return reply

    def value(self, message: dict) -> object:
        """Return the value a reply holds, or raise what the answer raised."""
        self.touched = True
        reply = self.ask(message)
        if "value" in reply:
            return decode(reply["value"])
        kind = vars(builtins).get(str(reply.get("raised")))
        ordinary = isinstance(kind, type) and issubclass(kind, Exception)
        raise (kind if ordinary else Broke)(str(reply.get("text") or reply.get("raised")))

    def function(self, name: str) -> object:
        """Return a function that runs the answer's function of this name over there."""

        def call(*args, **kwargs):
            return self.value({"name": name, "args": encode(list(args)), "kwargs": encode(kwargs)})

        call.__name__ = name
        return call


def warden(job: dict, inbox: object, outbox: object) -> dict:
    """Run the tests against the answer; return the verdict without its token."""
    answer, space, missing = Answer(inbox, outbox), {"__name__": "tests"}, []
    with Caught() as caught:
        first = answer.ask({"code": job["code"]})
        missing = [name for name in WALLS if name in first["missing"]]
        if first["raised"]:
            raise Broke(f"the answer raised {first['raised']} when it was loaded")
        tests = compile(job["tests"], "tests", "exec")
        mentioned = words(tests) - set(vars(builtins))
        for name, is_function in first["names"].items():
            if name in mentioned and not name.startswith("__"):
                space[name] = answer.function(name) if is_function else answer.value({"name": name})
        exec(tests, space)
    why = f"{caught.kind}: {caught.text}".strip(": ")
    return {"passed": not caught.kind, "why": why, "touched": answer.touched, "missing": missing}


def words(code: object) -> set[str]:
    """Return every name in compiled code, in the functions inside it too."""
    inner = [item for item in code.co_consts if type(item) is type(code)]
    return set(code.co_names).union(*map(words, inner))


def main() -> None:
    """Fork the prisoner, read the job from stdin, write the verdict with the job's token to stdout."""
    limits = json.loads(sys.argv[1])
    flags = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC
    limits["apart"] = sys.platform == "linux" and LIBC.unshare(flags) == 0
    to_answer, from_answer = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        prisoner(limits, to_answer[0], from_answer[1])
        os._exit(0)
    os.close(to_answer[0])
    os.close(from_answer[1])
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody of the same user reads this memory

    def late(number: int, frame: object) -> None:
        os.kill(child, signal.SIGKILL)
        os._exit(3)

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limits["wall"])
    limit(limits, processes=True)
    job = json.loads(sys.stdin.buffer.read())
    output = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # what tests print is no verdict
    with os.fdopen(from_answer[0], "rb") as inbox, os.fdopen(to_answer[1], "wb") as outbox, Caught():
        verdict = warden(job, inbox, outbox)
        os.write(output, json.dumps(verdict | {"token": job["token"]}).encode())
    os.kill(child, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main()
