"""What a command does before anything is loaded: its output folder is claimed, and one line says what is run."""

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from alignment.errors import InputError

# Weights below this many bytes are read and written before a progress bar could be read.
_SMALL = 2**30


def open_run(args: Any) -> None:
    """Claim `output_dir`, seed the random numbers, quiet the libraries, say what is run.

    Raises:
        InputError: `output_dir` holds something already, or cannot be written to.
    """
    if os.environ.get("RANK", "0") == "0":  # the other processes may come when this one already writes
        claim(args)
        print(headline(args), flush=True)
    quiet(args)
    if args.train.hub_token:  # the trainer would write it into training_args.bin, beside the weights
        os.environ["HF_TOKEN"], args.train.hub_token = args.train.hub_token, None
    # A new head or adapter is drawn before the trainer would seed: without this, two equal runs would differ.
    from transformers import set_seed

    set_seed(args.train.seed)


def resuming(args: Any) -> str:
    """Return the value of `--resume_from_checkpoint`, or an empty string when the run starts afresh."""
    value = str(args.train.resume_from_checkpoint or "")
    return "" if value.lower() in ("false", "no", "none") else value


def headline(args: Any) -> str:
    """Return one line: recipe, model, data, which weights are trained, and where they go."""
    data = ", ".join(args.data.data)
    if len(data) > 60:
        first = Path(args.data.data[0]).name
        data = first if len(args.data.data) == 1 else f"{first} and {len(args.data.data) - 1} more"
    part = "" if args.peft.peft == "none" else f", {args.peft.peft}"
    end = "dry run" if args.data.dry_run else args.train.output_dir
    return f"{args.recipe}: {args.model.model_name_or_path} on {data}{part} -> {end}"


def claim(args: Any) -> None:
    """Raise InputError when the run could not, or should not, write into `output_dir` at its end."""
    if args.data.dry_run:
        return
    folder = Path(args.train.output_dir)
    ancestor = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written to: {error.strerror}",
            where="--output_dir",
            why="the run would end without leaving anything",
            fix="--output_dir with a folder of yours",
        ) from error
    held = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    held = [name for name in held if not name.startswith(".")]
    wanted = resuming(args)
    if wanted.lower() in ("true", "last", "latest") and not any(name.startswith("checkpoint-") for name in held):
        raise InputError(
            f"there is no checkpoint to go on from in {folder}",
            where="--resume_from_checkpoint",
            fix="leave the flag out to start afresh, or name the run's folder with --output_dir",
        )
    if held and not wanted and not args.data.overwrite_output_dir:
        raise InputError(
            f"{folder} is not empty: it holds {', '.join(held[:3])}{', …' if len(held) > 3 else ''}",
            where="--output_dir",
            why="files of two runs would be mixed",
            fix="another --output_dir, --resume_from_checkpoint last to go on, or --overwrite_output_dir",
        )


def quiet(args: Any) -> None:
    """Switch off progress bars that only flash, and a deprecation the libraries raise against each other."""
    from transformers.utils import logging as library

    # PEFT 0.21 asks transformers 5.23 by the old name; no code of ours can avoid it
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    if small(args.model.model_name_or_path) or not sys.stderr.isatty():
        library.disable_progress_bar()


def small(path: str | None) -> bool:
    """Say whether a local folder holds less than a gigabyte; a hub id is not known to."""
    folder = Path(path or "")
    if not path or not folder.is_dir():
        return False
    total = 0
    with contextlib.suppress(OSError):
        total = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return total < _SMALL
