"""Paired comparison against scipy and against simulation; the words it chooses; the script."""

import json
import runpy
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from alignment.compare import (
    bootstrap_interval,
    corrected,
    holm,
    join,
    mcnemar,
    paired,
    score_interval,
    sentence,
    sign_flip,
    verdict,
)
from alignment.errors import InputError
from alignment.report import Result, write_result


def scores(up: int, down: int, both: int, neither: int):
    """Two 0/1 vectors with these counts of changed and unchanged rows."""
    first = [0] * up + [1] * down + [1] * both + [0] * neither
    second = [1] * up + [0] * down + [1] * both + [0] * neither
    return first, second


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_the_exact_binomial_test(up, down):
    expected = stats.binomtest(up, up + down, 0.5).pvalue if up + down else 1.0
    assert mcnemar(up, down) == pytest.approx(expected, abs=1e-12)


def test_sign_flip_enumerates_small_sets_like_scipy():
    change = np.array([0.5, -0.25, 0.125, 0.75, 0.3, -0.1, 0.0, 0.0])
    reference = stats.permutation_test(
        (change,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip(change) == pytest.approx(reference.pvalue, abs=1e-12)


def test_sign_flip_of_many_rows_agrees_with_the_t_test():
    change = np.random.default_rng(0).normal(0.1, 1, size=400)
    assert sign_flip(change) == pytest.approx(stats.ttest_1samp(change, 0).pvalue, abs=0.01)
    assert 0 < sign_flip(np.ones(50)) < 0.001, "never exactly zero"
    assert sign_flip(np.zeros(50)) == 1.0


def test_sign_flip_keeps_its_level():
    """Without a difference p is below 0.05 in about one of twenty sets."""
    rng = np.random.default_rng(0)
    sets = rng.exponential(1, size=(400, 40)) - rng.exponential(1, size=(400, 40))
    rejected = np.mean([sign_flip(change, resamples=500) < 0.05 for change in sets])
    assert 0.025 < rejected < 0.08


def test_bootstrap_interval_equals_scipys():
    change = np.random.default_rng(1).exponential(1, size=200)
    low, high = bootstrap_interval(change, seed=3)
    reference = stats.bootstrap((change,), np.mean, method="percentile", rng=4).confidence_interval
    width = reference.high - reference.low
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.03 * width)
    assert bootstrap_interval(change, seed=3) == (low, high)
    assert bootstrap_interval(change, seed=4) != (low, high)


@pytest.mark.parametrize(("up", "down"), [(0.02, 0.01), (0.10, 0.05), (0.004, 0.0), (0.30, 0.02)])
def test_the_interval_of_0_1_scores_covers_the_truth(up, down):
    """In 95 of 100 sets of 300 rows the true difference lies inside, for rare and for frequent changes."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        counts = rng.multinomial(300, [up, down, 1 - up - down])
        difference = paired(*scores(counts[0], counts[1], 0, counts[2]))
        inside += difference.low <= up - down <= difference.high
    assert inside / 200 >= 0.91


def test_the_interval_of_real_scores_covers_the_truth():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        change = rng.exponential(1, size=100) - 0.7
        low, high = bootstrap_interval(change, resamples=1000, seed=1)
        inside += low <= 0.3 <= high
    assert 0.91 <= inside / 300 <= 0.98


def score_z(up: int, down: int, rows: int, delta: float) -> float:
    """The score statistic of "the difference is delta"; its nuisance share maximises the likelihood."""

    def loss(share: float) -> float:  # share of rows that fell; share + delta rose
        parts = ((up, share + delta), (down, share), (rows - up - down, 1 - 2 * share - delta))
        return -sum(count * np.log(p) for count, p in parts if count)

    bounds = (max(0.0, -delta) + 1e-12, (1 - delta) / 2 - 1e-12)
    share = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return (up - down - rows * delta) / np.sqrt(rows * (2 * share + delta * (1 - delta)))


@pytest.mark.parametrize(("up", "down", "rows"), [(12, 2, 50), (5, 1, 400), (0, 7, 90), (3, 3, 30), (1, 0, 60)])
def test_the_score_interval_is_what_the_score_test_keeps(up, down, rows):
    low, high = score_interval(up, down, rows)
    assert score_z(up, down, rows, low) == pytest.approx(1.959964, abs=2e-4)
    assert score_z(up, down, rows, high) == pytest.approx(-1.959964, abs=2e-4)


def test_the_score_interval_without_changes_has_a_width():
    low, high = score_interval(0, 0, 100)
    assert low == pytest.approx(-high) and 0.03 < high < 0.05


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 60))
def test_the_score_interval_is_antisymmetric_and_holds_the_estimate(up, down, same):
    rows = up + down + same
    low, high = score_interval(up, down, rows)
    mirrored = score_interval(down, up, rows)
    assert -1 <= low <= (up - down) / rows <= high <= 1
    assert (low, high) == pytest.approx((-mirrored[1], -mirrored[0]), abs=1e-9)


def test_no_change_still_has_an_interval():
    same = paired(*scores(0, 0, 200, 200))
    assert same.low < 0 < same.high and same.p == 1.0
    assert verdict(same) == "the same"
    assert "every one of 400 rows" in sentence(same, "base", "sft")


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == [0.02]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_never_helps_and_keeps_the_order(values):
    fixed = holm(values)
    assert all(p <= q <= 1 for p, q in zip(values, fixed, strict=True))
    assert [fixed[i] for i in np.argsort(values)] == sorted(fixed)


def test_verdicts_and_their_words():
    better, worse, unclear = paired(*scores(30, 5, 100, 265)), paired(*scores(5, 30, 100, 265)), paired(
        *scores(12, 9, 100, 279)
    )  # fmt: skip
    assert [verdict(d) for d in (better, worse, unclear)] == ["better", "worse", "no difference shown"]
    assert better.value == pytest.approx(25 / 400) and (better.up, better.down) == (30, 5)
    assert "dpo is better than sft by 6.2 points on 400 rows" in sentence(better, "sft", "dpo")
    text = sentence(unclear, "sft", "dpo")
    assert text.startswith("No difference shown with 400 rows") and "smaller than about" in text
    assert verdict(corrected([unclear, better])[1]) == "better"
    weak = paired(*scores(12, 3, 100, 285))
    assert weak.p < 0.05 and verdict(corrected([weak] * 5)[0]) == "no difference shown"


def test_what_is_called_visible_is_found_in_four_of_five_tries():
    rng = np.random.default_rng(0)
    noise = paired(*scores(40, 40, 160, 160))
    shift = noise.visible
    found = 0
    for _ in range(300):
        counts = rng.multinomial(400, [0.1 + shift / 2, 0.1 - shift / 2, 0.8])
        found += mcnemar(counts[0], counts[1]) < 0.05
    assert 0.7 <= found / 300 <= 0.88


def test_real_scores_use_the_permutation_test():
    rng = np.random.default_rng(0)
    first = rng.uniform(0, 1, 300)
    difference = paired(first, np.clip(first + rng.normal(0.03, 0.1, 300), 0, 1))
    assert difference.test == "sign-flip permutation" and verdict(difference) == "better"
    assert difference.low < difference.value < difference.high


@pytest.mark.parametrize(("first", "second"), [([1.0], [1.0]), ([1.0, 0.0], [1.0]), ([1.0, float("nan")], [1.0, 0.0])])
def test_scores_that_cannot_be_paired_are_refused(first, second):
    with pytest.raises(InputError):
        paired(first, second)


def rows(ids: str, value: float = 1.0):
    return [{"id": i, "score": value} for i in ids]


def test_join_pairs_by_id_and_refuses_other_rows():
    pairs = join(rows("abc"), rows("cab", 0.0))
    assert [(a["id"], b["id"]) for a, b in pairs] == [("a", "a"), ("b", "b"), ("c", "c")]
    with pytest.raises(InputError, match="2 in both, 1 only in base, 2 only in sft") as caught:
        join(rows("abc"), rows("bcde"), names=("base", "sft"))
    assert "--common" in str(caught.value)
    assert [a["id"] for a, _ in join(rows("abc"), rows("bcde"), common=True)] == ["b", "c"]
    with pytest.raises(InputError) as caught:
        join(rows("ab"), rows("cd"), common=True)
    assert "--common" not in str(caught.value)


# --- the script ---


def result(values: list[float], **changes) -> Result:
    made = [
        {
            "id": f"r{i}",
            "score": v,
            "exact": v,
            "task": "ab"[i % 2],
            "prompt": f"q{i}",
            "answer": "x",
            "text": "y",
        }
        for i, v in enumerate(values)
    ]
    base = {
        "task": "generate", "version": 1, "data": "d", "model": "m", "run": None, "prompt_hash": "h",
        "settings": {"temperature": 0.0}, "rows": made, "metrics": {},
    }  # fmt: skip
    return Result(**{**base, **changes})


def compare(monkeypatch, capsys, *words) -> str:
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    runpy.run_path(str(ROOT / "eval" / "compare.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture
def files(tmp_path):
    def write(**results: Result):
        for name, made in results.items():
            write_result(made, tmp_path / f"{name}.json")
        return [tmp_path / f"{name}.json" for name in results]

    return write


def test_three_files_give_a_table_verdicts_and_changed_rows(files, monkeypatch, capsys, tmp_path):
    first, second = scores(40, 5, 100, 255)
    paths = files(base=result([0.0] * 400), sft=result(first), dpo=result(second, settings={"temperature": 1.0}))
    out = compare(monkeypatch, capsys, *paths, "--by", "task", "--output", tmp_path / "c.json")
    assert max(map(len, out.splitlines())) <= 100
    assert "dpo is better than sft by 8.8 points" in " ".join(out.split())
    assert "sft and dpo differ in temperature: 0.0 and 1.0" in " ".join(out.split())
    assert "40 rows rose" in out and "5 rows fell" in out and "Holm" in out
    saved = json.loads((tmp_path / "c.json").read_text())
    last = saved["comparisons"][-1]
    assert (last["first"], last["second"], last["verdict"]) == ("sft", "dpo", "better")
    assert len(last["rose"]) == 40 and last["fell"] == [f"r{i}" for i in range(40, 45)]
    assert last["difference"]["p_holm"] >= last["difference"]["p"]


def test_pairs_with_the_first_only(files, monkeypatch, capsys):
    paths = files(a=result([0.0] * 20), b=result([1.0] * 20), c=result([1.0] * 20))
    out = compare(monkeypatch, capsys, *paths, "--pairs", "first")
    assert "b is better than a" in out and "c is better than a" in out and "c scores the same as b" not in out


@pytest.mark.parametrize(
    ("second", "words", "message"),
    [
        ({"version": 2}, [], "score differently"),
        ({"prompt_hash": "other"}, [], "--other_prompts"),
        ({}, ["--column", "exakt"], "--column exact"),
        ({}, ["--column", "text"], "no number 'text'"),
        ({}, ["--by", "kind"], "no column 'kind'"),
        ({"rows": rows(["r0", "x"])}, [], "do not hold the same rows"),
        ({"rows": rows("ab"), "data": "e"}, [], "these files have no row in common"),
        ({}, ["--target", "generate"], "several tasks"),
    ],
)
def test_files_that_cannot_be_compared_are_refused(files, monkeypatch, capsys, second, words, message):
    paths = files(a=result([0.0, 1.0, 1.0]), b=result([1.0, 1.0, 1.0], **second))
    with pytest.raises(InputError, match=message):
        compare(monkeypatch, capsys, *paths, *words)


def test_other_wording_is_compared_when_asked_for(files, monkeypatch, capsys):
    paths = files(a=result([0.0] * 9), b=result([1.0] * 9, prompt_hash="other"))
    assert "b is better than a" in compare(monkeypatch, capsys, *paths, "--other_prompts")


def test_one_file_is_refused(files, monkeypatch, capsys):
    with pytest.raises(InputError, match="nothing to be compared"):
        compare(monkeypatch, capsys, *files(a=result([0.0, 1.0])))


def suite(task: str, values: list[float], model: str, **changes) -> Result:
    rows = [{"id": f"{task}{i}", "score": v} for i, v in enumerate(values)]
    return result([], task=task, rows=rows, model=model, data=f"data/{task}", **changes)


@pytest.fixture
def suites(tmp_path):
    """Two models on a target and two other tasks, in a folder a task."""
    first, second = scores(60, 5, 100, 235)
    values = {"mmlu": (first, second), "prompts": (second, first), "text": ([-1.5] * 40, [-1.4] * 40)}
    paths = []
    for task, both in values.items():
        (tmp_path / task).mkdir()
        for name, scored in zip(("base", "sft"), both, strict=True):
            paths.append(tmp_path / task / f"{name}.json")
            write_result(suite(task, scored, f"outputs/{name}"), paths[-1])
    return paths


def test_several_tasks_show_what_was_gained_and_what_was_forgotten(suites, monkeypatch, capsys, tmp_path):
    words = ["--target", "mmlu", "text", "--output", tmp_path / "c.json", "--plot", tmp_path / "c.png"]
    out = compare(monkeypatch, capsys, *suites, *words)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, out.splitlines())) <= 100
    aimed, rest = out.index("trained for"), out.index("not trained for")
    assert aimed < out.index("mmlu", aimed) < rest < out.index("prompts", rest)
    assert "sft is worse than base at prompts." in out and "-1.5" in out and "all 3 comparisons" in out
    saved = json.loads((tmp_path / "c.json").read_text())["comparisons"]
    assert [(c["task"], c["verdict"]) for c in saved] == [("mmlu", "better"), ("text", "better"), ("prompts", "worse")]
    singles = [paired(*both).p for both in [scores(60, 5, 100, 235)]]
    assert saved[0]["difference"]["p_holm"] >= singles[0]


def test_without_a_loss_the_size_of_an_unseen_one_is_said(suites, monkeypatch, capsys):
    out = compare(monkeypatch, capsys, *[p for p in suites if "prompts" not in str(p)], "--target", "mmlu")
    assert "No loss shown there" in out


def test_models_keep_their_name_when_files_are_called_by_task(tmp_path, monkeypatch, capsys):
    paths = []
    for model in ("base", "sft"):
        (tmp_path / model).mkdir()
        for task in ("mmlu", "glue"):
            paths.append(tmp_path / model / f"{task}.json")
            write_result(suite(task, [0.0, 1.0, 1.0], f"outputs/{model}"), paths[-1])
    out = compare(monkeypatch, capsys, *paths)
    assert "base and sft" in out and "glue" in out
    with pytest.raises(InputError, match="did you mean mmlu"):
        compare(monkeypatch, capsys, *paths, "--target", "mmul")
    with pytest.raises(InputError, match="one task"):
        compare(monkeypatch, capsys, *paths, "--by", "task")


def test_rows_that_a_model_was_trained_on_are_said(files, monkeypatch, capsys):
    found = {"rows": 9, "found": 3}
    paths = files(a=result([0.0] * 9), b=result([1.0] * 9, contamination=found))
    assert "3 of these 9 rows overlap with the training data of b" in compare(monkeypatch, capsys, *paths)
