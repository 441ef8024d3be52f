"""Where rows come from: hub ids, files, folders and declarations, resolved into `Part`s that can be read."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alignment.errors import InputError, nearest
from alignment.files import SUFFIXES, kind_of, locate, read_file, read_yaml, roots

HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.+-]+))?")
TEST = re.compile(r"(^|[_.\-/])test([_.\-\[]|$)", re.IGNORECASE)
# Which names stand for which split, the best one for evaluation during training first.
HELD_OUT = ("validation", "valid", "val", "dev", "eval", "test")
SOURCE_KEYS = ("path", "config", "split", "weight", "rows", "columns")


@dataclass
class Part:
    """Rows of one file or of one split on the hub.

    Attributes:
        name: short, for the ledger. where: the full place, for messages.
        split: the split's name ("train", "test", …), "" for a file that says nothing.
        read: yields (row number from 1, raw row).
        columns: {theirs: ours}.
        weight, rows: how much of it is wanted; None for all.
        group: which source of which declaration it belongs to; its parts share one weight.
        role: "train", or "eval" for rows to evaluate on.
    """

    name: str
    where: str
    split: str
    read: Callable[[], Iterator[tuple[int, dict]]]
    columns: dict[str, str] = field(default_factory=dict)
    weight: float | None = None
    rows: int | None = None
    group: str = ""
    role: str = "train"

    @property
    def is_test(self) -> bool:
        """Say whether this is called a test split."""
        return bool(TEST.search(self.split))


@dataclass
class Plan:
    """The parts of one `--data` value, and what its declaration says about them."""

    parts: list[Part]
    seed: int | None = None
    test_size: float | None = None


def resolve(spec: str, purpose: str, streaming: bool = False) -> Plan:
    """Find out what a `--data` value means.

    Args:
        spec: `org/name[:config][@split]` on the hub, `path[@split]` of a file, folder or data/*.yaml.
        purpose: "train" (training split and, where there is one, the one to evaluate on) or "test" (rows to
            evaluate on only).
        streaming: open hub sets without downloading them.

    Raises:
        InputError: nothing is there, or it cannot be understood.
    """
    path, split = find_local(spec)
    if path is not None and path.suffix in (".yaml", ".yml"):
        return read_declaration(path, purpose, streaming)
    if path is not None:
        return Plan(local_parts(path, split, purpose))
    return Plan(hub_parts(spec, split, purpose, streaming))


def find_local(spec: str, folder: Path | None = None) -> tuple[Path | None, str]:
    """Return (path, split) of a local spec, (None, split) for a hub id; raises for a missing local path."""
    bare, _, split = spec.rpartition("@") if "@" in spec else (spec, "", "")
    for text, wanted in ((spec, ""), (bare, split)):
        if any((root / Path(text).expanduser()).exists() for root in ([folder] if folder else roots())):
            return locate(text, folder), wanted
    places = [folder] if folder else roots()
    beside = any((place / bare).parent.is_dir() and "/" in bare for place in places)
    looks_local = kind_of(Path(bare)) in (*SUFFIXES, ".yaml", ".yml") or bare.startswith((".", "/", "~"))
    if HUB.fullmatch(bare) and not looks_local and not beside:
        return None, split
    if "/" not in bare and not looks_local:
        try:
            locate(bare, folder)
        except InputError as error:
            raise InputError(
                error.what,
                where=error.where,
                why="hub sets are named in full",
                fix=f"org/{bare}, or a path; {error.fix}",
            ) from None
    locate(bare, folder)
    raise AssertionError("locate raises for a path that is not there")


def local_parts(path: Path, split: str, purpose: str) -> list[Part]:
    """Return the parts of a file or a folder; `split` picks one of a folder's splits."""
    in_test = path.name.lower() == "test" or (path.is_file() and path.parent.name.lower() == "test")
    if path.is_file():
        name = path.name.split(".")[0]
        named = name if split_of(path) or TEST.search(name) else ""
        return [file_part(path, "test" if in_test else named, path.name)]
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        return choose(disk_parts(path), split, purpose, str(path))
    files = [
        f
        for f in sorted(path.iterdir())
        if f.is_file() and kind_of(f) in SUFFIXES and not f.name.startswith("dataset_")
    ]
    if not files:
        inside = [f.name for f in sorted(path.iterdir())][:5]
        raise InputError(
            f"{path} holds no rows",
            why=f"it holds {', '.join(inside) or 'nothing'}",
            fix=f"files of the kinds {', '.join(SUFFIXES)}, or a folder of save_to_disk",
        )
    parts = [file_part(f, split_of(f), f"{path.name}/{f.name}") for f in files]
    if any(p.split == "train" for p in parts) or split:
        return choose([p for p in parts if p.split], split, purpose, str(path))
    kinds = sorted({kind_of(f) for f in files})
    if len(kinds) > 1:
        raise InputError(
            f"{path} holds files of several kinds ({', '.join(kinds)}) and none called train",
            why="it is not clear which are the rows",
            fix="name one file",
        )
    if in_test:
        return [replace(p, split="test") for p in parts]
    rest = [p for p in parts if p.split not in HELD_OUT]
    return choose(
        [replace(p, split="train") for p in rest] + [p for p in parts if p.split in HELD_OUT],
        "",
        purpose,
        str(path),
    )


def split_of(path: Path) -> str:
    """Return the split a file's name begins with: "train" for train.jsonl and train-0-of-2.parquet."""
    word = re.split(r"[.\-_]", path.name)[0].lower()
    return word if word in ("train", *HELD_OUT) else ""


def file_part(path: Path, split: str, name: str) -> Part:
    """Return one file as a part."""
    return Part(name, str(path), split, lambda: read_file(path))


def disk_parts(path: Path) -> list[Part]:
    """Return the splits of a folder written by `datasets.save_to_disk`."""
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(path))
    splits = found if isinstance(found, DatasetDict) else {"train": found}
    return [Part(f"{path.name}/{s}", f"{path}, split {s}", s, lambda d=d: enumerate(d, 1)) for s, d in splits.items()]


def choose(parts: list[Part], split: str, purpose: str, where: str) -> list[Part]:
    """Pick the parts for a purpose out of all splits of one source.

    For "train": the training split, and the first of validation … test. For "test": the test split when there
    is one, else the first other held-out one, else all.
    """
    names = list(dict.fromkeys(p.split for p in parts))
    if split:
        chosen = [p for p in parts if p.split == split]
        if not chosen:
            near = nearest(split, names)
            raise InputError(
                f"there is no split {split!r}",
                where=where,
                fix=f"did you mean {near}?" if near else f"one of {', '.join(names)}",
            )
        return chosen
    held_out = [n for wanted in HELD_OUT for n in names if re.split(r"[_.\-\[]", n)[0] == wanted]
    if purpose == "test":
        best = next((n for n in held_out if TEST.search(n)), (held_out or ["train"])[0])
        return [p for p in parts if p.split == best] or parts
    train = [n for n in names if re.split(r"[_.\-\[]", n)[0] == "train"]
    if len(train) != 1:
        raise InputError(
            f"it is not clear which split to train on: {', '.join(names)}",
            where=where,
            fix=f"…@{(train or names)[0]}",
        )
    same = train[0][len("train") :]  # train_sft goes with test_sft, not with test_gen
    evaluate = next((n for n in held_out if n.endswith(same)), None)
    chosen = [replace(p, role="train") for p in parts if p.split == train[0]]
    return chosen + [replace(p, role="eval") for p in parts if p.split == evaluate]


def hub_parts(spec: str, split: str, purpose: str, streaming: bool) -> list[Part]:
    """Return the parts of a hub set, its list of splits read from the hub (or the local cache)."""
    match = HUB.fullmatch(spec.rpartition("@")[0] if split else spec)
    name, config = match["id"], match["config"]
    if split:
        return [hub_part(name, config, split, streaming)]
    from datasets import config as settings
    from datasets import get_dataset_split_names, load_dataset

    if settings.HF_HUB_OFFLINE:  # the list of splits is not in the cache, the set itself may be
        names = list(ask_hub(lambda: load_dataset(name, config), name))
    else:
        names = ask_hub(lambda: get_dataset_split_names(name, config), name)
    return choose([hub_part(name, config, s, streaming) for s in names], "", purpose, name)


def hub_part(name: str, config: str | None, split: str, streaming: bool) -> Part:
    """Return one split of a hub set; it is fetched when it is read."""
    from datasets import load_dataset

    def read() -> Iterator[tuple[int, dict]]:
        rows = ask_hub(lambda: load_dataset(name, config, split=split, streaming=streaming), name)
        return enumerate(rows, 1)

    full = name + (f":{config}" if config else "")
    return Part(f"{full}@{split}", f"https://huggingface.co/datasets/{name}", split, read)


def ask_hub(call: Callable[[], Any], name: str) -> Any:
    """Run a hub call; what goes wrong there becomes an InputError."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return call()
    except (OSError, ValueError, DatasetsError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise InputError(
            f"the hub set {name} cannot be read",
            where=f"https://huggingface.co/datasets/{name}",
            why=str(error).strip().split("\n")[0],
            fix="check org/name:config@split, the network and HF_HUB_OFFLINE, or give a local path",
        ) from error


def read_declaration(path: Path, purpose: str, streaming: bool) -> Plan:
    """Read a data/*.yaml: sources (path, config, split, weight or rows, columns), seed, test_size."""
    wanted, lines = read_yaml(path)
    refuse_unknown(wanted, ("sources", "seed", "test_size"), lambda key: f"{path}, line {lines[key]}")
    sources = wanted.get("sources")
    if not isinstance(sources, list) or not sources or not all(isinstance(s, dict) for s in sources):
        raise InputError(f"{path.name} lists no sources", where=str(path), fix="sources:\n  - path: org/name")
    for name, kinds in (("seed", int), ("test_size", int | float)):
        if name in wanted and (
            not isinstance(wanted[name], kinds) or isinstance(wanted[name], bool) or wanted[name] < 0
        ):
            raise InputError(f"{name} is {wanted[name]!r}, not a number", where=f"{path}, line {lines[name]}")
    parts = []
    for index, source in enumerate(sources, 1):
        where = f"{path}, source {index}"
        check_source(source, where)
        found = source_parts(source, path.parent, purpose, streaming)
        share = {k: source.get(k) for k in ("weight", "rows")} | {"columns": source.get("columns", {})}
        parts += [replace(p, group=f"{path}#{index}", **share) for p in found]
    weighted = sum("weight" in s for s in sources)
    if weighted not in (0, len(sources)):
        raise InputError(
            f"{weighted} of {len(sources)} sources have a weight",
            where=str(path),
            why="weights are shares of the whole mixture",
            fix="give every source a weight, or use rows",
        )
    return Plan(parts, wanted.get("seed"), wanted.get("test_size"))


def refuse_unknown(mapping: dict, known: tuple[str, ...], where: Callable[[str], str]) -> None:
    """Raise InputError for the first key that is not known."""
    for key in mapping:
        if key not in known:
            near = nearest(str(key), list(known))
            fix = f"did you mean {near}?" if near else f"the keys are {', '.join(known)}"
            raise InputError(f"unknown key {key!r}", where=where(key), fix=fix)


def check_source(source: dict, where: str) -> None:
    """Raise InputError for a source of a declaration that cannot be understood."""
    refuse_unknown(source, SOURCE_KEYS, lambda _: where)
    if not isinstance(source.get("path"), str):
        raise InputError(
            "a source without a path", where=where, fix="path: org/name, or a file or folder beside this file"
        )
    if "weight" in source and "rows" in source:
        raise InputError("a source with both weight and rows", where=where, fix="keep one of them")
    for key, kinds in (("weight", (int, float)), ("rows", (int,))):
        value = source.get(key, 1)
        if not isinstance(value, kinds) or isinstance(value, bool) or value <= 0:
            raise InputError(f"{key} is {value!r}", where=where, fix="a number above 0")
    for key in ("config", "split"):
        if not isinstance(source.get(key, ""), str):
            raise InputError(f"{key} is {source[key]!r}, not text", where=where, fix=f'{key}: "{source[key]}"')
    columns = source.get("columns", {})
    if not isinstance(columns, dict) or not all(isinstance(x, str) for pair in columns.items() for x in pair):
        raise InputError("columns is no mapping of names", where=where, fix="columns: {theirs: ours}")


def source_parts(source: dict, folder: Path, purpose: str, streaming: bool) -> list[Part]:
    """Return the parts of one source of a declaration; relative paths start at the declaration's folder."""
    path, split = find_local(source["path"], folder)
    split = source.get("split", split)
    if path is not None and path.suffix in (".yaml", ".yml"):
        raise InputError("a declaration inside a declaration", where=str(path), fix="list its sources here")
    if path is not None:
        return local_parts(path, split, purpose)
    spec = source["path"] + (f":{source['config']}" if "config" in source else "") + (f"@{split}" if split else "")
    return hub_parts(spec, split, purpose, streaming)
