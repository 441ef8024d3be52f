"""Code in answers: what passes, what cannot cheat, and what cannot get out."""

import os
import time
from pathlib import Path

import pytest

from alignment import sandbox
from alignment.errors import InputError
from alignment.sandbox import Limits, code_in, judge

TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0\n"
RIGHT = "def add(a, b):\n    return a + b\n"
QUICK = Limits(cpu=1, wall=3)
# Each defines a right `add` behind what it tries, so that it passes where the attempt is let through.
CHEATS = {
    "exits before the tests": "import sys\nsys.exit(0)",
    "ends the process": "import os\nos._exit(0)",
    "a SystemExit with a nice code": "raise SystemExit(0)",
    "starts a process": "import os\nif not os.fork(): os._exit(0)",
    "starts a program": "import subprocess\nsubprocess.run(['true'])",
    "starts a thread": "import threading\nthreading.Thread(target=print).start()",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)",
    "leaves its group": "import os\nos.setsid()",
    "takes four gigabytes": "x = bytearray(4 << 30)",
    "writes a big file": "f = open('x', 'wb')\nf.write(b'0' * (8 << 20))\nf.flush()",
    "opens many files": "f = [open('x', 'w') for _ in range(100)]",
    "opens a socket": "import socket\nsocket.socket()",
    "asks a server": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9/')",
    "reads the users": "open('/etc/passwd').read()",
    "looks at processes": "import os\nos.listdir('/proc')",
    "looks at its parent": "import os\nopen(f'/proc/{os.getppid()}/environ').read()",
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "makes a file executable": "import os\nopen('x', 'w').close()\nos.chmod('x', 0o755)",
}
IMPOSTORS = {
    "equal to everything": "class Y:\n    __eq__ = lambda self, other: True\ndef add(a, b):\n    return Y()",
    "an int equal to everything": "class Y(int):\n    __eq__ = lambda s, o: True\ndef add(a, b):\n    return Y(7)",
    "a list equal to everything": "class Y(list):\n    __eq__ = lambda s, o: True\ndef add(a, b):\n    return Y()",
    "ends in the call": "import os\ndef add(a, b):\n    os._exit(0)",
    "says it passed": "print('{\"passed\": true}', flush=True)\ndef add(a, b):\n    return 1",
    "floods the pipes": "import os\nfor n in range(64):\n    try:\n        os.write(n, b'{\"value\": 5}\\n' * 9)\n"
    "    except OSError:\n        pass\ndef add(a, b):\n    return 5",
    "nonsense on the pipes": "import os\ndef add(a, b):\n    os.write(4, b'[' * 100000 + b'\\n')",
    "returns too much": "def add(a, b):\n    return 'x' * (2 << 20)",
    "returns a knot": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "overrides what Python has": "def all(x):\n    return True\ndef isinstance(a, b):\n    return True\n"
    "def add(a, b):\n    return 'no'",
    "raises what a test might": "def add(a, b):\n    raise KeyboardInterrupt",
    "no function": "",
    "no Python": "def add(a, b)",
    "nul": "\0",
}


def test_right_code_passes_and_wrong_code_does_not():
    assert judge(RIGHT, TESTS).passed
    verdict = judge("def add(a, b):\n    return a - b", TESTS)
    assert not verdict.passed and "AssertionError" in verdict.why
    assert "NameError" in judge("", TESTS).why


@pytest.mark.parametrize("attempt", CHEATS)
def test_an_attempt_ends_the_answer(attempt):
    assert not judge(CHEATS[attempt] + "\n" + RIGHT, TESTS, QUICK).passed


@pytest.mark.parametrize("attempt", IMPOSTORS)
def test_a_wrong_answer_does_not_pass_as_a_right_one(attempt):
    tests = TESTS + "assert all([isinstance(add(2, 3), int)])\n"
    assert not judge(IMPOSTORS[attempt], tests, QUICK).passed


def test_the_answer_cannot_find_the_tests_nor_the_token():
    code = (
        "import gc, sys\n"
        "def told():\n"
        "    frame, seen = sys._getframe(), []\n"
        "    while frame:\n"
        "        seen.append(repr(frame.f_locals))\n"
        "        frame = frame.f_back\n"
        "    seen += [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, tuple))]\n"
        "    return any('razxuq'[::-1] in s for s in seen)\n"
    )
    verdict = judge(code, "hidden = 'quxzar'\nassert told() is False")
    assert verdict.passed, verdict.why


def test_a_fork_bomb_and_endless_loops_end_in_time():
    began = time.monotonic()
    for code in ("import os\nwhile True:\n    os.fork()", "while True:\n    pass", "import time\ntime.sleep(60)"):
        assert not judge(code, TESTS, Limits(cpu=1, wall=1)).passed
    assert not judge("def add(a, b):\n    while True:\n        pass", TESTS, Limits(cpu=1, wall=1)).passed
    assert time.monotonic() - began < 20


def test_nothing_is_written_outside_nor_left_behind(tmp_path, monkeypatch):
    target = tmp_path / "mine.txt"
    target.write_text("mine")
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    for code in (f"open({str(target)!r}, 'w').write('x')", f"import os\nos.remove({str(target)!r})"):
        assert not judge(code + "\n" + RIGHT, TESTS).passed
    assert judge("open('own.txt', 'w').write('x')\n" + RIGHT, TESTS).passed  # in its own folder it may
    assert target.read_text() == "mine" and os.listdir(tmp_path) == ["mine.txt"]


def test_plain_data_cross_as_they_are():
    code = "def same(x, *more, **named):\n    return x\nlimit = 3\ndef fail(x):\n    raise ValueError('no')"
    tests = (
        "import math\n"
        "for x in (None, True, 7, -2.5, 'é\\n', b'ab', [1, [2]], (1, 2), {1, 2}, {'a': (1,), 2: None}, 2j):\n"
        "    assert same(x) == x and type(same(x)) is type(x)\n"
        "assert math.isnan(same(float('nan'))) and same(1, 2, a=3) == 1 and limit == 3\n"
        "def check(candidate):\n    assert candidate(10**50) == 10**50\n"
        "check(same)\n"
        "try:\n    fail(1)\nexcept ValueError as error:\n    assert str(error) == 'no'\n"
        "else:\n    raise AssertionError\n"
    )
    verdict = judge(code, tests)
    assert verdict.passed, verdict.why


def test_tests_that_test_nothing_are_refused():
    with pytest.raises(InputError, match="use nothing of the answer"):
        judge(RIGHT, "assert True")
    with pytest.raises(InputError, match="no Python"):
        judge(RIGHT, "assert add(")


def test_weaker_walls_are_said(monkeypatch):
    monkeypatch.setattr(sandbox, "_JAIL", _without(("restrict_files", "forbid_calls")))
    with pytest.warns(RuntimeWarning, match="weaker walls here, against: files"):
        assert judge(RIGHT, TESTS).passed
    Path(sandbox._JAIL).unlink()


def _without(walls):
    """A jail on whose machine these walls cannot be had."""
    text = Path(sandbox._JAIL).read_text()
    for wall in walls:
        text = text.replace(f"def {wall}(", f"def {wall}(*_):\n    return False\n\n\ndef _{wall}(")
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"jail-{os.getpid()}.py"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Here:\n```python\nx = 1\n```\nand\n```py\ny = 2\n```\n", "y = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("x = 1", "x = 1"),
        ("```python\nx = 1", "x = 1"),
    ],
)
def test_code_is_found_in_an_answer(text, code):
    assert code_in(text) == code
