"""A classifier fine-tuned by our recipe and by a bare transformers Trainer: same rows, model, rate, batch and seed.

    python benchmarks/classify.py                                          # the embedded model and sentences
    python benchmarks/classify.py --model MODEL --task cola --data GLUE_FOLDER --peft none lora ia3 prompt prefix
    python benchmarks/classify.py --model MODEL --task sst2 --data GLUE_FOLDER --rows 5000 --epochs 1

Both run in this process, one after the other: the bare Trainer with all weights, ours with each method of --peft. The
bare one pads each batch to its longest row, ours runs it as up to four narrower ones. Seconds are those of training,
with the preparation of the rows and without evaluation; the ratio is of CPU seconds, which a busy neighbour disturbs
less. --output writes JSON, too.
"""

import argparse
import json
import platform
import runpy
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from alignment.classifier import ClassificationTrainer, ClassifyConfig, score_sequences
from alignment.classifying import encode
from alignment.config import parse
from alignment.labels import load_labelled
from alignment.models import load_model
from alignment.warmstart import ready

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = runpy.run_path(str(ROOT / "recipes" / "classify.py"))["DEFAULTS"]
NO_METRIC = ("seconds", "cpu", "trained", "rate", "rows", "held out", "computed", "real")


def arguments(args: argparse.Namespace, peft: str, folder: str):
    """Return the recipe's arguments for one method, without evaluation and saving while it trains."""
    flags = [f"--model_name_or_path={args.model}", f"--data={args.data}", f"--peft={peft}", f"--output_dir={folder}"]
    flags += [f"--num_train_epochs={args.epochs}", f"--per_device_train_batch_size={args.batch_size}"]
    flags += [f"--seed={args.seed}", f"--max_length={args.max_length}", "--warmup_steps=0", "--disable_tqdm=true"]
    flags += ["--eval_strategy=no", "--eval_on_start=false", "--save_strategy=no", "--logging_strategy=no"]
    flags += [f"--task={args.task}"] if args.task else []
    flags += [f"--learning_rate={args.learning_rate}"] if peft == "none" else []
    flags += [f"--learning_rate={args.peft_rate}"] if peft != "none" and args.peft_rate else []
    return parse(ClassifyConfig, DEFAULTS, flags)


def first_rows(splits, args: argparse.Namespace) -> None:
    """Keep --rows of the training rows, drawn with the seed; the books are not balanced after this."""
    if args.rows and args.rows < len(splits.train):
        splits.train = splits.train.shuffle(seed=args.seed).select(range(args.rows))


def ours(args: argparse.Namespace, peft: str) -> dict:
    """Train as recipes/classify.py does; returns seconds, metrics and what was trained."""
    with tempfile.TemporaryDirectory() as folder:
        run = arguments(args, peft, folder)
        set_seed(args.seed)
        splits, labels = load_labelled(run)
        first_rows(splits, args)
        held_out = splits.test
        loaded = load_model(run, head="sequence", labels=labels.outputs)
        began, cpu = time.perf_counter(), time.process_time()
        splits.ledger.check = lambda: None  # rows were left out behind its back
        rows = encode(splits, loaded, run, labels)
        trainer = ClassificationTrainer(
            model=loaded.model, args=run.train, labels=labels, train_dataset=rows.train, eval_dataset=rows.test,
            processing_class=loaded.tokenizer, peft_config=loaded.peft_config,
        )  # fmt: skip
        ready(trainer, loaded)
        trainer.train()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        found = trainer.evaluate()
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {
        "seconds": seconds, "cpu": cpu, "trained": trained, "rate": run.train.learning_rate, "rows": len(rows.train),
        "held out": len(held_out), "computed": trainer.token_count.computed, "real": int(trainer.token_count.real),
        **metrics_of(found),
    }  # fmt: skip


def metrics_of(found: dict) -> dict[str, float]:
    """Return the metrics of an evaluation, without the clock's."""
    clock = ("runtime", "per_second", "epoch", "loss")
    return {key.removeprefix("eval_"): value for key, value in found.items() if not any(w in key for w in clock)}


def bare(args: argparse.Namespace) -> dict:
    """Train with transformers alone, as its text classification example does."""
    with tempfile.TemporaryDirectory() as folder:
        run = arguments(args, "none", folder)
        splits, labels = load_labelled(run)
        first_rows(splits, args)
        set_seed(args.seed)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model, num_labels=len(labels.outputs), dtype=torch.float32
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        began, cpu = time.perf_counter(), time.process_time()

        def tokens(batch: dict) -> dict:
            texts = (batch["text"], batch["text_pair"]) if "text_pair" in batch else (batch["text"],)
            out = tokenizer(*texts, truncation=True, max_length=args.max_length)
            if vars(model.config).get("type_vocab_size", 0) < 2:
                out.pop("token_type_ids", None)
            return {**out, "labels": [labels.number(value) for value in batch["label"]]}

        encoded = [
            part.map(tokens, batched=True, remove_columns=part.column_names) for part in (splits.train, splits.test)
        ]
        settings = TrainingArguments(
            folder, learning_rate=args.learning_rate, num_train_epochs=args.epochs, seed=args.seed,
            per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=64, report_to="none",
            use_cpu=not torch.cuda.is_available(), save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            model, settings, DataCollatorWithPadding(tokenizer), *encoded, processing_class=tokenizer,
            compute_metrics=lambda found: score_sequences(found.predictions, found.label_ids, labels),
        )  # fmt: skip
        trainer.train()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        found = trainer.evaluate()
    trained = sum(p.numel() for p in model.parameters())
    return {
        "seconds": seconds, "cpu": cpu, "trained": trained, "rate": args.learning_rate,
        "rows": len(encoded[0]), "held out": len(encoded[1]), **metrics_of(found),
    }  # fmt: skip


def show(found: dict[str, dict], args: argparse.Namespace) -> None:
    """Print a row for each run; CPU seconds also as a ratio to the bare Trainer's."""
    first = next(iter(found.values()))
    names = [
        key for key in first if key not in ("seconds", "trained", "rate", "rows", "held out", "computed", "real", "cpu")
    ]
    what = args.task or args.data
    title = f"{what}: {first['rows']:,} rows, {args.epochs:g} epochs of {args.batch_size}, seed {args.seed}"
    table = Table(title=f"{title}; {first['held out']:,} held-out rows", title_justify="left")
    for head in ("", "trained", "rate", *names, "seconds", "CPU s", "ratio"):
        table.add_column(head, justify="left" if not head else "right")
    for name, run in found.items():
        ratio = run["cpu"] / found["bare"]["cpu"] if "bare" in found else float("nan")
        cells = [f"{run['trained']:,}", f"{run['rate']:g}", *(f"{run[key]:.3f}" for key in names)]
        table.add_row(name, *cells, f"{run['seconds']:.0f}", f"{run['cpu']:.0f}", f"{ratio:.2f}")
    Console(width=100).print(table)


def main() -> None:
    """Run the bare Trainer and the recipe, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(ROOT / "data" / "tiny" / "model"))
    add("--task", help="a GLUE task; without it --data are labelled rows")
    add("--data", default=str(ROOT / "data" / "tiny" / "sentences"))
    add("--peft", nargs="+", default=["none"], help="methods of ours to run")
    add("--rows", type=int, help="this many training rows, drawn with the seed")
    add("--epochs", type=float, default=3)
    add("--batch_size", type=int, default=32)
    add("--learning_rate", type=float, default=5e-5, help="of all weights, in both")
    add("--peft_rate", type=float, help="of the other methods [the recipe's]")
    add("--max_length", type=int, default=256)
    add("--seed", type=int, default=42)
    add("--no_bare", action="store_true", help="leave the bare Trainer out")
    add("--output", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    found = {} if args.no_bare else {"bare": bare(args)}
    for peft in args.peft:
        found["ours" if peft == "none" else f"ours, {peft}"] = ours(args, peft)
        if args.output:
            record = {"arguments": vars(args) | {"output": str(args.output)}, "runs": found}
            args.output.write_text(json.dumps(record | {"machine": platform.platform()}, indent=1) + "\n")
    show(found, args)


if __name__ == "__main__":
    main()
