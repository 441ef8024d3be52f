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
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "tiny"
SEED = 7
VOCABULARY = 768
CONTEXT = 1024
TOKENS_PER_STEP = 4096
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
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
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


def pack(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Return all documents in one row of token ids, each opened by <|im_start|> and ended by <|im_end|>."""
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    ids: list[int] = []
    for at in range(0, len(documents), 1000):
        for encoding in tokenizer(documents[at : at + 1000], add_special_tokens=False)["input_ids"]:
            ids += [start, *encoding, end]
    return torch.tensor(ids)


def block_length(step: int, rng: random.Random) -> int:
    """Return the length of this step's blocks: mostly short ones (cheap), now and then the whole context."""
    return CONTEXT if step >= 100 and rng.random() < 0.06 else 256


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: a short warm-up, then along a cosine to zero."""
    warmup = min(100, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def pretrain(model: LlamaForCausalLM, stream: torch.Tensor, steps: int, peak: float) -> None:
    """Train in place for `steps` steps of TOKENS_PER_STEP tokens, in the order of the stream."""
    rng = random.Random(SEED)
    decayed = [weight for weight in model.parameters() if weight.ndim == 2]
    other = [weight for weight in model.parameters() if weight.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    loss_column = TextColumn("loss {task.fields[loss]:.3f}")
    columns = ["{task.description}", BarColumn(), loss_column, TimeElapsedColumn(), TimeRemainingColumn()]
    model.train()
    average = math.nan
    with Progress(*columns) as progress:
        bar = progress.add_task("pretraining", total=steps, loss=average)
        for step in range(steps):
            at = step * TOKENS_PER_STEP % (len(stream) - TOKENS_PER_STEP)
            batch = stream[at : at + TOKENS_PER_STEP].view(-1, block_length(step, rng))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
            progress.update(bar, advance=1, loss=average)
            if step % 200 == 199 and not progress.console.is_terminal:
                print(f"step {step + 1}/{steps}: loss {average:.3f}", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model and tokenizer as a model folder, the weights in bfloat16."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()):,} bytes")


def build_model(text: Path, out: Path, steps: int, peak: float) -> None:
    """Train tokenizer and model on the text and save them."""
    torch.manual_seed(SEED)
    documents = [json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()]
    tokenizer = make_tokenizer(documents)
    stream = pack(tokenizer, documents)
    model = make_model(tokenizer)
    size = sum(weight.numel() for weight in model.parameters())
    print(
        f"{size:,} parameters, {len(tokenizer)} tokens; {len(documents):,} documents of {len(stream):,} tokens"
    )
    started = time.perf_counter()
    pretrain(model, stream, steps, peak)
    print(f"pretrained in {time.perf_counter() - started:.0f} s on {torch.get_num_threads()} threads")
    save(model, tokenizer, out)


def main() -> None:
    """Make the rows and the text, then the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "tiny" / "model", help="where the model folder goes"
    )
    parser.add_argument("--text", type=Path, default=BUILD / "text.jsonl", help="the pretraining text")
    parser.add_argument("--steps", type=int, default=1600, help=f"steps of {TOKENS_PER_STEP} tokens")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    stage = parser.add_mutually_exclusive_group()
    stage.add_argument("--rows_only", action="store_true", help="write the rows and the text, train nothing")
    stage.add_argument("--model_only", action="store_true", help="take the text as it is")
    args = parser.parse_args()
    if not args.model_only:
        subprocess.run(
            [sys.executable, str(HERE / "make_tiny_rows.py"), "--text", str(args.text)], check=True
        )
    if not args.rows_only:
        build_model(args.text, args.out, args.steps, args.learning_rate)


if __name__ == "__main__":
    main()
