"""What can be known before the first step, found on the tokenizer, template, collator and trainer of this run."""

import math
import os
import shutil
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from datasets import IterableDataset
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignment.drawing import draw_masks, sequences
from alignment.encoding import LONG, NO_ROOM
from alignment.errors import InputError
from alignment.first_loss import look_at_first_loss
from alignment.heads import ENDINGS
from alignment.launch import asked_for
from alignment.memory import memory_estimate, parameters
from alignment.methods import explicit
from alignment.tokenization import Tokenized

WIDTH = 100
FEW = 20  # held-out rows
STYLES = {"error": "bold red", "warning": "yellow", "fact": "dim"}


@dataclass
class Finding:
    """One line about the run: an error stops it, a warning wants a look, a fact is good to know."""

    level: str
    what: str
    fix: str = ""


def examine(trainer: Any, args: Any, loaded: Any, rows: Tokenized) -> list[Finding]:
    """Return everything that can be said about this run before its first step, errors first.

    Args:
        trainer: the constructed trainer.
        args: the parsed arguments.
        loaded: what `load_model` returned.
        rows: what `tokenize` returned.
    """
    found = [Finding("fact", note) for note in [*loaded.notes, *rows.notes, *trainer.notes]]
    found += _launch(trainer)
    found += _size(trainer, args, loaded, rows)
    found += _held_out(rows)
    if rows.form == "prompt":
        found += _prompts(rows, args) + _rollouts(trainer, rows)
    else:
        found += _plan(trainer, rows)
        if rows.form in ENDINGS:
            found += _lengths(rows, args, loaded) + [Finding(*finding) for finding in rows.findings]
        elif not isinstance(rows.train, IterableDataset):
            found += _lengths(rows, args, loaded) + _answers(rows) + _bos(rows) + _pairs(rows, args)
        found += [Finding(*finding) for finding in look_at_first_loss(trainer, args, loaded, rows)]
    return in_order(found)


def in_order(found: list[Finding]) -> list[Finding]:
    """Return the findings with the errors first, then the warnings."""
    order = list(STYLES)
    return sorted(found, key=lambda finding: order.index(finding.level))


def width() -> int:
    """Return the columns to print in: those of the terminal, at most WIDTH."""
    return min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH) if sys.stdout.isatty() else WIDTH


def report(findings: list[Finding], rows: Tokenized, console: Console) -> None:
    """Print the findings, the mask of a few rows and the ledger."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(finding.what)
        if finding.fix:
            text.append(f" -> {finding.fix}", style="cyan")
        table.add_row(Text(finding.level, style=STYLES[finding.level]), text)
    console.print(table)
    console.print()
    for line in draw_masks(rows, plain=not console.is_terminal):
        console.print(line)
    console.print(rows.ledger.table())
    console.print(Text(rows.ledger.caption(), style="dim"))


def refuse(findings: list[Finding]) -> None:
    """Raise InputError when there is an error among the findings."""
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        first = errors[0]
        more = f" ({len(errors) - 1} more above)" if len(errors) > 1 else ""
        raise InputError(first.what + more, where="before the first step", fix=first.fix)


def _held_out(rows: Tokenized) -> list[Finding]:
    """Warn when so few rows are held out that their metrics say nothing, although there are rows enough."""
    if rows.test is None or isinstance(rows.train, IterableDataset) or len(rows.test) >= FEW:
        return []
    held, total = len(rows.test), len(rows.test) + len(rows.train)
    wanted = min(total // 5, 200)
    if wanted <= held:
        return []
    text = f"{held} of {total} rows are held out: each is {100 / held:.0f} points of their metrics"
    return [Finding("warning" if total >= 2 * FEW else "fact", text, f"--test_size {wanted}, or --eval_data rows")]


def _prompts(rows: Tokenized, args: Any) -> list[Finding]:
    """Say how long the prompts are, which were dropped, and where the answers to them stop."""
    stops = ", ".join(sorted(rows.encoder.stop_tokens)) or "nothing"
    found = [Finding("fact", f"answers stop at {stops}, or after max_completion_length")]
    if isinstance(rows.train, IterableDataset):
        return found
    sizes = rows.lengths["train"]
    half, most, top = (int(np.quantile(sizes, q)) for q in (0.5, 0.9, 1.0))
    room = f"half up to {half:,} tokens, 90 % up to {most:,}, longest {top:,}"
    found.append(Finding("fact", f"prompts: {room}; answers up to {args.train.max_completion_length:,}"))
    dropped = sum(a.dropped[NO_ROOM][0] for a in rows.ledger.accounts.values() if NO_ROOM in a.dropped)
    if dropped:
        share = dropped / sum(map(len, rows.lengths.values()))
        text = f"{dropped:,} prompts dropped ({share:.1%}): with the answer they exceed the model's positions"
        found.append(Finding("warning" if share > 0.01 else "fact", text, "a smaller --max_completion_length"))
    if rows.counts["train escaped"]:
        found.append(Finding("fact", f"{rows.counts['train escaped']:,} control tokens in the rows' texts stay text"))
    if rows.counts["train control"]:
        text = f"{rows.counts['train control']:,} control tokens in plain prompts are read as control tokens"
        found.append(Finding("warning", text, "prompts as lists of turns, whose text stays text"))
    unasked = explicit(args, "model_name_or_path") and not explicit(args, "data")
    if unasked and rows.encoder.tokenizer.chat_template and isinstance(rows.train[0]["prompt"], str):
        text = "the default prompts are plain text (Q: …), and this model has a chat template"
        found.append(Finding("warning", text, "--data data/tiny/prompts, or your own, when it answers turns"))
    return found + _bos(rows)


def _rollouts(trainer: Any, rows: Tokenized) -> list[Finding]:
    """Say how many answers are sampled for an update, and how many updates there are."""
    settings = trainer.args
    if "generation_batch_size" not in vars(settings):
        return []
    prompts = settings.generation_batch_size // settings.num_generations
    each = settings.steps_per_generation * settings.num_iterations / settings.gradient_accumulation_steps
    if not isinstance(rows.train, IterableDataset) and len(rows.train) < prompts:
        fix = "more rows, or a smaller --per_device_train_batch_size"
        return [Finding("error", f"{len(rows.train):,} prompts are fewer than the {prompts} of one update", fix)]
    steps = settings.max_steps
    if steps <= 0:
        steps = math.ceil(len(rows.train) // prompts * each * settings.num_train_epochs)
    text = f"{prompts} prompts x {settings.num_generations} answers, then {each:g} update{'s' if each != 1 else ''}"
    rate = f"learning rate {settings.learning_rate:g} ({settings.lr_scheduler_type.value})"
    return [Finding("fact", f"{text}; {steps:,} updates in all, {rate}")]


def _lengths(rows: Tokenized, args: Any, loaded: Any) -> list[Finding]:
    sizes = rows.lengths["train"]
    sizes = sizes[sizes > 0]
    p50, p90, p99, top = (int(np.quantile(sizes, q)) for q in (0.5, 0.9, 0.99, 1.0))
    limit = args.train.max_length
    line = f"length in tokens: half up to {p50:,}, 90 % up to {p90:,}, 99 % up to {p99:,}, longest {top:,}"
    found = [Finding("fact", f"{line}; max_length {limit if limit else 'none'}")]
    positions = vars(loaded.model.config.get_text_config()).get("max_position_embeddings") or math.inf
    longest = min(top, limit or top)
    if longest > positions:
        text = f"rows of up to {longest:,} tokens, and the model knows {positions:,} positions"
        found.append(Finding("warning", text, f"--max_length {positions}"))
    accounts = rows.ledger.accounts.values()
    cut = sum(n for a in accounts for (_, cause), (n, _) in a.cut.items() if cause.startswith(LONG))
    dropped = sum(n for a in accounts for cause, (n, _) in a.dropped.items() if cause.startswith(LONG))
    if cut or dropped:
        done = " and ".join(f"{n:,} {word}" for n, word in ((dropped, "dropped"), (cut, "cut")) if n)
        share = (cut + dropped) / sum(map(len, rows.lengths.values()))
        wanted = 1 << (p99 - 1).bit_length()
        fix = f"--max_length {wanted} keeps 99 %" if limit < p99 and wanted <= positions else ""
        if limit < p99 and wanted > positions > limit:
            fix = f"--max_length {positions}, all this model knows, keeps {np.mean(sizes <= positions):.0%}"
        text = f"rows longer than max_length ({share:.1%}): {done}"
        found.append(Finding("warning" if share > 0.01 else "fact", text, fix))
    return found


def _answers(rows: Tokenized) -> list[Finding]:
    """Check that answers are trained, and that each ends in a token at which generation stops."""
    found, counts = [], rows.counts
    turns = counts["train turns"]
    if turns:
        open_ended = counts["train unstopped"]
        names = ", ".join(sorted(rows.encoder.stop_tokens)) or "nothing"
        if open_ended > 0.01 * turns:
            found.append(
                Finding(
                    "error",
                    f"{open_ended:,} of {turns:,} answers end in no token that generation stops at ({names})",
                    "a chat template that ends answers with one: "
                    + (
                        "--chat_template_path data/chat_templates/plain.jinja"
                        if rows.form == "sft"
                        else "train with recipes/sft.py --chat_template_path data/chat_templates/plain.jinja first"
                    ),
                )
            )
        else:
            found.append(Finding("fact", f"answers end in {names}, where generation stops"))
    if counts["train skipped"]:
        text = f"{counts['train skipped']:,} earlier answers are not trained: the template rewrites history"
        found.append(Finding("warning", text, "split such conversations into one row per answer"))
    if counts["train escaped"]:
        found.append(Finding("fact", f"{counts['train escaped']:,} control tokens in the rows' texts stay text"))
    if not turns:
        found += _text_ends(rows)
    for source, account in rows.ledger.accounts.items():
        total, trained = account.tokens.get("train", (0, 0))
        if total and trained / total < 0.02:
            text = f"{source}: only {trained / total:.1%} of the tokens are trained on"
            found.append(Finding("warning", text, "shorter prompts, or a source with longer answers"))
    return found


def _text_ends(rows: Tokenized) -> list[Finding]:
    """Check the token that is put behind rows which are no conversations."""
    tokenizer = rows.encoder.tokenizer
    if tokenizer.eos_token_id in rows.encoder.stops:
        return [Finding("fact", f"texts end in {tokenizer.eos_token}, where generation stops")]
    text = f"texts end in {tokenizer.eos_token}, and generation stops at {', '.join(sorted(rows.encoder.stop_tokens))}"
    return [Finding("warning", text, "give the tokenizer and generation_config.json of the model one end token")]


def _bos(rows: Tokenized) -> list[Finding]:
    """Count BOS tokens in whole sequences; a template and a tokenizer that both add one are a classic."""
    tokenizer = rows.encoder.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None or bos in rows.encoder.stops:
        return []
    counts = [ids.count(bos) for row in rows.train.take(200) for ids in sequences(row, rows.form)]
    low, high = min(counts), max(counts)
    if high > 1:
        text = f"{sum(c > 1 for c in counts)} of the first {len(counts)} sequences hold more than one BOS token"
        return [Finding("warning", text, "take the BOS out of the rows' texts")]
    if low == 0 and tokenizer("a")["input_ids"][0] == bos:
        text = f"{counts.count(0)} of the first {len(counts)} sequences begin without {tokenizer.bos_token}"
        fix = "a chat template that begins with it: the tokenizer puts it in front of every text"
        return [Finding("warning", text, fix)]
    return [Finding("fact", f"BOS tokens a row: {low}" + ("" if low == high else f" to {high}"))]


def _pairs(rows: Tokenized, args: Any) -> list[Finding]:
    found = []
    near = rows.counts["train near"]
    if near:
        text = f"{near:,} pairs differ in less than 5 % of their tokens"
        many = near > 0.05 * len(rows.train)
        fix = "pairs whose answers differ in what matters: so alike, both move together" if many else ""
        found.append(Finding("warning" if many else "fact", text, fix))
    if rows.form == "dpo":
        chosen, rejected = (sum(map(len, rows.train[name])) for name in ("chosen_ids", "rejected_ids"))
        text = f"chosen answers are {chosen / max(rejected, 1):.2f} x as long as rejected ones"
        found.append(Finding("fact", text))
    if rows.form == "kto":
        good = sum(rows.train["label"])
        bad = len(rows.train) - good
        found.append(Finding("fact", f"thumbs: {good:,} up, {bad:,} down"))
        if not good or not bad:
            found.append(Finding("error", "all thumbs point the same way", "KTO needs both; with one kind use sft"))
        else:
            ratio = args.train.desirable_weight * good / (args.train.undesirable_weight * bad)
            if not 0.7 <= ratio <= 1.5:
                weight = round(args.train.undesirable_weight * bad / good, 2)
                text = f"weighted thumbs up to thumbs down is {ratio:.2f}; the paper advises 1 to 1.33"
                found.append(Finding("warning", text, f"--desirable_weight {weight}"))
    return found


def _size(trainer: Any, args: Any, loaded: Any, rows: Tokenized) -> list[Finding]:
    trainable, total = parameters(trainer.model)
    if not total:  # ZeRO-3 has taken the weights apart already
        return [Finding("fact", "parameters and memory are not counted: the weights are sharded already")]
    text = f"trains {trainable:,} of {total:,} parameters ({trainable / total:.2%}, {loaded.method})"
    found = [Finding("fact", text)]
    if not trainable:
        found.append(Finding("error", "no parameter is trained", "--peft with another method"))
    length = _longest(args, rows)
    tokens = trainer.args.per_device_train_batch_size * length * (2 if "chosen_ids" in _columns(trainer) else 1)
    reference = vars(trainer).get("ref_model")
    shards = trainer.args.world_size if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled else 1
    need = memory_estimate(trainer.model, trainer.args, tokens, reference, shards)
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in need.items() if name != "total" and size)
    have = _memory()
    text = f"memory, roughly: {_bytes(need['total'])} of {_bytes(have)} ({parts})"
    fix = "--peft qlora, a smaller --per_device_train_batch_size or --max_length, --gradient_checkpointing true"
    found.append(Finding("warning", text, fix) if need["total"] > have else Finding("fact", text))
    return found


def _longest(args: Any, rows: Tokenized) -> int:
    """Return the tokens of the longest sequence the model may have to read."""
    if rows.form != "prompt":
        return args.train.max_length or 1024
    return int(rows.lengths["train"].max() if len(rows.lengths) else 1024) + args.train.max_completion_length


def _memory() -> float:
    """Return the bytes there are for one process: its GPU's, or its share of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return psutil.virtual_memory().total / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _plan(trainer: Any, rows: Tokenized) -> list[Finding]:
    """Say how long the run is: updates, passes over the rows, tokens."""
    settings = trainer.args
    rate = f"learning rate {settings.learning_rate:g} ({settings.lr_scheduler_type.value})"
    if isinstance(rows.train, IterableDataset):
        return [Finding("fact", f"{settings.max_steps:,} updates, {rate}")]
    batches = math.ceil(len(trainer.train_dataset) / (settings.per_device_train_batch_size * settings.world_size))
    epoch = max(math.ceil(batches / settings.gradient_accumulation_steps), 1)
    steps = settings.max_steps if settings.max_steps > 0 else math.ceil(epoch * settings.num_train_epochs)
    tokens = sum(a.tokens["train"][0] for a in rows.ledger.accounts.values() if "train" in a.tokens) * steps / epoch
    passes = f"{steps / epoch:.2g} epoch{'s' if steps > epoch else ''}"
    return [Finding("fact", f"{steps:,} updates, {passes}, about {tokens:,.0f} tokens, {rate}")]


def _columns(trainer: Any) -> list[str]:
    return trainer.train_dataset.column_names or []


def _bytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{max(size / 2**20, 0.1):.1f} MiB"


def _launch(trainer: Any) -> list[Finding]:
    """Compare the processes there are with those the launcher was asked for."""
    state, asked = trainer.accelerator.state, asked_for()
    got = state.num_processes
    kind = str(state.distributed_type).rpartition(".")[2]
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    steps = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps * got
    found = [
        Finding("fact", f"runs on {got} process{'es' if got > 1 else ''} ({kind}, {device}); rows per update: {steps}")
    ]
    number, strategy = asked.get("num_processes"), str(asked.get("distributed_type", ""))
    if number and int(number) * int(asked.get("num_machines") or 1) != got and int(number) != got:
        text = f"the launcher was asked for {number} processes, and {got} came"
        fix = "accelerate_configs/cpu.yaml shows how to get several processes without a GPU" if device == "CPU" else ""
        found.append(Finding("error", text, fix))
    for name, there in (("FSDP", trainer.is_fsdp_enabled), ("DEEPSPEED", trainer.is_deepspeed_enabled)):
        if name in strategy.upper() and not there:
            found.append(Finding("error", f"the launcher was asked for {strategy}, and the run has none", "needs GPUs"))
    return found
