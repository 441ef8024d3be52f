"""The nine GLUE tasks (Wang et al. 2019): official files or the hub, labels, metrics, prompts, files to submit."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import InputError, nearest
from alignment.files import Broken, decode, locate
from alignment.sources import HUB, Part, Plan, hub_part

HUB_ID = "nyu-mll/glue"
DIAGNOSTIC = (
    "test-ax"  # the diagnostic set, which models of MNLI are asked; a folder, and on the hub a task, of its own
)


@dataclass(frozen=True)
class Task:
    """One task of GLUE.

    Attributes:
        name: as the hub and run_glue.py call it. folder: of the official download, and its file to submit.
        tsv: columns of text, second text (or "") and label in the official files. hub: of both texts on the hub.
        labels: class names in the order of their numbers; none for a regression.
        metrics: the official ones, as `alignment.metrics` calls them.
        named: the labels stand in the official files as names, and are submitted as names.
        prompt, words: lm-eval 0.4's question and the word of each label, in the order of `labels`.
    """

    name: str
    folder: str
    tsv: tuple[str, str, str]
    hub: tuple[str, str]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    named: bool = False
    prompt: str = ""
    words: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, tuple[str, str, str]]:
        """Return split -> (official file, split on the hub, file to submit)."""
        if self.name != "mnli":
            return {
                "train": ("train.tsv", "train", ""),
                "dev": ("dev.tsv", "validation", ""),
                "test": ("test.tsv", "test", f"{self.folder}.tsv"),
            }
        found = {"train": ("train.tsv", "train", "")}
        for ours, theirs, short in (("", "matched", "m"), ("-mm", "mismatched", "mm")):
            found[f"dev{ours}"] = (f"dev_{theirs}.tsv", f"validation_{theirs}", "")
            found[f"test{ours}"] = (f"test_{theirs}.tsv", f"test_{theirs}", f"MNLI-{short}.tsv")
        return found | {DIAGNOSTIC: ("diagnostic.tsv", "test", "AX.tsv")}


_BOTH = ("sentence1", "sentence2", "label")
_ENTAILS = ("entailment", "not_entailment")
_TRUE = "{text}\nQuestion: {text_pair} True or False?\nAnswer:"
TASKS = {
    task.name: task
    for task in (
        Task(
            "cola", "CoLA", ("sentence", "", "label"), ("sentence", ""), ("unacceptable", "acceptable"),
            ("matthews_correlation",),
            prompt="{text}\nQuestion: Does this sentence make sense?\nAnswer:", words=("no", "yes"),
        ),
        Task(
            "sst2", "SST-2", ("sentence", "", "label"), ("sentence", ""), ("negative", "positive"),
            prompt="{text}\nQuestion: Is this sentence positive or negative?\nAnswer:",
            words=("negative", "positive"),
        ),
        Task(
            "mrpc", "MRPC", ("#1 String", "#2 String", "Quality"), ("sentence1", "sentence2"),
            ("not_equivalent", "equivalent"), ("accuracy", "f1"), words=("no", "yes"),
            prompt="Sentence 1: {text}\nSentence 2: {text_pair}\n"
            "Question: Do both sentences mean the same thing?\nAnswer:",
        ),
        Task(
            "stsb", "STS-B", ("sentence1", "sentence2", "score"), ("sentence1", "sentence2"), (),
            ("pearsonr", "spearmanr"),
        ),
        Task(
            "qqp", "QQP", ("question1", "question2", "is_duplicate"), ("question1", "question2"),
            ("not_duplicate", "duplicate"), ("accuracy", "f1"), words=("no", "yes"),
            prompt="Question 1: {text}\nQuestion 2: {text_pair}\n"
            "Question: Do both questions ask the same thing?\nAnswer:",
        ),
        Task(
            "mnli", "MNLI", ("sentence1", "sentence2", "gold_label"), ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"), named=True,
            prompt="{text}\nQuestion: {text_pair} True, False or Neither?\nAnswer:",
            words=("True", "Neither", "False"),
        ),
        Task(
            "qnli", "QNLI", ("question", "sentence", "label"), ("question", "sentence"), _ENTAILS, named=True,
            prompt="{text}\n{text_pair}\nQuestion: Does this response answer the question?\nAnswer:",
            words=("yes", "no"),
        ),
        Task("rte", "RTE", _BOTH, _BOTH[:2], _ENTAILS, named=True, prompt=_TRUE, words=("True", "False")),
        Task("wnli", "WNLI", _BOTH, _BOTH[:2], _ENTAILS[::-1], prompt=_TRUE, words=("False", "True")),
    )
}  # fmt: skip


def find_task(name: str) -> Task:
    """Return the task of this name, in any spelling (sst2, SST-2); raises InputError with the nearest."""
    plain = name.lower().replace("-", "").replace("_", "")
    if plain in TASKS:
        return TASKS[plain]
    near = nearest(plain, list(TASKS))
    raise InputError(
        f"GLUE has no task {name!r}",
        where="--task",
        fix=(f"did you mean {near}? " if near else "") + f"The tasks are {', '.join(TASKS)}",
    )


def plan(task: Task, spec: str) -> Plan:
    """Return the training rows of a task and those it is evaluated on while it trains.

    Args:
        task: the task.
        spec: the folder of the official download (the one of all tasks, or of this one), or a hub id.
    """
    return Plan([part(task, spec, "train", "train"), part(task, spec, "dev", "eval")])


def part(task: Task, spec: str, split: str, role: str = "eval") -> Part:
    """Return one split of a task as rows of "text", "text_pair" where there are two, and "label" where it is known."""
    file, name, _ = task.splits[split]
    if HUB.fullmatch(spec) and not Path(spec).exists():
        found = hub_part(spec, "ax" if split == DIAGNOSTIC else task.name, name, streaming=False)
        rows = found.read
        found.read = lambda: ((number, from_hub(task, row)) for number, row in rows())
        found.role = role
        return found
    folder = locate(spec)
    path = find_file(task, folder, split)
    if path is None:
        raise InputError(
            f"there is no {task.folder}/{file}",
            where=f"--data {spec}",
            why=f"--task {task.name} reads the files of the official GLUE download",
            fix=f"the folder that holds {task.folder}/, or --data {HUB_ID}",
        )
    where = f"{task.folder}/{file}"
    return Part(where, str(path), split, lambda: read_tsv(task, path, split), role=role)


def find_file(task: Task, folder: Path, split: str) -> Path | None:
    """Return the official file of a split, in the folder of all tasks or of this one; None where it is not there."""
    file, inner = task.splits[split][0], "diagnostic" if split == DIAGNOSTIC else task.folder
    return next((place for place in (folder / inner / file, folder / file) if place.is_file()), None)


def read_tsv(task: Task, path: Path, split: str) -> Iterator[tuple[int, dict]]:
    """Yield (row number, row) of an official file: cells between tabs, quotes are letters, the header first.

    CoLA's files for training have no header. A row of the test split has its "index".

    Raises:
        InputError: a column is missing.
    """
    lines = decode(path.read_bytes(), path).split("\n")
    test = split.startswith("test")
    first, second, label = task.tsv
    if task.name == "cola" and not test:
        header, start = ["source", "label", "mark", "sentence"], 0
    else:
        header, start = lines[0].rstrip("\r").split("\t"), 1
    index = ("id" if task.name == "qqp" else "index") if test else ""
    wanted = {"text": first, "text_pair": second, "index": index, "label": "" if test else label}
    wanted = {ours: theirs for ours, theirs in wanted.items() if theirs}
    missing = [name for name in wanted.values() if name not in header]
    if missing:
        near = nearest(missing[0], header)
        raise InputError(
            f"{path.name} has no column {missing[0]!r}",
            where=f"{path}, line 1",
            why=f"its columns are {', '.join(header)}",
            fix=f"is {near!r} meant? Rename it" if near else f"the file of the official download of {task.folder}",
        )
    if not any(lines[start:]):
        raise InputError(f"{path.name} has no rows", where=str(path), fix="check how the file was written")
    places = {ours: header.index(theirs) for ours, theirs in wanted.items()}
    for number, line in enumerate(lines[start:], 1):
        cells = line.rstrip("\r").split("\t")
        if line and len(cells) <= max(places.values()):
            yield number, Broken(f"{len(cells)} cells where the header has {len(header)}")
        elif line:
            yield number, finished(task, {ours: cells[at] for ours, at in places.items()})


def finished(task: Task, row: dict[str, Any]) -> dict:
    """Return a row with its label by name, or as the number of a regression; what cannot be is left to the checks."""
    label = row.get("label")
    if isinstance(label, str) and not task.labels:
        try:
            row["label"] = float(label)
        except ValueError:
            return Broken(f"the score is {label!r}, not a number")
    elif isinstance(label, str) and label not in task.labels:
        if not label.isdigit() or int(label) >= len(task.labels):
            return Broken(f"the label is {label!r}, not one of {', '.join(task.labels)}")
        row["label"] = task.labels[int(label)]
    return row


def from_hub(task: Task, row: dict[str, Any]) -> dict:
    """Return a row of the hub in our columns; -1 stands for no label there."""
    out = {"text": row[task.hub[0]], "index": row["idx"]}
    if task.hub[1]:
        out["text_pair"] = row[task.hub[1]]
    if row["label"] == -1:
        return out
    return out | {"label": task.labels[row["label"]] if task.labels else float(row["label"])}


def submission(task: Task, indices: list[Any], predictions: list[Any]) -> str:
    """Return the file to submit for one test split: a line for each row, index and prediction.

    Args:
        task: the task.
        indices: of the test rows.
        predictions: class numbers, or scores, which are kept between 0 and 5.
    """
    if not task.labels:
        words = [f"{min(max(float(value), 0.0), 5.0):.3f}" for value in predictions]
    else:
        words = [task.labels[value] if task.named else str(value) for value in predictions]
    lines = [f"{index}\t{word}" for index, word in zip(indices, words, strict=True)]
    return "\n".join(["index\tprediction", *lines, ""])


def macro_average(scores: dict[str, dict[str, float]]) -> float:
    """Return GLUE's average: the metrics of a task first (m and mm of MNLI among them), then the tasks.

    Args:
        scores: task -> metric -> value, between -1 and 1.
    """
    means = [sum(metrics.values()) / len(metrics) for metrics in scores.values()]
    return sum(means) / len(means)


def question(task: Task, row: dict[str, str]) -> str:
    """Return lm-eval's prompt for a row; the answer follows after a space."""
    pair = row.get("text_pair", "")
    if task.name == "mnli":
        pair = pair.strip() + ("" if pair.strip().endswith(".") else ".")
    return task.prompt.format(text=row["text"], text_pair=pair)
