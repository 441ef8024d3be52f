"""How far a model moved: KL and perplexity against a few lines of their own."""

import math

import pytest
import torch
from conftest import ROOT

from alignment.drift import answer_kl
from alignment.likelihood import perplexity
from alignment.models import load_checkpoint

TEXTS = ["The bread was warm.", "Tom has a dog and lives near the church.", "A swan is white."]
PROMPTS = [[{"role": "user", "content": text}] for text in TEXTS]
ANSWERS = ["5", "near the mill", "white"]


@pytest.fixture(scope="module")
def tiny():
    return load_checkpoint(ROOT / "data/tiny/model")


@pytest.fixture(scope="module")
def moved():
    model, _ = load_checkpoint(ROOT / "data/tiny/model")
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    return model


def test_perplexity_is_that_of_the_rows_one_by_one(tiny):
    model, tokenizer = tiny
    losses, tokens = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            losses += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    for size in (1, 3):
        assert perplexity(model, tokenizer, TEXTS, size) == pytest.approx(math.exp(losses / tokens), rel=1e-4)


def test_kl_of_a_model_from_itself_is_nothing(tiny):
    model, tokenizer = tiny
    assert answer_kl(model, model, tokenizer, PROMPTS, ANSWERS) == pytest.approx([0.0] * 3, abs=1e-6)


def test_kl_is_summed_over_the_answer_and_its_stop_token(tiny, moved):
    model, tokenizer = tiny
    wanted = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        first = len(tokenizer(start)["input_ids"])
        ids = tokenizer(f"{start}{answer}<|im_end|>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            mine, other = (m(input_ids=ids).logits[0, first - 1 : -1].log_softmax(-1) for m in (moved, model))
        wanted.append((mine.exp() * (mine - other)).sum().item())
    for size in (1, 3):
        found = answer_kl(moved, model, tokenizer, PROMPTS, ANSWERS, size)
        assert found == pytest.approx(wanted, rel=1e-3)
    assert min(wanted) > 0.01
