"""Folders that hold a model or an adapter: say what is wrong with one before anything is loaded from it."""

import functools
import json
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from alignment.errors import InputError, nearest

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def is_adapter(path: str | Path) -> bool:
    """Say whether the path is a folder that holds an adapter and not a model."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def fetch(path: str | Path, revision: str = "main") -> str:
    """Return the folder an adapter of the hub is downloaded to; every other path as it is."""
    name = str(path)
    return name if _is_path(name) or Path(name).exists() else _fetch_id(name, revision)


@functools.cache  # a checkpoint is asked for by its head, its weights and its tokenizer: one request does
def _fetch_id(name: str, revision: str) -> str:
    try:
        huggingface_hub.hf_hub_download(name, ADAPTER_CONFIG, revision=revision)
    except (HfHubHTTPError, HFValidationError, OSError):  # no adapter; `check_model` says it when there is no model
        return name
    files = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    return huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns="*/*")


def check_model(path: str | Path, revision: str = "main") -> None:
    """Raise InputError unless the path is a folder with config and safetensors, or a hub id within reach."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        _check_hub_id(str(path), revision)
        return
    if not any(folder.iterdir()):
        raise InputError(f"the model folder {path} is empty", where="--model_name_or_path", fix=_other_folder(folder))
    if not (folder / "config.json").is_file():
        raise InputError(
            f"no config.json in {path}",
            where="--model_name_or_path",
            why="without it the architecture is unknown" + _nested_models(folder),
            fix=_other_folder(folder),
        )
    if not list(folder.glob("*.safetensors")):
        old = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in folder.glob(suffix))
        raise InputError(
            f"no *.safetensors in {path}",
            where="--model_name_or_path",
            why=f"{old[0]} is a pickle, which can run code when it is read" if old else "there are no weights",
            fix="load it once where you trust it and save_pretrained() it: that writes safetensors",
        )
    _check_shards(folder)


def _check_shards(folder: Path) -> None:
    """Raise InputError when the index names a shard that is not there (a broken download or copy)."""
    for index in folder.glob("*.safetensors.index.json"):
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        gone = sorted(name for name in named if not (folder / name).is_file())
        if gone:
            raise InputError(
                f"{len(gone)} of {len(named)} weight files are missing from {folder}",
                where=str(folder / gone[0]),
                why="the model would be incomplete",
                fix="copy or download the folder again",
            )


def _is_path(name: str) -> bool:
    """Say whether a name can only be meant as a path: no hub id looks like it, or the folder above it is here."""
    return name.count("/") > 1 or name.startswith((".", "/", "~")) or ("/" in name and Path(name).parent.is_dir())


def _check_hub_id(name: str, revision: str) -> None:
    """Raise InputError when the name is a local path that is not there, or a hub id out of reach."""
    folder = Path(name).expanduser()
    if _is_path(name):
        raise InputError(f"no model folder at {name}", where="--model_name_or_path", fix=_other_folder(folder))
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    raise InputError(
        f"{name} is neither a folder here nor in the cache of the Hugging Face hub",
        where="--model_name_or_path",
        why="HF_HUB_OFFLINE is set, so nothing is downloaded",
        fix=_other_folder(folder) + "; or unset HF_HUB_OFFLINE; or `hf download` it first",
    )


def _other_folder(folder: Path) -> str:
    """Return advice that names the folder next to a missing one that is most like it."""
    parent = folder.parent
    while not parent.is_dir():
        parent = parent.parent
    others = sorted(
        child.name
        for child in parent.iterdir()
        if child.is_dir() and child != folder and ((child / "config.json").exists() or is_adapter(child))
    )
    close = nearest(folder.name, others)
    if close:
        return f"did you mean {parent / close}?"
    return "give a folder with config.json, model.safetensors and a tokenizer, or a hub id"


def _nested_models(folder: Path) -> str:
    """Return a hint when the weights are one level down, as in an output folder of checkpoints."""
    inside = sorted(c.name for c in folder.iterdir() if (c / "config.json").is_file() or is_adapter(c))
    return f"; the folder holds {', '.join(inside[:4])}: give one of them" if inside else ""


def find_base(path: str | Path) -> str:
    """Return the base model of an adapter folder.

    A base saved beside the adapter (`base_model/` in the folder or its parent) wins, so that a moved
    folder stays whole; then the name in adapter_config.json, as given and relative to the folders above
    the adapter.

    Raises:
        InputError: no such base is here, with the places that were tried.
    """
    folder = Path(path).resolve()
    name = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    tried = [folder / "base_model", folder.parent / "base_model"]
    if name:
        tried += [
            Path(name).expanduser(),
            *(parent / name for parent in folder.parents if not Path(name).is_absolute()),
        ]
    for place in tried:
        if (place / "config.json").is_file():
            return str(place)
    if name and name.count("/") <= 1 and not name.startswith((".", "/", "~")):
        check_model(name)
        return name
    raise InputError(
        f"the base model of the adapter {path} is not here",
        where=f"{Path(path) / ADAPTER_CONFIG}, base_model_name_or_path: {name}",
        why="an adapter is only a difference to its base",
        fix=f"put the base at {Path(path) / 'base_model'}, or correct the name",
    )
