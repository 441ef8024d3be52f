"""Rows with labels: for a sequence, for each of its tokens, or an answer that stands in a text; what can be wrong."""

import math
from collections.abc import Iterator

from alignment.rows import Problem, check_text

# The columns of each head; those in brackets a row may lack.
LABELLED = {
    "sequence": ("text", "text_pair", "label"),
    "token": ("tokens", "tags"),
    "span": ("id", "question", "context", "answers"),
}
NEEDED_LABELLED = {
    "sequence": ({"text", "label"},),
    "token": ({"tokens", "tags"},),
    "span": ({"question", "context", "answers"},),
}
# The names a text or a pair of texts goes by; the first that is there is meant, pairs before single texts.
PAIRS = (
    ("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("question", "sentence"),
    ("text", "text_pair"), ("text_a", "text_b"),
)  # fmt: skip
SINGLES = ("sentence", "text", "review", "comment", "tweet", "content")
LABELS = ("label", "labels", "sentiment", "category", "class", "target", "score")
TAGS = ("tags", "ner_tags", "pos_tags", "labels")


def labelled_columns(columns: list[str], kind: str) -> dict[str, str] | None:
    """Return {column of the kind: its name in these rows}, or None where they are not all there."""
    have = set(columns)
    if kind == "span":
        found = {name: name for name in LABELLED["span"] if name in have}
        return found if NEEDED_LABELLED["span"][0] <= found.keys() else None
    if kind == "token":
        tags = next((name for name in TAGS if name in have), None)
        return {"tokens": "tokens", "tags": tags} if tags and "tokens" in have else None
    label = next((name for name in LABELS if name in have), None)
    pair = next((pair for pair in PAIRS if have.issuperset(pair)), None)
    single = next((name for name in SINGLES if name in have), None)
    if label is None or not (pair or single):
        return None
    return {"text": pair[0], "text_pair": pair[1], "label": label} if pair else {"text": single, "label": label}


def check_sequence(row: dict, alternate: bool) -> Iterator[Problem]:
    """Check a text or a pair of texts with its label: a class by name or number, or a decimal number."""
    for column in ("text", "text_pair"):
        if column in row:
            yield from check_text(column, row[column])
    label = row.get("label")
    if label is None or label == "":
        yield Problem("label", "no value", "the loss needs it", "write the label or drop the row", "label missing")
    elif not isinstance(label, str | int | float):
        kind = type(label).__name__
        yield Problem("label", f"a {kind}", "a label is a name or a number", "one label a row", "label is no label")
    elif isinstance(label, float) and not math.isfinite(label):
        yield Problem("label", str(label), "the loss would be nan", "drop the row", "label is not finite")
    elif isinstance(label, int) and label < 0:
        yield Problem("label", str(label), "it stands for no label", "rows with labels", "label below 0")


def check_tokens(row: dict, alternate: bool) -> Iterator[Problem]:
    """Check words with a tag each."""
    words, tags = row.get("tokens"), row.get("tags")
    for column, values in (("tokens", words), ("tags", tags)):
        if not isinstance(values, list) or not values:
            yield Problem(column, f"{values!r}, not a list", "", "a list with a value a word", f"{column} is no list")
            return
    if len(words) != len(tags):
        what = f"{len(tags)} for {len(words)} tokens"
        yield Problem(
            "tags", what, "nobody can tell which belongs to which", "one tag a token", "tags do not fit tokens"
        )
    bad = next((word for word in words if not isinstance(word, str)), None)
    if bad is not None:
        yield Problem("tokens", f"holds {bad!r}", "", "words as text", "a token is no text")
    kinds = sorted({type(tag).__name__ for tag in tags})
    if len(kinds) > 1 or kinds[0] not in ("str", "int"):
        yield Problem("tags", f"holds {' and '.join(kinds)}", "", "names, or whole numbers", "tags of several kinds")


def check_span(row: dict, alternate: bool) -> Iterator[Problem]:
    """Check a question, a context and where in it the answers stand (SQuAD's form)."""
    yield from check_text("question", row.get("question"))
    yield from check_text("context", row.get("context"))
    answers = row.get("answers")
    fits = isinstance(answers, dict) and all(isinstance(answers.get(key), list) for key in ("text", "answer_start"))
    if not fits or len(answers["text"]) != len(answers["answer_start"]):
        want = '{"text": ["…"], "answer_start": [0]}'
        yield Problem("answers", f"{answers!r}"[:60], "", want, "answers are not in SQuAD's form")
        return
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        there = str(row.get("context"))[start : start + len(text)] if isinstance(start, int) and start >= 0 else ""
        if text and there != text:
            yield Problem(
                "answers",
                f"{text!r} is not at answer_start {start}: there stands {there!r}",
                "the model would learn to point beside the answer",
                "count characters (not bytes, not tokens) from 0, in the context as it is",
                "answer_start does not fit the context",
            )
            return


CHECKS = {"sequence": check_sequence, "token": check_tokens, "span": check_span}
