"""PEFT by name: what the flags ask for, what each method may do, and what is said about it."""

import json
import math
import shutil

import peft
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, TrainingArguments
from trl import DPOConfig, RewardConfig, SFTConfig

from alignment import adapters, config, models, targets
from alignment.errors import InputError


def arguments(folder, out, *flags, train=SFTConfig, recipe="sft", **defaults):
    """Arguments as a recipe parses them, on the model in `folder`."""
    own = {"model_name_or_path": str(folder), "output_dir": str(out), "report_to": "none"}
    args = config.parse(train, own | defaults, [str(flag) for flag in flags])
    args.recipe = recipe
    return args


def adapted(args, head="causal"):
    loaded = models.load_model(args, head)
    return loaded, peft.get_peft_model(loaded.model, loaded.peft_config)


@pytest.mark.parametrize("head", ["causal", "sequence"])
@pytest.mark.parametrize("name", adapters.NAMES[1:])
def test_named_method_trains_saves_and_reloads(toy, tmp_path, name, head):
    args = arguments(toy, tmp_path, "--peft", name, train=RewardConfig if head == "sequence" else SFTConfig)
    loaded, model = adapted(args, head)
    trainable, total = models.parameters(model)
    assert 0 < trainable < total
    rows = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 0.05)
    for _ in range(2):  # LoRA's second factor starts at zero: the first step moves only that one
        model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits.float().square().mean().backward()
        optimizer.step()
    after = model.eval()(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
    model.save_pretrained(tmp_path / "adapter")
    again, tokenizer = models.load_checkpoint(
        tmp_path / "adapter", loaded.model.dtype, head=head, load_in_4bit=name == "qlora"
    )
    difference = (again(input_ids=rows, attention_mask=torch.ones_like(rows)).logits - after).abs().max()
    # a 4-bit base computes in bfloat16: eight bits of mantissa
    assert difference <= (0.02 if name == "qlora" else 1e-5) * after.abs().max()
    assert tokenizer.pad_token == "<|pad|>"


def test_sequence_head_is_trained_and_saved_whatever_its_name(toy_bert, tmp_path):
    args = arguments(toy_bert, tmp_path, "--peft", "lora", train=RewardConfig, recipe="reward")
    loaded, model = adapted(args, "sequence")
    # the pooler is new too: a masked language model has none
    assert {"classifier", "pooler.dense"} <= set(loaded.peft_config.modules_to_save)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    again, _ = models.load_checkpoint(tmp_path / "adapter", head="sequence")
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--peft", "lorra"], ["lorra", "lora"]),
        (["--peft", "lora", "--peft_args", '{"rank": 4}'], ["'rank'", "rank_pattern"]),
        (["--peft", "ia3", "--peft_args", '{"r": 4}'], ["ia3", "'r'"]),
        (["--peft", "lora", "--peft_args", '{"task_type": "SEQ_CLS"}'], ["task_type", "recipe sets it"]),
        (["--load_in_4bit", "true"], ["--load_in_4bit", "full fine-tuning", "qlora"]),
        (["--peft", "loha", "--load_in_4bit", "true"], ["loha", "quantised"]),
        (["--peft", "ia3", "--lora_r", "4"], ["lora_r", "ia3"]),
        (["--peft_args", '{"r": 4}'], ["peft_args"]),
        (["--peft", "xlora"], ["xlora", "adapters"]),
        (
            ["--peft", "prefix", "--gradient_checkpointing", "true"],
            ["prefix", "gradient_checkpointing false"],
        ),
        (["--peft", "prompt", "--packing", "true"], ["packing", "see each other"]),
        (
            ["--peft", "lora", "--peft_args", '{"r": 4, "x": 1}'],
            ["'x'"],
        ),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(toy, tmp_path, flags, words):
    with pytest.raises(InputError) as refused:
        models.load_model(arguments(toy, tmp_path, *flags))
    for word in words:
        assert word in str(refused.value), str(refused.value)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "none"),
        (["--lora_r", "4"], "lora"),
        (["--peft", "lora", "--load_in_4bit", "true"], "qlora"),
        (["--peft", "lora", "--load_in_8bit", "true"], "lora"),
        (["--peft", "Prefix-Tuning"], "prefix"),
        (["--peft", "p_tuning"], "ptuning"),
    ],
)
def test_flags_resolve_to_one_method(toy, tmp_path, flags, name):
    assert adapters.resolve(arguments(toy, tmp_path, *flags)) == name


def test_use_peft_means_lora(toy, tmp_path):
    args = arguments(toy, tmp_path)
    args.model.use_peft = True
    assert adapters.resolve(args) == "lora"


def test_lora_flags_and_peft_args_win_over_ours(toy, tmp_path):
    flags = ["--peft", "lora", "--lora_alpha", 7, "--use_rslora", "true", "--peft_args", '{"r": 3}']
    found = models.load_model(arguments(toy, tmp_path, *flags)).peft_config
    assert (found.r, found.lora_alpha, found.use_rslora) == (3, 7, True)
    assert found.lora_dropout == 0.05  # ours


def test_prefix_switches_checkpointing_off_and_says_so(toy, tmp_path):
    args = arguments(toy, tmp_path, "--peft", "prefix")
    assert args.train.gradient_checkpointing  # TRL's default
    loaded = models.load_model(args)
    assert not args.train.gradient_checkpointing
    assert not args.train.activation_checkpointing
    assert any("checkpointing" in note and "switched off" in note for note in loaded.notes)


def test_learning_rate_of_the_recipe_belongs_to_its_own_method(toy, tmp_path):
    def rate(*flags, **defaults):
        args = arguments(toy, tmp_path, *flags, learning_rate=0.123, **defaults)
        models.load_model(args)
        return args.train.learning_rate

    assert rate() == 0.123
    assert rate(peft="lora") == 0.123
    assert rate("--peft", "lora", "--learning_rate", "0.5") == 0.5
    assert rate("--peft", "lora") == adapters.default_learning_rate("lora", 64)
    assert rate("--model_name_or_path", shutil.copytree(toy, tmp_path / "made of it")) == 0.123
    other = ROOT / "data" / "tiny" / "model"
    assert rate("--model_name_or_path", other) == adapters.default_learning_rate("none", 128)
    assert adapters.default_learning_rate("lora", 4096) < adapters.default_learning_rate("lora", 1024)
    assert adapters.default_learning_rate("lora", 2000) == pytest.approx(5e-4)
    assert adapters.default_learning_rate("lora", 2000, "dpo") < 2e-5


def test_ia3_targets_come_from_the_layers(toy, toy_bert):
    names = {}
    for folder, kind in ((toy, AutoModelForCausalLM), (toy_bert, AutoModelForMaskedLM)):
        model = kind.from_pretrained(folder)
        every, feedforward = targets.attention_and_feedforward(model)
        made = peft.get_peft_model(model, peft.IA3Config(target_modules=every, feedforward_modules=feedforward))
        layers = {n: m for n, m in made.named_modules() if isinstance(m, peft.tuners.ia3.IA3Layer)}
        first = {n.split(".0.", 1)[1]: m.is_feedforward for n, m in layers.items() if ".0." in n}
        names[folder] = first
    assert names[toy] == dict.fromkeys((f"self_attn.{p}_proj" for p in "qkvo"), False) | {"mlp.down_proj": True}
    attention = (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
    )
    assert names[toy_bert] == dict.fromkeys(attention, False) | {"output.dense": True}


def test_ia3_targets_of_a_model_without_attention():
    class Plain(torch.nn.Module):
        config = AutoModelForCausalLM  # never read further than its width

        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    Plain.config = type("C", (), {"get_text_config": lambda self: type("T", (), {"hidden_size": 2})()})()
    with pytest.raises(ValueError, match="no numbered layers with attention"):
        targets.attention_and_feedforward(Plain())


def untrained(toy, folder, tie):
    """A copy of the toy whose two ChatML tokens have one row, as in a base that never saw them."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy), AutoTokenizer.from_pretrained(toy)
    model.config.tie_word_embeddings = tie
    model.tie_weights()
    rows = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            weight[rows] = weight.mean(0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, rows


def test_rows_of_trained_control_tokens_are_left_alone(toy):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy), AutoTokenizer.from_pretrained(toy)
    assert targets.untrained_tokens(model, tokenizer) == []
    stop = tokenizer.eos_token_id
    with torch.no_grad():
        model.get_input_embeddings().weight[stop] *= 1e-4
    assert targets.untrained_tokens(model, tokenizer) == [stop]


@pytest.mark.parametrize("tie", [True, False])
def test_untrained_control_tokens_are_trained_beside_lora(toy, tmp_path, tie):
    folder, rows = untrained(toy, tmp_path / "base", tie)
    loaded, model = adapted(arguments(folder, tmp_path, "--peft", "lora"))
    assert any("<|im_end|>" in note for note in loaded.notes)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.tensor([[5, 6, rows[0], 7, rows[1]]])
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 1.0).step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any("embed_tokens" in name for name in changed)
    logits = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    again, _ = models.load_checkpoint(tmp_path / "adapter")
    torch.testing.assert_close(again(ids).logits, logits)
    models.merge(tmp_path / "adapter", tmp_path / "merged")
    merged, _ = models.load_checkpoint(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, logits, atol=1e-4, rtol=1e-4)


def test_other_methods_say_that_they_cannot_train_control_tokens(toy, tmp_path):
    folder, _ = untrained(toy, tmp_path / "base", False)
    notes = models.load_model(arguments(folder, tmp_path, "--peft", "ia3")).notes
    assert any("<|im_end|>" in note and "ia3 cannot" in note for note in notes)


@pytest.mark.parametrize("name", ["adalora", "vera", "oft", "boft", "loha", "lokr", "ln_tuning", "hra", "fourierft"])
def test_pefts_other_methods_go_by_their_own_name(toy, tmp_path, name):
    _, model = adapted(arguments(toy, tmp_path, "--peft", name))
    assert 0 < models.parameters(model)[0] < models.parameters(model)[1]
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    again, _ = models.load_checkpoint(tmp_path / "adapter")
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


def test_every_name_is_known_to_peft():
    names = adapters.all_names()
    assert len(names) == len(set(names)) > 30
    for name in set(names) - {"none"}:
        peft.PeftType(adapters.family(name))


def test_limits_in_plain_words():
    plain = TrainingArguments("x", activation_checkpointing=False, report_to="none")
    assert adapters.limits("lora", "sft", plain) == []
    texts = [limit.text for limit in adapters.limits("prompt", "dpo", plain)]
    assert any("ln 2" in text for text in texts)
    on = DPOConfig("x", activation_checkpointing=True, report_to="none", bf16=False, use_cpu=True)
    assert [limit.switch for limit in adapters.limits("prefix", "dpo", on) if limit.refuse] == [
        "gradient_checkpointing"
    ]


def test_memory_estimate_follows_the_method(toy, tmp_path):
    train = TrainingArguments("x", activation_checkpointing=False, report_to="none")
    full = models.memory_estimate(models.load_model(arguments(toy, tmp_path)).model, train, 128)
    _, lora = adapted(arguments(toy, tmp_path, "--peft", "lora", "--peft_args", '{"r": 2}'))
    small = models.memory_estimate(lora, train, 128)
    _, quantized = adapted(arguments(toy, tmp_path, "--peft", "qlora"))
    assert full["optimizer"] == 2 * full["gradients"]
    assert full["gradients"] == full["weights"] - 2 * 8 * 4  # rotary frequencies: buffers, not trained
    assert small["optimizer"] < full["optimizer"] / 5
    assert models.memory_estimate(quantized, train, 128)["weights"] < small["weights"]
    assert full["total"] == sum(value for key, value in full.items() if key != "total")
    checkpointed = TrainingArguments("x", activation_checkpointing=True, report_to="none")
    assert models.memory_estimate(lora, checkpointed, 128)["activations"] < small["activations"]


def test_quantized_model_counts_the_numbers_it_stands_for(toy, tmp_path):
    plain = models.load_model(arguments(toy, tmp_path)).model
    quantized = models.load_model(arguments(toy, tmp_path, "--peft", "qlora")).model
    assert models.parameters(quantized)[1] == models.parameters(plain)[1]
    assert math.isclose(quantized.model.layers[0].mlp.up_proj.weight.numel() * 2, 64 * 128)


@pytest.mark.parametrize("wanted", ["q_proj", ["q_proj"], r".*\.q_proj"])
def test_target_modules_may_be_a_name_a_list_or_an_expression(toy, tmp_path, wanted):
    flags = ["--peft", "lora", "--peft_args", json.dumps({"target_modules": wanted})]
    _, model = adapted(arguments(toy, tmp_path, *flags))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4 and all("q_proj" in name for name in trained)


def test_a_target_module_that_is_not_there_is_refused(toy, tmp_path):
    for flags in (
        ["--peft_args", '{"target_modules": ["q_proj", "v_pro"]}'],
        ["--lora_target_modules", "v_pro"],
    ):
        with pytest.raises(InputError, match="did you mean 'v_proj'"):
            models.load_model(arguments(toy, tmp_path, "--peft", "lora", *flags))


@pytest.mark.parametrize("name", ["c3a", "vblora"])
def test_blocks_fit_layers_of_any_width(toy, tmp_path, name):
    loaded, _ = adapted(arguments(toy, tmp_path, "--peft", name))
    size = {"c3a": "block_size", "vblora": "vector_length"}[name]
    assert vars(loaded.peft_config)[size] == 32  # keys and values of the toy are 32 wide, the rest 64 and 128
