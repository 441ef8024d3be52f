"""Finished rows of an evaluation, on disk as soon as they are made: an interrupted one goes on where it was."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from accelerate.utils import gather_object
from tqdm import tqdm

from alignment.errors import InputError
from alignment.generation import process_state
from alignment.report import Result, read_result, text_hash

_SAME = ("task", "version", "data", "model", "run", "prompt_hash", "settings")


class Journal:
    """The rows of one result: those an earlier run finished, and those this one adds.

    Each process appends to a file of its own beside the result file; `write` of `alignment.evaluation.keep` removes
    them once the result is written. Use it as a context manager.

    Attributes:
        done: id -> row, finished before this run; a result file that is there counts as finished altogether.
    """

    def __init__(self, head: Result, ids: Sequence[str], file: Path, resume: bool):
        """Read what is there, and wait until every process has.

        Args:
            head: the result without rows: says what is measured, and of which model.
            ids: of all rows, in the order of the result.
            file: the result file.
            resume: keep finished rows; else they are deleted.

        Raises:
            InputError: what was finished belongs to other rows, another model or other settings.
        """
        self.ids, self.file, self.done = list(ids), file, {}
        self._key = text_hash(*(vars(head)[name] for name in _SAME), self.ids)
        self._new: dict[str, dict[str, Any]] = {}
        self._stream: TextIO | None = None
        state = process_state()
        if resume:
            self._read_result(head)
            for path in parts(file):
                self._read_part(path)
        state.wait_for_everyone()
        if state.is_main_process:
            if self.done:
                tqdm.write(f"{file}: {len(self.done):,} of {len(self.ids):,} rows are finished", file=sys.stderr)
            elif parts(file):
                tqdm.write(f"{file}: rows of an interrupted evaluation are dropped", file=sys.stderr)
        self._path = file.with_name(f".{file.name}.part{state.process_index}")
        if not resume and state.is_main_process:
            drop_parts(file)
        state.wait_for_everyone()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._stream is not None:
            self._stream.close()

    def todo(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the rows that are not finished."""
        return [row for row in rows if row["id"] not in self.done]

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Book finished rows of this process, and put them on disk."""
        if self._stream is None:
            fresh = not self._path.exists()
            self._stream = self._path.open("a", encoding="utf-8")
            if fresh:
                self._stream.write(json.dumps({"key": self._key}) + "\n")
            elif self._path.stat().st_size and not self._path.read_bytes().endswith(b"\n"):
                self._stream.write("\n")  # a line that was cut off stays a line of its own
        for row in rows:
            self._new[row["id"]] = row
            self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._stream.flush()

    def rows(self) -> list[dict[str, Any]]:
        """Return the finished rows of all processes, in the order of the ids; every process has to call it."""
        everyone = self.done | dict(gather_object(list(self._new.items())))
        return [everyone[name] for name in self.ids]

    def _read_result(self, head: Result) -> None:
        if not self.file.exists():
            return
        found = read_result(self.file)
        mine, theirs = ({name: vars(result)[name] for name in _SAME} for result in (head, found))
        differ = [name for name in _SAME if mine[name] != theirs[name]]
        if differ or {row["id"] for row in found.rows} != set(self.ids):
            raise self._other(self.file, f"{', '.join(differ) or 'rows'} differ")
        self.done |= {row["id"]: row for row in found.rows}

    def _read_part(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line that was being written when the run ended
                continue
            if number == 0 and row.get("key") != self._key:
                raise self._other(path, "its key is another")
            if number:
                self.done[row["id"]] = row

    def _other(self, path: Path, detail: str) -> InputError:
        return InputError(
            f"what is finished in {path} is of another evaluation: {detail}",
            where="--resume",
            why="rows made in another way would be mixed with new ones",
            fix="repeat the interrupted command as it was, or leave --resume out and take --overwrite",
        )


def parts(file: Path) -> list[Path]:
    """Return the files of finished rows beside a result file."""
    return sorted(file.parent.glob(f".{file.name}.part*"))


def drop_parts(file: Path) -> None:
    """Delete the files of finished rows beside a result file."""
    for path in parts(file):
        path.unlink(missing_ok=True)
