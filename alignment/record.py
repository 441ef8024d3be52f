"""What a run leaves for people to read: run.json, metrics.json, the dropped rows, the model card, the last words."""

import hashlib
import importlib.metadata
import json
import os
import platform
import time
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
import yaml
from datasets import Dataset, IterableDataset
from peft import PeftModel
from rich.console import Console
from rich.table import Table

from alignment.critic import policy_of
from alignment.heads import ENDINGS, NEW_HEADS
from alignment.launch import command
from alignment.report import write_text
from alignment.tokenization import Tokenized

# What a person looks at, in this order, of the many numbers that are logged.
HEADLINE = {
    "sft": ("loss", "mean_token_accuracy"),
    "dpo": ("loss", "rewards/accuracies", "rewards/margins"),
    "kto": ("loss", "rewards/margins", "kl"),
    "reward": ("loss", "accuracy", "margin"),
    "sequence": ("loss", "matthews_correlation", "accuracy", "f1", "f1_macro", "pearsonr", "spearmanr"),
    "token": ("loss", "f1", "precision", "recall", "accuracy"),
    "span": ("loss", "exact_match", "f1"),
    "prompt": ("reward", "completions/mean_length", "completions/clipped_ratio", "kl"),
}
PIPELINES = {
    "reward": "text-classification", "sequence": "text-classification", "token": "token-classification",
    "span": "question-answering",
}  # fmt: skip
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "plumbline")
SECRETS = ("hub_token", "push_to_hub_token", "token", "api_key", "password")


def identify(trainer: Any, args: Any, rows: Tokenized) -> dict[str, Any]:
    """Return what makes a run this run: data, template, model, the order of rows, the division of the work."""
    tokenizer = rows.encoder.tokenizer
    template = tokenizer.chat_template
    template = template if isinstance(template, str) else json.dumps(template)
    return {
        "form": rows.form,
        "data": fingerprint(trainer.train_dataset),
        "chat_template": hashlib.sha256((template or "").encode()).hexdigest()[:16],
        "model": weights_hash(trainer),
        "peft": args.peft.peft,
        "seed": [trainer.args.seed, trainer.args.data_seed],
        "processes": trainer.args.world_size,
        "num_generations": vars(trainer.args).get("num_generations"),
        "rows_per_step": trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps,
    }


def fingerprint(rows: Dataset | IterableDataset) -> str:
    """Return a hash of the columns of token ids of a data set, in the order of its rows; "stream" for a stream.

    Of prompts also the columns that rewards read.
    """
    if isinstance(rows, IterableDataset):
        return "stream"
    digest = hashlib.sha256()
    read = set(rows.column_names) - {"source", "row", "prompt"} if "prompt" in rows.column_names else set()
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        for name in sorted(batch.column_names):
            column = batch[name].combine_chunks()
            if pyarrow.types.is_list(column.type) and pyarrow.types.is_integer(column.type.value_type):
                digest.update(name.encode())
                digest.update(np.ascontiguousarray(column.value_lengths()).tobytes())
                digest.update(np.ascontiguousarray(column.flatten(), dtype=np.int64).tobytes())
            elif pyarrow.types.is_boolean(column.type) or name in {*read, "labels", "start_positions", "end_positions"}:
                digest.update(repr(column.to_pylist()).encode())
    return digest.hexdigest()[:16]


def weights_hash(trainer: Any) -> str:
    """Return a hash of the first numbers of each weight the run starts from; empty where they are sharded.

    Of a model with an adapter only the frozen weights count, and never a new head: those are drawn anew.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return ""
    model = policy_of(trainer.accelerator.unwrap_model(trainer.model))
    weights = dict(model.named_parameters())
    frozen = {name: weight for name, weight in weights.items() if not weight.requires_grad}
    digest = hashlib.sha256()
    for name, weight in (frozen or weights).items():
        if not {*name.split(".")} & {*NEW_HEADS}:
            part = weight.detach().reshape(-1)[:256].cpu().contiguous()
            digest.update(name.encode() + part.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def describe(trainer: Any, args: Any, rows: Tokenized, identity: dict, findings: list) -> dict[str, Any]:
    """Return the content of run.json that is known before training."""
    values = {}
    for group in (args.data, args.model, args.peft, args.train, *args.also):
        for item in fields(group):
            if item.init and item.name not in SECRETS:
                values[item.name] = {
                    "value": plain(getattr(group, item.name)),
                    "source": args.sources.get(item.name, "library"),
                }
    gpus = range(torch.cuda.device_count())
    return {
        "recipe": args.recipe,
        "command": command(),
        "identity": identity,
        "arguments": values,
        "findings": [vars(finding) for finding in findings],
        "ledger": rows.ledger.to_dict(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "hardware": {
            "machine": platform.platform(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "gpus": [torch.cuda.get_device_name(i) for i in gpus],
        },
        "seed": trainer.args.seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def plain(value: Any) -> Any:
    """Return a JSON-ready form of an argument."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if key not in SECRETS}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)


def write_record(folder: Path, record: dict[str, Any], rows: Tokenized) -> None:
    """Write run.json, metrics.json once there are metrics, and dropped.jsonl when rows were dropped."""
    write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")
    if "metrics" in record:
        write_text(folder / "metrics.json", json.dumps(record["metrics"], indent=1) + "\n")
    dropped = rows.ledger.dropped_rows()
    if dropped:
        write_text(folder / "dropped.jsonl", "".join(json.dumps(row) + "\n" for row in dropped))


def final_metrics(log: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the first and last held-out metrics, and the last of training, without the clock's numbers.

    "before" is there when the run was evaluated before its first step (`--eval_on_start`).
    """
    held_out = [entry for entry in log if "eval_loss" in entry]
    training = [entry for entry in log if "loss" in entry]
    before = [entry for entry in held_out if entry["step"] == 0]
    clock = ("runtime", "per_second", "epoch", "step")
    found = {}
    for name, entries in (("before", before[:1]), ("after", held_out[-1:]), ("training", training[-1:])):
        found[name] = {
            key.removeprefix("eval_"): value
            for entry in entries
            for key, value in entry.items()
            if not any(word in key for word in clock)
        }
    return found


def model_card(record: dict[str, Any], args: Any) -> str:
    """Return the README.md of the trained weights: what was trained on what, with what result."""
    metrics, model = record["metrics"], args.model.model_name_or_path
    head = {
        "base_model": model,
        "library_name": "transformers" if args.peft.peft == "none" else "peft",
        "pipeline_tag": PIPELINES.get(record["identity"]["form"], "text-generation"),
        "tags": [args.recipe, "plumbline"],
    }
    lines = ["---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(), "---"]
    lines += [f"# {Path(args.train.output_dir).name}", ""]
    part = "all weights" if args.peft.peft == "none" else args.peft.peft
    form = record["identity"]["form"]
    how = f"a {form} head" if form in ENDINGS else args.recipe.upper()
    lines += [f"`{model}` trained with {how} ({part}), {record['steps']} steps.", ""]
    names = [name for name in HEADLINE[form] if name in metrics["after"]]
    if names:
        lines += ["| held-out rows | before | after |", "|---|---|---|"]
        for name in names:
            before = f"{metrics['before'][name]:.4f}" if name in metrics["before"] else ""
            lines.append(f"| {name} | {before} | {metrics['after'][name]:.4f} |")
        lines.append("")
    lines += ["| data | rows read | trained on | dropped |", "|---|---|---|---|"]
    for source, a in record["ledger"]["sources"].items():
        lines.append(f"| {source} | {a['read']} | {a['train']} | {sum(d['rows'] for d in a['dropped'].values())} |")
    lines += ["", "![curves](curves.png)", ""]
    lines += [f"Command: `{record['command']}`. Every value and where it came from is in `run.json`.", ""]
    lines += [", ".join(f"{name} {version}" for name, version in record["versions"].items()), ""]
    return "\n".join(lines)


def conclude(console: Console, record: dict[str, Any], rows: Tokenized, folder: Path) -> None:
    """Print what changed on the held-out rows, what it took, and what to do next."""
    metrics, seconds = record["metrics"], record["training_seconds"]
    if metrics["after"] and record["status"] == "finished":
        table = Table(title=f"Held-out rows ({rows.ledger.rows('test'):,})", title_justify="left")
        for head in ("metric", "before", "after"):
            table.add_column(head, justify="left" if head == "metric" else "right")
        for name in HEADLINE[rows.form]:
            if name in metrics["after"]:
                before = metrics["before"].get(name)
                table.add_row(name, "" if before is None else f"{before:.3f}", f"{metrics['after'][name]:.3f}")
        console.print(table)
    pad, speed = rows.ledger.pad.get("train"), ""
    if pad and pad[1]:
        speed = f", {pad[1] / max(seconds, 1e-9):,.0f} tokens/s ({pad[0] / pad[1]:.2f} x computed with the padding)"
    console.print(f"{record['steps']:,} steps; trained for {seconds:.0f} s of {record['seconds']:.0f} s{speed}")
    if record.get("groups"):
        share = record["groups_without_difference"] / record["groups"]
        console.print(f"{share:.0%} of {record['groups']:,} groups had answers of one and the same reward", end="")
        console.print(
            ": they taught nothing. Harder or easier prompts, more --num_generations, or a reward with shades"
            if share > 0.5
            else " and taught nothing"
        )
    if record["status"] == "interrupted":
        console.print(f"Interrupted by {record['signal']}; saved in {folder}/checkpoint-{record['steps']}")
        console.print(f"To go on: {command(resume=True)}", soft_wrap=True)
        return
    console.print(f"Weights, README.md, run.json and curves.png are in {folder}")
    if rows.form not in PIPELINES or rows.form == "reward":
        data = record["arguments"]["data"]["value"]
        embedded = all(str(name).startswith("data/tiny") for name in data)
        if rows.form == "reward":
            measure = f"eval/reward.py --model {folder}" + ("" if embedded else " --data YOUR_PAIRS.jsonl")
        else:
            own = data[0] if rows.form == "prompt" else "data/tiny/prompts"  # what it learnt from has a test split
            measure = f"eval/generate.py --model {folder} --data {own if embedded else 'YOUR_ROWS.jsonl'}"
        console.print("To measure it:" if embedded else "To measure it, on rows of yours that were held out:")
        console.print(f"  accelerate launch {measure}", soft_wrap=True)


def generation_config(model: Any) -> Any:
    """Return the generation config of a model or of what is under its adapter; None where it cannot generate."""
    model = policy_of(model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return vars(base).get("generation_config")
