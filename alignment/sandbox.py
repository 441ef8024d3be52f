"""Run the code in an answer against tests, where it can neither do harm nor cheat.

Two processes of `alignment.jail`, started by `python -I -S` in a folder of their own that is deleted afterwards: one
runs the tests, the other the answer, whose functions the tests call over a pipe. What is done:

- limits on processor time, wall-clock time, memory, the size of a file, and open files;
- no new processes, threads, programs or signals, and no sockets (seccomp; a network namespace where one can be had);
- no file outside the folder but those of Python's standard library, and these only to read (Landlock);
- success is a token that only the tests' process holds, and values cross the pipe as plain data.

What it is not: a virtual machine. A hole in the kernel or in CPython's JSON is open; so is the disk, up to as many
files of the largest size as fit into the time. On a kernel without seccomp or Landlock, or on macOS, some of the walls
are missing: a warning names them. Only functions with plain arguments and results can be tested, arguments changed in
place are not seen, and nothing but the standard library can be imported. The tests are trusted: they come from the
data, and run with limits and without a network, but with the files of the user.
"""

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from alignment.errors import InputError

_JAIL = Path(__file__).with_name("jail.py")
_BLOCK = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.S | re.I)
_GRACE = 5.0  # seconds for a process to start and to end by itself


@dataclass(frozen=True)
class Limits:
    """What the code of one answer may use.

    Attributes:
        cpu, wall: seconds of processor time, and by the clock.
        memory, file: bytes of address space, and of the largest file.
    """

    cpu: int = 5
    wall: float = 10.0
    memory: int = 512 * 2**20
    file: int = 2**20


@dataclass(frozen=True)
class Verdict:
    """Whether all tests passed, and if not why, in a few words."""

    passed: bool
    why: str = ""


def code_in(text: str) -> str:
    """Return the last fenced block of an answer, or all of it where there is none."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else text


def judge(code: str, tests: str, limits: Limits | None = None) -> Verdict:
    """Run tests against the code of an answer.

    Args:
        code: what the model wrote; it defines functions or values.
        tests: Python with assertions that uses them by name. A name that Python has built in is Python's own.
        limits: what the answer may use.

    Raises:
        InputError: the tests are no Python, use nothing of the answer, or this machine cannot run them.
    """
    check_tests(tests)
    limits, token = limits or Limits(), secrets.token_hex(16)
    job = json.dumps({"code": code, "tests": tests, "token": token})
    with tempfile.TemporaryDirectory(prefix="answer-") as folder:
        command = [sys.executable, "-I", "-S", str(_JAIL), json.dumps(asdict(limits))]
        said = _run(command, job, folder, limits.wall + _GRACE)
    try:
        verdict = json.loads(said)
    except ValueError:
        return Verdict(False, "no verdict: out of time or memory")
    if not isinstance(verdict, dict) or verdict.get("token") != token:
        return Verdict(False, "no verdict: something else was said")
    _warn(tuple(verdict["missing"]))
    if verdict["passed"] and not verdict["touched"]:
        raise InputError(
            "the tests use nothing of the answer",
            where=f"tests: {tests[:80]!r}",
            why="every answer would pass them",
            fix="tests that call a function by the name the prompt asks for: assert add(2, 3) == 5",
        )
    return Verdict(verdict["passed"], verdict["why"])


def check_tests(tests: str) -> None:
    """Raise InputError when the tests cannot be compiled, or the machine has no processes to fork."""
    if "fork" not in dir(os):
        raise InputError("code cannot be tested on this system", why="it needs fork", fix="Linux, or WSL")
    try:
        compile(tests, "tests", "exec")
    except (SyntaxError, ValueError) as error:
        raise InputError(
            f"the tests of a row are no Python: {error}", where=f"tests: {tests[:80]!r}", fix="mend the column answer"
        ) from error


def _run(command: list[str], job: str, folder: str, seconds: float) -> bytes:
    """Return what the process wrote within its time; its whole group is killed at the end."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder,
        env={"LANG": "C.UTF-8", "HOME": folder}, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(job.encode("utf-8", "surrogatepass"), timeout=seconds)
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended already
                os.killpg(process.pid, signal.SIGKILL)
    return said


def _warn(missing: tuple[str, ...]) -> None:
    """Say which walls this machine does not have; Python shows the same warning once."""
    if missing:
        warnings.warn(
            f"code in answers runs with weaker walls here, against: {', '.join(missing)}. This process gets no "
            "Landlock or seccomp from its kernel: train on answers with code in a container or virtual machine",
            RuntimeWarning,
            stacklevel=3,
        )
