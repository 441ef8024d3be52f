"""Best of n: what is kept of sampled answers, in which form, and whole rounds of the recipe."""

import json

import numpy as np
import pytest
from conftest import ROOT
from test_recipes import launch, results, script

from alignment.best_of_n import SamplingArguments, choose
from alignment.errors import InputError

CHAT = [{"role": "user", "content": "Add 1 and 2."}]


def said(row):
    return row["messages"][-1]["content"]


def test_the_best_answer_is_kept_and_paired_with_the_worst():
    rows = [{"prompt": CHAT, "answer": "3", "source": "a", "row": 1}]
    kept, pairs = choose(rows, [["4", "3", "30"]], np.array([[0.5, 1.0, 0.0]]), None)
    assert said(kept[0]) == "3" and kept[0]["reward"] == 1.0 and kept[0]["answer"] == "3"
    assert kept[0]["messages"][:-1] == CHAT and "source" not in kept[0]
    assert pairs[0]["prompt"] == CHAT
    assert [pairs[0][side][0]["content"] for side in ("chosen", "rejected")] == ["3", "30"]


def test_of_equal_rewards_the_shortest_is_kept_and_there_is_no_pair():
    kept, pairs = choose([{"prompt": CHAT}], [["a long one", "short", ""]], np.ones((1, 3)), None)
    assert said(kept[0]) == "short" and pairs == []


def test_a_prompt_without_a_good_answer_is_left_out_of_the_rows_and_the_pairs():
    kept, pairs = choose(
        [{"prompt": CHAT}, {"prompt": "2 + 2 ="}], [["4", "5"], ["4", "5"]], np.array([[0, 0.5], [1, 0]]), 1
    )
    assert [row.get("completion") for row in kept] == ["4"] and kept[0]["prompt"] == "2 + 2 ="
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("4", "5")]


@pytest.mark.parametrize("values", [{"num_generations": 1}, {"temperature": 0.0}, {"rounds": 0}])
def test_settings_that_make_no_sense_are_refused(values):
    with pytest.raises(InputError) as caught:
        SamplingArguments(**values)
    assert f"--{next(iter(values))}" in str(caught.value)


@pytest.fixture
def prompts(tmp_path):
    lines = (ROOT / "data/tiny/prompts/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(lines[:8]), encoding="utf-8")
    return file


FEW = ("--num_generations", 2, "--max_completion_length", 4, "--test_size", 0, "--max_steps", 1)
QUICK = (*FEW, "--eval_strategy", "no", "--no_eval_on_start", "--min_reward", -1)


def test_two_rounds_leave_their_rows_and_weights(prompts, tmp_path):
    out = tmp_path / "out"
    *_, args, _, rows = launch("best_of_n", "--data", prompts, "--output_dir", out, "--rounds", 2, *QUICK)
    kept = [json.loads(line) for line in (out / "rows/round_1.jsonl").read_text().splitlines()]
    assert 1 <= len(kept) <= 8 and all(row["messages"][-1]["role"] == "assistant" for row in kept)
    assert args.model.model_name_or_path == str(out / "round_1") and len(rows.train) >= 1
    for number in (1, 2):
        assert (out / f"round_{number}" / "model.safetensors").is_file()
        assert results(out / f"round_{number}")[0]["status"] == "finished"
    history = json.loads((out / "rewards.json").read_text())
    assert len(history) == 2 and history[0]["after"] is None and history[0]["kept"] >= history[0]["sampled"]


def test_a_dry_run_samples_and_writes_nothing(prompts, tmp_path, capfd):
    script(ROOT / "recipes/best_of_n.py", "--data", prompts, "--output_dir", tmp_path / "out", "--dry_run", *QUICK)
    said = capfd.readouterr().out
    assert "nothing was trained" in said and not (tmp_path / "out").exists()
    assert "16 answers" in said and "What is trained" in said, "the tuning looks at the kept rows, too"


def test_no_answer_is_good_enough(prompts, tmp_path):
    with pytest.raises(InputError, match="none of 16 answers has a reward of 2") as caught:
        launch("best_of_n", "--data", prompts, "--output_dir", tmp_path / "out", *QUICK[:-1], 2)
    assert "--min_reward" in str(caught.value)
