"""Metrics as `evaluate.Metric` objects that need no network: `metric("glue", "cola").compute(predictions, references)`.

`evaluate.load` downloads a script for each of them; these give the same numbers under the same keys.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from alignment.errors import InputError, nearest

_SPAN = {
    "predictions": {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")},
    "references": {
        "id": datasets.Value("string"),
        "answers": {"text": [datasets.Value("string")], "answer_start": [datasets.Value("int32")]},
    },
}
_TAGS = [datasets.Value("string")]


class OfflineMetric(evaluate.Metric):
    """One of FUNCTIONS as an `evaluate.Metric`; `config_name` chooses GLUE's task."""

    def __init__(self, name: str, config_name: str | None = None, **kwargs: Any):
        """Keep predictions in memory: nothing is written, and processes cannot meet in a file."""
        self._function, self._kind = FUNCTIONS[name]
        self._name = name
        super().__init__(config_name=config_name, keep_in_memory=True, **kwargs)
        self.info.module_name = name

    def _info(self) -> evaluate.MetricInfo:
        if self._kind == "span":
            features = _SPAN
        elif self._kind == "tags":
            features = {"predictions": _TAGS, "references": _TAGS}
        else:
            number = datasets.Value(self._kind if self.config_name != "stsb" else "float64")
            features = {"predictions": number, "references": number}
        return evaluate.MetricInfo(
            description=self._function.__doc__,
            citation="",
            inputs_description="predictions, references",
            features=datasets.Features(features),
            module_name=self._name,
        )

    def _compute(self, predictions: Sequence, references: Sequence, **options: Any) -> dict[str, float]:
        if self._name == "glue":
            options["config_name"] = self.config_name
        return self._function(predictions, references, **options)


def metric(name: str, config_name: str | None = None) -> OfflineMetric:
    """Return a metric by the name `evaluate.load` knows it under; raises InputError with the nearest."""
    if name not in FUNCTIONS:
        near = nearest(name, list(FUNCTIONS))
        raise InputError(f"no metric is called {name!r}", fix=f"did you mean {near}?" if near else ", ".join(FUNCTIONS))
    if name == "glue" and config_name not in GLUE:
        near = nearest(str(config_name), list(GLUE))
        fix = f"did you mean {near}?" if near else f"one of {', '.join(GLUE)}"
        raise InputError(f"GLUE has no task {config_name!r}", fix=fix)
    return OfflineMetric(name, config_name)


def accuracy(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Share of equal labels."""
    return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def matthews(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Matthews correlation of two labelings with any number of classes (Gorodkin 2004); 0 when one is constant."""
    guess, truth = np.asarray(predictions), np.asarray(references)
    classes = np.unique(np.concatenate([guess, truth]))
    g, t = guess[:, None] == classes, truth[:, None] == classes
    n, right = float(len(truth)), float((guess == truth).sum())
    together = n * right - float(g.sum(0) @ t.sum(0))
    spread = (n * n - float(g.sum(0) @ g.sum(0))) * (n * n - float(t.sum(0) @ t.sum(0)))
    return {"matthews_correlation": together / spread**0.5 if spread > 0 else 0.0}


def f1(predictions: Sequence, references: Sequence, average: str = "binary", pos_label: int = 1) -> dict[str, float]:
    """F1 of the class `pos_label`, or over classes: "macro" (each alike) or "micro"; 0 where it has no cases."""
    guess, truth = np.asarray(predictions), np.asarray(references)
    if average == "micro":
        return {"f1": accuracy(guess, truth)["accuracy"]}
    classes = [pos_label] if average == "binary" else np.unique(np.concatenate([guess, truth]))
    values = []
    for each in classes:
        both, all_ = int(((guess == each) & (truth == each)).sum()), int((guess == each).sum() + (truth == each).sum())
        values.append(2 * both / all_ if all_ else 0.0)
    return {"f1": float(np.mean(values))}


def pearson(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Pearson correlation; 0 when one side is constant, where it is not defined."""
    guess, truth = (np.asarray(side, dtype=np.float64) for side in (predictions, references))
    guess, truth = guess - guess.mean(), truth - truth.mean()
    size = float((guess @ guess) * (truth @ truth)) ** 0.5
    return {"pearsonr": float(guess @ truth) / size if size > 1e-12 else 0.0}


def spearman(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Spearman correlation: Pearson's of the ranks, equal values sharing theirs; 0 when one side is constant."""
    from scipy.stats import rankdata

    return {"spearmanr": pearson(rankdata(predictions), rankdata(references))["pearsonr"]}


def glue(predictions: Sequence, references: Sequence, config_name: str) -> dict[str, float]:
    """The official metrics of a GLUE task."""
    found: dict[str, float] = {}
    for function in GLUE[config_name]:
        found |= function(predictions, references)
    return found


def exact_matches(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Share of equal texts, case and punctuation counting."""
    return {"exact_match": float(np.mean([a == b for a, b in zip(predictions, references, strict=True)]))}


def normalise(text: str) -> str:
    """Return a text as SQuAD compares it: lower case, no punctuation, no articles, single spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(guess: str, truth: str) -> float:
    """F1 of the words two normalised texts share; without words on one side, 1 when the other has none either."""
    ours, theirs = normalise(guess).split(), normalise(truth).split()
    if not ours or not theirs:
        return float(ours == theirs)
    both = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * both / (len(ours) + len(theirs))


def squad_row(guess: str, answers: Sequence[str]) -> tuple[float, float]:
    """Return (exact match, F1) of one answer, each against the reference that suits it best, 0 to 1.

    A question without references is answered by an empty text (SQuAD 2.0).
    """
    answers = [answer for answer in answers if normalise(answer)] or [""]
    exact = max(float(normalise(guess) == normalise(answer)) for answer in answers)
    return exact, max(token_f1(guess, answer) for answer in answers)


def squad(predictions: Sequence[dict], references: Sequence[dict]) -> dict[str, float]:
    """Exact match and F1 in per cent, as the official SQuAD script gives them."""
    given = {row["id"]: row["prediction_text"] for row in predictions}
    scores = [squad_row(given.get(row["id"], ""), row["answers"]["text"]) for row in references]
    exact, overlap = (100 * float(np.mean(column)) for column in zip(*scores, strict=True))
    return {"exact_match": exact, "f1": overlap}


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (type, first, last) of the spans in a row of BIO or BIOES tags, read as the CoNLL script reads them.

    I- begins a span where none of its type is open; B- and S- always begin one, E- and S- end one.
    """
    start, kind, before = 0, "", "O"
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        name = name or "_"
        outside = mark == "O"
        begins = not outside and (mark in "BS" or before in ("O", "E", "S") or name != kind)
        if before not in ("O",) and (outside or begins):
            yield kind, start, place - 1
        if begins:
            start, kind = place, name
        before = mark


def seqeval(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole spans (micro), and the accuracy of the tags, as seqeval gives by default."""
    both = made = wanted = 0
    for guess, truth in zip(predictions, references, strict=True):
        ours, theirs = set(entities(guess)), set(entities(truth))
        both, made, wanted = both + len(ours & theirs), made + len(ours), wanted + len(theirs)
    equal = [
        a == b for guess, truth in zip(predictions, references, strict=True) for a, b in zip(guess, truth, strict=True)
    ]
    return {
        "overall_precision": both / made if made else 0.0,
        "overall_recall": both / wanted if wanted else 0.0,
        "overall_f1": 2 * both / (made + wanted) if made + wanted else 0.0,
        "overall_accuracy": float(np.mean(equal)) if equal else 0.0,
    }


# Name -> (function, what it is given).
FUNCTIONS: dict[str, tuple[Callable, str]] = {
    "accuracy": (accuracy, "int64"),
    "f1": (f1, "int64"),
    "matthews_correlation": (matthews, "int64"),
    "pearsonr": (pearson, "float64"),
    "spearmanr": (spearman, "float64"),
    "glue": (glue, "int64"),
    "exact_match": (exact_matches, "string"),
    "squad": (squad, "span"),
    "seqeval": (seqeval, "tags"),
}
GLUE: dict[str, tuple[Callable, ...]] = {
    "cola": (matthews,),
    "mrpc": (accuracy, f1),
    "qqp": (accuracy, f1),
    "stsb": (pearson, spearman),
    **dict.fromkeys(("sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli"), (accuracy,)),
}
