"""The run from end to end: what it leaves, what it refuses, how it stops and goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from toy_runs import RECIPES, ROOT, SETTINGS, same_weights, signal_at, start, toy_rows, weights

from alignment import launch, preflight
from alignment.errors import InputError


@pytest.fixture
def flags(toy, tmp_path):
    """The flags of a small run of a recipe, into tmp_path/name."""

    def make(recipe, name="out", *more):
        data = ["--data", toy_rows(tmp_path, recipe), "--model_name_or_path", toy, "--output_dir", tmp_path / name]
        return [*data, *SETTINGS, *more]

    return make


def record(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_files_of_a_run(monkeypatch, tmp_path, flags, capsys):
    long = {"messages": [{"role": "user", "content": "x y " * 200}, {"role": "assistant", "content": "rain"}]}
    more = ["--test_size=8", "--eval_strategy=steps", "--eval_steps=4", "--eval_on_start=true", "--max_length=200"]
    words = flags("sft", "out", *more, "--hub_token=hf_secret", "--adam_beta2", "0.95")
    with open(tmp_path / "sft.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(long) + "\n")
    monkeypatch.setenv("HF_TOKEN", "")  # put back afterwards
    start(monkeypatch, "sft", *words)
    folder, shown = tmp_path / "out", capsys.readouterr().out
    assert shown.splitlines()[0].startswith("sft: ") and "sft.jsonl" in shown.splitlines()[0]
    found = record(folder)
    assert found["status"] == "finished" and found["steps"] == 8
    arguments = found["arguments"]
    assert arguments["adam_beta2"] == {"value": 0.95, "source": "flag"}
    assert arguments["lr_scheduler_type"] == {"value": "cosine", "source": "recipe"}
    assert arguments["weight_decay"]["source"] == "library" and "eos_token" in arguments
    for file in folder.rglob("*"):
        if file.is_file():
            assert b"hf_secret" not in file.read_bytes(), file
    dropped = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    sources = found["ledger"]["sources"].values()
    assert len(dropped) == sum(part["rows"] for s in sources for part in s["dropped"].values()) == 1
    assert dropped[0]["row"] == 49 and "longer" in dropped[0]["cause"]
    assert json.loads((folder / "metrics.json").read_text()) == found["metrics"]
    assert found["metrics"]["after"]["loss"] < found["metrics"]["before"]["loss"]
    assert (folder / "curves.png").stat().st_size > 5_000
    head = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert head["base_model"].endswith("model") and "plumbline" in head["tags"]
    assert found["ledger"]["padding"]["train"]["real"] > 0
    assert "tokens/s" in shown and "before" in shown
    assert max(map(len, shown.splitlines())) <= 400  # only commands may be longer than the screen


def test_dry_run_writes_nothing(monkeypatch, tmp_path, flags, capsys):
    start(monkeypatch, "kto", *flags("kto"), "--dry_run")
    assert not (tmp_path / "out").exists()
    shown = capsys.readouterr().out
    assert "nothing was trained" in shown
    assert max(map(len, shown.splitlines()[1:])) <= preflight.WIDTH


def test_folder_in_use_is_refused_before_anything_is_loaded(monkeypatch, tmp_path, flags):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("work of weeks")
    words = flags("sft", "out", "--model_name_or_path", "no/such/model")
    with pytest.raises(InputError, match="not empty: it holds mine.txt") as caught:
        start(monkeypatch, "sft", *words)
    assert "--overwrite_output_dir" in caught.value.fix
    with pytest.raises(InputError, match="no checkpoint to go on from"):
        start(monkeypatch, "sft", *words, "--resume_from_checkpoint", "last")
    for way_out in ("--dry_run", "--overwrite_output_dir"):
        with pytest.raises(InputError, match="no/such/model"):  # past the folder
            start(monkeypatch, "sft", *words, way_out)
    assert [file.name for file in folder.iterdir()] == ["mine.txt"]


def test_folder_that_cannot_be_written_to_is_refused(monkeypatch, tmp_path, flags):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        start(monkeypatch, "sft", *flags("sft", "file/out"))
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(InputError, match="cannot be written to"):
        start(monkeypatch, "sft", *flags("sft", "closed/out"))


def test_overwriting_keeps_the_earlier_run_until_the_new_one_has_finished(monkeypatch, tmp_path, flags, capsys):
    folder = tmp_path / "out"
    start(monkeypatch, "sft", *flags("sft", "out", "--max_steps=4", "--save_strategy=steps", "--save_steps=2"))
    (folder / "notes.txt").write_text("mine")
    (folder / "generate.json").write_text("{}")
    first = weights(folder)
    again = flags("sft", "out", "--max_steps=2", "--overwrite_output_dir")
    with monkeypatch.context() as patch:
        signal_at(patch, 1)
        start(patch, "sft", *again)
    assert record(folder)["status"] == "interrupted"
    aside = folder / "earlier_run_1"
    assert (aside / "generate.json").is_file() and (aside / "checkpoint-4").is_dir()
    assert all(torch.equal(value, weights(aside)[name]) for name, value in first.items())
    assert sorted(file.name for file in folder.iterdir()) == [
        "checkpoint-1", "earlier_run_1", "metrics.json", "notes.txt", "run.json",
    ]  # fmt: skip
    start(monkeypatch, "sft", *again)
    assert record(folder)["status"] == "finished" and record(folder)["steps"] == 2
    assert (folder / "notes.txt").is_file() and not list(folder.glob("earlier_run*"))
    assert not list(folder.glob("checkpoint-*")) and not (folder / "generate.json").exists()
    assert "earlier run" in capsys.readouterr().out


def test_run_that_would_overwrite_its_own_model_is_refused(monkeypatch, tmp_path, flags):
    start(monkeypatch, "sft", *flags("sft", "out", "--max_steps=1"))
    before = weights(tmp_path / "out")
    words = flags("sft", "out", "--model_name_or_path", tmp_path / "out", "--overwrite_output_dir")
    with pytest.raises(InputError, match="holds the model this run starts from"):
        start(monkeypatch, "sft", *words)
    after = weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_runs_with_one_seed_are_the_same_run(monkeypatch, tmp_path, flags):
    """New heads and adapters are drawn from the seed, too."""
    for name in ("a", "b"):
        torch.manual_seed(ord(name))  # what happened before in this process must not matter
        start(monkeypatch, "reward", *flags("reward", name, "--max_steps=2", "--peft=lora"))
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_failure_is_written_down(monkeypatch, tmp_path, flags):
    with pytest.raises(InputError, match="(loss|norm) is (nan|inf)"):
        start(monkeypatch, "sft", *flags("sft", "out", "--learning_rate=1e30", "--max_grad_norm=0"))
    found = record(tmp_path / "out")
    assert found["status"] == "failed" and "is" in found["reason"]
    assert not list((tmp_path / "out").glob("*.safetensors"))


KINDS = ["none", "lora", "ia3", "prefix", "prompt"]


@pytest.mark.parametrize("peft", KINDS)
def test_saved_weights_answer_as_the_trained_ones(monkeypatch, tmp_path, flags, peft):
    check_reload(monkeypatch, tmp_path, flags("sft", "out", f"--peft={peft}", "--max_steps=3"), "sft", "causal")


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_saved_reward_model_scores_as_the_trained_one(monkeypatch, tmp_path, flags, peft):
    check_reload(monkeypatch, tmp_path, flags("reward", "out", f"--peft={peft}", "--max_steps=3"), "reward", "sequence")


def check_reload(monkeypatch, tmp_path, words, recipe, head):
    from alignment import run
    from alignment.models import load_checkpoint

    held = {}

    def save(trainer, folder, real=run.save):
        real(trainer, folder)
        model = trainer.model.eval()
        held["ids"] = torch.tensor([trainer.processing_class("the quick brown fox")["input_ids"]])
        with torch.no_grad():
            held["logits"] = model(input_ids=held["ids"]).logits

    with monkeypatch.context() as patch:
        patch.setattr(run, "save", save)
        start(patch, recipe, *words)
    folder = tmp_path / "out"
    model, tokenizer = load_checkpoint(str(folder), head=head)
    with torch.no_grad():
        logits = model(input_ids=held["ids"]).logits
    assert (logits - held["logits"]).abs().max() < 1e-5
    assert "im_start" in tokenizer.chat_template
    if "none" not in str(words):
        assert (folder / "adapter_config.json").is_file() and not (folder / "model.safetensors").exists()
    if head == "causal":
        stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert end in (stops if isinstance(stops, list) else [stops])


def test_adapter_on_a_merged_adapter_saves_its_base(monkeypatch, tmp_path, flags):
    from alignment.models import load_checkpoint

    start(monkeypatch, "sft", *flags("sft", "first", "--peft=lora", "--max_steps=1"))
    words = flags("sft", "out", "--peft=ia3", "--max_steps=1", "--model_name_or_path", tmp_path / "first")
    start(monkeypatch, "sft", *words)
    assert (tmp_path / "out" / "base_model" / "model.safetensors").is_file()
    load_checkpoint(str(tmp_path / "out"))


def interrupt(monkeypatch, recipe, words, step):
    with monkeypatch.context() as patch:
        signal_at(patch, step)
        start(patch, recipe, *words)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_interrupted_and_resumed_is_never_stopped(monkeypatch, tmp_path, flags, recipe, capsys):
    """Bit for bit on the CPU, with dropout on, in the middle of the second epoch."""
    more = ["--per_device_train_batch_size=8", "--test_size=8", "--eval_strategy=steps", "--eval_steps=3"]
    more += ["--eval_on_start=true", "--peft=lora", "--lora_dropout=0.2"]
    start(monkeypatch, recipe, *flags(recipe, "whole", *more))
    interrupt(monkeypatch, recipe, flags(recipe, "parts", *more), 3)
    interrupt(monkeypatch, recipe, flags(recipe, "parts", *more, "--resume_from_checkpoint=last"), 6)
    parts = tmp_path / "parts"
    assert record(parts)["status"] == "interrupted" and record(parts)["steps"] == 6
    assert not list(parts.glob("*.safetensors"))
    start(monkeypatch, recipe, *flags(recipe, "parts", *more, "--resume_from_checkpoint=true"))
    assert same_weights(tmp_path / "whole", parts)
    whole, resumed = record(tmp_path / "whole"), record(parts)
    assert resumed["status"] == "finished" and resumed["steps"] == 8
    assert resumed["metrics"]["before"] == whole["metrics"]["before"] != {}
    for part in (whole, resumed):
        del part["metrics"]["after"]["num_tokens"]  # TRL counts from where it went on
    assert resumed["metrics"]["after"] == whole["metrics"]["after"]
    assert resumed["identity"] == whole["identity"]


@pytest.mark.slow
def test_resume_of_full_training_with_rotation(monkeypatch, tmp_path, flags):
    more = ["--save_strategy=steps", "--save_steps=2", "--save_total_limit=1"]
    start(monkeypatch, "sft", *flags("sft", "whole", *more))
    assert [folder.name for folder in (tmp_path / "whole").glob("checkpoint-*")] == ["checkpoint-8"]
    interrupt(monkeypatch, "sft", flags("sft", "parts", *more), 5)
    assert [folder.name for folder in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-5"]
    start(monkeypatch, "sft", *flags("sft", "parts", *more, "--resume_from_checkpoint=last"))
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_resume_of_another_run_is_refused(monkeypatch, tmp_path, flags):
    interrupt(monkeypatch, "sft", flags("sft"), 2)
    again = [*flags("sft"), "--resume_from_checkpoint", "last"]
    before = record(tmp_path / "out")
    for change, word in (
        (["--per_device_train_batch_size=2"], "rows per step"),
        (["--seed=7"], "seed"),
        (["--chat_template_path", template(tmp_path)], "chat template"),
        (["--peft=lora"], "peft"),
    ):
        with pytest.raises(InputError, match=f"not the run that wrote the checkpoint: other .*{word}"):
            start(monkeypatch, "sft", *again, *change)
    lines = (tmp_path / "sft.jsonl").read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join([*lines[1:], lines[1]]), encoding="utf-8")
    with pytest.raises(InputError, match="other data"):
        start(monkeypatch, "sft", *again, "--data", other)
    assert record(tmp_path / "out") == before


def template(folder):
    from conftest import CHATML

    file = folder / "other.jinja"
    file.write_text(CHATML + "{# other #}", encoding="utf-8")
    return file


def test_damaged_newest_checkpoint_is_passed_over(monkeypatch, tmp_path, flags, capsys):
    more = ["--save_strategy=steps", "--save_steps=2", "--save_total_limit=2"]
    start(monkeypatch, "sft", *flags("sft", "out", *more, "--max_steps=4"))
    file = tmp_path / "out" / "checkpoint-4" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    expected = weights(tmp_path / "out")
    start(monkeypatch, "sft", *flags("sft", "out", *more, "--max_steps=4", "--resume_from_checkpoint=last"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-4 passed over: model.safetensors is not as it was written" in shown
    assert "goes on from" in shown
    found = weights(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_command_to_go_on_can_be_pasted(monkeypatch, tmp_path):
    words = "recipes/sft.py --resume_from_checkpoint out/checkpoint-3 --data 'a b.jsonl' c.jsonl --overwrite-output-dir"
    monkeypatch.setattr(sys, "argv", [*shlex.split(words), "--hub_token", "hf_x"])
    monkeypatch.setattr(launch, "launcher", lambda: ["accelerate", "launch", "--num_processes", "2"])
    assert shlex.split(launch.command(resume=True)) == [
        "accelerate", "launch", "--num_processes", "2", "recipes/sft.py", "--data", "a b.jsonl", "c.jsonl",
        "--hub_token", "hf_x", "--resume_from_checkpoint", "last",
    ]  # fmt: skip
    assert "hf_x" not in launch.command() and "***" in launch.command()
    monkeypatch.setattr(sys, "argv", ["recipes/sft.py", "--hub-token=hf_x"])
    assert "hf_x" not in launch.command()


def command_line(words, *launch_flags):
    accelerate = Path(sys.executable).with_name("accelerate")
    return [str(accelerate), "launch", *launch_flags, *map(str, words)]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def wait_for_step(process, text):
    """Read what the command prints until a line holds `text`; returns the lines."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError("".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("hardware", [[], ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml")]])
def test_ctrl_c_as_a_user_types_it_and_the_command_that_is_printed(tmp_path, flags, hardware):
    words = ["recipes/sft.py", *flags("sft", "out", "--max_steps=400", "--logging_steps=1")]
    process = subprocess.Popen(
        command_line(words, *hardware), cwd=ROOT, env=environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for_step(process, "step     2/400")
    os.killpg(process.pid, signal.SIGINT)  # the terminal tells the launcher and the recipe alike
    shown = process.stdout.read()
    process.wait(60)
    said = next(line for line in shown.splitlines() if line.startswith("To go on: "))
    stopped = record(tmp_path / "out")
    assert stopped["status"] == "interrupted" and stopped["signal"] == "SIGINT"
    again = shlex.split(said.removeprefix("To go on: "))
    assert again[: 2 + len(hardware)] == ["accelerate", "launch", *hardware]
    again[0] = command_line([])[0]
    again += ["--max_steps", str(stopped["steps"] + 2)]
    done = subprocess.run(again, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert record(tmp_path / "out")["steps"] == stopped["steps"] + 2


@pytest.mark.slow
def test_signal_to_one_process_stops_both_at_one_step(tmp_path, flags):
    import psutil

    words = ["recipes/sft.py", *flags("sft", "out", "--max_steps=400", "--logging_steps=1")]
    hardware = ROOT / "accelerate_configs" / "cpu.yaml"
    process = subprocess.Popen(
        command_line(words, "--config_file", str(hardware)), cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for_step(process, "step     2/400")
    children = [c for c in psutil.Process(process.pid).children() if "recipes/sft.py" in " ".join(c.cmdline())]
    second = next(c for c in children if c.environ().get("RANK") == "1")
    second.send_signal(signal.SIGTERM)
    shown = process.stdout.read()
    assert process.wait(120) == 0, shown[-3000:]
    found = record(tmp_path / "out")
    assert found["status"] == "interrupted" and found["signal"] == "a signal to another process"
    listed = json.loads((tmp_path / "out" / f"checkpoint-{found['steps']}" / "complete.json").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= listed.keys()


def test_colours_in_a_terminal_marks_elsewhere(monkeypatch, tmp_path, flags):
    from toy_runs import built

    trainer, args, loaded, rows = built(monkeypatch, "dpo", *flags("dpo"))
    plain = "\n".join(line.plain for line in preflight.draw_masks(rows, plain=True))
    assert "[+" in plain and "[-" in plain and "<|im_end|>+]" in plain
    colourful = preflight.draw_masks(rows, plain=False)
    assert not any("[+" in line.plain for line in colourful)
    console = Console(force_terminal=True, color_system="standard", width=100)
    with console.capture() as capture:
        for line in colourful:
            console.print(line)
    assert "\x1b[1;32m" in capture.get() and "\x1b[1;31m" in capture.get()
