"""How this process was launched: what the command line of the launcher asked for, and how to type it again."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import psutil

# Flags that would change the meaning of a command that is typed again to go on.
_ONCE = ("--resume_from_checkpoint", "--overwrite_output_dir")
_SECRET = ("--hub_token", "--token")


def launcher() -> list[str]:
    """Return the words of `accelerate launch …` before the script, or an empty list without accelerate."""
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []
    names = [Path(word).name for word in words[:4]]
    start = next((i for i, name in enumerate(names) if name in ("accelerate", "accelerate-launch")), None)
    end = next((i for i, word in enumerate(words) if i and word.endswith(sys.argv[0])), None)
    if start is None or end is None:
        return []
    return [names[start], *words[start + 1 : end]]


def asked_for() -> dict[str, Any]:
    """Return what the command line of `accelerate launch` asks for: its config file, then its flags."""
    words = launcher()
    flags: dict[str, Any] = {}
    for first, second in zip(words, [*words[1:], ""], strict=False):
        name, _, value = first.removeprefix("--").partition("=")
        if first.startswith("--"):
            flags[name.replace("-", "_")] = value or second
    asked: dict[str, Any] = {}
    if "config_file" in flags:
        from accelerate.commands.config.config_args import load_config_from_file

        asked = {k: v for k, v in vars(load_config_from_file(flags["config_file"])).items() if v is not None}
    return asked | {k: v for k, v in flags.items() if k in ("num_processes", "num_machines")}


def command(*, resume: bool = False) -> str:
    """Return the command of this run, fit for a shell.

    Args:
        resume: the command that goes on from the newest checkpoint. Otherwise it is the command as it was typed, with
            stars in place of access tokens.
    """
    words = without(sys.argv, _ONCE) if resume else hidden(sys.argv)
    start = launcher() or [Path(sys.executable).name]
    return shlex.join([*start, *words, *(["--resume_from_checkpoint", "last"] if resume else [])])


def without(words: list[str], names: tuple[str, ...]) -> list[str]:
    """Return a command line without some flags and the values that follow them."""
    kept, skipping = [], False
    for word in words:
        if word.startswith("--"):
            skipping = _flag(word) in names
        if not skipping:
            kept.append(word)
    return kept


def hidden(words: list[str]) -> list[str]:
    """Return a command line with stars in place of access tokens."""
    kept, hide = [], False
    for word in words:
        if hide:
            word = "***"
        elif _flag(word) in _SECRET and "=" in word:
            word = word.partition("=")[0] + "=***"
        hide = _flag(word) in _SECRET and "=" not in word
        kept.append(word)
    return kept


def _flag(word: str) -> str:
    return word.partition("=")[0].replace("-", "_").replace("__", "--", 1) if word.startswith("--") else ""
