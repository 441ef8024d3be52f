"""Let models answer prompts and score the answers, each with the verifier its row names.

    accelerate launch eval/generate.py --model outputs/sft --data data/tiny/prompts --output outputs/sft.json
    accelerate launch eval/generate.py --model base=data/tiny/model outputs/sft outputs/dpo
    accelerate launch eval/generate.py --model Qwen/Qwen3-0.6B --data mine.jsonl --temperature 0.7 --top_p 0.9

Rows: {"prompt", "answer", "verifier", "task"}, a conversation (its last answer is the reference), a question
with its answer. To score answers in another way, edit `score`. eval/README.md says what the numbers mean.
"""

import time
from argparse import Namespace

from alignment.errors import InputError
from alignment.evaluation import choose_rows, dtype_of, keep, load, make_parser, read_arguments, show_all
from alignment.report import Result, mean_metric, package_versions, run_id, text_hash
from alignment.rewards import exact, verifier

TASK, VERSION = "generate", 1  # raise the version when the same answers would get another score


def score(text: str, row: dict) -> dict[str, float]:
    """Return the numbers of one answer; "score" is what models are compared by."""
    return {"score": verifier(row["verifier"])(text, row["answer"]), "exact": exact(text, row["answer"])}


def ask(prompt: str | list[dict], args: Namespace) -> str | list[dict]:
    """Return a row's prompt as it is put to the model."""
    if isinstance(prompt, str):
        if not args.chat:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if args.system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": args.system}, *prompt]
    return prompt


def read_rows(args: Namespace) -> list[dict]:
    """Return the rows as {id, prompt, answer, verifier, task, source, row}, checked."""
    from alignment.data import load_rows

    data = load_rows(args.data, "prompt")
    if "answer" not in data.column_names:
        raise InputError(
            "the rows have no reference answer",
            where=f"{args.data}, columns {', '.join(data.column_names)}",
            why="an answer is right or wrong only against one",
            fix='add a column "answer" (and "verifier"), or end conversations with the assistant\'s turn',
        )
    rows, seen = [], {}
    for raw in data:
        where = f"{raw['source']}, row {raw['row']}"
        if not isinstance(raw["answer"], str | int | float):
            raise InputError(f"the answer is {raw['answer']!r}", where=where, fix="text or a number")
        row = {k: raw.get(k) for k in ("prompt", "task", "source", "row")}
        row |= {"answer": str(raw["answer"]), "verifier": raw.get("verifier") or args.verifier}
        verifier(row["verifier"], where=f"{where}, column verifier")
        row["id"] = text_hash(row["prompt"], row["answer"], row["verifier"])
        seen[row["id"]] = seen.get(row["id"], 0) + 1
        if seen[row["id"]] > 1:  # the same row once more
            row["id"] += f"#{seen[row['id']]}"
        rows.append(row)
    return choose_rows(rows, args.limit)


def evaluate(name: str, rows: list[dict], args: Namespace) -> Result:
    """Load one model, let it answer, and return its result, on every process alike."""
    from alignment.generation import generate_answers
    from alignment.journal import Journal

    started = time.perf_counter()
    result = Result(
        task=TASK,
        version=VERSION,
        data=args.data,
        model=args.models[name],
        run=run_id(args.models[name]),
        prompt_hash=text_hash({"system": args.system, "chat": args.chat}),
        settings=vars(args.decoding) | {"dtype": dtype_of(args), "load_in_4bit": args.load_in_4bit},
        rows=[],
        metrics={},
        versions=package_versions("torch", "transformers", "peft", "accelerate"),
    )

    with Journal(result, [row["id"] for row in rows], args.files[name], args.resume) as journal:
        todo = journal.todo(rows)

        def book(answers) -> None:
            journal.add(finished(todo[number], answer) for number, answer in answers.items())

        if todo:
            model, tokenizer = load(args.models[name], args)
            started = time.perf_counter()
            prompts = [ask(row["prompt"], args) for row in todo]
            streams = [number for number, row in enumerate(rows) if row["id"] not in journal.done]
            generate_answers(
                model, tokenizer, prompts, args.decoding, batch_size=args.batch_size, label=name, made=book,
                streams=streams,
            )  # fmt: skip
        result.rows = journal.rows()
    result.metrics = summarise(result.rows)
    result.seconds = round(time.perf_counter() - started, 2)
    return result


def finished(row: dict, answer) -> dict:
    """Return the row of the result file."""
    last = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    made = {"stopped": answer.stopped, "tokens": answer.tokens, "text": answer.text}
    return {"id": row["id"], **score(answer.text, row), **made, **row, "prompt": last}


def summarise(rows: list[dict]) -> dict[str, dict]:
    """Return the means over all rows, and the score of each task when there are several."""
    found = {key: mean_metric([float(row[key]) for row in rows]) for key in ("score", "exact", "stopped")}
    found["answer length"] = mean_metric([row["tokens"] for row in rows], unit="tokens")
    tasks = sorted({row["task"] for row in rows if row["task"]})
    for task in tasks if len(tasks) > 1 else []:
        found[f"score/{task}"] = mean_metric([row["score"] for row in rows if row["task"] == task])
    return found


def main() -> None:
    """Evaluate every model on the same rows, write their results and print one table."""
    parser = make_parser(__doc__.split("\n")[0], data="data/tiny/prompts")
    add = parser.add_argument
    add(
        "--verifier",
        default="exact",
        help="for rows that name none: exact, number, contains or regex [exact]",
    )
    add("--system", default="", help="a system message in front of every conversation that has none")
    add("--chat", action="store_true", help="ask prompts that are plain text as a user's turn")
    add("--max_new_tokens", type=int, default=128, help="answers are cut there [128]")
    add("--temperature", type=float, default=0.0, help="0: greedy; above: sampled [0]")
    add("--top_k", type=int, default=0, help="sample from the k most likely tokens; 0: all [0]")
    add("--top_p", type=float, default=1.0, help="sample from the fewest tokens with this probability [1]")
    add("--num_beams", type=int, default=1, help="above 1: beam search [1]")
    add("--seed", type=int, default=0, help="of the sampling [0]")
    args = read_arguments(parser)
    from alignment.contamination import question_of
    from alignment.generation import Decoding

    args.decoding = Decoding(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.num_beams, args.seed)
    rows = read_rows(args)
    results = {}
    for name in args.models:
        results[name] = evaluate(name, rows, args)
        keep(name, results[name], args, {row["id"]: question_of(row) for row in rows})
    show_all(results, args)


if __name__ == "__main__":
    main()
