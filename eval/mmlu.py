"""MMLU: multiple-choice questions with examples in front, scored by the likelihood of the four letters.

    accelerate launch eval/mmlu.py --model base=data/tiny/model outputs/sft
    accelerate launch eval/mmlu.py --model outputs/sft --data cais/mmlu --shots 5 --output outputs/mmlu.json
    accelerate launch eval/mmlu.py --model outputs/sft --data mine/mmlu --subjects anatomy law --apply_chat_template

Prompts, letters and means are those of lm-eval's `mmlu`, version 2; the examples of a subject are computed once.
--data: a folder of the original csv files, of parquet or JSON lines, or a hub id. eval/README.md has the rest.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from alignment.errors import InputError
from alignment.evaluation import choose_rows, dtype_of, keep, load, make_parser, read_arguments, show_all
from alignment.multiple_choice import GROUP_OF, LETTERS, Question, read_questions
from alignment.report import (
    Result,
    check_free,
    mean_metric,
    package_versions,
    pooled_metric,
    run_id,
    text_hash,
    unique_ids,
)
from alignment.wording import WORDINGS, Wording, read_wordings, wording_hash

TASK, VERSION = "mmlu", 2  # lm-eval's: the prompt or the aggregation of another version is another score
FEW = 10  # subjects that are shown without being asked for


def read(args: Namespace) -> tuple[list[Question], dict[str, list[Question]]]:
    """Return the questions to answer, and subject -> the examples to put in front of them."""
    found = read_questions(args.data, args.split, args.subjects)
    examples = read_questions(args.data, "dev", list(found)) if args.shots else {}
    return choose_rows([question for subject in found.values() for question in subject], args.limit), examples


def ids_of(questions: Sequence[Question]) -> list[str]:
    """Return the id of each question; "#2" is added to the second of two that are equal."""
    return unique_ids(question.id for question in questions)


def evaluate(name: str, wording: Wording, args: Namespace) -> Result:
    """Score one model with one wording; return its result, on every process alike."""
    from alignment.few_shot import Prompting, choose
    from alignment.journal import Journal

    prompting = Prompting(args.shots, args.apply_chat_template, args.fewshot_as_multiturn, wording)
    form = {"shots": args.shots, "chat": args.apply_chat_template, "multiturn": args.fewshot_as_multiturn}
    result = Result(
        task=TASK,
        version=VERSION,
        data=args.data,
        model=args.models[name],
        run=run_id(args.models[name]),
        prompt_hash=wording_hash(wording, form),
        settings=form | {"wording": wording.name, "split": args.split, "dtype": dtype_of(args)}
        | {"load_in_4bit": args.load_in_4bit},
        rows=[],
        metrics={},
        versions=package_versions("torch", "transformers", "peft", "accelerate"),
    )  # fmt: skip
    names, started = ids_of(args.questions), time.perf_counter()
    with Journal(result, names, file_of(name, wording, args), args.resume) as journal:
        todo = [(name, q) for name, q in zip(names, args.questions, strict=True) if name not in journal.done]

        def book(choices) -> None:
            journal.add(finished(*todo[number], choice) for number, choice in choices.items())

        if todo:
            model, tokenizer = loaded(name, args)
            label, started = name if len(args.wordings) == 1 else f"{name}, {wording.name}", time.perf_counter()
            choose(
                model, tokenizer, [question for _, question in todo], args.examples, prompting,
                batch_size=args.batch_size, made=book, label=label,
            )  # fmt: skip
        result.rows = journal.rows()
    result.metrics = summarise(result.rows)
    result.seconds = round(time.perf_counter() - started, 2)
    return result


def loaded(name: str, args: Namespace) -> tuple:
    """Return the model and its tokenizer; kept while its wordings are asked one after the other."""
    if args.kept is None or args.kept[0] != name:
        args.kept = None  # the last one goes before the next one comes
        args.kept = (name, load(args.models[name], args))
    return args.kept[1]


def finished(name: str, question: Question, choice) -> dict:
    """Return the row of the result file."""
    row = {"id": name, "score": float(choice.prediction == question.answer), "subject": question.subject}
    row |= {"prediction": LETTERS[choice.prediction], "answer": LETTERS[question.answer], "shots": choice.shots}
    row["log_likelihoods"] = [round(value, 8) for value in choice.log_likelihoods]
    if choice.cut:
        row["cut_tokens"] = choice.cut
    return row | {"prompt": question.question.strip()[:160]}


def summarise(rows: list[dict]) -> dict[str, dict]:
    """Return the accuracy over all questions, its mean over subjects, of lm-eval's groups, and of each subject.

    Accuracies of several subjects are weighted by size, with lm-eval's pooled standard error.
    """
    subjects: dict[str, list[float]] = {}
    for row in rows:
        subjects.setdefault(row["subject"], []).append(row["score"])
    found = {"accuracy": pooled_metric(list(subjects.values()))}
    each = {subject: mean_metric(scores) for subject, scores in sorted(subjects.items())}
    errors = [metric["stderr"] for metric in each.values()]
    error = None if None in errors else sum(e * e for e in errors) ** 0.5 / len(errors)
    mean = statistics.fmean(metric["value"] for metric in each.values())
    found["mean of subjects"] = {"value": mean, "stderr": error, "n": len(rows), "unit": "share"}
    for group in dict.fromkeys(GROUP_OF.values()):
        if inside := [scores for subject, scores in subjects.items() if GROUP_OF.get(subject) == group]:
            found[f"group/{group}"] = pooled_metric(inside)
    return found | {f"subject/{subject}": metric for subject, metric in each.items()}


def file_of(name: str, wording: Wording, args: Namespace):
    """Return the result file of a model and a wording."""
    file = args.files[name]
    return file if len(args.wordings) == 1 else file.with_suffix(f".{wording.name}.json")


def together(results: dict[str, Result]) -> Result:
    """Return one result of several wordings: a question's score is the share of wordings it was right in.

    Its rows have the score of each wording as a number of its own: `compare.py --column score/NAME`.
    """
    first = next(iter(results.values()))
    rows = []
    for several in zip(*(result.rows for result in results.values()), strict=True):
        scores = {f"score/{name}": row["score"] for name, row in zip(results, several, strict=True)}
        row = {key: several[0][key] for key in ("id", "subject", "answer", "prompt")}
        row["prediction"] = "".join(row["prediction"] for row in several)
        rows.append({"id": row.pop("id"), "score": statistics.fmean(scores.values()), **scores, **row})
    metrics = summarise(rows)
    values = [result.metrics["accuracy"]["value"] for result in results.values()]
    spread = {"lowest": min(values), "highest": max(values), "sd": statistics.stdev(values)}
    metrics |= {
        f"wordings/{name}": {"value": value, "stderr": None, "n": len(rows), "unit": "share"}
        for name, value in spread.items()
    }
    metrics |= {f"wording/{name}": result.metrics["accuracy"] for name, result in results.items()}
    return replace(
        first, rows=rows, metrics=metrics, seconds=round(sum(result.seconds for result in results.values()), 2),
        prompt_hash=text_hash([result.prompt_hash for result in results.values()]),
        settings=first.settings | {"wording": list(results)},
    )  # fmt: skip


def read_command_line() -> Namespace:
    """Return the command line with questions, examples and wordings read."""
    parser = make_parser(__doc__.split("\n")[0], data="data/tiny/choices")
    add = parser.add_argument
    add("--shots", "--num_fewshot", type=int, default=5, help="examples in front of a question (lm-eval: 0) [5]")
    add("--subjects", nargs="+", help="only these subjects")
    add("--split", default="test", choices=("test", "validation"), help="where the questions come from [test]")
    add("--prompt", default="lm_eval", choices=tuple(WORDINGS), help="lm-eval's words, or the authors' [lm_eval]")
    add("--prompts", help="a YAML list of wordings: each is asked, and their spread reported")
    add("--apply_chat_template", action="store_true", help="put the prompt as a conversation")
    add("--fewshot_as_multiturn", nargs="?", const="true", choices=("true", "false"), help="examples as turns [true]")
    add("--by_subject", action="store_true", help=f"show every subject (more than {FEW} are in the file only)")
    args = read_arguments(parser)
    if args.shots < 0:
        raise InputError(f"--shots is {args.shots}", where="the command line", fix="0 or more")
    if args.fewshot_as_multiturn and not args.apply_chat_template:
        raise InputError("--fewshot_as_multiturn without turns", fix="--apply_chat_template as well")
    args.fewshot_as_multiturn = args.apply_chat_template and args.fewshot_as_multiturn != "false"  # as lm-eval
    args.wordings = read_wordings(args.prompts) if args.prompts else {args.prompt: WORDINGS[args.prompt]}
    for name in args.models if args.prompts else []:
        for wording in args.wordings.values():
            check_free(file_of(name, wording, args), overwrite=args.overwrite or args.resume)
    args.questions, args.examples = read(args)
    args.kept = None
    return args


def main() -> None:
    """Evaluate every model on the same questions, write their results and print one table."""
    args, results = read_command_line(), {}
    asked = [{"id": question.id, "question": question.question} for question in args.questions]
    for name in args.models:
        several = {}
        for wording in args.wordings.values():
            several[wording.name] = evaluate(name, wording, args)
            keep(name, several[wording.name], replace_file(args, name, wording), asked)
        results[name] = next(iter(several.values()))
        if len(several) > 1:
            results[name] = together(several)
            keep(name, results[name], args, asked)
    shown = len({question.subject for question in args.questions}) <= FEW or args.by_subject
    show_all({name: result if shown else without_subjects(result) for name, result in results.items()}, args)


def without_subjects(result: Result) -> Result:
    """Return the result as the short table shows it."""
    return replace(result, metrics={k: m for k, m in result.metrics.items() if not k.startswith("subject/")})


def replace_file(args: Namespace, name: str, wording: Wording) -> Namespace:
    """Return the arguments with the result file of one wording."""
    return Namespace(**vars(args) | {"files": {name: file_of(name, wording, args)}})


if __name__ == "__main__":
    main()
