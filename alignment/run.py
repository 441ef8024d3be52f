"""One run from the constructed trainer to the files it leaves: look, train, save, write down."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import sys
import time
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from alignment import preflight
from alignment.checkpointing import Seal, check_same_run, find_checkpoint
from alignment.models import LoadedModel, save_base
from alignment.report import draw_curves, write_text
from alignment.tokenization import Tokenized
from alignment.warmstart import ready

# What a person looks at, in this order, of the many numbers that are logged.
HEADLINE = {
    "sft": ("loss", "mean_token_accuracy"),
    "dpo": ("loss", "rewards/accuracies", "rewards/margins"),
    "kto": ("loss", "rewards/margins", "kl"),
    "reward": ("loss", "accuracy", "margin"),
}
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "plumbline")


def run(trainer: Any, args: Any, loaded: LoadedModel, rows: Tokenized) -> None:
    """Examine the run, train, and write everything into `output_dir`.

    Files: the weights (only the adapter with PEFT), the tokenizer with the template that was trained on, the
    generation config with its stop tokens, `run.json`, `curves.png`, `README.md`, `trainer_state.json`, and
    `dropped.jsonl` when rows were dropped.

    Args:
        trainer: a trainer of `alignment.trainers`, or any transformers Trainer on the same rows.
        args: what `parse` returned.
        loaded: what `load_model` returned.
        rows: what `tokenize` returned.

    Raises:
        InputError: the examination found an error, the loss is not finite, the checkpoint does not fit.
    """
    began = time.time()
    main = trainer.accelerator.is_main_process
    console = Console(width=None if sys.stdout.isatty() else preflight.WIDTH, quiet=not main, highlight=False)
    loaded.notes += ready(trainer, loaded)
    identity = identify(trainer, rows)
    checkpoint = _checkpoint(args, identity, loaded)
    findings = preflight.examine(trainer, args, loaded, rows)
    preflight.report(findings, trainer, rows, console)
    preflight.refuse(findings)
    if args.data.dry_run:
        console.print("Dry run: nothing was trained, nothing was written.")
        return
    folder = Path(trainer.args.output_dir)
    record = describe(trainer, args, rows, identity, findings)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        save_base(loaded, folder)
        _write_record(folder, record | {"status": "running"}, rows)
    stop = StopOnSignal(folder)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    for callback in (Progress(HEADLINE[rows.form]), stop, Seal()):
        trainer.add_callback(callback)
    with stop:
        trainer.train(resume_from_checkpoint=checkpoint)
    status = "interrupted" if stop.name else "finished"
    if not stop.name and trainer.eval_dataset is not None and trainer.args.eval_strategy != "no":
        _evaluate_last(trainer)
    save(trainer, folder)
    if main:
        if not isinstance(rows.train, IterableDataset) and "token_count" in vars(trainer):
            rows.ledger.padding("train", trainer.token_count.computed, int(trainer.token_count.real))
        rows.ledger.check()
        record |= {"ledger": rows.ledger.to_dict(), "metrics": final_metrics(trainer.state.log_history)}
        record |= {"status": status, "seconds": round(time.time() - began, 1), "steps": trainer.state.global_step}
        _write_record(folder, record, rows)
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
        draw_curves(trainer.state.log_history, folder / "curves.png", title=folder.name)
        write_text(folder / "README.md", model_card(record, args))
        conclude(console, record, rows, folder)


def _checkpoint(args: Any, identity: dict, loaded: LoadedModel) -> str | None:
    wanted = args.train.resume_from_checkpoint
    if not wanted:
        return None
    checkpoint, notes = find_checkpoint(args.train.output_dir, str(wanted))
    loaded.notes += notes
    file = Path(args.train.output_dir) / "run.json"
    if file.is_file():
        before = json.loads(file.read_text())["identity"]
        loaded.notes += check_same_run(before, identity, args.data.overwrite_output_dir)
    return checkpoint


def _evaluate_last(trainer: Any) -> None:
    """Evaluate the final weights, unless the last step did."""
    last = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if not last or last[-1] != trainer.state.global_step:
        trainer.evaluate()


def save(trainer: Any, folder: Path) -> None:
    """Write weights, tokenizer and generation config; every rank has to call it."""
    trainer.save_model(str(folder))
    model = trainer.accelerator.unwrap_model(trainer.model)
    config = vars(model.get_base_model() if "peft_config" in vars(model) else model).get("generation_config")
    if config is not None and trainer.accelerator.is_main_process:
        config.save_pretrained(folder)


def identify(trainer: Any, rows: Tokenized) -> dict[str, Any]:
    """Return what makes a run this run: the data, the template, the division of the work."""
    tokenizer = rows.encoder.tokenizer
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else json.dumps(tokenizer.chat_template)
    return {
        "form": rows.form,
        "data": "stream" if isinstance(rows.train, IterableDataset) else fingerprint(rows),
        "chat_template": hashlib.sha256((template or "").encode()).hexdigest()[:16],
        "processes": trainer.args.world_size,
        "rows_per_step": trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps,
    }


def fingerprint(rows: Tokenized) -> str:
    """Return a hash of the encoded training rows in their order."""
    digest = hashlib.sha256()
    for batch in rows.train.with_format("arrow").iter(batch_size=1000):
        for column in batch.drop_columns([c for c in ("source", "row") if c in batch.column_names]).columns:
            digest.update(repr(column.to_pylist()).encode())
    return digest.hexdigest()[:16]


def describe(trainer: Any, args: Any, rows: Tokenized, identity: dict, findings: list) -> dict[str, Any]:
    """Return the content of run.json that is known before training."""
    values = {}
    for group in (args.data, args.model, args.peft, args.train, *args.also):
        for item in fields(group):
            if item.init and "token" not in item.name.split("_"):
                values[item.name] = {
                    "value": _plain(getattr(group, item.name)),
                    "source": args.sources.get(item.name, "library"),
                }
    return {
        "recipe": args.recipe,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "identity": identity,
        "arguments": values,
        "findings": [vars(finding) for finding in findings],
        "ledger": rows.ledger.to_dict(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "hardware": {
            "machine": platform.platform(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "seed": trainer.args.seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _plain(value: Any) -> Any:
    """Return a JSON-ready form of an argument."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)


def _write_record(folder: Path, record: dict[str, Any], rows: Tokenized) -> None:
    write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")
    dropped = rows.ledger.dropped_rows()
    if dropped:
        write_text(folder / "dropped.jsonl", "".join(json.dumps(row) + "\n" for row in dropped))


def final_metrics(log: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the first and last held-out metrics, and the last of training, without the clock's numbers."""
    held_out = [entry for entry in log if "eval_loss" in entry]
    training = [entry for entry in log if "loss" in entry]
    clock = ("runtime", "per_second", "epoch", "step")
    found = {}
    for name, entries in (("before", held_out[:1]), ("after", held_out[-1:]), ("training", training[-1:])):
        found[name] = {
            key.removeprefix("eval_"): value
            for entry in entries
            for key, value in entry.items()
            if not any(word in key for word in clock)
        }
    return found


def model_card(record: dict[str, Any], args: Any) -> str:
    """Return the README.md of the trained weights: what was trained on what, with what result."""
    metrics = record["metrics"]
    lines = [
        "---",
        f"base_model: {args.model.model_name_or_path}",
        f"library_name: {'peft' if args.peft.peft != 'none' else 'transformers'}",
        f"tags: [{args.recipe}, plumbline]",
        "---",
        f"# {Path(args.train.output_dir).name}",
        "",
        f"`{args.model.model_name_or_path}` trained with {args.recipe.upper()}, PEFT: {args.peft.peft}, "
        f"{record['steps']} steps, {record['status']}.",
        "",
        "| held-out rows | before | after |",
        "|---|---|---|",
        *(
            f"| {name} | {metrics['before'].get(name, float('nan')):.4f} | {metrics['after'][name]:.4f} |"
            for name in HEADLINE[record["identity"]["form"]]
            if name in metrics["after"]
        ),
        "",
        "| data | rows read | trained on | dropped |",
        "|---|---|---|---|",
        *(
            f"| {source} | {a['read']} | {a['train']} | {sum(d['rows'] for d in a['dropped'].values())} |"
            for source, a in record["ledger"]["sources"].items()
        ),
        "",
        "![curves](curves.png)",
        "",
        f"Command: `{record['command']}`. Every value and where it came from is in `run.json`.",
        "",
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "",
    ]
    return "\n".join(lines)


def conclude(console: Console, record: dict[str, Any], rows: Tokenized, folder: Path) -> None:
    """Print what changed on the held-out rows, what was computed, and what to do next."""
    metrics = record["metrics"]
    if metrics["after"]:
        table = Table(title=f"Held-out rows ({rows.ledger.rows('test'):,})")
        for head in ("metric", "before", "after"):
            table.add_column(head, justify="left" if head == "metric" else "right")
        for name in HEADLINE[rows.form]:
            if name in metrics["after"]:
                before = metrics["before"].get(name)
                table.add_row(name, "" if before is None else f"{before:.3f}", f"{metrics['after'][name]:.3f}")
        console.print(table)
    pad = rows.ledger.pad.get("train")
    if pad:
        console.print(f"{pad[0]:,} tokens computed for {pad[1]:,} real ones ({pad[0] / max(pad[1], 1):.2f} x)")
    console.print(f"{record['steps']} steps in {record['seconds']:.0f} s; weights, run.json and curves.png in {folder}")
    if record["status"] == "interrupted":
        words = [w for w in sys.argv if not w.startswith("--resume_from_checkpoint")]
        console.print(f"To go on: accelerate launch {shlex.join(words)} --resume_from_checkpoint last", soft_wrap=True)
    elif rows.form != "reward":
        console.print(
            f"To measure it: accelerate launch eval/generate.py --model {folder} --data data/tiny/prompts "
            f"--output {folder}/generate.json",
            soft_wrap=True,
        )


class Progress(TrainerCallback):
    """A progress bar with the few numbers that matter; lines where there is no terminal."""

    def __init__(self, headline: tuple[str, ...]):
        self.headline, self.bar = headline, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step", dynamic_ncols=True,
                disable=not sys.stderr.isatty(),
            )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Show the headline numbers of training in the bar, those of the held-out rows on a line of their own."""
        if self.bar is None or not logs:
            return
        held_out = "eval_loss" in logs
        names = [f"eval_{name}" if held_out else name for name in self.headline]
        text = "  ".join(f"{name.removeprefix('eval_')} {logs[name]:.3f}" for name in names if name in logs)
        if held_out or (self.bar.disable and "loss" in logs):
            kind = "held out" if held_out else "training"
            tqdm.write(f"step {state.global_step:>5}/{state.max_steps}  {kind}  {text}", file=sys.stdout)
        elif "loss" in logs:
            self.bar.set_postfix_str(text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class StopOnSignal(TrainerCallback):
    """Turns Ctrl-C and SIGTERM into a checkpoint after the current step; a second signal ends at once."""

    def __init__(self, folder: Path):
        self.folder, self.name, self.before = folder, "", {}

    def __enter__(self) -> "StopOnSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: Any) -> None:
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        tqdm.write(f"{self.name}: saving after this step; once more to end at once", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end, when a signal came."""
        if self.name:
            control.should_save = control.should_training_stop = True
