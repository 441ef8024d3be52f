"""Perplexity: each token is predicted once, in the windows of transformers' recipe, with lm-eval's formulae."""

import math
import re

import pytest
import torch
from conftest import ROOT, SENTENCES
from eval_runs import run_script, save_reward_model, write_rows

from alignment import likelihood
from alignment.errors import InputError
from alignment.likelihood import Window, log_likelihoods, room_for_text, sliding_windows, with_prefix
from alignment.models import load_checkpoint
from alignment.report import ratio_metric, read_result

TEXTS = [" ".join(SENTENCES[i : i + 3]) * (i + 1) for i in range(4)]


@pytest.fixture(scope="module")
def model_and_tokenizer(toy):
    return load_checkpoint(toy)


def score(model, tokenizer, ids, size, stride, batch_size=8):
    return math.fsum(
        log_likelihoods(model, list(sliding_windows(ids, size, stride)), tokenizer.pad_token_id, batch_size)
    )


@pytest.mark.parametrize(("size", "stride"), [(2, 1), (5, 1), (5, 3), (5, 4), (16, 8), (100, 99)])
@pytest.mark.parametrize("length", [0, 1, 2, 5, 6, 9, 17, 40])
def test_windows_score_every_token_but_the_first_once_and_with_context(length, size, stride):
    ids, scored = list(range(length)), []
    for window in sliding_windows(ids, size, stride):
        assert window.first >= 1 and len(window.ids) <= size
        assert window.ids == list(range(window.ids[0], window.ids[-1] + 1))
        scored += window.ids[window.first :]
    assert scored == ids[1:]


@pytest.mark.parametrize("stride", [0, 8, 9])
def test_a_stride_that_skips_tokens_is_an_error(stride):
    with pytest.raises(ValueError, match="windows of 8"):
        next(sliding_windows(list(range(20)), 8, stride))


def test_sliding_windows_give_what_the_recipe_of_transformers_gives(model_and_tokenizer):
    """https://huggingface.co/docs/transformers/perplexity, its loop word for word but for names and device."""
    model, tokenizer = model_and_tokenizer
    ids = torch.tensor([tokenizer(TEXTS[3])["input_ids"]])
    for max_length, stride in ((32, 16), (24, 5)):
        nll_sum, n_tokens, prev_end_loc, seq_len = 0.0, 0, 0, ids.size(1)
        for begin_loc in range(0, seq_len, stride):
            end_loc = min(begin_loc + max_length, seq_len)
            trg_len = end_loc - prev_end_loc
            input_ids = ids[:, begin_loc:end_loc]
            target_ids = input_ids.clone()
            target_ids[:, :-trg_len] = -100
            with torch.no_grad():
                neg_log_likelihood = model(input_ids, labels=target_ids).loss
            num_loss_tokens = (target_ids[:, 1:] != -100).sum().item()
            nll_sum += neg_log_likelihood.item() * num_loss_tokens
            n_tokens += num_loss_tokens
            prev_end_loc = end_loc
            if end_loc == seq_len:
                break
        assert n_tokens == seq_len - 1
        assert -score(model, tokenizer, ids[0].tolist(), max_length, stride) == pytest.approx(nll_sum, rel=1e-5)


def naive(model, ids):
    """The log-likelihood token by token: each in a forward pass of its own, all of the text before it."""
    total = 0.0
    for end in range(1, len(ids)):
        with torch.no_grad():
            total += model(torch.tensor([ids[:end]])).logits[0, -1].log_softmax(-1)[ids[end]].item()
    return total


def test_one_window_is_the_naive_loop_in_every_batch(model_and_tokenizer, monkeypatch):
    model, tokenizer = model_and_tokenizer
    rows = [with_prefix(tokenizer(text)["input_ids"], tokenizer)[:40] for text in TEXTS]
    wanted = [naive(model, ids) for ids in rows]
    windows = [Window(ids, 1) for ids in rows]
    for size in (1, 3, 8):
        assert log_likelihoods(model, windows, tokenizer.pad_token_id, size) == pytest.approx(wanted, rel=1e-5)
    ends = [Window(ids, len(ids) - 2 - i) for i, ids in enumerate(rows)]
    with torch.no_grad():
        each = [model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in rows]
    for window, logs, found in zip(ends, each, log_likelihoods(model, ends, tokenizer.pad_token_id), strict=True):
        wanted = sum(logs[i - 1, window.ids[i]].item() for i in range(window.first, len(window.ids)))
        assert found == pytest.approx(wanted, rel=1e-5), "only the last logits are computed"
    monkeypatch.setattr(likelihood, "LOGITS", 1)
    assert likelihood.batched(rows, 8, 320) == [[i] for i in sorted(range(4), key=lambda i: -len(rows[i]))]


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_adapters_are_measured_with_their_virtual_tokens_first(toy, method):
    import peft

    base, tokenizer = load_checkpoint(toy)
    configs = {
        "lora": lambda: peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    }
    torch.manual_seed(0)
    model = peft.get_peft_model(base, configs[method]()).eval()
    rows = [tokenizer(text)["input_ids"][:30] for text in TEXTS[:2]]
    rows[1] = rows[1][:17]
    found = log_likelihoods(model, [Window(ids, 1) for ids in rows], tokenizer.pad_token_id)
    assert found == pytest.approx([naive(model, ids) for ids in rows], rel=1e-4)
    assert room_for_text(model) == (512 if method == "lora" else 507)


def test_the_script_measures_what_lm_eval_measures(monkeypatch, toy, tmp_path):
    """Rolling log-likelihoods of HFLM, and word_perplexity and bits_per_byte as tasks/wikitext aggregates them."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.models.huggingface import HFLM

    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    run_script(monkeypatch, "perplexity", "--model", toy, "--data", rows, "--output", tmp_path / "r.json", "--use_cpu")
    result = read_result(tmp_path / "r.json")
    model, tokenizer = load_checkpoint(toy)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1)
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    theirs = lm.loglikelihood_rolling(asked, disable_tqdm=True)
    assert [row["log_likelihood"] for row in result.rows] == pytest.approx(theirs, rel=1e-5)
    words = [len(re.split(r"\s+", text)) for text in TEXTS]
    octets = [len(text.encode("utf-8")) for text in TEXTS]
    found = {name: metric["value"] for name, metric in result.metrics.items()}
    pairs = list(zip(theirs, octets, strict=True))
    assert found["bits per byte"] == pytest.approx(bits_per_byte(pairs), rel=1e-5)
    by_word = weighted_perplexity(list(zip(theirs, words, strict=True)))
    assert found["perplexity per word"] == pytest.approx(by_word, rel=1e-4)
    tokens = [row["tokens"] for row in result.rows]
    assert found["perplexity per token"] == pytest.approx(math.exp(-sum(theirs) / sum(tokens)), rel=1e-5)
    scores = [-row["score"] * row["bytes"] for row in result.rows]
    assert sum(scores) / sum(octets) == pytest.approx(found["bits per byte"])


def test_models_of_other_vocabularies_are_not_ranked_by_token(monkeypatch, toy, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    models = [f"toy={toy}", f"tiny={ROOT / 'data/tiny/model'}"]
    words = ["--model", *models, "--data", rows, "--output", tmp_path / "two", "--max_length", 64]
    run_script(monkeypatch, "perplexity", *words)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    (line,) = [line for line in lines if line.startswith("perplexity per token ")]
    assert line.count("not comparable") == 2
    assert any("Compare by byte or by word" in line for line in lines)
    assert max(len(line) for line in lines if not line.startswith(("written", "next"))) <= 100
    (line,) = [line for line in lines if line.startswith("bits per byte")]
    assert line.count("±") == 2


def test_the_error_of_a_ratio_is_that_of_resampling_the_rows():
    import numpy as np

    rng = np.random.default_rng(0)
    below = rng.integers(20, 200, 150)
    above = below * rng.normal(2, 0.5, 150) + rng.normal(0, 5, 150)
    drawn = [above[i].sum() / below[i].sum() for i in rng.integers(0, 150, (2000, 150))]
    assert ratio_metric(above.tolist(), below.tolist(), "x")["stderr"] == pytest.approx(np.std(drawn), rel=0.1)


def test_a_text_file_is_one_text_and_finished_rows_are_kept(monkeypatch, toy, tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(TEXTS))
    words = ["--model", toy, "--data", tmp_path / "book.txt", "--max_length", 40, "--output", tmp_path / "b.json"]
    run_script(monkeypatch, "perplexity", *words)
    first = read_result(tmp_path / "b.json")
    assert len(first.rows) == 1 and first.metrics["bits per byte"]["stderr"] is None
    assert first.settings["stride"] == 20
    run_script(monkeypatch, "perplexity", *words, "--resume")
    assert read_result(tmp_path / "b.json").rows == first.rows


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([{"prompt": "a", "completion": "b"}], [], "no plain texts"),
        ([{"text": "a"}, {"text": " "}], [], "empty|no text|cannot be used"),
        ([{"text": "a"}], ["--max_length", "8", "--stride", "8"], "windows of 8 tokens with a stride of 8"),
        ([{"text": "a"}], ["--max_length", "8", "--stride", "0"], "stride of 0"),
        ([{"text": "a"}], ["--max_length", "513"], "512 positions"),
        ([], [], "rows|empty"),
    ],
)
def test_bad_input_is_refused(monkeypatch, toy, tmp_path, rows, words, message):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=message):
        run_script(monkeypatch, "perplexity", "--model", toy, "--data", path, "--output", tmp_path / "r.json", *words)


def test_a_model_without_a_language_head_is_refused(monkeypatch, toy, toy_bert, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    for model, message in ((toy_bert, "is an encoder"), (save_reward_model(toy, tmp_path / "rm"), "score head")):
        with pytest.raises(InputError, match=message):
            run_script(monkeypatch, "perplexity", "--model", model, "--data", path, "--output", tmp_path / "r.json")
