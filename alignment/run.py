"""One run from the constructed trainer to the files it leaves: look, train, save, write down."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import IterableDataset
from rich.console import Console
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from alignment import preflight, rehearsal
from alignment.checkpointing import (
    Seal,
    check_same_run,
    drop_aside,
    find_checkpoint,
    leftovers,
    set_aside,
    step_of,
)
from alignment.errors import InputError
from alignment.models import LoadedModel, save_base
from alignment.opening import resuming
from alignment.record import (
    HEADLINE,
    conclude,
    describe,
    final_metrics,
    generation_config,
    identify,
    model_card,
    write_record,
)
from alignment.report import draw_curves, write_text
from alignment.tokenization import Tokenized
from alignment.warmstart import ready

# A launcher passes Ctrl-C on to its processes, which the terminal told already: within this many seconds it is one.
_ECHO = 3.0


def run(trainer: Any, args: Any, loaded: LoadedModel, rows: Tokenized) -> None:
    """Examine the run, train, and write everything into `output_dir`.

    Files: the weights (only the adapter with PEFT), the tokenizer with the template that was trained on, the
    generation config with its stop tokens, `run.json`, `metrics.json`, `curves.png`, `README.md`,
    `trainer_state.json`, and `dropped.jsonl` when rows were dropped. A run that is interrupted leaves a checkpoint and
    `run.json`, and says how to go on.

    Args:
        trainer: a trainer of `alignment.trainers`, or any transformers Trainer on the same rows.
        args: what `parse` returned.
        loaded: what `load_model` returned.
        rows: what `tokenize` returned.

    Raises:
        InputError: the examination found an error, the loss is not finite, the checkpoint does not fit.
    """
    began, folder = time.time(), Path(trainer.args.output_dir)
    main = trainer.accelerator.is_main_process
    console = Console(width=preflight.width(), quiet=not main, highlight=False)
    loaded.notes += ready(trainer, loaded)
    identity = identify(trainer, args, rows)
    checkpoint = find_start(args, identity, loaded)
    findings = preflight.examine(trainer, args, loaded, rows)
    if rows.form == "prompt":
        heard = rehearsal.rehearse(trainer, rehearsal_size(args))
        findings = preflight.in_order(findings + heard.findings)
    preflight.report(findings, rows, console)
    if rows.form == "prompt":
        rehearsal.show(heard, console)
    preflight.refuse(findings)
    if args.data.dry_run:
        if main and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # the trainer made it
        console.print("Dry run: nothing was trained, nothing was written.")
        return
    record = describe(trainer, args, rows, identity, findings) | {"status": "running"}
    if main:
        for note in prepare(folder, checkpoint, args, loaded):
            console.print(note)
        write_record(folder, record, rows)
    record |= train(trainer, folder, checkpoint, rows, record)
    record["seconds"] = round(time.time() - began, 1)
    if main:
        write_record(folder, record, rows)
        if record["status"] == "finished":
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            draw_curves(trainer.state.log_history, folder / "curves.png", title=folder.name)
            write_text(folder / "README.md", model_card(record, args))
            for note in drop_aside(folder):
                console.print(note)
        conclude(console, record, rows, folder)


def rehearsal_size(args: Any) -> int:
    """Return the prompts to rehearse with: the option where the recipe has it, else 16."""
    return next((vars(group)["rehearsal_prompts"] for group in args.also if "rehearsal_prompts" in vars(group)), 16)


def find_start(args: Any, identity: dict[str, Any], loaded: LoadedModel) -> str | None:
    """Return the checkpoint to go on from, the same on every process, or None to start afresh.

    Raises:
        InputError: there is none, it is damaged, or another run wrote it.
    """
    wanted = resuming(args)
    if not wanted:
        return None
    answer: list[Any] = [None]
    try:
        checkpoint, notes = find_checkpoint(args.train.output_dir, wanted)
        file = Path(checkpoint).parent / "run.json"
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))["identity"]
            notes += check_same_run(before, identity, args.data.overwrite_output_dir)
        answer = [(checkpoint, notes)]
    except InputError as error:
        answer = [error]
    answer = broadcast_object_list(answer)
    if isinstance(answer[0], InputError):
        raise answer[0]
    checkpoint, notes = answer[0]
    loaded.notes += notes
    return checkpoint


def prepare(folder: Path, checkpoint: str | None, args: Any, loaded: LoadedModel) -> list[str]:
    """Make room in `output_dir`, on one process; return notes of what was moved."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = [args.model.model_name_or_path]
    if not loaded.merged_from:  # else the base is only about to be written there
        needed.append(loaded.model.name_or_path)
    notes = set_aside(leftovers(folder, checkpoint), folder, [] if checkpoint else needed)
    save_base(loaded, folder)
    return notes


def train(trainer: Any, folder: Path, checkpoint: str | None, rows: Tokenized, record: dict) -> dict[str, Any]:
    """Train, evaluate and save; return what is known afterwards, for run.json.

    A failure is written into run.json before it is raised again.
    """
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.create_model_card = lambda *args, **kwargs: None  # TRL's, with each checkpoint; ours comes at the end
    stop, began = StopOnSignal(), time.time()
    for callback in (Progress(HEADLINE[rows.form]), stop, Seal()):
        trainer.add_callback(callback)
    if checkpoint:
        trainer.args.eval_on_start = False  # "before" is in the log that the checkpoint brings
    try:
        with stop:
            trainer.train(resume_from_checkpoint=checkpoint)
            seconds = time.time() - began - _evaluating(trainer, checkpoint)
            if not stop.stopped:
                _evaluate_last(trainer)
                save(trainer, folder)
    except BaseException as error:
        if trainer.accelerator.is_main_process:
            reason = f"{type(error).__name__}: {error}".strip(": ")
            write_record(folder, record | {"status": "failed", "reason": reason}, rows)
        raise
    _book_padding(trainer, rows)
    rows.ledger.check()
    known = {"status": "finished", "steps": trainer.state.global_step, "training_seconds": round(seconds, 1)}
    known |= {"status": "interrupted", "signal": stop.name} if stop.stopped else {}
    if "flat_groups" in vars(trainer) and trainer.compares:
        known["groups"], known["groups_without_difference"] = trainer.groups, trainer.flat_groups
    return known | {"ledger": rows.ledger.to_dict(), "metrics": final_metrics(trainer.state.log_history)}


def _evaluating(trainer: Any, checkpoint: str | None) -> float:
    """Return the seconds that went into evaluations since this run was started."""
    start = step_of(Path(checkpoint)) if checkpoint else -1
    return sum(e["eval_runtime"] for e in trainer.state.log_history if "eval_runtime" in e and e["step"] > start)


def _evaluate_last(trainer: Any) -> None:
    """Evaluate the final weights, unless the last step did or the run has no evaluation."""
    if trainer.eval_dataset is None or trainer.args.eval_strategy == "no":
        return
    last = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if not last or last[-1] != trainer.state.global_step:
        trainer.evaluate()


def _book_padding(trainer: Any, rows: Tokenized) -> None:
    """Book the tokens of all processes, computed and real; streams are not counted."""
    if isinstance(rows.train, IterableDataset) or "token_count" not in vars(trainer):
        return
    count = trainer.token_count
    numbers = torch.tensor([int(count.computed), int(count.real)], device=trainer.args.device)
    computed, real = trainer.accelerator.reduce(numbers, "sum").tolist()
    rows.ledger.padding("train", computed, real)


def save(trainer: Any, folder: Path) -> None:
    """Write weights, tokenizer and generation config; every rank has to call it."""
    trainer.save_model(str(folder))
    config = generation_config(trainer.accelerator.unwrap_model(trainer.model))
    if config is not None and trainer.accelerator.is_main_process:
        config.save_pretrained(folder)


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
        short = {name: name.removeprefix("eval_").removeprefix("completions/") for name in names}
        text = "  ".join(f"{short[name]} {logs[name]:.3f}" for name in names if name in logs)
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
    """Turns Ctrl-C and SIGTERM into a checkpoint after the current step; a second one, seconds later, ends at once.

    Attributes:
        name: of the signal, or empty. stopped: the run ended before its last step because of it.
    """

    def __init__(self):
        self.name, self.stopped, self.before, self.at = "", False, {}, 0.0

    def __enter__(self) -> "StopOnSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: Any) -> None:
        if self.name:
            if time.monotonic() - self.at > _ECHO:
                raise KeyboardInterrupt
            return
        self.name, self.at = signal.Signals(number).name, time.monotonic()
        tqdm.write(f"{self.name}: saving after this step; once more to end at once", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end when a signal came, to this process or to another."""
        if args.world_size > 1:
            came = torch.tensor(float(bool(self.name)), device=args.device)
            torch.distributed.all_reduce(came, torch.distributed.ReduceOp.MAX)
            self.name = self.name or ("a signal to another process" if came.item() else "")
        if self.name and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
