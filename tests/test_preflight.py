"""What is found before the first step: each broken set-up is named, and a sound one is left alone."""

import json
import sys

import pytest
import torch
from conftest import CHATML
from toy_runs import RECIPES, SETTINGS, built, start, toy_rows

from alignment import launch, preflight
from alignment.errors import InputError
from alignment.first_loss import first_loss


@pytest.fixture
def flags(toy, tmp_path):
    """The flags of a small run; `rows` replaces its data."""

    def make(recipe, *more, rows=None):
        file = toy_rows(tmp_path, recipe)
        if rows is not None:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = ["--data", file, "--model_name_or_path", toy, "--output_dir", tmp_path / "out"]
        return [*data, *SETTINGS, *more]

    return make


def examined(monkeypatch, recipe, words):
    return preflight.examine(*built(monkeypatch, recipe, *words))


def at(findings, level):
    return [f"{finding.what} -> {finding.fix}" for finding in findings if finding.level == level]


def one(findings, level, *words):
    """The one finding of a level that holds all the words."""
    found = [text for text in at(findings, level) if all(word in text for word in words)]
    assert len(found) == 1, [vars(finding) for finding in findings]
    return found[0]


def chat(question, answer):
    return [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]


@pytest.mark.parametrize("recipe", RECIPES)
def test_embedded_defaults_are_sound(monkeypatch, tmp_path, recipe):
    findings = examined(monkeypatch, recipe, ["--output_dir", tmp_path / "out"])
    assert at(findings, "error") == at(findings, "warning") == []
    assert one(findings, "fact", "updates", "epoch", "tokens", "learning rate")
    assert one(findings, "fact", "max_length 256")


@pytest.mark.parametrize("recipe", RECIPES)
def test_toy_rows_are_sound(monkeypatch, flags, recipe):
    findings = examined(monkeypatch, recipe, flags(recipe))
    assert at(findings, "error") == at(findings, "warning") == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_template_without_stop_token(monkeypatch, tmp_path, toy, flags, recipe):
    file = tmp_path / "open.jinja"
    file.write_text(CHATML.replace("'<|im_end|>\\n'", "'\\n'"), encoding="utf-8")
    words = [*flags(recipe), "--chat_template_path", file]
    if recipe != "sft":  # only SFT has the flag: here the template is the tokenizer's own
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(toy)
        tokenizer.chat_template = file.read_text(encoding="utf-8")
        tokenizer.save_pretrained(tmp_path / "open")
        AutoModelForCausalLM.from_pretrained(toy).save_pretrained(tmp_path / "open")
        words = [*flags(recipe), "--model_name_or_path", tmp_path / "open"]
    assert one(examined(monkeypatch, recipe, words), "error", "generation stops at", "<|im_end|>", "--chat_template")
    with pytest.raises(InputError, match="end in no token"):
        start(monkeypatch, recipe, *words)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("label", [True, False])
def test_thumbs_all_one_way(monkeypatch, flags, label):
    rows = []
    for number in range(12):
        prompt, completion = chat(f"fox {number}", f"dog {number}")
        rows.append({"prompt": prompt, "completion": completion, "label": label})
    findings = examined(monkeypatch, "kto", flags("kto", rows=rows))
    assert one(findings, "error", "all thumbs point the same way", "sft")


def test_thumbs_out_of_balance(monkeypatch, flags):
    rows = []
    for number in range(30):
        prompt, completion = chat(f"fox {number}", f"dog {number}")
        rows.append({"prompt": prompt, "completion": completion, "label": number % 5 == 0})
    findings = examined(monkeypatch, "kto", flags("kto", rows=rows))
    assert "--desirable_weight 4.0" in one(findings, "warning", "0.25")
    advised = examined(monkeypatch, "kto", flags("kto", "--desirable_weight=4", rows=rows))
    assert at(advised, "warning") == []


@pytest.mark.parametrize("recipe", ["dpo", "kto"])
def test_wrong_reference(monkeypatch, flags, recipe):
    from transformers import AutoModelForCausalLM

    trainer, args, loaded, rows = built(monkeypatch, recipe, *flags(recipe))
    other = AutoModelForCausalLM.from_pretrained(args.model.model_name_or_path)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    trainer.ref_model.load_state_dict(other.state_dict())
    findings = preflight.examine(trainer, args, loaded, rows)
    assert one(findings, "error", "before training", "the reference is not the model that is trained")
    with pytest.raises(InputError, match="before training"):
        preflight.refuse(findings)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "robust"])
def test_right_reference_of_any_loss(monkeypatch, flags, loss):
    more = ["--label_smoothing=0.1"] if loss == "robust" else []
    findings = examined(monkeypatch, "dpo", flags("dpo", f"--loss_type={loss}", *more))
    text = one(findings, "fact", "before training", "margin 0.0000", "agree")
    assert ("ln 2" in text) == (loss == "sigmoid")


def test_few_trained_tokens(monkeypatch, flags):
    rows = []
    for number in range(12):
        prompt, answer = chat("river boat rain " * 12 + str(number), "r")
        rows.append({"messages": prompt + answer})
    findings = examined(monkeypatch, "sft", flags("sft", rows=rows))
    assert one(findings, "warning", "sft.jsonl: only", "trained on")


def test_near_equal_pairs(monkeypatch, flags):
    rows = []
    for number in range(12):
        prompt, chosen = chat(f"fox {number}", "qxz wvk " * 20)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": chat("", "qxz wvk " * 19 + "qxz wvj ")[1]})
    findings = examined(monkeypatch, "dpo", flags("dpo", rows=rows))
    assert one(findings, "warning", "12 pairs differ in less than 5 %")


def test_few_held_out_rows_say_nothing(monkeypatch, flags):
    rows = [{"messages": [turn for side in chat(f"fox {i}", "qxz wvk") for turn in side]} for i in range(60)]
    findings = examined(monkeypatch, "sft", flags("sft", "--test_size=0.05", rows=rows))
    assert "--test_size 12" in one(findings, "warning", "3 of 60 rows are held out: each is 33 points")
    assert not at(examined(monkeypatch, "sft", flags("sft", "--test_size=12", rows=rows)), "warning")


@pytest.mark.parametrize(("policy", "word"), [("drop", "dropped"), ("cut", "cut")])
def test_rows_too_long_and_the_length_that_keeps_them(monkeypatch, flags, policy, word):
    rows = []
    for number in range(20):
        prompt, answer = chat(f"fox {number}", "qx " * (8 if number % 4 else 30))
        rows.append({"messages": prompt + answer})
    findings = examined(monkeypatch, "sft", flags("sft", "--max_length=64", f"--on_long_row={policy}", rows=rows))
    assert "--max_length 128 keeps 99 %" in one(findings, "warning", "(25.0%): 5 " + word)


def test_rows_longer_than_the_model_knows(monkeypatch, flags):
    prompt, answer = chat("fox", "qxz " * 200)
    rows = [{"messages": prompt + answer}] * 4
    findings = examined(monkeypatch, "sft", flags("sft", "--max_length=2048", rows=rows))
    assert "--max_length 512" in one(findings, "warning", "knows 512 positions")


def test_processes_asked_for_that_did_not_come(monkeypatch, flags):
    monkeypatch.setattr(preflight, "asked_for", lambda: {"num_processes": "2"})
    assert one(examined(monkeypatch, "sft", flags("sft")), "error", "asked for 2 processes, and 1 came", "cpu.yaml")


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharding_asked_for_that_is_not_there(monkeypatch, flags, kind):
    monkeypatch.setattr(preflight, "asked_for", lambda: {"num_processes": 1, "distributed_type": kind})
    assert one(examined(monkeypatch, "sft", flags("sft")), "error", kind, "has none")


def test_launcher_is_read_from_its_command_line(monkeypatch, tmp_path):
    hardware = tmp_path / "two.yaml"
    lines = [
        "compute_environment: LOCAL_MACHINE",
        "distributed_type: FSDP",
        "num_processes: 8",
        "mixed_precision: 'no'",
    ]
    lines += ["use_cpu: false", "debug: false", "num_machines: 1", "machine_rank: 0"]
    hardware.write_text("\n".join(lines), encoding="utf-8")
    words = ["/x/bin/python", "/x/bin/accelerate", "launch", "--config_file", str(hardware), "--num-processes=2"]

    class Parent:
        def __init__(self, pid):
            pass

        def cmdline(self):
            return [*words, "recipes/sft.py", "--num_processes", "99"]

    monkeypatch.setattr(launch.psutil, "Process", Parent)
    monkeypatch.setattr(sys, "argv", ["recipes/sft.py"])
    asked = launch.asked_for()
    assert asked["num_processes"] == "2" and "FSDP" in str(asked["distributed_type"])
    assert launch.command(resume=True).startswith("accelerate launch --config_file")
    words[1:] = ["-m", "pytest", "accelerate_configs"]
    assert launch.asked_for() == {}


def test_nothing_to_train(monkeypatch, flags):
    trainer, *rest = built(monkeypatch, "sft", *flags("sft"))
    trainer.model.requires_grad_(False)
    assert one(preflight.examine(trainer, *rest), "error", "no parameter is trained")


def test_memory_that_is_not_there(monkeypatch, flags):
    monkeypatch.setattr(preflight, "_memory", lambda: 2**20)
    assert one(examined(monkeypatch, "dpo", flags("dpo")), "warning", "memory", "1.0 MiB", "qlora")


def with_bos(toy, folder, template, adds=True):
    """The toy with a BOS token, put in front of texts by its tokenizer."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy)
    tokenizer.bos_token = "<|im_start|>"
    if adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = template
    AutoModelForCausalLM.from_pretrained(toy).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


PLAIN = CHATML.replace("'<|im_start|>' + ", "").replace("<|im_start|>assistant", "assistant")


@pytest.mark.parametrize("recipe", RECIPES)
def test_bos_twice_or_never(monkeypatch, tmp_path, toy, flags, recipe):
    twice = with_bos(toy, tmp_path / "twice", "{{ '<|im_start|><|im_start|>' }}" + PLAIN)
    words = [*flags(recipe), "--model_name_or_path", twice]
    assert one(examined(monkeypatch, recipe, words), "warning", "more than one BOS")
    never = with_bos(toy, tmp_path / "never", PLAIN)
    words = [*flags(recipe), "--model_name_or_path", never]
    assert one(examined(monkeypatch, recipe, words), "warning", "begin without <|im_start|>")
    once = with_bos(toy, tmp_path / "once", "{{ '<|im_start|>' }}" + PLAIN)
    words = [*flags(recipe), "--model_name_or_path", once]
    assert one(examined(monkeypatch, recipe, words), "fact", "BOS tokens a row: 1")


@pytest.mark.parametrize("recipe", RECIPES)
def test_looking_changes_nothing(monkeypatch, flags, recipe):
    """Training after the examination is training without it, bit for bit, with dropout on."""
    ends = []
    for look in (True, False):
        torch.manual_seed(0)
        trainer, args, loaded, rows = built(monkeypatch, recipe, *flags(recipe, "--peft=lora", "--lora_dropout=0.3"))
        before = torch.get_rng_state()
        if look:
            first_loss(trainer)
            assert torch.equal(before, torch.get_rng_state()) and trainer.model.training is True
            assert not trainer._metrics["eval"] and trainer.token_count.computed == 0
            assert trainer.accelerator._dataloaders == []
        trainer.train()
        ends.append({name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad})
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
