"""What every script in eval/ shares: the flags, the models and their result files, the table at the end."""

import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.config import Parser, install_excepthook, with_underscores
from alignment.errors import InputError, nearest
from alignment.report import (
    Result,
    check_free,
    package_versions,
    results_table,
    run_id,
    text_hash,
    write_result,
)


def make_parser(description: str, data: str, output: str = "outputs/eval") -> Parser:
    """Return a parser with the flags of all evaluations; `data` and `output` are the defaults of these flags."""
    parser = Parser(description=description)
    add = parser.add_argument
    add("--model", nargs="+", required=True, help="checkpoint folders or hub ids, or name=checkpoint")
    add("--data", default=data, help=f"a file, a folder (its test split), a hub id or a data/*.yaml [{data}]")
    add("--output", default=output, help=f"result file (.json), or a folder when there are several models [{output}]")
    add("--overwrite", action="store_true", help="replace result files that exist")
    add("--resume", action="store_true", help="go on with an interrupted evaluation: finished rows stay as they are")
    add("--limit", type=int, help="this many rows, drawn at random but the same for every model")
    add("--batch_size", type=int, default=64, help="rows at a time and process; changes the speed only [64]")
    add("--dtype", default="auto", help="float32, bfloat16, float16; auto: bfloat16 on a GPU, else float32")
    add("--use_cpu", action="store_true", help="leave the GPU alone")
    add("--load_in_4bit", action="store_true", help="quantise the weights to NF4 while loading")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser


def read_arguments(parser: Parser, argv: list[str] | None = None) -> Namespace:
    """Return the command line, with `models` (name -> checkpoint) and `files` (name -> result file) added.

    Raises:
        InputError: an unknown flag, with the nearest; a model named twice; a result file that exists already.
    """
    install_excepthook("finished rows are kept, and the same command with --resume goes on")
    # PEFT 0.21 asks transformers 5.23 by an old name, and says that virtual tokens ignore positions: rows with them
    # share a batch only where they have one length
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Position ids are not supported.*", category=UserWarning)
    words = [with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
    args, rest = parser.parse_known_args(words)
    if rest:
        known = [flag for action in parser._actions for flag in action.option_strings]
        near = nearest(rest[0].partition("=")[0], known)
        raise InputError(
            f"unknown option {rest[0]}",
            where="the command line",
            fix=f"did you mean {near}?" if near else "--help lists the options",
        )
    for name in ("limit", "batch_size"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            raise InputError(f"--{name} is {vars(args)[name]}", where="the command line", fix="1 or more")
    if args.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"--dtype is {args.dtype}", fix="auto, float32, bfloat16 or float16")
    args.models = name_models(args.model)
    args.files = name_files(args.models, args.output, args.overwrite or args.resume)
    return args


def name_models(words: list[str]) -> dict[str, str]:
    """Return name -> checkpoint; one without a name is called by the last part of its path."""
    models: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or "/" in name:
            name, path = Path(word).name.removesuffix(".json") or word, word
        if name in models:
            raise InputError(f"two models are called {name}", where="--model", fix=f"give one a name: other={path}")
        models[name] = path
    return models


def name_files(models: Mapping[str, str], output: str, overwrite: bool) -> dict[str, Path]:
    """Return the result file of each model; raises InputError when one exists or cannot be written."""
    target = Path(output)
    if target.suffix == ".json" and len(models) > 1:
        raise InputError(
            f"{len(models)} models and one result file",
            where="--output",
            fix=f"--output {target.with_suffix('')}, a folder",
        )
    if target.suffix == ".json":
        files = dict.fromkeys(models, target)
    else:
        files = {name: target / f"{name.replace('/', '_')}.json" for name in models}
    return {name: check_free(file, overwrite=overwrite) for name, file in files.items()}


def choose_rows(rows: list, limit: int | None) -> list:
    """Return `limit` rows in their order, drawn with a fixed seed: the same for every model and every day."""
    import numpy as np

    chosen = np.random.default_rng(0).permutation(len(rows))[:limit]
    return [rows[i] for i in sorted(chosen)]


def load(path: str, args: Namespace, head: str = "causal") -> tuple:
    """Return (model on this process's device, tokenizer)."""
    from transformers.utils.logging import disable_progress_bar

    from alignment.generation import process_state
    from alignment.models import load_checkpoint

    disable_progress_bar()
    model, tokenizer = load_checkpoint(
        path, dtype_of(args), head, load_in_4bit=args.load_in_4bit, trust_remote_code=args.trust_remote_code
    )
    return model if args.load_in_4bit else model.to(process_state(args.use_cpu).device), tokenizer


def dtype_of(args: Namespace) -> str:
    """Return the type weights are held in: what --dtype says, or what suits the device."""
    from alignment.generation import process_state

    if args.dtype != "auto":
        return args.dtype
    return "bfloat16" if process_state(args.use_cpu).device.type == "cuda" else "float32"


def new_result(
    name: str, args: Namespace, task: tuple[str, int], wording: Any, settings: dict, packages: Sequence[str] = ()
) -> Result:
    """Return the result of one model without its rows.

    Args:
        name: of the model, in `args.models`.
        args: the command line.
        task: what is measured, and its version.
        wording: what is put around the rows; models are compared on the same only.
        settings: what else the numbers depend on; dtype and quantisation are added.
        packages: beside torch and its companions, those that had a part in it.
    """
    return Result(
        task=task[0],
        version=task[1],
        data=args.data,
        model=args.models[name],
        run=run_id(args.models[name]),
        prompt_hash=text_hash(wording),
        settings=settings | {"dtype": dtype_of(args), "load_in_4bit": args.load_in_4bit, "limit": args.limit},
        rows=[],
        metrics={},
        versions=package_versions("torch", "transformers", "peft", "accelerate", *packages),
    )


def measure_rows(
    result: Result,
    rows: Sequence[dict[str, Any]],
    measure: Callable[[list[dict[str, Any]]], tuple[list[dict[str, Any]], int]],
    args: Namespace,
    name: str,
) -> None:
    """Fill `result.rows`: every process measures its share in batches, finished rows are on disk at once.

    Args:
        result: of `new_result`.
        rows: each with an "id"; the finished ones come back in their order.
        measure: takes a batch and returns its finished rows, with the ids, and how many tokens it read.
        args: the command line.
        name: of the model; the progress bar says it.
    """
    from tqdm import tqdm

    from alignment.generation import process_state
    from alignment.journal import Journal

    state, started = process_state(), time.perf_counter()
    with Journal(result, [row["id"] for row in rows], args.files[name], args.resume) as journal:
        mine = journal.todo(rows)[state.process_index :: state.num_processes]
        tokens, quiet = 0, None if state.is_main_process else True
        with tqdm(total=len(mine), desc=name, unit="row", disable=quiet) as bar:
            for at in range(0, len(mine), args.batch_size):
                batch = mine[at : at + args.batch_size]
                made, read = measure(batch)
                journal.add(made)
                tokens += read
                bar.update(len(batch))
                bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s")
        result.rows = journal.rows()
    result.seconds = round(time.perf_counter() - started, 2)


def keep(name: str, result: Result, args: Namespace, rows: Sequence[dict[str, Any]] = ()) -> None:
    """Write the result of one model, on the main process, and drop the journal of its rows.

    What `rows` ask is looked for in the rows that the model was trained on.
    """
    from alignment.contamination import check, question_of
    from alignment.generation import process_state
    from alignment.journal import drop_parts

    if process_state().is_main_process:
        if rows:
            result.contamination = check(result.model, {row["id"]: question_of(row) for row in rows})
        write_result(result, args.files[name])
        drop_parts(args.files[name])


def show_contamination(console: Any, results: Mapping[str, Result]) -> None:
    """Print for each model whether its training data hold the rows; in yellow when they hold many."""
    from alignment.contamination import sentence

    for name, result in results.items():
        if result.contamination:
            text = sentence(result.contamination)
            console.print(f"{name}: {text}", style="yellow" if "warning" in text else "dim", soft_wrap=True)


def show_all(results: Mapping[str, Result], args: Namespace, refused: Mapping[str, str] | None = None) -> None:
    """Print the table of all models, where their files are, and what to do next, on the main process.

    `refused` holds the metrics that these models cannot be compared by, with a sentence that says why.
    """
    from rich.console import Console

    from alignment.generation import process_state

    if not process_state().is_main_process:
        return
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    rows = len(next(iter(results.values())).rows)
    console.print(f"[bold]{args.data}, {rows:,} rows[/bold]: mean ± its standard error, shares in per cent")
    console.print(results_table(results, refused=list(refused or {})))
    for name, why in (refused or {}).items():
        console.print(f"[yellow]{name}: {why}[/yellow]")
    show_contamination(console, results)
    for file in args.files.values():
        console.print(f"written: {file}", soft_wrap=True)
    if len(results) > 1:
        names = " ".join(str(file) for file in args.files.values())
        console.print(f"next:    python eval/compare.py {names}", soft_wrap=True)
