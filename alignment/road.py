"""What the scripts that run several commands in a row share: a folder of their own, and each command on the screen."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from alignment.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
MARKER = ".made-by-the-demo"
# accelerate's own defaults; without them it lists them at every start.
LAUNCH = ["--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]


@dataclass(frozen=True)
class Took:
    """What a command took: wall time in seconds, and the peak memory of its largest process in bytes."""

    seconds: float
    memory: int


def run_command(console: Console, number: int, what: str, words: list[str]) -> Took:
    """Run one step with its output on the screen.

    Args:
        console: where the step and its command are announced.
        number: of the step.
        what: happens in it.
        words: "accelerate launch" or "python", then the script and its flags.

    Raises:
        InputError: the command failed.
    """
    console.print(f"\n[bold]{number}. {what}[/bold]")
    console.print("$ " + " ".join(words), style="cyan", soft_wrap=True, markup=False)
    start = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH]
    began = time.monotonic()
    process = subprocess.Popen([*start, *words[1:]], cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        process.wait()  # it got the signal, too, and saves
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise InputError(
            f"step {number} ended with status {process.returncode}",
            where=" ".join(words),
            fix="the reason stands above; the same command can be run by hand",
        )
    return Took(time.monotonic() - began, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def clear(folder: Path) -> None:
    """Empty the script's own folder; one that it did not make is left alone.

    Raises:
        InputError: the folder holds files of somebody else.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise InputError(
            f"{folder} has files in it that are not the demo's",
            why="the demo starts with an empty folder",
            fix=f"--output_dir {folder.parent / 'another-demo'}",
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("this folder is cleared at the next start\n")


def read_log(folder: Path) -> list[dict]:
    """Return the log of a training run."""
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]
