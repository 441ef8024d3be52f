"""Read files: find them, decode them, and say the line where they are broken."""

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from alignment.errors import InputError, nearest

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".ndjson")


class Broken(dict):
    """Stands for a row that could not be read; `why` says what is wrong with it."""

    def __init__(self, why: str):
        super().__init__()
        self.why = why


def roots() -> list[Path]:
    """Return the folders a relative path is looked up in: here, then the repository the recipe lies in."""
    return [Path.cwd(), Path(sys.argv[0]).resolve().parents[1], Path(__file__).resolve().parents[1]]


def locate(path: str | Path, folder: Path | None = None) -> Path:
    """Find an existing file or folder.

    Args:
        path: absolute, or relative to `folder`, or (without it) to the working directory or the repository.
        folder: where relative paths start, e.g. the folder of the declaration that names them.

    Raises:
        InputError: nothing is there; names the nearest file that is.
    """
    wanted = Path(path).expanduser()
    places = [folder] if folder else roots()
    for place in places:
        if (place / wanted).exists():
            return place / wanted
    folders = [(place / wanted).parent for place in places if (place / wanted).parent.is_dir()]
    near = nearest(wanted.name, sorted({p.name for parent in folders for p in parent.iterdir()}))
    raise InputError(
        f"there is no {path}",
        where=f"looked in {', '.join(dict.fromkeys(str(p) for p in places))}",
        fix=f"did you mean {Path(path).parent / near}?" if near else "check the path",
    )


class StrictLoader(yaml.SafeLoader):
    """A YAML loader that refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Build the mapping; raise yaml.constructor.ConstructorError on a duplicate key."""
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            key = key.replace("-", "_") if isinstance(key, str) else key
            line = key_node.start_mark.line + 1
            if key in seen:
                problem = f"the key {key!r} is written twice, in lines {seen[key]} and {line}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> tuple[dict, dict[str, int]]:
    """Read a YAML mapping; return it and the line of each top-level key.

    Raises:
        InputError: unreadable, no mapping, or a key written twice.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder", why="a YAML file was expected", fix="name a file in it")
    text = decode(path.read_bytes(), path)
    try:
        value = yaml.load(text, StrictLoader)
        node = yaml.compose(text, StrictLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no valid YAML", where=mark_of(error), why=reason_of(error)) from error
    if not isinstance(value, dict):
        kind = "empty" if value is None else f"a {type(value).__name__}"
        raise InputError(
            f"{path} is {kind}, not a mapping", why="options are read by name", fix="write `key: value` lines"
        )
    return value, {k.value: k.start_mark.line + 1 for k, _ in node.value}


def mark_of(error: yaml.YAMLError) -> str:
    """Say the line of a YAML error, when it has one."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def reason_of(error: yaml.YAMLError) -> str:
    """Say what PyYAML found wrong, without its drawing."""
    return str(error.problem) if isinstance(error, yaml.MarkedYAMLError) else str(error)


def decode(raw: bytes, path: Path, lines_before: int = 0, bytes_before: int = 0) -> str:
    """Decode UTF-8 (with or without a byte order mark); InputError names the line and byte that is not."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = lines_before + raw.count(b"\n", 0, error.start) + 1
        name = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        raise InputError(
            f"{path.name} is not UTF-8",
            where=f"{path}, line {line}, byte {bytes_before + error.start}: 0x{raw[error.start]:02x}",
            why="decoded as something else, letters would silently become others",
            fix=f"iconv -f {name} -t UTF-8 {path.name} > utf8{path.suffix}",
        ) from error


def kind_of(path: Path) -> str:
    """Return the suffix that says how to read a file: `.jsonl` for rows.jsonl and rows.jsonl.gz."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return ".jsonl" if suffix == ".ndjson" else suffix.lower()


def read_file(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield (row number, row) of one file; a row that cannot be read is a `Broken`.

    Row numbers start at 1; in jsonl and txt they are line numbers, elsewhere the header does not count.

    Raises:
        InputError: unknown kind of file, wrong encoding, or no rows at all.
    """
    kind = kind_of(path)
    if kind not in SUFFIXES:
        raise InputError(
            f"{path.name} is of no kind that can be read",
            where=str(path),
            fix=f"one of {', '.join(SUFFIXES)}",
        )
    if kind in (".parquet", ".arrow"):
        rows = read_table(path, kind)
    else:
        rows = read_plain(path, kind)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise InputError(f"{path.name} has no rows", where=str(path), fix="check how the file was written")


def read_plain(path: Path, kind: str) -> Iterator[tuple[int, dict]]:
    """Yield the rows of a file of text; JSON lines are read as they come, the other kinds at once."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if kind == ".jsonl":
                yield from read_jsonl(file, path)
                return
            text = decode(file.read(), path)
    except (OSError, EOFError) as error:
        raise InputError(f"{path.name} cannot be read", where=str(path), why=str(error)) from error
    if kind in (".csv", ".tsv"):
        yield from read_csv(text, path, "\t" if kind == ".tsv" else ",")
    else:
        yield from (read_json if kind == ".json" else read_text)(text, path)


def read_jsonl(lines: Iterable[bytes], path: Path) -> Iterator[tuple[int, dict]]:
    """Yield the rows of JSON lines; empty lines are skipped but counted."""
    start = 0
    for number, line in enumerate(lines, 1):
        text = decode(line, path, number - 1, start)
        start += len(line)
        if text.strip():
            yield number, parse_line(text.rstrip("\r\n"))


def parse_line(line: str) -> dict:
    """Parse one JSON line into a row or a Broken."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        around = line[max(0, error.pos - 20) : error.pos + 20]
        return Broken(f"no valid JSON: {error.msg}, column {error.colno}: {around!r}")
    return value if isinstance(value, dict) else Broken(f"a JSON {type(value).__name__}, not an object")


def read_json(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    """Yield the rows of a JSON list, of an object with one list in it, or of JSON lines called .json."""
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from read_jsonl(io.BytesIO(text.encode()), path)
            return
        raise InputError(
            f"{path.name} is no valid JSON: {error.msg}",
            where=f"{path}, line {error.lineno}, column {error.colno}",
        ) from error
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise InputError(
            f"{path.name} holds a {type(value).__name__}, not rows", where=str(path), fix="a list of objects"
        )
    for number, row in enumerate(value, 1):
        yield number, row if isinstance(row, dict) else Broken(f"a JSON {type(row).__name__}, not an object")


def read_csv(text: str, path: Path, delimiter: str) -> Iterator[tuple[int, dict]]:
    """Yield the rows of a table with a header; a line with more or fewer cells than the header is Broken."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header = next(reader, None)
    if not header:
        return
    doubled = sorted({name for name in header if header.count(name) > 1 or not name.strip()})
    if doubled:
        raise InputError(f"{path.name} has a header with {doubled[0]!r} twice or empty", where=f"{path}, line 1")
    for number, cells in enumerate((c for c in reader if c), 1):
        if len(cells) == len(header):
            yield number, dict(zip(header, cells, strict=True))
        else:
            yield (
                number,
                Broken(f"{len(cells)} cells where the header has {len(header)} (ends in line {reader.line_num})"),
            )


def read_text(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    """Yield the paragraphs of a plain text (parted by empty lines), numbered by their first line."""
    start, block = 0, []
    for number, line in enumerate([*text.replace("\r\n", "\n").split("\n"), ""], 1):
        if line.strip():
            start = start or number
            block.append(line)
        elif block:
            yield start, {"text": "\n".join(block)}
            start, block = 0, []


def read_table(path: Path, kind: str) -> Iterator[tuple[int, dict]]:
    """Yield the rows of a parquet or arrow file, batch by batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind == ".parquet":
            batches = pq.ParquetFile(path).iter_batches()
        else:
            batches = iter(pa.ipc.open_stream(path).read_all().to_batches())
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pa.ArrowInvalid as error:
        raise InputError(f"{path.name} cannot be read", where=str(path), why=str(error).split("\n")[0]) from error
