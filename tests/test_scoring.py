"""Log-likelihoods of continuations equal a forward pass of one row, however rows are batched, cached and spread."""

import json
import os
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
from conftest import ROOT, toy_tokenizer

from alignment.errors import InputError
from alignment.models import load_checkpoint
from alignment.scoring import choice_log_likelihoods, encode_requests, score_encoded, window

SHOTS = (
    "Questions of the village.\n\nWhat is seven?\nA. x\nB. y\nAnswer: A\n\nWho is larger?\nA. x\nB. y\nAnswer: B\n\n"
)
WORDS = ["The", "boat", "crossed", "the", "river", "before", "rain", "came", "and", "seven", "brown", "foxes"]
CLOSE = 1e-5


def questions(count: int = 11, seed: int = 3) -> list[tuple[str, list[str]]]:
    rng = np.random.default_rng(seed)
    return [
        (f"{SHOTS}{' '.join(rng.choice(WORDS, size=int(rng.integers(1, 20))))}?\nAnswer:", [" A", " B", " the boat"])
        for _ in range(count)
    ]


def by_hand(model, tokenizer, context: str, continuation: str) -> float:
    """The reference: one row, no cache, no padding, every position through the head."""
    whole, start = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole]), attention_mask=torch.ones(1, len(whole)).long()).logits
    logits = logits[0, -len(whole) :].log_softmax(-1)  # virtual tokens of prompt tuning have logits, too
    return sum(float(logits[at - 1, whole[at]]) for at in range(start, len(whole)))


def reference(model, tokenizer, requests) -> list[list[float]]:
    return [[by_hand(model, tokenizer, context, end) for end in ends] for context, ends in requests]


def gap(first, second) -> float:
    return max(abs(a - b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


@pytest.fixture(scope="module")
def model_and_tokenizer(toy):
    return load_checkpoint(toy)


def small(kind: str):
    """A random model of an architecture, of width 32."""
    from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, Qwen3NextConfig

    tokenizer = toy_tokenizer()
    torch.manual_seed(1)
    shared = {"vocab_size": len(tokenizer), "initializer_range": 0.3, "pad_token_id": tokenizer.pad_token_id}
    llama = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "learned positions": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=512, **shared),
        "sliding window": lambda: MistralConfig(num_key_value_heads=2, sliding_window=24, **llama, **shared),
        "linear attention": lambda: Qwen3NextConfig(
            num_key_value_heads=2, head_dim=8, linear_num_value_heads=2, linear_num_key_heads=2,
            linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1,
            moe_intermediate_size=16, shared_expert_intermediate_size=16,
            layer_types=["linear_attention", "full_attention"], **llama, **shared,
        ),
    }[kind]()  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


@pytest.mark.parametrize("size", [1, 4, 64])
def test_equals_one_row_at_a_time_for_every_batch_size(model_and_tokenizer, size):
    model, tokenizer = model_and_tokenizer
    requests = questions()
    found = choice_log_likelihoods(model, tokenizer, requests, batch_size=size)
    assert gap(found, reference(model, tokenizer, requests)) < CLOSE


def test_groups_padding_side_and_order_change_nothing(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    requests = questions(8) + [("What is seven?\nAnswer:", [" A", " B"]), ("", ["The boat", "The river"])]
    plain = choice_log_likelihoods(model, tokenizer, requests)
    groups = [number % 3 for number in range(8)] + ["other", "empty"]
    assert gap(plain, choice_log_likelihoods(model, tokenizer, requests, groups=groups, batch_size=5)) < CLOSE
    backwards = choice_log_likelihoods(model, tokenizer, requests[::-1])
    assert gap(plain, backwards[::-1]) < CLOSE
    tokenizer.padding_side, before = "left", tokenizer.padding_side
    assert gap(plain, choice_log_likelihoods(model, tokenizer, requests)) == 0
    tokenizer.padding_side = before


def test_common_beginning_is_computed_once(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    widths = []
    watch = model.model.register_forward_pre_hook(
        lambda _, args, inputs: widths.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    requests = [(context, ends[:2]) for context, ends in questions()]
    choice_log_likelihoods(model, tokenizer, requests, batch_size=4)
    watch.remove()
    shots = len(tokenizer.encode(SHOTS))
    probe, prefix, *batches = widths
    assert probe == (1, 2)
    assert prefix[0] == 1 and shots - 3 <= prefix[1] <= shots + 3
    assert [rows for rows, _ in batches] == [4, 4, 3]
    longest = max(request.length for request in encode_requests(tokenizer, requests))
    assert max(width for _, width in batches) == longest - prefix[1]


@pytest.mark.parametrize("kind", ["learned positions", "sliding window", "linear attention"])
def test_architectures(kind):
    model, tokenizer = small(kind)
    requests, said = questions(5), []
    found = choice_log_likelihoods(model, tokenizer, requests, say=said.append, batch_size=3)
    assert gap(found, reference(model, tokenizer, requests)) < CLOSE
    if kind == "linear attention":
        assert "cannot be shared" in said[0] and "every prompt is computed whole" in said[0]
    else:
        assert not said


ADAPTERS = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
    "lora on the head": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "lm_head"]
    ),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(toy, name):
    base, tokenizer = load_checkpoint(toy)
    torch.manual_seed(5)
    model = peft.get_peft_model(base, ADAPTERS[name]()).eval()
    if name == "prefix tuning":  # PEFT starts it near nothing
        torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight)
    requests = questions(6)
    found = choice_log_likelihoods(model, tokenizer, requests, batch_size=4)
    assert gap(found, reference(model, tokenizer, requests)) < CLOSE
    with model.disable_adapter():
        bare = reference(model.get_base_model(), tokenizer, requests)
    assert gap(found, bare) > 0.01, "the adapter does something"
    virtual = model.active_peft_config.num_virtual_tokens if model.active_peft_config.is_prompt_learning else 0
    assert window(model) == 512 - virtual


def test_virtual_tokens_in_front_of_a_cache_that_cannot_be_shared():
    base, tokenizer = small("linear attention")
    torch.manual_seed(5)
    model = peft.get_peft_model(base, ADAPTERS["prompt tuning"]()).eval()
    requests, said = questions(5), []
    found = choice_log_likelihoods(model, tokenizer, requests, say=said.append)
    assert said and gap(found, reference(model, tokenizer, requests)) < CLOSE


def test_rows_are_handed_over_as_they_are_made(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    booked = {}
    found = choice_log_likelihoods(model, tokenizer, questions(), batch_size=6, made=booked.update)
    assert [booked[number] for number in range(len(found))] == found


def test_bad_requests(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    with pytest.raises(InputError, match="exceeds the 512 that the model takes"):
        choice_log_likelihoods(model, tokenizer, [("seven " * 400, [" A"])])
    with pytest.raises(InputError, match="a continuation has no tokens"):
        choice_log_likelihoods(model, tokenizer, [("seven", [" A", ""])])
    with pytest.raises(InputError, match="has no language-model head"):
        score_encoded(model.model, encode_requests(tokenizer, [("seven", [" A"])]))
    assert choice_log_likelihoods(model, tokenizer, []) == []


def test_encoding_is_that_of_lm_eval(model_and_tokenizer):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = model_and_tokenizer
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu")
    requests = questions(3) + [("one line", [" A", "B"]), ("spaces behind  ", ["A"]), ("line\n\n", ["A", " long one"])]
    requests += [("<|im_end|>already opened\nA:", [" A"])]
    for (context, ends), found in zip(requests, encode_requests(tokenizer, requests), strict=True):
        for end, ids in zip(ends, found.continuations, strict=True):
            assert theirs._encode_pair(context, end) == (found.context.tolist(), list(ids))


CODE = """
import json, sys
sys.path.insert(0, "tests")
from test_scoring import questions
from alignment.generation import process_state
from alignment.models import load_checkpoint
from alignment.scoring import choice_log_likelihoods
state = process_state(True)
model, tokenizer = load_checkpoint(sys.argv[1])
found = choice_log_likelihoods(model, tokenizer, questions(), groups=[i % 2 for i in range(11)], batch_size=4)
print(json.dumps(found)) if state.process_index == 1 else None
"""


@pytest.mark.slow
def test_two_processes_equal_one(model_and_tokenizer, toy, tmp_path):
    (tmp_path / "score.py").write_text(CODE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29613"]
    done = subprocess.run(
        [*command, str(tmp_path / "score.py"), str(toy)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert gap(json.loads(line), choice_log_likelihoods(*model_and_tokenizer, questions())) < CLOSE
