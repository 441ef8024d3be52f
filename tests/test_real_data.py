"""Public rows through the recipes on the embedded model: the format is recognised, the books balance."""

import json
import math

import pytest
from test_recipes import launch

pytestmark = pytest.mark.real_data
# Byte-level tokens of a model of 1,024 positions: what is dropped here fits into a real model.
RUNS = {
    "sft on alpaca": ("sft", "instructions/alpaca_en_demo.json", 999, "Alpaca rows", "drop"),
    "sft on gsm8k": ("sft", "gsm8k/train.jsonl", 7473, "question, answer", "drop"),
    "dpo on pairs": ("dpo", "preferences/dpo_en_demo.json", 300, "preference pairs", "drop"),
    "dpo on pairs, cut": ("dpo", "preferences/dpo_en_demo.json", 300, "preference pairs", "cut"),
    "kto on thumbs": ("kto", "preferences/kto_en_demo.json", 300, "thumbs up or down", "drop"),
    "reward on pairs": ("reward", "preferences/dpo_en_demo.json", 300, "preference pairs", "drop"),
}
IDS = {
    "sft": ["input_ids"],
    "dpo": ["prompt_ids", "chosen_ids", "prompt_ids", "rejected_ids"],
    "kto": ["prompt_ids", "completion_ids"],
    "reward": ["chosen_ids", "rejected_ids"],
}


@pytest.mark.parametrize("run", RUNS)
def test_public_rows_train_and_the_books_balance(run, real_data, tmp_path):
    recipe, file, count, words, long = RUNS[run]
    out = tmp_path / "out"
    trainer, _, _, rows = launch(
        recipe, "--data", real_data / file, "--max_length", 1024, "--on_long_row", long, "--max_steps", 2,
        "--per_device_train_batch_size", 4, "--eval_strategy", "no", "--logging_steps", 1, "--output_dir", out,
    )  # fmt: skip
    record = json.loads((out / "run.json").read_text())
    ledger = record["ledger"]
    print(run, json.dumps(ledger))
    (account,) = ledger["sources"].values()
    assert any(words in note for note in rows.notes)

    dropped = sum(cause["rows"] for cause in account["dropped"].values())
    assert account["read"] == count == account["train"] + account["test"] + dropped
    assert (account["train"], account["test"]) == (len(rows.train), len(rows.test))
    assert len((out / "dropped.jsonl").read_text().splitlines() if dropped else []) == dropped
    for split, kept in (("train", rows.train), ("test", rows.test)):
        tokens = sum(len(ids) for column in IDS[recipe] for ids in kept[column])
        assert account["tokens"][split]["tokens"] == tokens
        assert max(kept["length"]) <= 1024
    assert bool(account["cut"]) == (long == "cut")

    computed, real = ledger["padding"]["train"].values()
    assert real <= computed <= 1.10 * real
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == record["steps"] == 2
    if recipe in ("dpo", "kto"):
        assert losses[0] == pytest.approx({"dpo": math.log(2), "kto": 0.5}[recipe], abs=1e-3)
