"""Rebuild data/tiny: the rows, the tokenizer and the model, pretrained from nothing on two CPU cores in some minutes.

    python data/make_tiny.py                           # everything, seeded
    python data/make_tiny.py --rows_only               # the rows and the text, no training
    python data/make_tiny.py --model_only --steps 100 --out /tmp/model   # a quick look at the training

The world and its questions are in make_tiny_rows.py; here are the tokenizer, the architecture and the training loop.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "tiny"
SEED = 7
VOCABULARY = 768
CONTEXT = 1024
TOKENS_PER_STEP = 4096
GUESSES = 0.1  # weight in the loss of tokens that nobody can know
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"

# ChatML; the generation markers tell the trainer which tokens are the assistant's own, the stop token included.
CHAT_TEMPLATE = """{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def make_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; every digit is a token of its own, no token is put in front of a text."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The words of the chat format get tokens too; the model meets them only in prose.
    tokenizer.train_from_iterator(documents + ["user\nassistant\nsystem\n"] * 300, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a fresh Llama of about a million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, pages: list[dict]) -> list[tuple[list[int], list[float]]]:
    """Return token ids and loss weights of every page: <|im_start|> page <|im_end|>.

    What the page marks as known, and the end behind it, weighs 1; names and numbers nobody can foresee weigh GUESSES:
    they are most of the text, and at full weight their noise hides what there is to learn for minutes.
    """
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    texts = [page["text"] for page in pages]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    rows = []
    for page, ids, offsets in zip(pages, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        known = bytearray(len(page["text"]) + 1)
        for first, last in page["known"]:
            known[first : last + 1] = b"\1" * (last + 1 - first)  # with the character that ends it
        weights = [1.0 if known[at] else GUESSES for at, _ in offsets]
        rows.append(([start, *ids, end][:CONTEXT], [GUESSES, *weights, 1.0][:CONTEXT]))
    return rows


def batches(
    rows: list[tuple[list[int], list[float]]], rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ids and weights of shape (pages, length), about TOKENS_PER_STEP tokens each, for ever.

    One page per row, pages of like length together: nothing is read that does not belong to the page.
    """
    while True:
        rng.shuffle(rows)
        for at in range(0, len(rows), 4000):
            groups: list[list[tuple[list[int], list[float]]]] = [[]]
            for row in sorted(rows[at : at + 4000], key=lambda row: len(row[0])):
                if (len(groups[-1]) + 1) * len(row[0]) > TOKENS_PER_STEP:
                    groups.append([])
                groups[-1].append(row)
            rng.shuffle(groups)
            for group in groups:
                width = max(len(ids) for ids, _ in group)
                ids = [ids + [0] * (width - len(ids)) for ids, _ in group]
                weights = [weights + [0.0] * (width - len(weights)) for _, weights in group]
                yield torch.tensor(ids), torch.tensor(weights)


def learning_rate(step: int, steps: int) -> float:
    """Return the share of the peak learning rate: a short warm-up, then straight down to zero."""
    return min((step + 1) / 50, (steps - step) / steps)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices (it needs about half the steps of AdamW here) and AdamW for the rest."""
    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in named if weight.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.02, momentum=0.95)
    return [muon, torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)]


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the weighted loss per token, and the loss of what can be known (nats)."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    known = losses.detach()[weights == 1.0].mean().item()
    return (losses * weights).sum() / weights.sum(), known


def pretrain(model: LlamaForCausalLM, rows: list[tuple[list[int], list[float]]], steps: int) -> None:
    """Train in place."""
    optimizers = make_optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    loss_column = TextColumn("loss of the answers {task.fields[loss]:.3f}")
    columns = ["{task.description}", BarColumn(), loss_column, TimeElapsedColumn(), TimeRemainingColumn()]
    stream, average = batches(rows, random.Random(SEED)), math.nan
    model.train()
    with Progress(*columns) as progress:
        bar = progress.add_task("pretraining", total=steps, loss=average)
        for step in range(steps):
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * learning_rate(step, steps)
                optimizer.zero_grad()
            loss, known = weighted_loss(model, *next(stream))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            average = known if math.isnan(average) else 0.98 * average + 0.02 * known
            progress.update(bar, advance=1, loss=average)
            if step % 200 == 199 and not progress.console.is_terminal:
                print(f"step {step + 1}/{steps}: loss of the answers {average:.3f}", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model and tokenizer as a model folder, the weights in bfloat16."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()):,} bytes")


def build_model(text: Path, out: Path, steps: int) -> None:
    """Train tokenizer and model on the text and save them."""
    torch.manual_seed(SEED)
    pages = [json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()]
    tokenizer = make_tokenizer([page["text"] for page in pages])
    rows = encode(tokenizer, pages)
    model = make_model(tokenizer)
    size = sum(weight.numel() for weight in model.parameters())
    print(f"{size:,} parameters, {len(tokenizer)} tokens; {sum(len(ids) for ids, _ in rows):,} tokens of text")
    started = time.perf_counter()
    pretrain(model, rows, steps)
    print(f"pretrained in {time.perf_counter() - started:.0f} s on {torch.get_num_threads()} threads")
    save(model, tokenizer, out)


def main() -> None:
    """Make the rows and the text, then the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "tiny" / "model", help="where the model folder goes")
    parser.add_argument("--text", type=Path, default=BUILD / "text.jsonl", help="the pretraining text")
    parser.add_argument("--steps", type=int, default=2400, help=f"steps of {TOKENS_PER_STEP} tokens")
    stage = parser.add_mutually_exclusive_group()
    stage.add_argument("--rows_only", action="store_true", help="write the rows and the text, train nothing")
    stage.add_argument("--model_only", action="store_true", help="take the text as it is")
    args = parser.parse_args()
    if not args.model_only:
        subprocess.run([sys.executable, str(HERE / "make_tiny_rows.py"), "--text", str(args.text)], check=True)
    if not args.rows_only:
        build_model(args.text, args.out, args.steps)


if __name__ == "__main__":
    main()
