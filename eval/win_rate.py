"""How often are the answers of one model preferred to those of another? A reward model or a language model judges.

    accelerate launch eval/win_rate.py --baseline a/sft.json --model a/dpo.json --judge outputs/reward
    accelerate launch eval/win_rate.py --baseline outputs/sft --model outputs/dpo outputs/ppo --judge outputs/reward
    accelerate launch eval/win_rate.py --baseline a/sft.json --model a/dpo.json --judge Qwen/Qwen3-8B --batch_size 8

Baseline and models are result files of eval/generate.py (no answer is made twice), or checkpoints that answer --data
greedily first. eval/README.md says what the numbers mean.
"""

import textwrap
from argparse import Namespace
from pathlib import Path

from alignment.compare import join, mcnemar, p_text
from alignment.errors import InputError
from alignment.evaluation import (
    choose_rows,
    dtype_of,
    keep,
    load,
    make_parser,
    measure_rows,
    name_models,
    new_result,
    read_arguments,
    show_all,
)
from alignment.report import Result, mean_metric, read_result, run_id, text_hash
from alignment.rewards import last_text

TASK, VERSION = "win_rate", 1


def answers_of(name: str, path: str, args: Namespace) -> list[dict]:
    """Return {id, turns, text} of each row: from a result file of generate.py, or by asking a checkpoint."""
    if path.endswith(".json"):
        return read_answers(path)
    from alignment.generation import Decoding, generate_answers
    from alignment.journal import Journal
    from alignment.questions import Asking, read_questions

    rows = choose_rows(read_questions(args.data, "exact", unanswered=True), args.limit)
    asked = Namespace(**vars(args) | {"models": {name: path}})
    head = new_result(name, asked, ("answers", VERSION), "chat", {"max_new_tokens": args.max_new_tokens})
    with Journal(head, [row["id"] for row in rows], answers_file(name, args), args.resume) as journal:
        todo = journal.todo(rows)
        prompts = [Asking(chat=True)(row["prompt"]) for row in todo]

        def book(answers) -> None:
            made = ((todo[n]["id"], prompts[n], answer.text) for n, answer in answers.items())
            journal.add({"id": row, "turns": turns, "text": text} for row, turns, text in made)

        if todo:
            decoding = Decoding(args.max_new_tokens)
            generate_answers(*load(path, args), prompts, decoding, batch_size=args.batch_size, label=name, made=book)
        return journal.rows()


def answers_file(name: str, args: Namespace) -> Path:
    """Return the file beside which the answers of a checkpoint are kept until they are judged."""
    return next(iter(args.files.values())).with_name(f"answers-{name.replace('/', '_')}.json")


def read_answers(path: str) -> list[dict]:
    """Return {id, turns, text} of each row of a result file."""
    result = read_result(path)
    if not result.rows:
        raise InputError(f"{path} holds no rows", why="there is nothing to judge")
    for row in result.rows:
        missing = [key for key in ("prompt", "text") if not isinstance(row.get(key), str)]
        if result.task != "generate" or missing:
            raise InputError(
                f"{path} holds no single answer to a prompt per row" + (f" (no {missing[0]!r})" if missing else ""),
                where=f"task {result.task}, row {row['id']}, columns {', '.join(row)}",
                why="two answers to the same prompt are judged",
                fix="a result file of eval/generate.py, with one wording and one sample",
            )
    own = [row.get("turns") or [{"role": "user", "content": row["prompt"]}] for row in result.rows]
    return [{"id": row["id"], "turns": turns, "text": row["text"]} for row, turns in zip(result.rows, own, strict=True)]


def make_judge(args: Namespace):
    """Return (a function of contests that gives their verdicts, the judge's tokenizer, the kind of judge)."""
    from alignment.generation import process_state
    from alignment.heads import head_of
    from alignment.judging import judge_by_model, judge_by_reward, read_judge_prompt
    from alignment.rewarding import RewardModel, check_scores

    if head_of(args.judge) == "sequence":
        check_scores(args.judge, "--judge")
        options = {"load_in_4bit": args.load_in_4bit, "trust_remote_code": args.trust_remote_code}
        reward = RewardModel(args.judge, args.batch_size, dtype_of(args), **options)
        reward.to(process_state(args.use_cpu).device)
        return lambda contests: judge_by_reward(reward, contests, args.margin), reward.tokenizer, "reward model"
    wording = read_judge_prompt(args.judge_prompt)
    model, tokenizer = load(args.judge, args)
    return (
        lambda contests: judge_by_model(model, tokenizer, contests, wording, args.batch_size),
        tokenizer,
        "language model",
    )


def evaluate(name: str, baseline: list[dict], args: Namespace, judge: tuple) -> Result:
    """Let the judge compare one model with the baseline, and return its result, on every process alike."""
    from alignment.judging import Contest, read_judge_prompt

    decide, tokenizer, kind = judge
    pairs = join(baseline, answers_of(name, args.models[name], args), names=(args.baseline_name, name))
    wording = read_judge_prompt(args.judge_prompt) if kind == "language model" else ""
    settings = {"baseline": args.baseline, "judge": args.judge, "kind": kind, "judge_run": run_id(args.judge)}
    # --resume must not mix the answers of two runs
    settings |= {"margin": args.margin, "answers": text_hash([(a["text"], b["text"]) for a, b in pairs])}
    result = new_result(name, args, (TASK, VERSION), {"judge": args.judge, "wording": wording}, settings)

    def measure(some: list[dict]) -> tuple[list[dict], int]:
        contests = [Contest(row["turns"], row["baseline_text"], row["text"]) for row in some]
        lengths = [[len(tokenizer(row[key])["input_ids"]) for key in ("text", "baseline_text")] for row in some]
        made = [finished(*three) for three in zip(some, decide(contests), lengths, strict=True)]
        return made, sum(map(sum, lengths))

    rows = [{"id": a["id"], "turns": a["turns"], "text": b["text"], "baseline_text": a["text"]} for a, b in pairs]
    measure_rows(result, rows, measure, args, name)
    result.metrics = summarise(result.rows)
    return result


def finished(row: dict, verdict: dict, lengths: list[int]) -> dict:
    """Return the row of the result file."""
    found = {"id": row["id"], **verdict, "tokens": lengths[0], "baseline_tokens": lengths[1]}
    texts = {"text": row["text"], "baseline_text": row["baseline_text"]}
    return found | {"prompt": last_text(row["turns"])} | texts


def summarise(rows: list[dict]) -> dict[str, dict]:
    """Return the win rate with its interval, the same at equal lengths, ties, and what length and order decide."""
    from alignment.judging import controlled_win_rate, wilson

    scores = [row["score"] for row in rows]
    longer = [row["tokens"] - row["baseline_tokens"] for row in rows]
    low, high = wilson(scores)
    counts = {"wins": scores.count(1.0), "losses": scores.count(0.0), "ties": scores.count(0.5)}
    sign_test = {"p": mcnemar(counts["wins"], counts["losses"])}
    found = {"win rate": mean_metric(scores) | {"low": low, "high": high} | counts | sign_test}
    if (controlled := controlled_win_rate(scores, longer)) is not None:
        found["win rate at equal length"] = controlled
    found["ties"] = mean_metric([float(score == 0.5) for score in scores])
    decided = [s if d > 0 else 1 - s for s, d in zip(scores, longer, strict=True) if d and s != 0.5]
    if decided:
        found["the longer wins"] = mean_metric(decided)
    found["length difference"] = mean_metric(longer, unit="tokens")
    if "flipped" in rows[0]:
        found["flipped with the order"] = mean_metric([row["flipped"] for row in rows])
        found["the first wins"] = mean_metric([row["first"] / 2 for row in rows])
    return found


def say(name: str, result: Result, baseline: str) -> str:
    """Return the result in a sentence."""
    rate = result.metrics["win rate"]
    flips = result.metrics.get("flipped with the order")
    if flips and flips["value"] > 0.5:
        return (
            f"{name} against {baseline}: this judge cannot tell. {flips['value']:.0%} of its verdicts change with the "
            "order of the answers, and count as ties."
        )
    equal = "" if "win rate at equal length" in result.metrics else " Too few answers of like length to compare those."
    return (
        f"{name} wins {rate['wins']:,}, ties {rate['ties']:,}, loses {rate['losses']:,} of {rate['n']:,} against "
        f"{baseline}: {rate['value']:.1%} (95 % interval {rate['low']:.1%} to {rate['high']:.1%}; sign test "
        f"{p_text(rate['p'])}).{equal}"
    )


def main() -> None:
    """Let the judge compare every model with the baseline, write the results and print one table."""
    parser = make_parser(__doc__.split("\n")[0], data="data/tiny/prompts", output="outputs/eval/win_rate")
    add = parser.add_argument
    add("--baseline", required=True, help="what the models are compared with: a result file, a checkpoint, a hub id")
    add("--judge", required=True, help="a reward model, or a language model that says which answer is better")
    add("--margin", type=float, default=0.0, help="rewards that differ by this or less tie [0]")
    add("--judge_prompt", help="a text file with {question}, {first} and {second} for a language model as judge")
    add("--max_new_tokens", type=int, default=128, help="answers of checkpoints are cut there [128]")
    args = read_arguments(parser)
    ((args.baseline_name, args.baseline),) = name_models([args.baseline]).items()
    for path in (args.baseline, *args.models.values()):
        if path.endswith(".json") and not Path(path).is_file():
            read_result(path)
    if args.baseline.endswith(".json"):
        args.data = read_result(args.baseline).data
    if args.margin < 0:
        raise InputError(f"--margin is {args.margin}", fix="0 or more")
    judge = make_judge(args)
    baseline = answers_of(args.baseline_name, args.baseline, args)
    results = {}
    for name in args.models:
        results[name] = evaluate(name, baseline, args, judge)
        keep(name, results[name], args)
    from alignment.generation import process_state
    from alignment.journal import drop_parts

    show_all(results, args)
    if process_state().is_main_process:
        for name in (args.baseline_name, *args.models):
            drop_parts(answers_file(name, args))
        for name, result in results.items():
            print(textwrap.fill("- " + say(name, result, args.baseline_name), 100, subsequent_indent="  "))


if __name__ == "__main__":
    main()
