"""Reward models and win rates: margins, calibration, order and length, against formulae and hand-made judges."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from eval_runs import run_script, save_reward_model, write_rows

from alignment.calibration import expected_calibration_error, rank_correlation, reliability, win_probabilities
from alignment.errors import InputError
from alignment.heads import head_of
from alignment.journal import Journal
from alignment.judging import (
    PROMPT,
    Contest,
    controlled_win_rate,
    fill,
    intercept,
    judge_by_model,
    judge_by_reward,
    read_judge_prompt,
    verdict,
    wilson,
)
from alignment.models import load_checkpoint
from alignment.report import read_result, write_result
from alignment.rewarding import RewardModel

PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"The boat {i}?"}],
        "chosen": [{"role": "assistant", "content": "It crossed the river" + " again" * (i % 3)}],
        "rejected": [{"role": "assistant", "content": "no" + " rain" * (i % 4)}],
    }
    for i in range(12)
]


@pytest.fixture(scope="module")
def reward_model(toy, tmp_path_factory):
    return save_reward_model(toy, tmp_path_factory.mktemp("reward") / "rm")


# --- calibration ---


def test_calibration_error_is_that_of_the_definition():
    margins = np.random.default_rng(0).normal(0.5, 1.5, 300)
    p = 1 / (1 + np.exp(-margins))
    assert win_probabilities(margins) == pytest.approx(p)
    wanted = 0.0
    for low in np.arange(0.5, 1.0, 0.05):
        inside = [max(q, 1 - q) for q in p if low <= max(q, 1 - q) < low + 0.05]
        right = [float(q > 0.5) for q in p if low <= max(q, 1 - q) < low + 0.05]
        wanted += abs(sum(inside) - sum(right)) / 300
    bins = reliability(margins)
    assert sum(b.pairs for b in bins) == 300
    assert expected_calibration_error(bins) == pytest.approx(wanted)


def test_pairs_drawn_from_the_model_are_calibrated_and_doubled_margins_are_not():
    rng = np.random.default_rng(1)
    p = 1 / (1 + np.exp(-rng.normal(0, 2, 20_000)))
    margins = np.where(rng.random(20_000) < p, 1, -1) * np.log(p / (1 - p))
    assert expected_calibration_error(reliability(margins)) < 0.01
    assert expected_calibration_error(reliability(3 * margins)) > 0.08


def test_extreme_margins_and_ties_have_a_bin():
    bins = reliability([1000.0, -1000.0, 0.0])
    assert [(b.pairs, b.confidence, b.accuracy) for b in bins] == [(1, 0.5, 0.5), (2, 1.0, 0.5)]


def test_rank_correlation_of_constants_is_nothing():
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == (0.0, None)
    value, stderr = rank_correlation([1, 2, 3, 4, 9], [2, 4, 6, 8, 10])
    assert value == pytest.approx(1.0) and stderr == pytest.approx(math.sqrt(1.5 / 2))


# --- eval/reward.py ---


def test_the_script_measures_a_reward_model(monkeypatch, reward_model, tmp_path, capsys):
    rows = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    words = ["--data", rows, "--batch_size", 5, "--output", tmp_path / "out"]
    run_script(monkeypatch, "reward", "--model", f"a={reward_model}", f"b={reward_model}", *words)
    result = read_result(tmp_path / "out" / "a.json")
    judge = RewardModel(reward_model)
    prompts = [pair["prompt"] for pair in PAIRS]
    margins = np.subtract(*(judge(prompts, [pair[side] for pair in PAIRS]) for side in ("chosen", "rejected")))
    assert [row["margin"] for row in result.rows] == pytest.approx(margins.tolist(), abs=1e-5)
    assert [row["score"] for row in result.rows] == (margins > 0).tolist()
    assert len({row["score"] for row in result.rows}) == 2, "both outcomes occur"
    value = {name: metric["value"] for name, metric in result.metrics.items()}
    assert value["accuracy"] == pytest.approx(np.mean(margins > 0))
    assert value["Brier score"] == pytest.approx(np.mean((1 / (1 + np.exp(margins))) ** 2))
    lengths = [row["chosen_tokens"] > row["rejected_tokens"] for row in result.rows]
    assert value["accuracy/chosen is longer"] == pytest.approx(np.mean((margins > 0)[lengths]))
    assert (tmp_path / "out" / "reliability.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if not line.startswith(("written:", "next:", "drawn:"))]
    assert max(map(len, table)) <= 100 and "calibration error" in out
    assert read_result(tmp_path / "out" / "b.json").rows == result.rows


def test_an_interrupted_measurement_goes_on_where_it_was(monkeypatch, reward_model, tmp_path):
    rows = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    words = ["--model", reward_model, "--data", rows, "--batch_size", 5]
    run_script(monkeypatch, "reward", *words, "--output", tmp_path / "whole.json")
    add, kept = Journal.add, []

    def interrupted(self, made):
        if kept:
            raise KeyboardInterrupt
        kept.extend(made)
        add(self, kept)

    monkeypatch.setattr(Journal, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_script(monkeypatch, "reward", *words, "--output", tmp_path / "r.json")
    again = []
    monkeypatch.setattr(Journal, "add", lambda self, made: (again.extend(made), add(self, made)))
    run_script(monkeypatch, "reward", *words, "--output", tmp_path / "r.json", "--resume")
    assert len(kept) == 5 and len(again) == 7
    whole, resumed = read_result(tmp_path / "whole.json").rows, read_result(tmp_path / "r.json").rows
    assert [row["id"] for row in whole] == [row["id"] for row in resumed]
    assert [row["margin"] for row in whole] == pytest.approx([row["margin"] for row in resumed], abs=1e-5)


def test_a_reward_adapter_is_measured(monkeypatch, toy, tmp_path):
    import peft
    from transformers import AutoTokenizer

    base, _ = load_checkpoint(toy, head="sequence")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="SEQ_CLS", modules_to_save=["score"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(toy).save_pretrained(tmp_path / "adapter")
    assert head_of(tmp_path / "adapter") == "sequence"
    rows = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    words = ["--model", tmp_path / "adapter", "--data", rows, "--output", tmp_path / "r.json"]
    run_script(monkeypatch, "reward", *words)
    assert len(read_result(tmp_path / "r.json").rows) == 12


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "b"}], "rejected|columns"),
        ([{"prompt": "a", "answer": "b"}], "cannot be used here"),
        ([], "rows"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(monkeypatch, reward_model, tmp_path, rows, message):
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(InputError, match=message):
        run_script(monkeypatch, "reward", "--model", reward_model, "--data", path, "--output", tmp_path / "r.json")


def test_a_model_without_a_reward_head_is_refused(monkeypatch, toy, tmp_path):
    rows = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    words = ["--data", rows, "--output", tmp_path / "r.json"]
    with pytest.raises(InputError, match=r"has no score head[\s\S]*--model"):
        run_script(monkeypatch, "reward", "--model", toy, *words)
    three = save_reward_model(toy, tmp_path / "three", labels=3)
    with pytest.raises(InputError, match="gives 3 numbers"):
        run_script(monkeypatch, "reward", "--model", three, *words)


# --- verdicts ---


@pytest.mark.parametrize(
    ("logs", "score", "flipped", "first"),
    [
        ((-2, -1, -1, -2), 1.0, 0.0, 1.0),  # B, then A: the candidate both times
        ((-1, -2, -2, -1), 0.0, 0.0, 1.0),
        ((-1, -2, -1, -2), 0.5, 1.0, 2.0),  # A both times: whoever is first
        ((-2, -1, -2, -1), 0.5, 1.0, 0.0),
        ((-1, -1, -1, -2), 0.5, 0.0, 1.0),  # no preference in one order
    ],
)
def test_a_verdict_that_flips_with_the_order_is_a_tie(logs, score, flipped, first):
    found = verdict(*map(float, logs))
    assert (found["score"], found["flipped"], found["first"]) == (score, flipped, first)


CONTESTS = [
    Contest([{"role": "user", "content": f"The boat {i} {{second}}?"}], "It crossed" + " again" * i, "rain {first}")
    for i in range(5)
]


@pytest.mark.parametrize("template", [True, False])
def test_a_model_judges_by_the_letter_it_would_say(toy, template):
    model, tokenizer = load_checkpoint(toy)
    if not template:
        tokenizer.chat_template = None
    for contest, found in zip(CONTESTS, judge_by_model(model, tokenizer, CONTESTS, batch_size=3), strict=True):
        logs = []
        for first, second in ((contest.baseline, contest.candidate), (contest.candidate, contest.baseline)):
            parts = PROMPT.replace("{question}", "\0q").replace("{first}", "\0a").replace("{second}", "\0b")
            text = parts.replace("\0q", contest.prompt[0]["content"]).replace("\0a", first).replace("\0b", second)
            if template:
                turns = [{"role": "user", "content": text}]
                ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            else:
                ids = tokenizer(text + "\n\nThe better answer is")["input_ids"]
            for letter in "AB":
                more = tokenizer(letter if template else f" {letter}")["input_ids"]
                with torch.no_grad():
                    each = model(torch.tensor([ids + more])).logits[0].log_softmax(-1)
                logs.append(sum(each[len(ids) - 1 + i, token].item() for i, token in enumerate(more)))
        assert found["margin"] == pytest.approx(verdict(*logs)["margin"], abs=1e-4)
        assert found["score"] == verdict(*logs)["score"]


def test_exchanging_the_two_answers_turns_a_verdict_round(toy):
    model, tokenizer = load_checkpoint(toy)
    turned = [Contest(c.prompt, c.candidate, c.baseline) for c in CONTESTS]
    for one, other in zip(*(judge_by_model(model, tokenizer, c) for c in (CONTESTS, turned)), strict=True):
        assert one["score"] == 1 - other["score"] and one["margin"] == pytest.approx(-other["margin"], abs=1e-5)


def test_a_judge_without_room_or_places_is_refused(toy, tmp_path):
    model, tokenizer = load_checkpoint(toy)
    long = [Contest(CONTESTS[0].prompt, "rain " * 600, "x")]
    with pytest.raises(InputError, match="512 positions"):
        judge_by_model(model, tokenizer, long)
    (tmp_path / "p.txt").write_text("{question} {first}")
    with pytest.raises(InputError, match="no {second}"):
        read_judge_prompt(str(tmp_path / "p.txt"))
    assert fill("{first}|{second}|{question}", ("{first}", "{second}", "b")) == "{second}|b|{first}"


def test_a_reward_model_judges_by_its_scores(reward_model):
    judge = RewardModel(reward_model)
    found = judge_by_reward(judge, CONTESTS, 0.0)
    for contest, one in zip(CONTESTS, found, strict=True):
        a, b = judge([contest.prompt] * 2, [contest.baseline, contest.candidate])
        assert one["margin"] == pytest.approx(b - a, abs=1e-5) and one["score"] == float(b > a)
    widest = max(abs(one["margin"]) for one in found)
    assert {one["score"] for one in judge_by_reward(judge, CONTESTS, widest + 1)} == {0.5}


def test_the_interval_is_wilsons():
    low, high = wilson([1.0] * 8 + [0.0] * 2)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson([1.0] * 10)[0] == pytest.approx(10 / (10 + 3.8415), abs=1e-4)


def test_the_regression_is_scikit_learns_and_takes_length_out():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    gap = rng.normal(5, 20, 4000)
    x = np.tanh(gap / gap.std())
    wins = (rng.random(4000) < 1 / (1 + np.exp(-2.5 * x))).astype(float)  # only length decides
    fit = LogisticRegression(C=np.inf).fit(x[:, None], wins)
    assert intercept(wins, x) == pytest.approx(1 / (1 + math.exp(-fit.intercept_[0])), abs=1e-3)
    found = controlled_win_rate(wins, gap)
    assert wins.mean() > 0.56 and found["value"] == pytest.approx(0.5, abs=0.03)
    assert abs(found["value"] - 0.5) < 3 * found["stderr"]


def test_equal_lengths_leave_the_win_rate_and_unequal_ones_are_not_extrapolated():
    scores = [1.0, 0.5, 0.0, 1.0] * 10
    assert controlled_win_rate(scores, [0] * 40)["value"] == pytest.approx(np.mean(scores), abs=1e-3)
    assert controlled_win_rate(scores, range(1, 41)) is None
    assert 0.9 < controlled_win_rate([1.0] * 40, [-1, 1] * 20)["value"] < 1, "finite where one side always wins"


# --- eval/win_rate.py ---


@pytest.fixture(scope="module")
def answers(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    lines = [{"prompt": pair["prompt"], "answer": "4", "verifier": "contains"} for pair in PAIRS]
    rows = write_rows(folder / "rows.jsonl", lines)
    with pytest.MonkeyPatch.context() as patch:
        words = ["--model", toy, "--data", rows, "--max_new_tokens", 6]
        run_script(patch, "generate", *words, "--output", folder / "greedy.json")
        run_script(patch, "generate", *words, "--temperature", 2, "--output", folder / "hot.json")
        run_script(patch, "generate", *words, "--limit", 5, "--output", folder / "few.json")
        words += ["--num_samples", 2, "--temperature", 1]
        run_script(patch, "generate", *words, "--output", folder / "samples.json")
    return folder


@pytest.mark.parametrize("kind", ["reward", "model"])
def test_result_files_are_judged(monkeypatch, toy, reward_model, answers, tmp_path, capsys, kind):
    judge = reward_model if kind == "reward" else toy
    words = ["--baseline", answers / "greedy.json", "--model", answers / "hot.json", "--judge", judge]
    run_script(monkeypatch, "win_rate", *words, "--output", tmp_path / "r.json", "--batch_size", 5)
    result = read_result(tmp_path / "r.json")
    assert result.task == "win_rate" and result.data == str(answers / "rows.jsonl")
    rate, scores = result.metrics["win rate"], [row["score"] for row in result.rows]
    assert len(scores) == 12 and set(scores) <= {0.0, 0.5, 1.0}
    assert rate["value"] == pytest.approx(np.mean(scores)) and rate["low"] < rate["value"] < rate["high"]
    assert rate["wins"] + rate["ties"] + rate["losses"] == 12
    assert ("flipped with the order" in result.metrics) == (kind == "model")
    out = capsys.readouterr().out
    assert ("this judge cannot tell" if kind == "model" else f"hot wins {rate['wins']}") in out
    lines = [line for line in out.splitlines() if not line.startswith(("written:", "-"))]
    assert max(map(len, lines)) <= 100
    run_script(monkeypatch, "win_rate", *words, "--output", tmp_path / "r.json", "--resume")
    assert read_result(tmp_path / "r.json").rows == result.rows


def test_checkpoints_answer_as_generate_would(monkeypatch, toy, reward_model, answers, tmp_path):
    words = ["--judge", reward_model, "--data", answers / "rows.jsonl", "--max_new_tokens", 6]
    words += ["--output", tmp_path / "r.json"]
    run_script(monkeypatch, "win_rate", "--baseline", answers / "greedy.json", "--model", toy, *words)
    assert {row["score"] for row in read_result(tmp_path / "r.json").rows} == {0.5}, "the same answers tie"
    assert [file.name for file in tmp_path.glob(".*")] == []


def test_interrupted_answers_are_not_made_again(monkeypatch, toy, reward_model, answers, tmp_path):
    from alignment import generation, judging

    made, whole = [], generation.generate_answers
    words = ["--baseline", toy, "--model", answers / "greedy.json", "--judge", reward_model, "--max_new_tokens", 6]
    words += ["--data", answers / "rows.jsonl", "--output", tmp_path / "r.json"]

    def counted(model, tokenizer, prompts, *more, **options):
        made.append(len(prompts))
        return whole(model, tokenizer, prompts, *more, **options)

    monkeypatch.setattr(generation, "generate_answers", counted)
    with monkeypatch.context() as broken:
        broken.setattr(judging, "judge_by_reward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_script(monkeypatch, "win_rate", *words)
    run_script(monkeypatch, "win_rate", *words, "--resume")
    assert made == [12] and len(read_result(tmp_path / "r.json").rows) == 12


def test_answers_that_cannot_be_judged_are_refused(monkeypatch, reward_model, answers, tmp_path):
    def judge(*words):
        last = ["--judge", reward_model, "--output", tmp_path / "r.json"]
        run_script(monkeypatch, "win_rate", *words, *last)

    greedy = answers / "greedy.json"
    with pytest.raises(InputError, match="5 in both, 7 only in greedy"):
        judge("--baseline", greedy, "--model", answers / "few.json")
    with pytest.raises(InputError, match=r"no single answer to a prompt per row \(no 'text'\)"):
        judge("--baseline", answers / "samples.json", "--model", greedy)
    with pytest.raises(InputError, match="there is no result file"):
        judge("--baseline", answers / "none.json", "--model", greedy)
    empty = read_result(greedy)
    empty.rows = []
    write_result(empty, tmp_path / "empty.json")
    with pytest.raises(InputError, match="holds no rows"):
        judge("--baseline", tmp_path / "empty.json", "--model", greedy)
    content = json.loads(greedy.read_text()) | {"task": "perplexity"}
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="task perplexity"):
        judge("--baseline", tmp_path / "other.json", "--model", greedy)


def test_an_encoder_is_no_judge(monkeypatch, toy_bert, answers, tmp_path):
    words = ["--baseline", answers / "greedy.json", "--model", answers / "hot.json", "--judge", toy_bert]
    with pytest.raises(InputError, match="is an encoder"):
        run_script(monkeypatch, "win_rate", *words, "--output", tmp_path / "r.json")


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(monkeypatch, toy, reward_model, answers, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "rain again " * (i + 1)} for i in range(7)])
    plain = write_rows(tmp_path / "plain.jsonl", [{"prompt": f"The boat {i}", "answer": "4"} for i in range(7)])
    scripts = {
        "reward": ["--model", reward_model, "--data", pairs],
        "perplexity": ["--model", toy, "--data", texts, "--max_length", 9],
        "generate": ["--model", toy, "--data", plain, "--num_samples", 3, "--temperature", 1, "--max_new_tokens", 4],
        "win_rate": ["--baseline", answers / "greedy.json", "--model", answers / "hot.json", "--judge", toy],
    }
    config = ROOT / "accelerate_configs" / "cpu.yaml"
    for name, words in scripts.items():
        words += ["--use_cpu", "--batch_size", 4, "--output"]
        run_script(monkeypatch, name, *words, tmp_path / "one" / f"{name}.json")
        start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, f"eval/{name}.py"]
        command = list(map(str, [*start, *words, tmp_path / "two" / f"{name}.json"]))
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written:") == 1
        one, two = (read_result(tmp_path / folder / f"{name}.json") for folder in ("one", "two"))
        assert [row["id"] for row in one.rows] == [row["id"] for row in two.rows]
        assert [row["score"] for row in one.rows] == pytest.approx([row["score"] for row in two.rows], abs=1e-5), name
        assert one.metrics.keys() == two.metrics.keys()
