"""Multiple-choice questions by subject, checked: from the original csv files, parquet, JSON lines or the hub."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.errors import InputError, nearest
from alignment.files import Broken, decode, locate, read_file, roots
from alignment.report import text_hash
from alignment.sources import HUB, hub_part

LETTERS = "ABCD"
SPLITS = {"test": "test", "validation": "val", "dev": "dev"}  # the hub's name -> that of the csv files
# The 57 subjects of MMLU (Hendrycks et al. 2021) in the groups of lm-eval's `mmlu`.
GROUPS = {
    "stem": (
        "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
        "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
        "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
        "high_school_mathematics high_school_physics high_school_statistics machine_learning"
    ),
    "humanities": (
        "formal_logic high_school_european_history high_school_us_history high_school_world_history "
        "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
        "professional_law world_religions"
    ),
    "social_sciences": (
        "econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics "
        "high_school_microeconomics high_school_psychology human_sexuality professional_psychology "
        "public_relations security_studies sociology us_foreign_policy"
    ),
    "other": (
        "business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
        "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology"
    ),
}
GROUP_OF = {subject: group for group, subjects in GROUPS.items() for subject in subjects.split()}


@dataclass(frozen=True)
class Question:
    """One question with four choices; `answer` is the number of the right one, from 0."""

    subject: str
    question: str
    choices: tuple[str, str, str, str]
    answer: int

    @property
    def id(self) -> str:
        """A hash of what is asked and right: the same wherever the row is read from."""
        return text_hash(self.subject, self.question, self.choices, self.answer)


def read_questions(data: str, split: str = "test", subjects: Sequence[str] | None = None) -> dict[str, list[Question]]:
    """Return subject -> its questions of one split, subjects by name, questions in the order of the source.

    Args:
        data: a folder of the original csv files ({dev,val,test}/<subject>_<split>.csv, no header), of parquet files
            as on the hub (<subject or all>/<split>-*.parquet), or of <split>.jsonl; else an id on the hub.
        split: "test", "validation" or "dev".
        subjects: which ones; all that are there when not given.

    Raises:
        InputError: files or subjects are missing, a split is empty, or a row has not four choices and one answer.
    """
    wanted = None if subjects is None else [name.replace(" ", "_") for name in subjects]
    found: dict[str, list[Question]] = {}
    there = set()
    for where, row in _rows(data, split, wanted):
        question = _checked(row, where)
        there.add(question.subject)
        if wanted is None or question.subject in wanted:
            found.setdefault(question.subject, []).append(question)
    if not found and wanted is None:
        raise InputError(f"no questions in the split {split}", where=data, fix="another --data or --split")
    for subject in wanted or []:
        if subject not in found:
            near = nearest(subject, sorted(there or GROUP_OF))
            raise InputError(
                f"the subject {subject} has no questions in the split {split}",
                where=data,
                fix=f"did you mean {near}?" if near and near != subject else "leave --subjects out for all",
            )
    return {subject: found[subject] for subject in sorted(found)}


def _rows(data: str, split: str, subjects: list[str] | None) -> Iterator[tuple[str, dict]]:
    """Yield (where, row) of a source."""
    if HUB.fullmatch(data) and not any((root / data).exists() for root in roots()):
        for name in subjects or ["all"]:
            part = hub_part(data, name, split, False)
            yield from ((f"{part.where}, {name}, {split}, row {number}", row) for number, row in part.read())
        return
    folder, short = locate(data), SPLITS[split]
    if not folder.is_dir():
        raise InputError(
            f"{data} is a file",
            where="--data",
            why="examples come from the dev split and questions from another",
            fix="a folder with dev.jsonl and test.jsonl, or of MMLU's csv files",
        )
    files = [path for name in {short, split} if (path := folder / f"{name}.jsonl").is_file()]
    files = files or _parquet(folder, split, subjects)
    if files:
        for path in files:
            yield from ((f"{path}, row {number}", row) for number, row in read_file(path))
    else:
        yield from _csv_rows(folder, short, subjects)


def _parquet(folder: Path, split: str, subjects: list[str] | None) -> list[Path]:
    """Return the files of a split in a copy of the hub's repository: a folder of each subject, or one of all."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"*/{split}-*.parquet")):
        files.setdefault(path.parent.name, []).append(path)
    if subjects is not None and set(subjects) <= set(files):
        return [path for name in subjects for path in files[name]]
    return files["all"] if "all" in files else [path for paths in files.values() for path in paths]


def _csv_rows(folder: Path, split: str, subjects: list[str] | None) -> Iterator[tuple[str, dict]]:
    """Yield (where, row) of the original csv files, {split}/<subject>_{split}.csv."""
    there = {path.stem.removesuffix(f"_{split}"): path for path in sorted((folder / split).glob(f"*_{split}.csv"))}
    if not there:
        raise InputError(
            f"there are no questions of the split {split} in {folder}",
            where=str(folder / split),
            fix=f"{split}/<subject>_{split}.csv, {split}.jsonl or <subject>/{split}-*.parquet",
        )
    # Some of MMLU's subjects mean all of them: the mean over fewer is another number.
    names = subjects or sorted(there.keys() | (GROUP_OF.keys() if there.keys() & GROUP_OF.keys() else set()))
    for name in names:
        if name not in there:
            near = nearest(name, sorted(there))
            known = name in GROUP_OF
            raise InputError(
                f"there is no file of the subject {name}",
                where=str(folder / split / f"{name}_{split}.csv"),
                why="the mean would be over other questions than everybody's" if known and subjects is None else "",
                fix="copy it there, or choose with --subjects" if known else f"did you mean {near}?" if near else "",
            )
        text = decode(there[name].read_bytes(), there[name])
        reader = csv.reader(io.StringIO(text, newline=""))
        for cells in reader:
            where = f"{there[name]}, line {reader.line_num}"
            if len(cells) != 6:
                raise InputError(
                    f"{len(cells)} columns instead of 6",
                    where=where,
                    why="a row is question, A, B, C, D, letter of the answer",
                    fix="quote a cell with a comma in it",
                )
            yield where, {"subject": name, "question": cells[0], "choices": cells[1:5], "answer": cells[5].strip()}


def _checked(row: dict | Broken, where: str) -> Question:
    """Return a row as a Question; raise InputError when it is none."""
    if isinstance(row, Broken):
        raise InputError("the row cannot be read", where=where, why=row.why)
    missing = [name for name in ("subject", "question", "choices", "answer") if row.get(name) is None]
    if missing:
        raise InputError(
            f"the row has no {missing[0]}", where=f"{where}, columns {', '.join(row)}", fix="subject, question, "
            "choices (four), answer (a letter, or a number from 0)",
        )  # fmt: skip
    choices, answer = tuple(map(str, row["choices"])), row["answer"]
    if len(choices) != 4:
        raise InputError(f"{len(choices)} choices instead of 4", where=where)
    number = LETTERS.find(answer) if isinstance(answer, str) and len(answer) == 1 else answer
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 4:
        raise InputError(f"the answer is {answer!r}", where=where, fix="A, B, C or D (in JSON and parquet also 0 to 3)")
    return Question(str(row["subject"]).replace(" ", "_"), str(row["question"]), choices, number)
