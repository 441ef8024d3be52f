"""Any task of lm-eval on any checkpoint of ours, with its results in our form.

    accelerate launch eval/harness.py --model base=data/tiny/model outputs/sft
    accelerate launch eval/harness.py --model outputs/sft --tasks gsm8k ifeval --apply_chat_template
    accelerate launch eval/harness.py --model outputs/sft --tasks mine --include_path mine/tasks --num_fewshot 3

Full weights, adapters, merged models, 4-bit. lm-eval does everything but the loading; `pip install "plumbline[eval]"`
brings it. For MMLU eval/mmlu.py gives the same numbers several times faster. eval/README.md says more.
"""

import logging
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.errors import InputError, nearest
from alignment.evaluation import dtype_of, keep, load, make_parser, read_arguments, show_all
from alignment.report import (
    Result,
    check_free,
    mean_metric,
    package_versions,
    read_result,
    run_id,
    text_hash,
    unique_ids,
)

WORDING = (
    "description", "doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter", "fewshot_delimiter",
    "num_fewshot", "fewshot_config", "gen_prefix",
)  # fmt: skip
SHARES = ("acc", "exact_match", "f1", "mcc", "em", "brier", "pass", "inst_level", "prompt_level")
TASKS = Path(__file__).parent / "tasks"


def read_tasks(args: Namespace):
    """Return lm-eval's TaskManager; raises InputError when lm-eval or a task is not there."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError("lm-eval is not installed", why=str(error), fix='pip install "plumbline[eval]"') from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if args.data:
        raise InputError("--data says nothing here", fix="a task names its data; --include_path adds tasks")
    if args.include_path and not Path(args.include_path).is_dir():
        raise InputError(f"there is no folder {args.include_path}", where="--include_path")
    folders = [str(TASKS), *([args.include_path] if args.include_path else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if set(args.tasks) <= set(manager.all_subtasks):
        return manager  # the thousands of files of lm-eval's own tasks take seconds to read
    manager = TaskManager(include_path=folders)
    for name in args.tasks:
        if name not in manager.all_tasks:
            near = nearest(name, list(manager.all_tasks))
            raise InputError(
                f"lm-eval has no task {name}",
                where="--tasks",
                fix=f"did you mean {near}?" if near else "`lm-eval ls tasks` lists them; --include_path adds yours",
            )
    return manager


def evaluate(name: str, task: str, args: Namespace) -> Result:
    """Return the result of one model on one task or group of tasks."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from alignment.generation import has_virtual_tokens
    from alignment.sources import ask_hub

    # data that cannot be had are found before the model is loaded
    parts = ask_hub(lambda: args.manager.load([task]), task)["tasks"]
    result = head_of(name, task, parts, args)
    if args.resume and (file := args.files[name, task]).is_file():
        found = read_result(file)
        if all(vars(found)[key] == vars(result)[key] for key in ("task", "version", "model", "run", "settings")):
            return found
    model, tokenizer = loaded(name, args)
    # PEFT ignores positions when there are virtual tokens: padding on the left would move the prompt
    size = 1 if has_virtual_tokens(model) else args.batch_size
    started = time.perf_counter()
    answer = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size), tasks=[task], num_fewshot=args.num_fewshot,
        limit=args.limit, task_manager=args.manager, apply_chat_template=args.apply_chat_template,
        fewshot_as_multiturn=args.apply_chat_template and args.fewshot_as_multiturn != "false", bootstrap_iters=1000,
    )  # fmt: skip
    result.rows = [
        row for leaf, part in parts.items() for row in rows_of(leaf, part, answer["samples"][leaf], len(parts) > 1)
    ]
    unit = "share" if all(0 <= row["score"] <= 1 for row in result.rows) else "score"
    result.metrics = {"score": mean_metric([row["score"] for row in result.rows], unit)}
    result.metrics |= metrics_of(task, answer, len(result.rows))
    wordings = {leaf: {key: str(config.get(key)) for key in WORDING} for leaf, config in answer["configs"].items()}
    result.prompt_hash = text_hash(wordings, result.settings["chat"], result.settings["multiturn"])
    result.seconds = round(time.perf_counter() - started, 2)
    return result


def head_of(name: str, task: str, parts: Mapping[str, Any], args: Namespace) -> Result:
    """Return the result without rows: what is measured, and of which model."""
    versions = [str(part.VERSION) for part in parts.values()]
    numbers = [int(float(version)) for version in versions if version.replace(".", "", 1).isdigit()]
    form = {"num_fewshot": args.num_fewshot, "limit": args.limit, "chat": args.apply_chat_template}
    form |= {"multiturn": args.fewshot_as_multiturn, "task_versions": sorted(set(versions))}
    return Result(
        task=f"lm-eval/{task}",
        version=max(numbers, default=0),
        data=task,
        model=args.models[name],
        run=run_id(args.models[name]),
        prompt_hash="",
        settings=form | {"dtype": dtype_of(args), "load_in_4bit": args.load_in_4bit},
        rows=[],
        metrics={},
        versions=package_versions("lm_eval", "torch", "transformers", "peft"),
    )


def loaded(name: str, args: Namespace) -> tuple:
    """Return the model and its tokenizer; kept while its tasks are done one after the other."""
    if args.kept is None or args.kept[0] != name:
        args.kept = None  # the last one goes before the next one comes
        args.kept = (name, load(args.models[name], args))
    return args.kept[1]


def rows_of(leaf: str, task: Any, samples: list[dict], several: bool) -> list[dict]:
    """Return a row per document: its numbers by metric (and filter, where a task has several), and its score.

    The score is the first metric that is a number for one document, with its sign changed where lower is better.
    """
    better = task.higher_is_better()
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    rows: dict[Any, dict] = {}
    for sample in samples:
        row = rows.setdefault(sample["doc_id"], {"id": text_hash(leaf, sample["doc_hash"], sample["target_hash"])})
        for metric in sample["metrics"]:
            value, is_likelihood = single(sample[metric])
            if value is not None:
                row.setdefault("score", value if is_likelihood or better.get(metric, True) else -value)
                row[metric if len(filters) == 1 else f"{metric},{sample['filter']}"] = value
        if "score" not in row:
            raise InputError(
                f"the task {leaf} has no metric that is a number for one row ({', '.join(sample['metrics'])})",
                where="--tasks",
                why="models are compared row by row",
                fix="`lm-eval run` gives its aggregate alone",
            )
        row["answer"] = str(sample["target"])[:160]
        if several:
            row["task"] = leaf
    ids = unique_ids(row.pop("id") for row in rows.values())
    return [{"id": name, "score": row.pop("score"), **row} for name, row in zip(ids, rows.values(), strict=True)]


def single(value: Any) -> tuple[float | None, bool]:
    """Return a metric of one document as a number, None when it is none, and whether it is a log-likelihood.

    Perplexities hand on (log-likelihood, count): their ratio is higher where the perplexity is lower.
    """
    if isinstance(value, int | float):  # numpy's float64 and bool, too
        return float(value), False
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], float) and isinstance(value[1], int):
        return value[0] / value[1], True
    return None, False


def metrics_of(task: str, answer: Mapping[str, Any], rows: int) -> dict[str, dict]:
    """Return lm-eval's aggregates: those of the task or group itself first, of the parts of a group after a "/"."""
    found = {}
    for part in [task, *(part for part in answer["results"] if part != task)]:
        numbers = answer["results"].get(part, {})
        count = answer["n-samples"].get(part, {}).get("effective", rows)
        for key, value in numbers.items():
            metric, _, chosen = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or metric in ("sample_len", "name"):
                continue
            error = numbers.get(f"{metric}_stderr,{chosen}")
            label = metric if chosen == "none" else f"{metric} ({chosen})"
            found[label if part == task else f"{part}/{label}"] = {
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) else None,
                "n": count,
                "unit": "share" if metric.startswith(SHARES) else metric,
            }
    return found


def main() -> None:
    """Evaluate every model on every task, write the results and print a table for each task."""
    parser = make_parser(__doc__.split("\n")[0], data="")
    add = parser.add_argument
    add("--tasks", nargs="+", default=["village_choices"], help="names of lm-eval's tasks or groups [village_choices]")
    add("--include_path", help="a folder with task files of yours")
    add("--num_fewshot", type=int, help="examples in front of a question [what the task says, mostly 0]")
    add("--apply_chat_template", action="store_true", help="put prompts as conversations")
    add("--fewshot_as_multiturn", nargs="?", const="true", choices=("true", "false"), help="examples as turns [true]")
    args = read_arguments(parser)
    args.manager, args.kept = read_tasks(args), None
    files = args.files
    if len(args.tasks) > 1:
        files = {(name, task): beside(file, task, args) for name, file in files.items() for task in args.tasks}
    else:
        files = {(name, args.tasks[0]): file for name, file in files.items()}
    args.files = files
    from alignment.generation import process_state

    if process_state(args.use_cpu).num_processes > 1:
        raise InputError(
            "lm-eval with a model that is loaded already runs in one process",
            why="each process would do all the rows",
            fix="accelerate launch --num_processes 1 (a multi-GPU run: lm-eval's own command line)",
        )
    results = dict.fromkeys(files)
    for name in args.models:
        for task in args.tasks:
            results[name, task] = evaluate(name, task, args)
            keep(name, results[name, task], Namespace(files={name: files[name, task]}))
    for task in args.tasks:
        mine = {name: results[name, task] for name in args.models}
        show_all(mine, Namespace(data=task, files={name: files[name, task] for name in args.models}))


def beside(file: Path, task: str, args: Namespace) -> Path:
    """Return the result file of one of several tasks."""
    return check_free(file.with_suffix(f".{task}.json"), overwrite=args.overwrite or args.resume)


if __name__ == "__main__":
    main()
