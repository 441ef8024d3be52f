"""GLUE: train a model on each task over several seeds, or take what was trained, or ask a language model; one table.

    python eval/glue.py --model data/tiny/model                            # two small tasks of our own, about a minute
    python eval/glue.py --model bert-base-uncased --data nyu-mll/glue --tasks cola rte --seeds 5
    python eval/glue.py --model roberta-base --data mine --train --peft lora --max_length 128
    python eval/glue.py --model mine=outputs/cola,outputs/rte --data mine
    python eval/glue.py --model data/tiny/model --prompted --shots 4

Each training is a launch of recipes/classify.py, whose folder stays in --runs; the checkpoint is loaded again and read
here. Dev rows go into the result file, one a task and seed; test rows into files of the official form.
"""

import os
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

from alignment.errors import InputError
from alignment.evaluation import choose_rows, dtype_of, keep, load, make_parser, read_arguments, show_contamination
from alignment.glue import HUB_ID, TASKS, Task, find_file, find_task, macro_average, part, question, submission
from alignment.launch import without
from alignment.report import Result, package_versions, read_run, run_id, text_hash, unique_ids, write_text

NAME, VERSION = "glue", 1  # raise the version when the same predictions would get another score
ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = {"sentences": "data/tiny/sentences", "sentence_pairs": "data/tiny/sentence_pairs"}
# How the stand-ins are asked; a label is the number of its word.
ASKED = {
    "sentences": Task(
        "sentences", "", ("", "", ""), ("", ""), ("0", "1"),
        prompt="{text}\nQuestion: Is this good or bad?\nAnswer:", words=("bad", "good"),
    ),
    "sentence_pairs": Task(
        "sentence_pairs", "", ("", "", ""), ("", ""), ("0", "1", "2"),
        prompt="{text}\nQuestion: {text_pair} True, False or Neither?\nAnswer:", words=("True", "Neither", "False"),
    ),
}  # fmt: skip


@dataclass
class Job:
    """One task with one seed: rows to be read, and where its checkpoint is or will be."""

    task: Task
    seed: int
    folder: Path
    source: str
    splits: dict[str, list[dict]] = field(default_factory=dict)

    @property
    def dev(self) -> list[dict]:
        """Return the rows that are scored."""
        return [row for name, rows in self.splits.items() if name.startswith("dev") for row in rows]


def read_splits(task: Task, source: str, limit: int | None) -> dict[str, list[dict]]:
    """Return split -> rows of everything but the training rows; dev rows with their "id"."""
    if task.name in EMBEDDED:
        from alignment.data import load_rows

        rows = [dict(row) | {"label": str(row["label"])} for row in load_rows(source, "sequence")]
        return {"dev": named(choose_rows(rows, limit), "dev", task)}
    found = {}
    for split, (file, *_) in task.splits.items():
        folder = Path(source)
        there = not folder.is_dir() or find_file(task, folder, split)
        if split == "train" or (split.startswith("test") and not there):
            continue
        rows = [row for _, row in part(task, source, split).read() if row.get("text") is not None]
        if split.startswith("dev") and not rows:
            raise InputError(f"the split {split} of {task.name} has no rows", where=f"{source}, {file}")
        found[split] = named(choose_rows(rows, limit), split, task) if split.startswith("dev") else rows
    return found


def named(rows: list[dict], split: str, task: Task) -> list[dict]:
    """Give each row an id of its own that survives another order of the file."""
    keys = (text_hash(row["text"], row.get("text_pair"), row["label"]) for row in rows)
    ids = unique_ids(f"{task.name}/{split}/{key}" for key in keys)
    return [row | {"id": name, "split": split} for row, name in zip(rows, ids, strict=True)]


def jobs_of(name: str, path: str, args: Namespace) -> list[Job]:
    """Return what is to be done for one model: checkpoints that are there already, or tasks times seeds."""
    if any(trained_on(read_run(one)) for one in path.split(",")):
        return [job_of_checkpoint(Path(one), args) for one in path.split(",")]
    jobs = []
    for word in args.tasks:
        task = ASKED[word] if word in EMBEDDED else find_task(word)
        if args.prompted and not task.prompt:
            print(f"{task.name} is a regression and cannot be asked with label words: left out")
            continue
        source = EMBEDDED.get(word, args.data)
        splits = read_splits(task, source, args.limit)
        for seed in range(args.seed, args.seed + (1 if args.prompted else args.seeds)):
            folder = Path(args.runs) / name / f"{task.name}-seed{seed}"
            jobs.append(Job(task, seed, folder, source, splits))
    return jobs


def trained_on(record: dict) -> str:
    """Return the task of a run of recipes/classify.py, or an empty string when the record is of no such run."""
    if not record or record["identity"]["form"] != "sequence":
        return ""
    task, data = (record["arguments"][key]["value"] for key in ("task", "data"))
    return task or next((word for word, place in EMBEDDED.items() if place in data), "")


def job_of_checkpoint(folder: Path, args: Namespace) -> Job:
    """Return the job of a checkpoint that is trained already."""
    record = read_run(folder)
    word = trained_on(record)
    if not word:
        raise InputError(
            f"{folder} is no checkpoint of recipes/classify.py on a task",
            where="--model",
            why="its run.json says which task it was trained on",
            fix="give all checkpoints of one model as name=folder,folder, or a model to train",
        )
    task = ASKED[word] if word in EMBEDDED else find_task(word)
    source = EMBEDDED.get(word, args.data)
    return Job(task, record["seed"], folder, source, read_splits(task, source, args.limit))


def command_of(job: Job, path: str, args: Namespace) -> list[str]:
    """Return the flags with which recipes/classify.py trains a job."""
    where = ["--data", job.source] + ([] if job.task.name in EMBEDDED else ["--task", job.task.name])
    flags = ["--model_name_or_path", path, *where, "--seed", str(job.seed), "--output_dir", str(job.folder)]
    return [*flags, *args.train]


def train(job: Job, path: str, args: Namespace) -> None:
    """Launch the recipe unless its folder holds this very run, finished.

    Raises:
        InputError: the recipe failed; its last words are in the message, all of them in a file beside its folder.
    """
    flags = command_of(job, path, args)
    before = read_run(job.folder) or {"status": "", "command": ""}
    words = without(shlex.split(before["command"]), ("--overwrite_output_dir",))
    if args.resume and before["status"] == "finished" and words[-len(flags) :] == flags:
        return
    again = args.overwrite or (args.resume and before["status"] != "finished")
    start = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *shlex.split(args.launch)]
    more = ["--overwrite_output_dir"] if again and job.folder.exists() else []
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            "there are several processes already",
            where="accelerate launch",
            why="each training is a launch of its own",
            fix="start this script with python; --launch gives a training its processes",
        )
    print(f"training: {job.task.name}, seed {job.seed} -> {job.folder}", flush=True)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    log = job.folder.with_name(f"{job.folder.name}.log")
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [*start, str(ROOT / "recipes" / "classify.py"), *more, *flags], stdout=file, stderr=file, check=False
        )
    if done.returncode:
        said = log.read_text(encoding="utf-8").partition("Traceback")[0].strip().splitlines()
        raise InputError(
            f"training {job.task.name} with seed {job.seed} ended with status {done.returncode}",
            where=shlex.join(["recipes/classify.py", *flags]),
            why="\n        ".join(said[-5:]),
            fix=f"all it said is in {log}; --resume goes on once the reason is gone",
        )


def read_checkpoint(job: Job, args: Namespace) -> dict[str, list[float]]:
    """Return split -> predictions of a trained checkpoint: class numbers, or scores of a regression."""
    from datasets import Dataset

    from alignment.classifier import predict
    from alignment.classifying import Encoder, reads_types
    from alignment.generation import process_state
    from alignment.labels import Labels
    from alignment.spans import Reading

    model, tokenizer = load(str(job.folder), args, head="sequence")
    reading = Reading(read_run(job.folder)["arguments"]["max_length"]["value"])
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    order = [names.index(name) for name in job.task.labels]  # numbers of the task's classes among the outputs
    found = {}
    for split, rows in job.splits.items():
        texts = {key: [row[key] for row in rows] for key in ("text", "text_pair") if key in rows[0]}
        batch = texts | {"label": ["0"] * len(rows), "source": [split] * len(rows), "row": list(range(len(rows)))}
        encode = Encoder(tokenizer, Labels("sequence", ["0", "1"]), reading, "cut", reads_types(model)).function()
        encoded = Dataset.from_dict(encode(batch))
        label = f"{job.task.name} {split}"
        scores = predict(model, tokenizer, encoded, process_state(args.use_cpu), args.batch_size, label)
        found[split] = scores[:, order].argmax(-1).tolist() if job.task.labels else scores[:, 0].tolist()
    return found


def ask(job: Job, loaded: tuple, args: Namespace) -> dict[str, list[float]]:
    """Return split -> predictions of a language model: the label word that is most likely after the prompt."""
    import numpy as np

    from alignment.scoring import choice_log_likelihoods

    model, tokenizer = loaded
    task, words = job.task, [f" {word}" for word in job.task.words]
    shots = ""
    if args.shots:
        rows = training_rows(job)
        chosen = np.random.default_rng(args.seed).permutation(len(rows))[: args.shots]
        solved = [question(task, rows[i]) + words[task.labels.index(str(rows[i]["label"]))] for i in chosen]
        shots = "\n\n".join([*solved, ""])
    found = {}
    for split, rows in job.splits.items():
        requests = [(shots + question(task, row), words) for row in rows]
        likely = choice_log_likelihoods(
            model, tokenizer, requests, batch_size=args.batch_size, label=f"{task.name} {split}"
        )
        found[split] = np.asarray(likely).argmax(-1).tolist()
    return found


def training_rows(job: Job) -> list[dict]:
    """Return the training rows, from which the solved examples are drawn."""
    if job.task.name in EMBEDDED:
        from alignment.data import load_rows

        return list(load_rows(f"{job.source}@train", "sequence"))
    return [row for _, row in part(job.task, job.source, "train").read() if row.get("text") is not None]


def book(job: Job, found: dict[str, list[float]]) -> list[dict]:
    """Return the rows of the result file; the score of a regression is the negative squared error."""
    rows = []
    for split in (name for name in job.splits if name.startswith("dev")):
        for row, guess in zip(job.splits[split], found[split], strict=True):
            label = row["label"]
            if job.task.labels:
                guess = job.task.labels[int(guess)]
            score = float(guess == label) if job.task.labels else -((guess - label) ** 2)
            kept = {"task": job.task.name, "split": split, "seed": job.seed}
            rows.append(
                {"id": f"{row['id']}/seed{job.seed}", "score": score, "prediction": guess, "label": label, **kept}
            )
    return rows


def submit(name: str, job: Job, found: dict[str, list[float]], args: Namespace) -> None:
    """Write the predictions for the test rows of a task in the official form."""
    folder = args.files[name].with_suffix("") / f"seed{job.seed}"
    for split in (name for name in job.splits if name.startswith("test")):
        rows = job.splits[split]
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / job.task.splits[split][2], submission(job.task, [r["index"] for r in rows], found[split]))


def evaluate(name: str, args: Namespace) -> Result:
    """Do every job of a model that is not done yet, and return its result."""
    from alignment.generation import process_state
    from alignment.journal import Journal

    path, began = args.models[name], time.perf_counter()
    jobs = jobs_of(name, path, args)
    if not jobs:
        raise InputError("no task is left to measure", where="--tasks", fix="a task with label words")
    settings = {"tasks": sorted({job.task.name for job in jobs}), "seeds": sorted({job.seed for job in jobs})}
    settings |= {"train": shlex.join(args.train), "prompted": args.prompted, "shots": args.shots}
    settings |= {"dtype": dtype_of(args), "load_in_4bit": args.load_in_4bit, "limit": args.limit}
    wording = {job.task.name: job.task.prompt for job in jobs} if args.prompted else "trained"
    result = Result(
        NAME, VERSION, args.data, path, run_id(path), text_hash(wording, args.shots), settings, [], {},
        package_versions("torch", "transformers", "peft", "accelerate"),
    )  # fmt: skip
    ids = [f"{row['id']}/seed{job.seed}" for job in jobs for row in job.dev]
    with Journal(result, ids, args.files[name], args.resume) as journal:
        todo = [job for job in jobs if any(f"{row['id']}/seed{job.seed}" not in journal.done for row in job.dev)]
        loaded = load(path, args) if args.prompted and todo else ()
        for job in todo:
            if args.prompted:
                found = ask(job, loaded, args)
            else:
                if "," not in path and job.folder != Path(path):
                    train(job, path, args)
                found = read_checkpoint(job, args)
            if process_state(args.use_cpu).is_main_process:
                submit(name, job, found, args)
                journal.add(book(job, found))
        result.rows = journal.rows()
    result.metrics = summarise(result.rows)
    if process_state(args.use_cpu).is_main_process:
        result.contamination = contamination_of(jobs, path, args)
    result.seconds = round(time.perf_counter() - began, 2)
    return result


def contamination_of(jobs: list[Job], path: str, args: Namespace) -> dict | None:
    """Look for the dev rows of each task in what its checkpoint was trained on, the runs it started from included."""
    from alignment.contamination import check, merge, question_of

    first = {job.task.name: job for job in reversed(jobs)}.values()
    return merge(
        [check(path if args.prompted else job.folder, {r["id"]: question_of(r) for r in job.dev}) for job in first]
    )


def summarise(rows: list[dict]) -> dict[str, dict]:
    """Return the official metrics of each task, a mean over seeds with its spread, and GLUE's average of them."""
    from alignment.metrics import metric

    found: dict[str, dict[int, float]] = {}
    average: dict[int, dict[str, dict[str, float]]] = {}
    for task, split, seed in dict.fromkeys((row["task"], row["split"], row["seed"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["split"], row["seed"]) == (task, split, seed)]
        known = TASKS.get(task) or ASKED[task]
        sides = [[known.labels.index(r[k]) if known.labels else r[k] for r in mine] for k in ("prediction", "label")]
        chosen = metric("glue", task) if task in TASKS else metric("accuracy")
        for key, value in chosen.compute(predictions=sides[0], references=sides[1]).items():
            shown = f"{task}{split.removeprefix('dev')}/{key}"
            found.setdefault(shown, {})[seed] = value
            average.setdefault(seed, {}).setdefault(task, {})[shown] = value
    whole = max(len(tasks) for tasks in average.values())
    found["average"] = {seed: macro_average(tasks) for seed, tasks in average.items() if len(tasks) == whole}
    return {name: over_seeds(list(values.values())) for name, values in found.items()}


def over_seeds(values: list[float]) -> dict:
    """Return mean, standard error and standard deviation over seeds; the last two are None for one seed."""
    import statistics

    spread = statistics.stdev(values) if len(values) > 1 else None
    error = None if spread is None else spread / len(values) ** 0.5
    return {
        "value": statistics.fmean(values), "stderr": error, "n": len(values), "unit": "share", "sd": spread,
        "values": values,
    }  # fmt: skip


def show(results: dict[str, Result], args: Namespace) -> None:
    """Print one table: a line for each task and metric, a column for each model, what is missing below."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    names = list(dict.fromkeys(key for result in results.values() for key in result.metrics if key != "average"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("task", "metric", "rows"):
        table.add_column(head, justify="right" if head == "rows" else "left")
    for model in results:
        table.add_column(model, justify="right", overflow="fold")
    first = next(iter(results.values()))
    for key in names:
        task, _, shown = key.partition("/")
        split = "dev-mm" if task == "mnli-mm" else "dev"
        some = [row for row in first.rows if (row["task"], row["split"]) == (task.removesuffix("-mm"), split)]
        rows = len({row["id"].rpartition("/")[0] for row in some})
        table.add_row(task, shown, f"{rows:,}", *(cell(result.metrics.get(key)) for result in results.values()))
    table.add_section()
    counted = {key.partition("/")[0].removesuffix("-mm") for key in names}
    title = "GLUE" if counted == set(TASKS) else f"average of {len(counted)}"
    table.add_row(title, "", "", *(cell(result.metrics["average"]) for result in results.values()))
    seeds = "; mean ± standard deviation over seeds" if args.seeds > 1 and not args.prompted else ""
    console.print(f"[bold]{args.data}[/bold]: in per cent{seeds}")
    console.print(table)
    missing = [name for name in TASKS if name not in counted]
    if missing and counted & set(TASKS):
        console.print(f"missing of GLUE's nine: {', '.join(missing)}; the average is no GLUE score")
    show_contamination(console, results)
    for name, file in args.files.items():
        folder = file.with_suffix("")
        more = f"; test predictions in {folder}" if folder.is_dir() else ""
        console.print(f"written: {file}{more}", soft_wrap=True)
        if name != next(iter(args.files)):
            console.print(f"next:    python eval/compare.py {args.files[next(iter(args.files))]} {file} --by task")


def cell(metric: dict | None) -> str:
    """Return "56.5 ± 1.2" in per cent; "-" when it was not measured."""
    if metric is None:
        return "-"
    return f"{100 * metric['value']:.1f}" + ("" if metric["sd"] is None else f" ± {100 * metric['sd']:.1f}")


def choose_tasks(args: Namespace) -> list[str]:
    """Return the tasks to measure: those asked for, else all whose files are there."""
    if args.data == "data/tiny":
        wrong = [word for word in args.tasks or [] if word not in EMBEDDED]
        if wrong:
            task = find_task(wrong[0])
            fix = f"--data {HUB_ID}, or the folder that holds {task.folder}/"
            raise InputError(f"the embedded rows are no {task.name}", where="--tasks", fix=fix)
        return args.tasks or list(EMBEDDED)
    if args.tasks:
        return [find_task(word).name for word in args.tasks]
    folder = Path(args.data)
    found = [name for name, task in TASKS.items() if not folder.is_dir() or (folder / task.folder).is_dir()]
    if not found:
        held = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
        fix = "the folder of the official download, with CoLA/, RTE/, …"
        raise InputError(f"{folder} holds no GLUE task", where="--data", why=f"it holds {held}", fix=fix)
    return found


def main() -> None:
    """Measure every model on the same tasks, write the results and print one table."""
    parser = make_parser(__doc__.split("\n")[0], data="data/tiny")
    add = parser.add_argument
    add("--tasks", nargs="+", help="cola sst2 mrpc stsb qqp mnli qnli rte wnli [all that are in --data]")
    add("--seeds", type=int, default=1, help="trainings of each task; small ones differ by points [1]")
    add("--seed", type=int, default=42, help="the first of them, and of the solved examples [42]")
    add(
        "--train",
        nargs="...",
        default=[],
        help="the last flag: all that follows is for recipes/classify.py (--train --peft lora --num_train_epochs 3)",
    )
    add("--launch", default="launch --num_cpu_threads_per_process 1", help="accelerate's words in front of the recipe")
    add("--runs", default="outputs/glue", help="where the trained checkpoints go [outputs/glue]")
    add("--prompted", action="store_true", help="train nothing: ask for the label word, with lm-eval's prompts")
    add("--shots", type=int, default=0, help="solved training rows in front of each question, with --prompted [0]")
    args = read_arguments(parser)
    if args.seeds < 1 or args.shots < 0 or (args.shots and not args.prompted):
        raise InputError("--seeds is 1 or more, --shots 0 or more and for --prompted only", where="the command line")
    args.tasks = choose_tasks(args)
    results = {}
    for name in args.models:
        results[name] = evaluate(name, args)
        keep(name, results[name], args)
    from alignment.generation import process_state

    if process_state().is_main_process:
        show(results, args)


if __name__ == "__main__":
    main()
