"""Our offline metrics against scikit-learn, scipy and a few lines written out as the originals have them."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn

from alignment.errors import InputError
from alignment.metrics import entities, metric, normalise, squad_row

RNG = np.random.default_rng(0)
LABELLED = [(RNG.integers(0, k, 60), RNG.integers(0, k, 60)) for k in (2, 2, 3, 5)]


@pytest.mark.parametrize(("guess", "truth"), LABELLED)
def test_classes_as_scikit_learn(guess, truth):
    def ours(name, **options):
        return metric(name).compute(predictions=guess, references=truth, **options)

    assert ours("accuracy")["accuracy"] == pytest.approx(sklearn.accuracy_score(truth, guess))
    assert ours("matthews_correlation")["matthews_correlation"] == pytest.approx(
        sklearn.matthews_corrcoef(truth, guess)
    )
    for average in ("macro", "micro"):
        wanted = sklearn.f1_score(truth, guess, average=average)
        assert ours("f1", average=average)["f1"] == pytest.approx(wanted)
    if max(truth) == 1:
        assert ours("f1")["f1"] == pytest.approx(sklearn.f1_score(truth, guess))
        assert ours("f1", pos_label=0)["f1"] == pytest.approx(sklearn.f1_score(truth, guess, pos_label=0))


def test_numbers_as_scipy():
    guess, truth = RNG.normal(size=80), RNG.integers(0, 6, 80).astype(float)  # with ties
    found = metric("glue", "stsb").compute(predictions=guess, references=truth)
    assert found == {
        "pearsonr": pytest.approx(stats.pearsonr(guess, truth)[0]),
        "spearmanr": pytest.approx(stats.spearmanr(guess, truth)[0]),
    }


def test_what_is_not_defined_is_0():
    same, truth = [1] * 6, [0, 1, 0, 1, 1, 0]
    assert metric("matthews_correlation").compute(predictions=same, references=truth) == {"matthews_correlation": 0.0}
    assert metric("pearsonr").compute(predictions=same, references=truth) == {"pearsonr": 0.0}
    assert metric("spearmanr").compute(predictions=same, references=truth) == {"spearmanr": 0.0}
    assert metric("f1").compute(predictions=[0, 0], references=[0, 0]) == {"f1": 0.0}


@pytest.mark.parametrize(
    ("task", "keys"),
    [("cola", {"matthews_correlation"}), ("mrpc", {"accuracy", "f1"}), ("qqp", {"accuracy", "f1"}),
     ("rte", {"accuracy"}), ("mnli", {"accuracy"}), ("stsb", {"pearsonr", "spearmanr"})],
)  # fmt: skip
def test_glue_has_the_official_metrics(task, keys):
    made = metric("glue", task).compute(predictions=[0, 1, 1], references=[0, 1, 0])
    assert made.keys() == keys


def test_metric_gathers_batches_as_evaluate_does():
    whole = metric("glue", "mrpc")
    for guess, truth in zip(([0, 1], [1, 1]), ([0, 1], [0, 1]), strict=True):
        whole.add_batch(predictions=guess, references=truth)
    assert whole.compute() == metric("glue", "mrpc").compute(predictions=[0, 1, 1, 1], references=[0, 1, 0, 1])


def conlleval(tags):
    """Spans by the rules of the CoNLL script, one rule a line: (type, first, last)."""
    found, before, kind, start = [], "O", "", 0
    for i, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        ends = (
            (before == "B" and mark in "BSO") or (before == "I" and mark in "BSO") or before in "ES" and before != "O"
            or (before != "O" and kind != name)
        )  # fmt: skip
        starts = (
            mark in "BS" or (before in "ESO" and mark in "EI") or (mark != "O" and kind != name)
        )  # fmt: skip
        if ends:
            found.append((kind, start, i - 1))
        if starts:
            start = i
        before, kind = mark, name
    return found


def test_spans_as_the_conll_script():
    rows = [["B-A", "I-A", "O", "I-B", "I-B", "I-A", "B-A"], ["O"], ["I-A"], ["B-A", "B-A", "E-A", "S-B", "I-B"]]
    marks = ["O", *(f"{m}-{k}" for m in "BIES" for k in ("PER", "LOC"))]
    rows += [list(RNG.choice(marks, RNG.integers(1, 12))) for _ in range(300)]
    for row in rows:
        assert list(entities(row)) == conlleval(row), row


def test_seqeval_counts_whole_spans():
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-PER"]]
    guess = [["B-PER", "I-PER", "O", "O"], ["B-LOC", "B-PER"]]
    assert metric("seqeval").compute(predictions=guess, references=truth) == {
        "overall_precision": pytest.approx(2 / 3),
        "overall_recall": pytest.approx(2 / 3),
        "overall_f1": pytest.approx(2 / 3),
        "overall_accuracy": pytest.approx(4 / 6),
    }


def test_squad_as_the_official_script():
    assert normalise("  The Cat's   hat, a dream! ") == "cats hat dream"
    assert squad_row("The cat", ["a dog", "cat"]) == (1.0, 1.0)
    exact, overlap = squad_row("black cat sat", ["the black cat"])
    assert exact == 0 and overlap == pytest.approx(0.8)
    assert squad_row("", []) == (1.0, 1.0) and squad_row("x", []) == (0.0, 0.0)
    made = metric("squad").compute(
        predictions=[{"id": "1", "prediction_text": "cat"}, {"id": "2", "prediction_text": "dog"}],
        references=[
            {"id": "1", "answers": {"text": ["The cat"], "answer_start": [0]}},
            {"id": "2", "answers": {"text": ["a cow"], "answer_start": [3]}},
        ],
    )
    assert made == {"exact_match": 50.0, "f1": 50.0}


def test_unknown_metric_names_the_nearest():
    with pytest.raises(InputError, match="did you mean accuracy"):
        metric("acuracy")
    with pytest.raises(InputError, match="did you mean cola"):
        metric("glue", "colla")
