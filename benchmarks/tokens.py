"""Tokens computed for each real one, and seconds an epoch: our recipes against TRL's own trainers.

    python benchmarks/tokens.py                                             # the embedded rows
    python benchmarks/tokens.py --sft alpaca.json --dpo pairs.json --rows 300

Both train the same model on the same rows for one epoch in this process, one after the other; what is longer
than max_length is cut by both. TRL runs with the values of its scripts (`trl sft`, `trl dpo`): random batches
of 8, padded to the longest row. Seconds include the preparation of the rows. --output writes JSON, too.
"""

import argparse
import json
import platform
import runpy
import tempfile
import time
from pathlib import Path

import torch
import trl
from rich.console import Console
from rich.table import Table

from alignment import trainers
from alignment.batching import TokenCount
from alignment.config import parse
from alignment.data import load_splits
from alignment.models import load_model
from alignment.tokenization import tokenize

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"sft": "sft", "dpo": "preference"}
OURS = {"sft": trainers.SFTTrainer, "dpo": trainers.DPOTrainer}
THEIRS = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer}
CONFIGS = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig}


def count_tokens(model: torch.nn.Module, policy: torch.nn.Module, count: TokenCount) -> None:
    """Make every forward pass of a model count its real and computed tokens, while the policy trains."""
    forward = model.forward

    def counted(*args, **inputs):
        mask = inputs.get("attention_mask")
        if policy.training and mask is not None:
            count.add(int(mask.sum()), mask.numel())
        return forward(*args, **inputs)

    model.forward = counted


def arguments(form: str, data: str, args: argparse.Namespace, folder: str):
    """Return the recipe's arguments for these rows, without evaluation and saving."""
    defaults = runpy.run_path(str(ROOT / "recipes" / f"{form}.py"))["DEFAULTS"]
    flags = [f"--data={data}", f"--output_dir={folder}", f"--max_length={args.max_length}"]
    flags += ["--eval_strategy=no", "--eval_on_start=false", "--save_strategy=no", "--disable_tqdm=true"]
    flags += [
        "--num_train_epochs=1",
        "--test_size=0",
        "--on_long_row=cut",
        f"--model_name_or_path={args.model}",
    ]
    flags += [f"--per_device_train_batch_size={2 if form == 'sft' else 8}", "--learning_rate=1e-4"]
    return parse(CONFIGS[form], defaults, flags)


def numbers(count: TokenCount, began: float) -> dict[str, float]:
    """Return the counts with the seconds since `began`."""
    return {"real": int(count.real), "computed": count.computed, "seconds": time.perf_counter() - began}


def measure(form: str, data: str, args: argparse.Namespace, folder: str) -> dict[str, dict[str, float]]:
    """Train both for an epoch; return real and computed tokens and seconds of each (preparation included)."""
    results = {}
    ours = arguments(form, data, args, folder)
    splits = load_splits(ours, KINDS[form])
    if args.rows and args.rows < len(splits.train):
        left_out = splits.train.select(range(args.rows, len(splits.train)))
        splits.ledger.drop(left_out["source"][0], "train", "not in this benchmark", left_out["row"])
        splits.train = splits.train.select(range(args.rows))
    ours_only = {"source", "row", "task"} & set(splits.train.column_names)
    raw = splits.train.remove_columns(sorted(ours_only))
    loaded = load_model(ours)
    began = time.perf_counter()
    rows = tokenize(splits, loaded, ours, form)
    trainer = OURS[form](
        model=loaded.model, args=ours.train, train_dataset=rows.train, processing_class=loaded.tokenizer
    )
    trainer.train()
    count = trainer.token_count
    results["ours"] = numbers(count, began)
    loaded = load_model(ours)
    stock = CONFIGS[form](
        output_dir=folder, max_length=args.max_length, per_device_train_batch_size=8, num_train_epochs=1,
        learning_rate=1e-4, use_cpu=ours.train.use_cpu, bf16=ours.train.bf16, report_to="none",
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    began, count = time.perf_counter(), TokenCount()
    trainer = THEIRS[form](model=loaded.model, args=stock, train_dataset=raw, processing_class=loaded.tokenizer)
    count_tokens(trainer.model, trainer.model, count)
    if form == "dpo":
        count_tokens(trainer.ref_model, trainer.model, count)
    trainer.train()
    results["TRL"] = numbers(count, began)
    return results


def main() -> None:
    """Measure both forms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="data/tiny/model")
    parser.add_argument("--sft", default="data/tiny/chat", help="rows for supervised fine-tuning")
    parser.add_argument("--dpo", default="data/tiny/preferences", help="preference pairs")
    parser.add_argument("--rows", type=int, default=0, help="use the first so many rows; 0 for all")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--output", help="write the numbers as JSON")
    args = parser.parse_args()
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    table = Table(title=f"One epoch, {where}")
    for head in ("", "rows", "real tokens", "computed", "computed / real", "seconds", "speed"):
        table.add_column(head, justify="right" if head else "left")
    found = {}
    for form, data in (("sft", args.sft), ("dpo", args.dpo)):
        with tempfile.TemporaryDirectory() as folder:
            found[form] = measure(form, data, args, folder)
        for name, r in found[form].items():
            speed = found[form]["TRL"]["seconds"] / r["seconds"]
            cells = [
                f"{r['real']:,}",
                f"{r['computed']:,}",
                f"{r['computed'] / r['real']:.2f}",
                f"{r['seconds']:.1f}",
            ]
            table.add_row(f"{form} {name}", Path(data).name, *cells, f"{speed:.2f} x")
    Console(width=100).print(table)
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
