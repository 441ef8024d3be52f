"""Checkpoints one can go on from: complete, unchanged, and of this very run."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from alignment.errors import InputError
from alignment.report import write_text

MANIFEST = "complete.json"


class Seal(TrainerCallback):
    """Writes `complete.json` into each checkpoint as its last file: the size and SHA-256 of all others."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint that was just written."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.should_save and folder.is_dir():
            write_text(folder / MANIFEST, json.dumps(contents(folder), indent=1))


def contents(folder: Path) -> dict[str, list]:
    """Return {name: [size, SHA-256]} of the files in a folder and below."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != MANIFEST:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            found[str(file.relative_to(folder))] = [file.stat().st_size, digest]
    return found


def fault_of(folder: Path) -> str:
    """Return what is wrong with a checkpoint, or an empty string."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return "its writing was interrupted (no complete.json)"
    listed, there = json.loads(manifest.read_text()), contents(folder)
    for name, (size, digest) in listed.items():
        if name not in there:
            return f"{name} is missing"
        if there[name] != [size, digest]:
            return f"{name} is not as it was written"
    return ""


def find_checkpoint(output_dir: str, wanted: str) -> tuple[str, list[str]]:
    """Return the checkpoint to go on from, and notes about those that were passed over.

    Args:
        output_dir: the run's folder.
        wanted: "true" or "last" for the newest good one, or the path of one.

    Raises:
        InputError: there is none, or the one that was named is damaged.
    """
    if wanted.lower() not in ("true", "last", "latest"):
        folder = Path(wanted)
        fault = fault_of(folder) if folder.is_dir() else "there is no such folder"
        if fault:
            raise InputError(
                f"cannot go on from {wanted}: {fault}",
                where="--resume_from_checkpoint",
                why="a run that goes on from it would end elsewhere, and nothing would say so",
                fix="--resume_from_checkpoint last takes the newest good one",
            )
        return str(folder), []
    folders = sorted(
        Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda f: int(f.name.rpartition("-")[2]), reverse=True
    )
    notes = []
    for folder in folders:
        fault = fault_of(folder)
        if not fault:
            return str(folder), [*notes, f"goes on from {folder}"]
        notes.append(f"{folder} passed over: {fault}")
    raise InputError(
        f"no checkpoint to go on from in {output_dir}" + "".join(f"; {note}" for note in notes),
        where="--resume_from_checkpoint",
        fix="leave the flag out to start afresh in another --output_dir",
    )


def check_same_run(before: dict[str, Any], now: dict[str, Any], allowed: bool) -> list[str]:
    """Compare what may not change between a run and its continuation; return notes where it was allowed.

    Args:
        before, now: the "identity" of run.json: fingerprints of data and template, processes, batch size, form.
        allowed: go on all the same (`--overwrite_output_dir`).

    Raises:
        InputError: something changed and it was not allowed.
    """
    changed = [key for key in now if key in before and before[key] != now[key]]
    if not changed:
        return []
    text = ", ".join(f"{key} (was {before[key]}, is {now[key]})" for key in changed)
    if not allowed:
        raise InputError(
            f"this is not the run that wrote the checkpoint: other {text}",
            where="--resume_from_checkpoint",
            why="the order of rows, the schedule or the meaning of the tokens would change half-way",
            fix="give the same data and settings, or add --overwrite_output_dir to go on all the same",
        )
    return [f"goes on although these changed: {text}"]
