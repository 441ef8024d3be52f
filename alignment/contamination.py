"""Do training rows hold the rows of a benchmark? N-gram overlap, short lines word for word, by source."""

import itertools
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alignment.errors import InputError
from alignment.files import Broken
from alignment.glue import find_task, plan
from alignment.sources import Part, resolve

NGRAM, SHARE = 13, 0.5
MANY = 0.1  # share of rows found from which on numbers are warned of
MOST_ROWS = 200_000  # training rows an evaluation reads by itself; data/contamination.py reads all
_WORD = re.compile(r"\w+|[-+*/^=<>%]")  # 17 + 7 is not 17 - 7
# The columns that hold what is asked; of rows without any of them every text counts.
QUESTION = (
    "prompt", "question", "instruction", "input", "sentence", "sentence1", "sentence2", "question1", "question2",
    "premise", "hypothesis", "context", "passage", "text", "text_pair", "tokens", "messages",
    "conversations",
)  # fmt: skip


@dataclass
class Found:
    """What one comparison found.

    Attributes:
        rows: benchmark rows looked for. read: training rows read, by source.
        hits: benchmark id -> the training rows (source, number) that hold it.
        skipped: sources that could not be read, and why.
    """

    rows: int = 0
    read: dict[str, int] = field(default_factory=dict)
    hits: dict[str, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))
    skipped: dict[str, str] = field(default_factory=dict)

    def by_source(self) -> dict[str, tuple[int, int]]:
        """Return source -> (benchmark rows found in it, training rows that hold one)."""
        table: dict[str, tuple[set[str], set[int]]] = {name: (set(), set()) for name in self.read}
        for name, places in self.hits.items():
            for source, number in places:
                table[source][0].add(name)
                table[source][1].add(number)
        return {source: (len(ids), len(rows)) for source, (ids, rows) in table.items()}


def words(text: str) -> tuple[str, ...]:
    """Return the words and operators of a text, without case, punctuation and compatibility forms (NFKC)."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).lower()))


class Index:
    """The n-grams and short lines of a benchmark, to be looked up in training rows.

    A training row holds a benchmark row when n-grams they share cover at least `share` of the benchmark row's words:
    13-grams as in GPT-3 (Brown et al. 2020, appendix C), the half of one row's words as in Tülu 3 (Lambert et al. 2024,
    section 3.2; its 8-grams take two questions of the same wording for one). A benchmark row of fewer than n words is
    held when one of the training row's lines is the same words.
    """

    def __init__(self, texts: Mapping[str, str], n: int = NGRAM, share: float = SHARE):
        if n < 1 or not 0 < share <= 1:
            raise InputError(f"n-grams of {n} words, a share of {share:g}", fix="1 or more words, a share in (0, 1]")
        self.n, self.share = n, share
        self.lengths: dict[str, int] = {}
        self.grams: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
        self.lines: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name, text in texts.items():
            found = words(text)
            self.lengths[name] = len(found)
            if len(found) >= n:
                for place, gram in enumerate(_grams(found, n)):
                    self.grams[gram].append((name, place))
            elif found:
                self.lines[found].append(name)

    def held_by(self, texts: list[str]) -> set[str]:
        """Return the ids of the benchmark rows that the texts of one training row hold."""
        covered: dict[str, set[int]] = defaultdict(set)
        found: set[str] = set()
        for text in texts:
            for gram in _grams(words(text), self.n):
                for name, place in self.grams.get(gram, ()):
                    covered[name].update(range(place, place + self.n))
            for line in {text, *text.splitlines()} if self.lines else ():
                found.update(self.lines.get(words(line), ()))
        return found | {name for name, places in covered.items() if len(places) >= self.share * self.lengths[name]}


def _grams(found: tuple[str, ...], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(found[start:] for start in range(n)), strict=False)


def texts_of(value: Any) -> list[str]:
    """Return every text in a row, those of messages and lists included; roles and control keys are none."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [t for key, v in value.items() if key not in ("role", "from", "task", "verifier") for t in texts_of(v)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in texts_of(item)]
    return []


def question_of(row: dict) -> str:
    """Return what a benchmark row asks: its question columns without system messages and answers."""
    columns = [name for name in QUESTION if row.get(name)]
    if not columns:
        return "\n".join(texts_of(row))
    kept = []
    for name in columns:
        value = row[name]
        if name == "tokens":
            value = " ".join(map(str, value))
        elif isinstance(value, list):
            value = [m for m in value if not isinstance(m, dict) or m.get("role", m.get("from")) in ("user", "human")]
        kept += texts_of(value)
    return "\n".join(kept)


def search(index: Index, parts: list[Part], limit: int | None = None) -> Found:
    """Read training rows and return which hold a benchmark row.

    Args:
        index: of the benchmark.
        parts: where the training rows are.
        limit: rows read at most, all parts together; what was not read is in `skipped`.
    """
    found = Found(rows=len(index.lengths))
    left = limit
    with tqdm(desc="contamination", unit="row", leave=False, disable=None) as bar:
        for part in parts:
            count = 0
            rows = itertools.islice(part.read(), left)
            for number, row in rows:
                count += 1
                if isinstance(row, Broken):
                    continue
                for name in index.held_by(list(dict.fromkeys([*texts_of(row), question_of(row)]))):
                    found.hits[name].append((part.name, number))
                bar.update()
            found.read[part.name] = found.read.get(part.name, 0) + count
            if left is not None:
                left -= count
                if left == 0:
                    found.skipped[part.name] = f"only the first {count:,} rows were read"
                    break
    return found


def trained_on(checkpoint: str | Path) -> tuple[list[tuple[str, str | None]], list[str]]:
    """Return what a checkpoint was trained on, the runs it started from included, and what is unknown.

    The first are (`--data` value, GLUE task or None). Each recipe leaves a run.json; a checkpoint that has none ends
    the way back.
    """
    specs, unknown, seen = [], [], set()
    path = Path(checkpoint)
    while (path / "run.json").is_file() and path not in seen:
        seen.add(path)
        try:
            arguments = json.loads((path / "run.json").read_text(encoding="utf-8"))["arguments"]
            values = {name: arguments[name]["value"] for name in arguments}
        except (json.JSONDecodeError, KeyError, TypeError):
            unknown.append(f"{path}/run.json cannot be read")
            break
        for name in ("data", "text_data"):
            value = values.get(name)
            several = [value] if isinstance(value, str) else value or []
            specs += [(spec, values.get("task")) for spec in several]
        path = Path(values.get("model_name_or_path") or "")
    return list(dict.fromkeys(specs)), unknown


def check(checkpoint: str | Path, texts: Mapping[str, str]) -> dict[str, Any] | None:
    """Look for the rows of an evaluation in what a checkpoint was trained on; None where no recipe made it.

    Returns:
        {"rows", "found", "ids", "read": {source: rows}, "skipped": {source: why}, "ngram", "share"}.
    """
    specs, unknown = trained_on(checkpoint)
    if not specs and not unknown:
        return None
    index = Index(texts)
    merged = Found(rows=len(texts), skipped=dict.fromkeys(unknown, ""))
    for spec, task in specs:
        try:
            sources = plan(find_task(task), spec) if task else resolve(spec, "train")
            parts = [part for part in sources.parts if part.role == "train"]
            found = search(index, parts, MOST_ROWS)
        except InputError as error:
            merged.skipped[spec] = error.what
            continue
        merged.read |= {f"{spec}: {name}": count for name, count in found.read.items()}
        merged.skipped |= found.skipped
        for name, places in found.hits.items():
            merged.hits[name] += places
    return {
        "rows": merged.rows,
        "found": len(merged.hits),
        "ids": sorted(merged.hits),
        "read": merged.read,
        "skipped": merged.skipped,
        "ngram": NGRAM,
        "share": SHARE,
    }


def merge(several: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return what `check` found for checkpoints of one model on different rows as one; None where it never looked."""
    known = [found for found in several if found]
    if not known:
        return None
    total = dict(known[0])
    for found in known[1:]:
        total |= {name: total[name] + found[name] for name in ("rows", "found", "ids")}
        total |= {name: total[name] | found[name] for name in ("read", "skipped")}
    return total


def sentence(found: Mapping[str, Any]) -> str:
    """Say in a line what `check` found."""
    read = sum(found["read"].values())
    skipped = f"; not read: {', '.join(found['skipped'])}" if found["skipped"] else ""
    if not found["read"]:
        return f"not checked for contamination{skipped}"
    if not found["found"]:
        return f"none of the {found['rows']:,} rows overlaps with the {read:,} rows of its training data{skipped}"
    verb = "overlaps" if found["found"] == 1 else "overlap"
    many = "warning: these are no unseen rows: " if found["found"] > MANY * found["rows"] else ""
    data = f"the {read:,} rows of its training data"
    return f"{many}{found['found']:,} of the {found['rows']:,} rows {verb} with {data}{skipped}"
