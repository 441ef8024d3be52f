"""The recipes as a user runs them: what they leave on disk, how one goes on from another, that they learn."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

RECIPES = ("sft", "dpo", "kto", "reward")
ROWS = {"sft": "chat", "dpo": "preferences", "kto": "feedback", "reward": "preferences", "grpo": "prompts"}
ROWS |= dict.fromkeys(("rloo", "ppo"), ROWS["grpo"]) | {"classify": "sentences"}
SHORT = ("--max_steps", 2, "--eval_strategy", "no", "--save_strategy", "no", "--logging_steps", 1)
IDS = torch.tensor([[5, 6, 7, 8, 40, 41, 42]])


def script(path, *words):
    """Run a script of ours in this process, as if it had been typed."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *map(str, words)])
        patch.setattr(sys, "excepthook", sys.__excepthook__)
        module.main()


def launch(name, *flags):
    """Run a recipe in this process; returns what it gave to `run`: trainer, args, loaded model, rows."""
    from alignment import run

    seen, finish = [], run.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run", lambda *given: (seen.extend(given), finish(*given)))
        script(ROOT / "recipes" / f"{name}.py", *flags)
    return seen


def few_rows(recipe, folder, rows=8, split="train"):
    """A file with the first rows of the embedded data of a recipe."""
    source = ROOT / "data" / "tiny" / ROWS[recipe] / f"{split}.jsonl"
    file = folder / f"{recipe}.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:rows]), encoding="utf-8")
    return file


def results(folder):
    """The run.json of an output folder, and its findings as one text."""
    record = json.loads((folder / "run.json").read_text())
    return record, "\n".join(finding["what"] for finding in record["findings"])


def held_out(folder, metric):
    """(before, after) of a metric on the held-out rows."""
    metrics = results(folder)[0]["metrics"]
    return metrics["before"][metric], metrics["after"][metric]


def generate(folder, *words):
    """The result file of eval/generate.py on a checkpoint."""
    file = folder / "generated.json"
    script(ROOT / "eval" / "generate.py", "--model", folder, "--output", file, "--max_new_tokens", 16, *words)
    return json.loads(file.read_text())


def answer(folder, head="causal"):
    from alignment.models import load_checkpoint

    with torch.no_grad():
        return load_checkpoint(folder, head=head)[0](input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@pytest.mark.parametrize("recipe", [*RECIPES, "classify"])
def test_recipe_as_it_is_typed(recipe, tmp_path):
    out = tmp_path / "out"
    words = ["launch", "--num_cpu_threads_per_process", "1", f"recipes/{recipe}.py"]
    words += ["--max_steps", "2", "--output_dir", str(out)]
    words += ["--eval_strategy", "no", "--peft", "lora"] if recipe in ("dpo", "kto") else []
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words],
        cwd=ROOT, env=os.environ, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    weights = "adapter_model.safetensors" if recipe in ("dpo", "kto") else "model.safetensors"
    files = {file.name for file in out.iterdir()}
    assert {weights, "tokenizer.json", "chat_template.jinja", "trainer_state.json"} <= files
    assert {"run.json", "README.md", "curves.png"} <= files
    assert ("generation_config.json" in files) == (recipe not in ("reward", "classify"))
    record, _ = results(out)
    assert record["status"] == "finished" and record["steps"] == 2
    assert record["arguments"]["max_steps"] == {"value": 2, "source": "flag"}
    assert record["arguments"]["data"]["source"] == "recipe"
    assert f"recipes/{recipe}.py" in record["command"]
    assert {source.split("/")[0] for source in record["ledger"]["sources"]} == {ROWS[recipe]}
    assert "What happened to the rows" in done.stdout
    card = (out / "README.md").read_text()
    assert "base_model: data/tiny/model" in card
    assert f"trained with {'a sequence head' if recipe == 'classify' else recipe.upper()}" in card


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A LoRA adapter of a few SFT steps on the embedded model."""
    out = tmp_path_factory.mktemp("tuned") / "sft"
    launch("sft", "--peft", "lora", "--max_steps", 8, "--eval_strategy", "no", "--output_dir", out)
    return out


def test_dpo_merge_kto_one_after_the_other(tuned, tmp_path):
    dpo, merged, kto = (tmp_path / name for name in ("dpo", "merged", "kto"))
    trainer, *_ = launch("dpo", "--model_name_or_path", tuned, *SHORT, "--output_dir", dpo)
    said = results(dpo)[1]
    assert "continuing the lora adapter" in said
    assert "loss 0.6931 (ln 2 is 0.6931), margin 0.0000" in said
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert (dpo / "adapter_model.safetensors").exists() and not (dpo / "model.safetensors").exists()
    assert not torch.allclose(answer(dpo), answer(tuned), atol=1e-3)

    script(ROOT / "recipes" / "merge.py", dpo, "--out", merged)
    # the base is stored in bfloat16, and so is the merged model: rounded once
    far = (answer(merged) - answer(dpo)).abs().max()
    assert far < 0.2 and far < 0.2 * (answer(merged) - answer(ROOT / "data/tiny/model")).abs().max()

    launch("kto", "--model_name_or_path", merged, *SHORT, "--output_dir", kto)
    assert "before training: loss 0.5000" in results(kto)[1]
    assert (kto / "model.safetensors").exists()
    result = generate(kto, "--limit", 6)
    assert len(result["rows"]) == 6 and all(row["text"] for row in result["rows"])


def test_reward_model_from_an_sft_adapter(tuned, tmp_path):
    out = tmp_path / "reward"
    trainer, *_ = launch("reward", "--model_name_or_path", tuned, "--peft", "lora", *SHORT, "--output_dir", out)
    assert (out / "adapter_model.safetensors").exists() and (out / "base_model" / "model.safetensors").exists()
    scores = answer(out, head="sequence")
    assert scores.shape == (1, 1)
    with torch.no_grad():
        here = trainer.model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(scores, here, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_dry_run_looks_and_writes_nothing(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = few_rows(recipe, tmp_path, rows=40)
    before = sorted(tmp_path.rglob("*"))
    launch(recipe, "--data", file, "--dry_run", "--output_dir", tmp_path / "out")
    shown = capsys.readouterr().out
    assert "before training" in shown and "<|im_start|>user" in shown and "Dry run" in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_values_come_from_flag_file_recipe_and_library(tmp_path):
    file, out = tmp_path / "mine.yaml", tmp_path / "out"
    file.write_text(f"data: {few_rows('dpo', tmp_path)}\nbeta: 0.3\nloss_type: ipo\ntest_size: 0\npeft: lora\n")
    launch("dpo", "--config", file, "--beta", 0.4, "--max_steps", 1, "--output_dir", out)
    said = results(out)[0]["arguments"]
    assert said["beta"] == {"value": 0.4, "source": "flag"}
    assert said["loss_type"] == {"value": ["ipo"], "source": "file mine.yaml"}
    assert said["max_length"] == {"value": 256, "source": "recipe"}
    assert said["label_smoothing"] == {"value": 0.0, "source": "library"}
    assert said["learning_rate"]["source"] == "adapter lora"  # the recipe's own is for training in full


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """The output folders of the four recipes as they are; DPO and KTO start from the SFT model."""
    folder = tmp_path_factory.mktemp("learnt")
    launch("sft", "--output_dir", folder / "sft")
    for recipe in ("dpo", "kto"):
        launch(recipe, "--model_name_or_path", folder / "sft", "--output_dir", folder / recipe)
    launch("reward", "--output_dir", folder / "reward")
    return folder


@pytest.fixture(scope="module")
def measured(learnt, tmp_path_factory):
    """What eval/generate.py says of the base and of the models made from it: name -> metric -> value."""
    out = tmp_path_factory.mktemp("measured")
    models = [f"base={ROOT / 'data/tiny/model'}", *(learnt / name for name in ("sft", "dpo", "kto"))]
    script(ROOT / "eval" / "generate.py", "--model", *models, "--output", out, "--max_new_tokens", 24)
    found = {file.stem: json.loads(file.read_text())["metrics"] for file in out.glob("*.json")}
    return {name: {key: metric["value"] for key, metric in metrics.items()} for name, metrics in found.items()}


@pytest.mark.slow
def test_sft_teaches_to_answer_and_to_stop(learnt, measured):
    before, after = held_out(learnt / "sft", "loss")
    assert after < 0.4 * before
    before, after = held_out(learnt / "sft", "mean_token_accuracy")
    assert after > before + 0.2
    assert measured["base"]["score"] < 0.02
    assert measured["sft"]["score"] > measured["base"]["score"] + 0.04
    assert measured["sft"]["stopped"] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "metric"), [("dpo", "rewards/accuracies"), ("reward", "accuracy")])
def test_pairs_are_told_apart(learnt, recipe, metric):
    before, after = held_out(learnt / recipe, "loss")
    assert after < 0.85 * before
    before, after = held_out(learnt / recipe, metric)
    assert after > max(before, 0.6)


@pytest.mark.slow
def test_kto_moves_thumbs_apart(learnt):
    before, after = held_out(learnt / "kto", "loss")
    assert before == pytest.approx(0.5, abs=1e-3) and after < 0.48
    before, after = held_out(learnt / "kto", "rewards/margins")
    assert abs(before) < 1e-3 and after > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dpo", "kto"])
def test_preferences_do_not_unlearn_the_answers(measured, recipe):
    assert measured[recipe]["score"] > measured["sft"]["score"] - 0.04
    assert measured[recipe]["stopped"] > 0.95
