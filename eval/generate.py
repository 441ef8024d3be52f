"""Let models answer prompts and score the answers, each with the verifier its row names.

    accelerate launch eval/generate.py --model outputs/sft --data data/tiny/prompts --output outputs/sft.json
    accelerate launch eval/generate.py --model base=data/tiny/model outputs/sft outputs/dpo
    accelerate launch eval/generate.py --model Qwen/Qwen3-0.6B --task gsm8k --data openai/gsm8k:main --shots 5
    accelerate launch eval/generate.py --model Qwen/Qwen3-0.6B --data mine.jsonl --temperature 0.7 --num_samples 8

Rows: {"prompt", "answer", "verifier", "task"}, a conversation (its last answer is the reference), a question with its
answer, a prompt with its tests (code) or its instructions (IFEval). To score answers in another way, edit `score`.
eval/README.md says what the numbers mean.
"""

import time
from argparse import Namespace
from statistics import mean, stdev

from alignment.constraints import follows
from alignment.errors import InputError
from alignment.evaluation import choose_rows, keep, load, make_parser, new_result, read_arguments, show_all
from alignment.questions import BENCHMARKS, PLACE, Asking, choose_shots, examples_of, read_questions, read_wordings
from alignment.report import Result, mean_metric
from alignment.rewards import exact, last_number, squeeze, verifier
from alignment.text_metrics import (
    ROUGE,
    bleu,
    gsm8k_equal,
    gsm8k_flexible,
    gsm8k_strict,
    majority,
    need_packages,
    pass_at_k,
    rouge,
    token_f1,
)

VOTED = ("exact", "number", "contains", "f1", "gsm8k")  # verifiers of short answers, which can be the same
TASK, VERSION = "generate", 1  # raise the version when the same answers would get another score


def score(text: str, row: dict) -> dict[str, float]:
    """Return the numbers of one answer; "score" is what models are compared by."""
    found = {"score": verifier(row["verifier"])(text, row["answer"]), "exact": exact(text, row["answer"])}
    if row["verifier"] == "gsm8k":
        found["flexible"] = gsm8k_equal(gsm8k_flexible(text), row["answer"])
    if row["verifier"] == "ifeval":
        found["instructions"] = mean(follows(text, row["answer"]))
    return found


def vote(text: str, row: dict, flexible: bool = False) -> str | None:
    """Return what an answer votes for when the majority of several counts; None: nothing was extracted."""
    if row["verifier"] == "gsm8k":
        return gsm8k_flexible(text) if flexible else gsm8k_strict(text)
    if row["verifier"] == "number":
        number = last_number(text)
        return None if number is None else str(number.normalize())
    return squeeze(text)


def program(answer, row: dict) -> str:
    """Return the text that is scored: of a function to be completed, its beginning and the answer together."""
    begun = row.get("entry_point") and isinstance(row["prompt"], str) and f"def {row['entry_point']}" in row["prompt"]
    whole = "```" in answer.raw or f"def {row.get('entry_point')}" in answer.raw
    return row["prompt"] + answer.raw if begun and not whole else answer.text


def evaluate(name: str, rows: list[dict], args: Namespace) -> Result:
    """Load one model, let it answer, and return its result, on every process alike."""
    from alignment.generation import generate_answers
    from alignment.journal import Journal

    started = time.perf_counter()
    wording = {"system": args.system, "chat": args.chat} | args.asked_otherwise
    packages = need_packages(args.metrics)
    result = new_result(name, args, (TASK, VERSION), wording, args.settings, packages)

    with Journal(result, [row["id"] for row in rows], args.files[name], args.resume) as journal:
        todo = journal.todo(rows)
        each = len(args.asking) * args.num_samples  # answers to a row: wordings, and samples of each
        waiting: dict[int, dict] = {}

        def book(answers) -> None:
            for number, answer in answers.items():
                waiting.setdefault(number // each, {})[number % each] = answer
            ready = {number: waiting.pop(number) for number in list(waiting) if len(waiting[number]) == each}
            journal.add(finished(todo[n], [made[i] for i in range(each)], args) for n, made in ready.items())

        if todo:
            model, tokenizer = load(args.models[name], args)
            started = time.perf_counter()
            numbers = [number for number, row in enumerate(rows) if row["id"] not in journal.done]
            prompts = [ask(row["prompt"]) for row in todo for ask in args.asking for _ in range(args.num_samples)]
            # the first answer draws from the row's number, so that one sample is the first of many
            streams = [number + (i << 32) for number in numbers for i in range(each)]
            generate_answers(
                model, tokenizer, prompts, args.decoding, batch_size=args.batch_size, label=name, made=book,
                streams=streams, together=each,
            )  # fmt: skip
        result.rows = journal.rows()
    result.metrics = summarise(result.rows, args)
    result.seconds = round(time.perf_counter() - started, 2)
    return result


def finished(row: dict, answers: list, args: Namespace) -> dict:
    """Return the row of the result file; numbers are means over the answers, the first answers' wording first."""
    texts = [program(answer, row) for answer in answers]
    numbers = [score(text, row) for text in texts]
    made = {key: mean(float(found[key]) for found in numbers) for key in numbers[0]}
    n = args.num_samples
    groups = [slice(at, at + n) for at in range(0, len(texts), n)]  # one for each wording
    if len(groups) > 1:
        made["wordings"] = [mean(found["score"] for found in numbers[group]) for group in groups]
    if n > 1:
        if row["verifier"] in VOTED:
            made["majority"] = mean(elect(texts[group], numbers[group], row) for group in groups)
        if "flexible" in made:
            made["flexible majority"] = mean(elect(texts[group], numbers[group], row, True) for group in groups)
        right = [sum(found["score"] == 1 for found in numbers[group]) for group in groups]
        made |= {f"pass@{k}": mean(pass_at_k(n, c, k) for c in right) for k in args.pass_at}
        if args.majority:
            made["score"] = made["majority"]
    if "f1" in args.metrics:
        made["f1"] = mean(token_f1(text, row["answer"]) for text in texts)
    if "rouge" in args.metrics:
        found = rouge(texts, [row["answer"]] * len(texts))
        made |= {key: mean(one[key] for one in found) for key in ROUGE}
    made["stopped"] = answers[0].stopped if len(answers) == 1 else mean(answer.stopped for answer in answers)
    made["tokens"] = answers[0].tokens if len(answers) == 1 else mean(answer.tokens for answer in answers)
    made |= {"text": answers[0].text} if len(answers) == 1 else {"texts": [answer.text for answer in answers]}
    turns = row["prompt"] if isinstance(row["prompt"], list) else []
    whole = {"turns": turns} if len(turns) > 1 else {}  # what a judge has to read
    last = turns[-1]["content"] if turns else row["prompt"]
    return {"id": row["id"], **made, **row, "prompt": last, **whole}


def elect(texts: list[str], numbers: list[dict], row: dict, flexible: bool = False) -> float:
    """Return the score of the answer that most samples gave (self-consistency); 0 when none can be extracted."""
    votes = [vote(text, row, flexible) for text in texts]
    winner = majority(votes)
    return 0.0 if winner is None else numbers[votes.index(winner)]["flexible" if flexible else "score"]


def summarise(rows: list[dict], args: Namespace) -> dict[str, dict]:
    """Return the means over all rows, the spread over wordings, and the score of each task when there are several."""
    names = ["score", "flexible", "instructions", "majority", "flexible majority"]
    names += [f"pass@{k}" for k in args.pass_at] + ["exact", "f1", *ROUGE, "stopped"]
    found = {
        key: mean_metric([float(row[key]) for row in rows if key in row])
        for key in names
        if any(key in row for row in rows)
    }
    found["answer length"] = mean_metric([row["tokens"] for row in rows], unit="tokens")
    if "bleu" in args.metrics:
        pairs = [(text, row["answer"]) for row in rows for text in row.get("texts", [row.get("text")])]
        found["BLEU"] = bleu(*zip(*pairs, strict=True))
    if len(args.asking) > 1:
        each = {name: mean_metric([row["wordings"][i] for row in rows]) for i, name in enumerate(args.wordings)}
        means = [metric["value"] for metric in each.values()]
        spread = {"lowest": min(means), "highest": max(means), "sd": stdev(means)}
        found |= {
            f"wordings/{key}": {"value": value, "stderr": None, "n": len(means), "unit": "share"}
            for key, value in spread.items()
        }
        found |= {f"wordings/{name}": metric for name, metric in each.items()}
    tasks = sorted({row["task"] for row in rows if row["task"]})
    for task in tasks if len(tasks) > 1 else []:
        found[f"score/{task}"] = mean_metric([row["score"] for row in rows if row["task"] == task])
    return found


def settle(args: Namespace) -> list[dict]:
    """Return the rows, and add to the arguments how they are asked and decoded."""
    from alignment.generation import Decoding

    known = BENCHMARKS.get(args.task)
    check_samples(args)
    need_packages(args.metrics)
    plain = known is not None and not args.chat
    longest = args.max_new_tokens if args.max_new_tokens is not None else known.max_new_tokens if known else 128
    strings = args.stop_strings if args.stop_strings is not None else list(known.stop_strings) if plain else []
    args.decoding = Decoding(
        longest, args.temperature, args.top_k, args.top_p, args.num_beams, args.seed, tuple(strings)
    )
    check = args.verifier or (known.verifier if known else "exact")
    rows = choose_rows(read_questions(args.data, check), args.limit)
    if args.majority and (other := next((row for row in rows if row["verifier"] not in VOTED), None)):
        raise InputError(
            f"the verifier {other['verifier']!r} has no majority",
            where=f"--majority, {other['source']}, row {other['row']}",
            why="long answers are hardly ever the same twice",
            fix="leave --majority out: the mean and pass@k are reported",
        )
    shots = choose_shots(args.fewshot_data or examples_of(args.data), check, args.shots, rows) if args.shots else []
    args.wordings = read_wordings(args.prompts) if args.prompts else {"own": known.wording if known else PLACE}
    args.asking = [Asking(word, tuple(shots), args.system, args.chat, plain) for word in args.wordings.values()]
    own = {"wordings": list(args.wordings.values())} if args.wordings != {"own": PLACE} else {}
    args.asked_otherwise = own | ({"shots": shots} if shots else {}) | ({"plain": True} if plain else {})
    args.settings = {k: v for k, v in vars(args.decoding).items() if k != "stop_strings"}
    extra = {"stop_strings": strings, "num_samples": args.num_samples, "majority": args.majority, "shots": args.shots}
    args.settings |= {k: v for k, v in extra.items() if v and (k, v) != ("num_samples", 1)}
    args.settings |= {"metrics": args.metrics} if args.metrics else {}
    args.settings |= {"pass_at": args.pass_at} if args.num_samples > 1 else {}
    return rows


def check_samples(args: Namespace) -> None:
    """Raise InputError when several samples are asked for that cannot differ, or measures that need more of them."""
    if args.num_samples < 1 or args.shots < 0:
        raise InputError(
            f"--num_samples {args.num_samples}, --shots {args.shots}", fix="1 or more samples, 0 or more shots"
        )
    if args.num_samples > 1 and args.temperature == 0:
        raise InputError(
            f"{args.num_samples} samples at temperature 0",
            where="--num_samples",
            why="greedy answers to the same prompt are all the same",
            fix="--temperature 0.7",
        )
    if args.majority and args.num_samples < 2:
        raise InputError("a majority of one answer", where="--majority", fix="--num_samples 8 --temperature 0.7")
    if min(args.pass_at) < 1:
        raise InputError(f"pass@{min(args.pass_at)}", where="--pass_at", fix="1 or more")
    pass_at_k(args.num_samples, 0, max(args.pass_at))


def main() -> None:
    """Evaluate every model on the same rows, write their results and print one table."""
    parser = make_parser(__doc__.split("\n")[0], data="data/tiny/prompts")
    add = parser.add_argument
    add("--task", choices=list(BENCHMARKS), help="lm-eval's wording, verifier and ends of answers of a benchmark")
    add("--verifier", help="for rows that name none: exact, number, contains, f1, code, … [exact]")
    add("--metrics", nargs="+", default=[], choices=("f1", "bleu", "rouge"), help="also compare with the reference so")
    add("--system", default="", help="a system message in front of every conversation that has none")
    add("--chat", action="store_true", help="ask prompts that are plain text as a user's turn")
    add("--shots", type=int, default=0, help="this many worked examples in front of each question [0]")
    add("--fewshot_data", help="where the examples come from [the training split of --data]")
    add("--prompts", help="a YAML list of wordings with {prompt}: each is asked, the spread is reported")
    add("--num_samples", type=int, default=1, help="answers to each prompt, sampled [1]")
    add("--majority", action="store_true", help="score the answer that most samples gave, not their mean")
    add("--pass_at", nargs="+", type=int, default=[1], help="k of pass@k, with several samples [1]")
    add("--stop_strings", nargs="*", help="an answer ends before the first of these")
    add("--max_new_tokens", type=int, help="answers are cut there [128, or the task's]")
    add("--temperature", type=float, default=0.0, help="0: greedy; above: sampled [0]")
    add("--top_k", type=int, default=0, help="sample from the k most likely tokens; 0: all [0]")
    add("--top_p", type=float, default=1.0, help="sample from the fewest tokens with this probability [1]")
    add("--num_beams", type=int, default=1, help="above 1: beam search [1]")
    add("--seed", type=int, default=0, help="of the sampling [0]")
    args = read_arguments(parser)
    rows = settle(args)
    results = {}
    for name in args.models:
        results[name] = evaluate(name, rows, args)
        keep(name, results[name], args, rows)
    show_all(results, args)


if __name__ == "__main__":
    main()
