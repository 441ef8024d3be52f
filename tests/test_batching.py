"""Narrow passes and packed rows give what plain passes give, and the probe sees it when they do not."""

import copy
import itertools

import peft
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignment.batching import (
    PackedCollator,
    TokenCount,
    kl_completions,
    narrow,
    packing_error,
    packs_exactly,
    split_rows,
)

LENGTHS = (5, 17, 3, 3, 11, 2, 9, 17)


def padded(lengths=LENGTHS, spare=0):
    """A right-padded batch with labels on the second half of each row."""
    generator = torch.Generator().manual_seed(1)
    width = max(lengths) + spare
    ids = torch.randint(5, 300, (len(lengths), width), generator=generator)
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(width)[None] < torch.tensor(lengths)[:, None] // 2), -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "use_cache": False}, labels


def load(toy, kind):
    torch.manual_seed(0)
    if kind == "sequence":
        return AutoModelForSequenceClassification.from_pretrained(toy, num_labels=1, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32)
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1", "label_mask"))
    if kind == "prompt":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(model, config)
    return model


def outputs(model, kind, inputs, labels):
    """Run the model as the trainers do; everything later code reads, and the gradients of a loss on it."""
    if kind == "sequence":
        found = {"logits": model(**inputs).logits}
        loss = found["logits"].square().sum()
    elif kind == "logits":
        found = {"logits": model(**inputs).logits * inputs["attention_mask"][..., None]}
        loss = found["logits"].square().mean()
    else:
        out = model(**inputs, labels=labels, fused_lm_head=True)
        found = {name: out[name][:, -(labels.shape[1] - 1) :] for name in ("log_probs", "entropy", "label_mask")}
        # where nothing is predicted the entropy says nothing, and the trainers do not read it
        found["entropy"] = found["entropy"] * found["label_mask"]
        loss = (found["log_probs"].sum(1) * torch.arange(1, len(labels) + 1)).sum()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found, gradients


@pytest.mark.parametrize("parts", [1, 3, 6, 20])
@pytest.mark.parametrize("spare", [0, 7])
@pytest.mark.parametrize("kind", ["causal", "logits", "sequence", "prompt"])
def test_narrow_passes_equal_one_wide_pass(toy, kind, spare, parts):
    model = load(toy, kind)
    inputs, labels = padded(spare=spare)
    plain, plain_gradients = outputs(model, kind, inputs, labels)
    count = TokenCount()
    model.forward = narrow(model.forward, count.add, parts)
    mine, gradients = outputs(model, kind, inputs, labels)
    for name, value in plain.items():
        assert mine[name].shape == value.shape
        torch.testing.assert_close(mine[name].float(), value.float(), atol=1e-5, rtol=1e-5)
    assert gradients and len(gradients) == len(plain_gradients)
    for a, b in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1, b.abs().max().item()), rtol=1e-4)
    assert count.real == sum(LENGTHS)
    if parts == 20:
        assert count.computed == sum(LENGTHS)  # a pass for each row: no padding at all
    assert count.real <= count.computed <= inputs["input_ids"].numel()


def test_batches_that_are_not_plain_go_through_whole(toy):
    """Left padding, positions of its own, a cache: a narrower pass would be another one."""
    calls = []

    def forward(*args, **inputs):
        calls.append(inputs["input_ids"].shape)
        return "through"

    run = narrow(forward, lambda real, computed: None)
    inputs, _ = padded((2, 9, 4))
    left = {name: value.flip(1) if torch.is_tensor(value) else value for name, value in inputs.items()}
    assert run(**left) == "through"
    assert run(**inputs | {"use_cache": True}) == "through"
    assert run(**inputs | {"attention_mask": None}) == "through"
    assert run(**inputs | {"output_router_logits": True}) == "through"
    empty = inputs | {"attention_mask": inputs["attention_mask"] * torch.tensor([[1], [1], [0]])}
    assert run(**empty) == "through"
    assert calls == [inputs["input_ids"].shape] * 5


def area(lengths, ends):
    starts = [0, *ends[:-1]]
    return sum(lengths[start] * (end - start) for start, end in zip(starts, ends, strict=True))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 5))
def test_rows_are_split_as_well_as_they_can_be(sizes, parts):
    lengths, n = tuple(sorted(sizes, reverse=True)), len(sizes)
    parts = min(parts, n)
    ends = split_rows(lengths, parts)
    assert len(ends) == parts and ends[-1] == n and all(a < b for a, b in itertools.pairwise([0, *ends]))
    best = min(area(lengths, [*cuts, n]) for cuts in itertools.combinations(range(1, n), parts - 1))
    assert area(lengths, ends) == best


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_is_exact_and_the_probe_would_see_if_it_were_not(toy, attention):
    model = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32, attn_implementation=attention)
    assert packing_error(model) < 1e-5 and packs_exactly(model)
    whole = model.forward
    for spoil in (
        lambda inputs: inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])},
        lambda inputs: {k: v for k, v in inputs.items() if k != "position_ids"},
    ):
        model.forward = lambda spoil=spoil, **inputs: whole(**spoil(inputs))
        assert packing_error(model) > 0.05 and not packs_exactly(model)
        model.forward = whole
    model.train()
    packing_error(model)
    assert model.training


def test_packed_rows_literally():
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, -100, 8, 9], "seq_lengths": [3, 2]},
        {"input_ids": [4, 3], "labels": [-100, 3]},
    ]
    batch = PackedCollator(pad_token_id=0)(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, 9], [-100, 3, -100, -100, -100]]
    flat = PackedCollator(pad_token_id=0, flatten=True)(rows)
    assert flat["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 3]]
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert flat["labels"].tolist() == [[-100, 6, -100, -100, 9, -100, 3]]


def test_padding_is_the_share_of_what_was_computed():
    count = TokenCount()
    assert count.padding == 0
    count.add(torch.tensor(30), 40)
    count.add(0, 0)
    assert count.padding == 0.25


def thumbs(prompts, lengths):
    rows = [
        {"prompt_ids": [prompt], "completion_ids": [100 + i] * n, "label": i % 2 == 0, "length": 1 + n}
        for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    return Dataset.from_list(rows)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=40), st.integers(1, 8))
def test_thumbs_get_the_answers_of_their_own_batch(rows, size):
    before = thumbs(*zip(*rows, strict=True))
    after = kl_completions(before, size, seed=3)
    name = "completion_ids"
    assert sorted(map(tuple, after[name])) == sorted(map(tuple, before[name]))  # each row once
    for start in range(0, len(after), size):
        batch = after[start : start + size]
        own, other = batch[name], batch["KL_completion_ids"]
        assert sorted(map(tuple, own)) == sorted(map(tuple, other))
        if len(own) > 1:
            assert all(a != b for a, b in zip(own, other, strict=True))
    assert copy.copy(after["prompt_ids"]) == kl_completions(before, size, seed=3)["prompt_ids"]


def test_thumbs_avoid_answers_to_their_own_prompt():
    """Two answers to each prompt side by side: a shift by one would pair half of them with their own prompt."""
    after = kl_completions(thumbs([i // 2 for i in range(32)], [3] * 32), 8, seed=0)
    own = {tuple(row["completion_ids"]): row["prompt_ids"] for row in after}
    same = sum(own[tuple(row["KL_completion_ids"])] == row["prompt_ids"] for row in after)
    assert same <= 2


def test_batches_of_thumbs_are_of_like_lengths():
    lengths = [1 + (i * 37) % 100 for i in range(200)]
    after = kl_completions(thumbs(range(200), lengths), 10, seed=0)["length"]
    batches = [after[i : i + 10] for i in range(0, 200, 10)]
    assert max(max(b) - min(b) for b in batches) < 20
    assert batches != sorted(batches)  # but they come in a random order
