"""Checkpoints one can go on from: complete, unchanged, and of this very run; and what an earlier run left."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from alignment.errors import InputError
from alignment.report import write_text

MANIFEST = "complete.json"
ASIDE = "earlier_run"
# What a run, and an evaluation of it, leaves in output_dir.
RESULTS = (
    f"{PREFIX_CHECKPOINT_DIR}-*", "base_model", "critic", "completions", "*.safetensors", "*.bin", "*.pt", "*.json",
    "*.jsonl", "*.jinja", "merges.txt", "vocab.txt", "*.model", "README.md", "curves.png",
)  # fmt: skip


class Seal(TrainerCallback):
    """Writes `complete.json` into each checkpoint as its last file: the size and SHA-256 of all others.

    Older checkpoints are deleted only after that (the trainer would do it before, and a run that is killed in between
    would be left with nothing to go on from).
    """

    def __init__(self):
        self.limit: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the deletion of older checkpoints over from the trainer."""
        self.limit, args.save_total_limit = args.save_total_limit, None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give it back."""
        args.save_total_limit = self.limit

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint that was just written, when every process has written its part; delete older ones."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.should_save and folder.is_dir():
            (folder / MANIFEST).unlink(missing_ok=True)
            write_text(folder / MANIFEST, json.dumps(contents(folder), indent=1))
            rotate_checkpoints(args.output_dir, self.limit, state.best_model_checkpoint)


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
        return f"its writing was interrupted (no {MANIFEST})"
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError:
        return f"{MANIFEST} is not as it was written"
    there = contents(folder)
    for name, (size, digest) in listed.items():
        if name not in there:
            return f"{name} is missing"
        if there[name] != [size, digest]:
            return f"{name} is not as it was written"
    if not any(name.startswith(("optimizer", "global_step")) for name in listed):
        return "it holds no state of the optimizer (--save_only_model)"
    return ""


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoint folders of a run, newest first."""
    found = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = [folder for folder in found if folder.is_dir() and folder.name.rpartition("-")[2].isdigit()]
    return sorted(numbered, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the number of updates before a checkpoint."""
    return int(folder.name.rpartition("-")[2])


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
        return str(folder), [f"goes on from {folder}"]
    notes = []
    for folder in checkpoints(output_dir):
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
        before: the "identity" in run.json: fingerprints of data, template and model, processes, batch size, ….
        now: that of this run.
        allowed: go on all the same (`--overwrite_output_dir`).

    Raises:
        InputError: something changed and it was not allowed.
    """
    changed = [key for key in now if key in before and before[key] != now[key]]
    if not changed:
        return []
    text = ", ".join(f"{key.replace('_', ' ')} (was {before[key]}, is {now[key]})" for key in changed)
    if not allowed:
        raise InputError(
            f"this is not the run that wrote the checkpoint: other {text}",
            where="--resume_from_checkpoint",
            why="the order of rows, the schedule or the meaning of the tokens would change half-way",
            fix="give the same data and settings, or add --overwrite_output_dir to go on all the same",
        )
    return [f"goes on although these changed: {text}"]


def leftovers(folder: Path, checkpoint: str | None) -> list[Path]:
    """Return what an earlier run left that could be mistaken for this run's.

    Args:
        folder: `output_dir`.
        checkpoint: the one this run goes on from; then only later ones are in the way. They are damaged, or of a way
            that is left now, and the newest number would win at the next start.
    """
    if checkpoint:
        return [other for other in checkpoints(folder) if step_of(other) > step_of(Path(checkpoint))]
    return sorted({file for pattern in RESULTS for file in folder.glob(pattern) if not file.name.startswith(".")})


def set_aside(paths: list[Path], folder: Path, needed: list[str]) -> list[str]:
    """Move files of an earlier run into a folder of their own beside the new ones; return a note.

    Args:
        paths: what to move, all in `folder`.
        folder: `output_dir`.
        needed: paths the new run reads: the model it starts from, the base of an adapter.

    Raises:
        InputError: something that is needed would be moved.
    """
    for name in needed:
        for path in paths:
            if Path(name).exists() and {path.resolve(), folder.resolve()} & {*_with_parents(Path(name))}:
                raise InputError(
                    f"{folder} holds the model this run starts from ({name})",
                    where="--overwrite_output_dir",
                    why="the run would replace it",
                    fix="another --output_dir",
                )
    if not paths:
        return []
    taken = [number for number in range(1, 100) if (folder / f"{ASIDE}_{number}").exists()]
    target = folder / f"{ASIDE}_{max(taken, default=0) + 1}"
    target.mkdir()
    for path in paths:
        path.rename(target / path.name)
    return [f"{len(paths)} files and folders of the earlier run are in {target} now"]


def _with_parents(path: Path) -> list[Path]:
    return [path.resolve(), *path.resolve().parents]


def drop_aside(folder: Path) -> list[str]:
    """Delete earlier runs that were set aside, now that the new one has finished; return a note.

    Only folders with a run.json or checkpoints and nothing else go: anything else may be somebody's own work.
    """
    gone = []
    for target in sorted(folder.glob(f"{ASIDE}_*")):
        names = [file.name for file in target.iterdir()]
        if "run.json" in names or all(name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") for name in names):
            shutil.rmtree(target)
            gone.append(target.name)
    return [f"deleted, as this run has finished: {', '.join(gone)}"] if gone else []
