"""Checkpoints are read whole or not at all; one recipe's weights start the next one from where they are."""

import json
import math
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from test_adapters import adapted, arguments, untrained
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, T5Config
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from alignment import models
from alignment.errors import InputError
from alignment.folders import find_base
from alignment.warmstart import ready

ROWS = Dataset.from_list([{"prompt": f"Is {i} odd?", "completion": " yes" if i % 2 else " no"} for i in range(8)])
PAIRS = Dataset.from_list(
    [{"prompt": f"Is {i} odd?", "chosen": [" no", " yes"][i % 2], "rejected": " I do not know"} for i in range(8)]
)
THUMBS = Dataset.from_list([{"prompt": f"Is {i}?", "completion": " yes", "label": i % 2 == 0} for i in range(8)])
TRAINERS = {
    "sft": (SFTConfig, SFTTrainer, ROWS),
    "dpo": (DPOConfig, DPOTrainer, PAIRS),
    "kto": (KTOConfig, KTOTrainer, THUMBS),
    "reward": (RewardConfig, RewardTrainer, PAIRS),
}
IDS = torch.tensor([[5, 6, 7, 8]])


def train(folder, out, recipe, *flags, steps=1, **defaults):
    """Train as a recipe does, a few steps; returns the trainer, the loaded model and the logged losses."""
    config, trainer_class, rows = TRAINERS[recipe]
    own = {"max_steps": steps, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
    own |= {"disable_tqdm": True, "learning_rate": 0.01, "activation_checkpointing": False}
    args = arguments(folder, out, *flags, train=config, recipe=recipe, **own | defaults)
    loaded = models.load_model(args, "sequence" if recipe == "reward" else "causal")
    more = {"ref_model": loaded.ref_model} if recipe in ("dpo", "kto") else {}
    trainer = trainer_class(
        model=loaded.model, args=args.train, train_dataset=rows, processing_class=loaded.tokenizer,
        peft_config=loaded.peft_config, **more,
    )  # fmt: skip
    ready(trainer, loaded)
    models.save_base(loaded, out)
    trainer.train()
    trainer.save_model(str(out))
    return trainer, loaded, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def answer(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


@pytest.fixture(scope="module")
def tuned(toy, tmp_path_factory):
    """Output folders of short SFT runs, one per kind of adapter and one in full."""
    folder = tmp_path_factory.mktemp("tuned")
    for name in ("lora", "ia3", "prefix", "prompt", "ptuning", "none"):
        train(toy, folder / name, "sft", "--peft", name, "--learning_rate", "0.05", steps=2)
    return folder


@pytest.mark.parametrize("recipe", ["dpo", "kto"])
@pytest.mark.parametrize(
    ("start", "flags"),
    [
        ("lora", []),
        ("ia3", []),
        ("prefix", []),
        ("prompt", []),
        ("ptuning", []),
        ("none", []),
        ("none", ["--peft", "lora"]),
        ("lora", ["--peft", "none"]),
        ("lora", ["--peft", "ia3"]),
        ("lora", ["--peft", "lora", "--peft_args", '{"r": 3}']),
        ("lora", ["--load_in_4bit", "true"]),
    ],
)
def test_preferences_start_from_the_tuned_model_as_reference(tuned, tmp_path, recipe, start, flags):
    before, _ = models.load_checkpoint(tuned / start)
    trainer, loaded, losses = train(tuned / start, tmp_path / "out", recipe, *flags)
    assert losses[0] == pytest.approx(math.log(2) if recipe == "dpo" else 0.5, abs=2e-4)
    with torch.no_grad():
        if loaded.ref_model is not None:
            reference = loaded.ref_model
        elif "ref" in getattr(trainer.model, "peft_config", {}):
            trainer.model.set_adapter("ref")
            reference = trainer.model
        else:
            return
        distance = (answer(reference) - answer(before)).abs().max()
    assert distance <= (0.3 if loaded.method == "qlora" else 1e-4) * answer(before).abs().max()


@pytest.mark.parametrize("flags", [["--peft", "ia3"], ["--peft", "lora", "--lora_r", "2"], ["--peft", "prompt"]])
def test_a_new_adapter_keeps_its_merged_base_and_may_be_moved(tuned, tmp_path, flags):
    trainer, loaded, _ = train(tuned / "lora", tmp_path / "out", "dpo", *flags)
    expected = answer(trainer.model)
    assert loaded.merged_from == str(tuned / "lora")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    model, _ = models.load_checkpoint(tmp_path / "moved")
    torch.testing.assert_close(answer(model), expected, atol=1e-4, rtol=1e-4)


def test_reward_model_starts_from_an_sft_adapter(tuned, toy, tmp_path):
    trainer, loaded, losses = train(tuned / "lora", tmp_path / "out", "reward", "--peft", "lora")
    base = AutoModelForCausalLM.from_pretrained(toy)
    tuned_base = loaded.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert not torch.allclose(tuned_base, base.model.layers[0].mlp.up_proj.weight)  # the adapter is in it
    model, _ = models.load_checkpoint(tmp_path / "out", head="sequence")
    torch.testing.assert_close(answer(model), answer(trainer.model))
    assert math.isfinite(losses[0])


@pytest.mark.parametrize("name", ["none", "lora", "qlora", "ia3", "prefix", "prompt", "ptuning"])
def test_score_alone_is_score_in_a_batch(toy, tmp_path, name):
    trainer, loaded, _ = train(toy, tmp_path, "reward", "--peft", name)
    tokenizer, texts = loaded.tokenizer, ["One.", "A much longer row of words than the first one."]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        trainer.model.eval()
        together = trainer.model(**batch).logits[:, 0]
        alone = torch.stack([trainer.model(**tokenizer([t], return_tensors="pt")).logits[0, 0] for t in texts])
    torch.testing.assert_close(together.float(), alone.float(), atol=0.02 if name == "qlora" else 1e-5, rtol=0.02)
    assert (together[0] - together[1]).abs() > 1e-4


def test_reward_on_a_quantised_base_keeps_its_head_in_32_bits(toy, tmp_path):
    trainer, _, losses = train(toy, tmp_path, "reward", "--peft", "qlora", steps=2)
    score = [p for n, p in trainer.model.named_parameters() if "score" in n and p.requires_grad]
    assert score
    assert all(p.dtype == torch.float32 for p in score)
    model, _ = models.load_checkpoint(tmp_path, torch.bfloat16, "sequence", load_in_4bit=True)
    torch.testing.assert_close(answer(model), answer(trainer.model), atol=0.02, rtol=0.02)


def test_prefix_starts_from_real_text(toy, tmp_path):
    _, _, real = train(toy, tmp_path / "a", "sft", "--peft", "prefix", "--learning_rate", "1e-9")
    args = arguments(toy, tmp_path, "--peft", "prefix")
    _, noise = adapted(args)
    weight = noise.prompt_encoder["default"].embedding.weight
    model, _ = models.load_checkpoint(tmp_path / "a")
    keys = model.prompt_encoder["default"].embedding.weight
    assert keys.shape == weight.shape
    plain, _ = models.load_checkpoint(toy)
    ids = plain_prefix_ids(toy, keys.shape[0])
    with torch.no_grad():
        cache = plain(ids, use_cache=True).past_key_values
    first = torch.stack([cache.layers[0].keys[0], cache.layers[0].values[0]])  # [2, heads, tokens, width]
    got = keys.view(keys.shape[0], 4, 2, 16)[:, :2].permute(1, 2, 0, 3)
    torch.testing.assert_close(got, first, atol=1e-5, rtol=1e-4)


def plain_prefix_ids(toy, tokens):
    from alignment.warmstart import PREFIX_TEXT

    ids = models.load_tokenizer(toy)(PREFIX_TEXT * 9, return_tensors="pt")["input_ids"]
    return ids[:, :tokens]


@pytest.mark.parametrize(
    ("name", "steps", "kept"),
    [("ptuning", 2, "prompt_encoder.safetensors"), ("adalora", 9, "rank_allocator.safetensors")],
)
def test_resumes_where_it_was(toy, tmp_path, name, steps, kept):
    options = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    whole, _, _ = train(toy, tmp_path / "a", "sft", "--peft", name, steps=steps, **options)
    args = arguments(
        toy, tmp_path / "a", "--peft", name, "--learning_rate", "0.01", train=SFTConfig, recipe="sft",
        max_steps=steps, per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True,
        lr_scheduler_type="constant", activation_checkpointing=False,
    )  # fmt: skip

    def resumed(folder):
        loaded = models.load_model(args)
        trainer = SFTTrainer(
            loaded.model, args.train, train_dataset=ROWS, processing_class=loaded.tokenizer,
            peft_config=loaded.peft_config,
        )  # fmt: skip
        ready(trainer, loaded)
        trainer.train(resume_from_checkpoint=str(folder))
        return trainer.model

    for step in {1, steps // 2 + 1} - {steps}:
        model = resumed(tmp_path / "a" / f"checkpoint-{step}")
        for key, parameter in whole.model.named_parameters():
            torch.testing.assert_close(model.get_parameter(key), parameter, msg=key)
    (tmp_path / "a" / "checkpoint-1" / kept).unlink()
    with pytest.raises(InputError, match=f"no {kept}"):
        resumed(tmp_path / "a" / "checkpoint-1")


def test_adalora_moves_its_ranks(toy, tmp_path):
    trainer, _, _ = train(toy, tmp_path, "sft", "--peft", "adalora", steps=6)
    pattern = trainer.model.peft_config["default"].rank_pattern
    assert pattern
    kept = [sum(flags) for flags in pattern.values()]
    assert min(kept) < 24  # init_r
    model, _ = models.load_checkpoint(tmp_path)
    torch.testing.assert_close(answer(model), answer(trainer.model), atol=1e-5, rtol=1e-4)


def test_adapter_of_the_hub(tuned, toy, tmp_path, monkeypatch):
    """A cache as the hub's own library writes it; offline, as everywhere in these tests."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--me--tuned"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    shutil.copytree(tuned / "lora", place / "snapshots" / ("a" * 40))
    ours, _ = models.load_checkpoint("me/tuned")
    torch.testing.assert_close(answer(ours), answer(models.load_checkpoint(tuned / "lora")[0]))
    loaded = models.load_model(arguments("me/tuned", tmp_path / "out"))
    assert loaded.method == "lora"
    assert models.merge("me/tuned", tmp_path / "merged")["agreement"] == 1.0
    with pytest.raises(InputError, match="me/other is neither a folder here nor in the cache"):
        models.load_checkpoint("me/other")


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_merged_is_adapter(tuned, tmp_path, name):
    distance = models.merge(tuned / name, tmp_path / "merged")
    assert distance["agreement"] == 1.0
    adapter, _ = models.load_checkpoint(tuned / name)
    merged, tokenizer = models.load_checkpoint(tmp_path / "merged")
    torch.testing.assert_close(answer(merged), answer(adapter), atol=1e-4, rtol=1e-4)
    base, _ = models.load_checkpoint(find_base(tuned / name))
    assert (answer(merged) - answer(base)).abs().max() > 1e-2
    assert tokenizer.chat_template
    assert merged.generation_config.eos_token_id == tokenizer.eos_token_id
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged"]  # nothing half-written beside it


@pytest.mark.parametrize("name", ["prefix", "prompt", "ptuning"])
def test_prompt_learning_is_neither_merged_nor_left(tuned, tmp_path, name):
    with pytest.raises(InputError, match="cannot be merged"):
        models.merge(tuned / name, tmp_path / "merged")
    with pytest.raises(InputError, match="cannot become part of the base") as refused:
        models.load_model(arguments(tuned / name, tmp_path, "--peft", "lora"))
    assert f"--peft {name}" in str(refused.value)


def test_merge_refuses_a_taken_folder_and_a_wrong_sum(tuned, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    with pytest.raises(InputError, match="exists"):
        models.merge(tuned / "lora", tmp_path / "taken")
    monkeypatch.setattr("alignment.merging.MAX_KL", -1.0)
    with pytest.raises(InputError, match="merging changed the model"):
        models.merge(tuned / "lora", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merge_recipe_is_a_command(tuned, tmp_path):
    from conftest import ROOT

    command = [
        sys.executable,
        str(ROOT / "recipes" / "merge.py"),
        str(tuned / "lora"),
        "--out",
        str(tmp_path / "m"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "agreement 1" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "Traceback" not in again.stderr
    assert "error:" in again.stderr


def test_adapter_of_another_base(tuned, toy, tmp_path):
    from transformers import LlamaConfig

    other = tmp_path / "other"
    shutil.copytree(toy, other)
    config = LlamaConfig.from_pretrained(toy)
    config.hidden_size, config.head_dim = 128, 32
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    for name in ("lora", "ia3", "prompt", "prefix"):
        folder = tmp_path / name
        shutil.copytree(tuned / name, folder)
        shutil.copytree(other, folder / "base_model")
        with pytest.raises(InputError, match="another model"):
            models.load_checkpoint(folder)
        with pytest.raises(InputError, match="another model"):
            models.load_model(arguments(folder, tmp_path / "out"))


def test_adapter_with_missing_or_unexpected_tensors(tuned, tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(tuned / "lora", folder)
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    key = sorted(whole)[0]
    save_file({k: v for k, v in whole.items() if k != key}, file)
    with pytest.raises(InputError, match="1 missing"):
        models.load_checkpoint(folder)
    save_file({k.replace("layers.1", "layers.7"): v for k, v in whole.items()}, file)
    with pytest.raises(InputError, match="without a place"):
        models.load_checkpoint(folder)
    file.unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        models.load_checkpoint(folder)


def test_base_of_an_adapter_is_looked_for_and_the_places_named(tuned, toy, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(tuned / "lora", project / "outputs" / "sft")
    shutil.copytree(toy, project / "models" / "toy")
    config = project / "outputs" / "sft" / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"base_model_name_or_path": "models/toy"}))
    assert find_base(config.parent) == str(project / "models" / "toy")  # whatever the working directory
    shutil.rmtree(project / "models")
    with pytest.raises(InputError, match="models/toy"):
        find_base(config.parent)
    shutil.copytree(toy, project / "outputs" / "sft" / "base_model")
    checkpoint = project / "outputs" / "sft" / "checkpoint-2"
    shutil.copytree(tuned / "lora", checkpoint, ignore=shutil.ignore_patterns("checkpoint-*"))
    assert find_base(checkpoint) == str(project / "outputs" / "sft" / "base_model")


def broken(toy, folder, change):
    shutil.copytree(toy, folder)
    change(folder)
    return folder


def forget(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def edit_config(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (forget("config.json"), ["no config.json"]),
        (forget("tokenizer.json"), ["no tokenizer"]),
        (forget("model.safetensors"), ["no *.safetensors", "no weights"]),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            ["no *.safetensors", "pytorch_model.bin is a pickle"],
        ),
        (edit_config(num_hidden_layers=3), ["do not fill the model", "9 missing", "layers.2"]),
        (edit_config(intermediate_size=96), ["do not fill the model", "of another shape"]),
        (edit_config(model_type="lama"), ["lama"]),
        (edit_config(architectures=["LlamaForSequenceClassification"]), ["reward model"]),
    ],
)
def test_a_broken_model_folder_says_what_is_wrong(toy, tmp_path, change, words):
    folder = broken(toy, tmp_path / "model", change)
    with pytest.raises(InputError) as refused:
        models.load_model(arguments(folder, tmp_path / "out"))
    for word in words:
        assert word in str(refused.value), str(refused.value)


def test_a_model_that_is_not_there(toy, tmp_path):
    shutil.copytree(toy, tmp_path / "qwen-small")
    (tmp_path / "empty").mkdir()
    for name, words in {
        str(tmp_path / "qwen-smal"): ["no model folder", "did you mean", "qwen-small"],
        str(tmp_path / "empty"): ["is empty"],
        "no-such-org/no-such-model": ["neither a folder here nor in the cache", "HF_HUB_OFFLINE"],
        "outputs/no/such": ["no model folder"],
    }.items():
        with pytest.raises(InputError) as refused:
            models.load_model(arguments(name, tmp_path / "out"))
        for word in words:
            assert word in str(refused.value), str(refused.value)


def test_output_folder_of_checkpoints_names_them(toy, tmp_path):
    shutil.copytree(toy, tmp_path / "run" / "checkpoint-5")
    with pytest.raises(InputError, match="checkpoint-5"):
        models.load_model(arguments(tmp_path / "run", tmp_path / "out"))


def test_missing_shard(toy, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(toy)
    folder = tmp_path / "sharded"
    shutil.copytree(toy, folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    models.load_checkpoint(folder)
    shards[0].unlink()
    with pytest.raises(InputError, match=r"weight files are missing") as refused:
        models.load_checkpoint(folder)
    assert shards[0].name in str(refused.value)


def test_architectures_that_do_not_fit(toy, toy_bert, tmp_path):
    with pytest.raises(InputError, match="bert is an encoder"):
        models.load_model(arguments(toy_bert, tmp_path))
    folder = tmp_path / "t5"
    shutil.copytree(toy, folder)
    T5Config(d_model=32, num_layers=1, num_heads=2, architectures=["T5ForConditionalGeneration"]).save_pretrained(
        folder
    )
    for head in ("causal", "sequence"):
        with pytest.raises(InputError, match="t5 is an encoder-decoder"):
            models.load_model(arguments(folder, tmp_path), head)


def test_tokenizer_larger_than_the_model(toy, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(toy, folder)
    tokenizer = models.load_tokenizer(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="token ids up to 320"):
        models.load_model(arguments(folder, tmp_path))


def test_padding_token_falls_back_to_the_end_token(toy, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(toy, folder)
    tokenizer = models.load_tokenizer(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert models.load_tokenizer(folder).pad_token == "<|im_end|>"


def test_reward_adapter_is_no_language_model(toy, tmp_path):
    train(toy, tmp_path / "rm", "reward", "--peft", "lora")
    with pytest.raises(InputError, match="reward model"):
        models.load_model(arguments(tmp_path / "rm", tmp_path / "out"))
    loaded = models.load_model(arguments(tmp_path / "rm", tmp_path / "out", train=RewardConfig), "sequence")
    assert isinstance(loaded.model, peft.PeftModelForSequenceClassification)
    assert any(p.requires_grad for n, p in loaded.model.named_parameters() if "score" in n)


def test_types_of_the_weights(toy, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(toy, half)
    AutoModelForCausalLM.from_pretrained(toy, dtype=torch.bfloat16).save_pretrained(half)

    def dtype(*flags):
        return models.load_model(arguments(half, tmp_path, *flags)).model.dtype

    assert dtype() == torch.float32  # small updates vanish in 16 bits
    assert dtype("--dtype", "auto") == torch.bfloat16
    assert dtype("--peft", "lora", "--dtype", "bfloat16") == torch.bfloat16
    assert dtype("--peft", "lora") == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    assert dtype("--peft", "qlora") == torch.bfloat16


def test_classification_head_survives_saving(toy, tmp_path):
    trainer, _, _ = train(toy, tmp_path, "reward", steps=1)
    model, _ = models.load_checkpoint(tmp_path, head="sequence")
    torch.testing.assert_close(answer(model), answer(trainer.model))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again.score.weight, model.score.weight)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_untrained_stop_token_is_learnt_by_the_trainers(toy, tmp_path, recipe, tie):
    folder, rows = untrained(toy, tmp_path / "base", tie)
    trainer, _, losses = train(folder, tmp_path / "out", recipe, "--peft", "lora", steps=3)
    head = trainer.model.get_base_model().get_output_embeddings()
    base = AutoModelForCausalLM.from_pretrained(folder)
    moved = (head.weight - base.get_output_embeddings().weight).abs().sum(1).nonzero().flatten().tolist()
    assert rows[1] in moved  # the stop token, which ends every answer
    assert set(moved) <= set(rows)
    model, _ = models.load_checkpoint(tmp_path / "out")
    torch.testing.assert_close(answer(model), answer(trainer.model), atol=1e-4, rtol=1e-4)
    assert losses[-1] < losses[0]


def test_weights_stored_in_4_bits(toy, tmp_path):
    loaded = models.load_model(arguments(toy, tmp_path, "--peft", "qlora"))
    loaded.model.save_pretrained(tmp_path / "four")
    loaded.tokenizer.save_pretrained(tmp_path / "four")
    model, _ = models.load_checkpoint(tmp_path / "four", torch.bfloat16)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    torch.testing.assert_close(answer(model), answer(loaded.model), atol=0.05, rtol=0.05)
    with pytest.raises(InputError, match="full fine-tuning"):
        models.load_model(arguments(tmp_path / "four", tmp_path / "out"))
    trainer, _, losses = train(tmp_path / "four", tmp_path / "out", "sft", "--peft", "lora")
    assert math.isfinite(losses[0])
    with pytest.raises(InputError, match="stored quantised"):
        models.merge(tmp_path / "out", tmp_path / "merged")


def test_damaged_weights(toy, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(toy, folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="damaged"):
        models.load_checkpoint(folder)


def test_vision_parts_of_a_model_are_left_alone(tmp_path, toy):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    folder = tmp_path / "gemma"
    shutil.copytree(toy, folder)
    Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=319)
    ).save_pretrained(folder)
    for name in ("lora", "ia3"):
        _, model = adapted(arguments(folder, tmp_path, "--peft", name))
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert not [n for n in trained if "vision" in n or "projector" in n]


def test_an_evaluation_does_not_change_what_a_quantised_base_learns(toy, tmp_path):
    def gradient(evaluate_first):
        torch.manual_seed(0)
        _, model = adapted(arguments(toy, tmp_path, "--peft", "qlora", "--peft_args", '{"lora_dropout": 0.0}'))
        if evaluate_first:
            answer(model)
        model.train()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    (loss, plain), (again, after) = gradient(False), gradient(True)
    torch.testing.assert_close(again, loss)
    assert plain.keys() == after.keys()
    for name in plain:
        torch.testing.assert_close(after[name], plain[name], msg=name)
