"""Measure what texts cost a model: perplexity per token and per word, bits per byte, in sliding windows.

    accelerate launch eval/perplexity.py --model data/tiny/model --data data/tiny/text
    accelerate launch eval/perplexity.py --model base=data/tiny/model outputs/sft --data book.txt --stride 256
    accelerate launch eval/perplexity.py --model Qwen/Qwen3-0.6B --data mine.jsonl --max_length 4096

Rows: {"text"}, or .txt files, each one text. Models that cut a text into other tokens are compared by word and by
byte only. eval/README.md says what the numbers mean.
"""

import math
import re
from argparse import Namespace
from pathlib import Path

from alignment.errors import InputError
from alignment.evaluation import (
    choose_rows,
    keep,
    load,
    make_parser,
    measure_rows,
    new_result,
    read_arguments,
    show_all,
)
from alignment.report import Result, ratio_metric, text_hash, unique_ids

TASK, VERSION = "perplexity", 1
LONGEST = 2048  # tokens read together, unless --max_length says otherwise
PER_TOKEN = "perplexity per token"


def read_texts(args: Namespace) -> list[dict]:
    """Return the rows as {id, text, words, bytes}; words are runs without white space, as lm-eval counts them."""
    path = Path(args.data).expanduser()
    if path.suffix == ".txt" and path.is_file():
        texts = [path.read_text(encoding="utf-8")]
    else:
        from alignment.data import load_rows

        data = load_rows(args.data, "sft")
        if "text" not in data.column_names:
            raise InputError(
                "the rows are no plain texts",
                where=f"{args.data}, columns {', '.join(data.column_names)}",
                why="perplexity is that of running text",
                fix='a column "text", or a .txt file',
            )
        texts = list(data["text"])
    if not all(text.strip() for text in texts):
        raise InputError("a text is empty", where=args.data, why="it has no bytes to pay for")
    rows = []
    for name, text in zip(unique_ids(map(text_hash, texts)), texts, strict=True):
        rows.append({"id": name, "text": text, "words": len(re.split(r"\s+", text)), "bytes": len(text.encode())})
    return choose_rows(rows, args.limit)


def check_windows(size: int, stride: int) -> None:
    """Raise InputError when windows of `size` tokens every `stride` tokens would leave tokens out."""
    if size < 2 or not 1 <= stride < size:
        raise InputError(
            f"windows of {size} tokens with a stride of {stride}",
            where="--max_length, --stride",
            why="a window has to begin before the end of the last one, or tokens between them are never predicted",
            fix=f"--stride {max(1, size // 2)}" if size >= 2 else "--max_length 2 or more",
        )


def window_of(model, args: Namespace) -> tuple[int, int]:
    """Return (tokens read together, tokens from one window to the next)."""
    from alignment.likelihood import room_for_text

    room = room_for_text(model)
    size = min(room or LONGEST, LONGEST) if args.max_length is None else args.max_length
    if room and size > room:
        raise InputError(
            f"windows of {size:,} tokens exceed the model's {room:,} positions", where="--max_length", fix=f"{room}"
        )
    stride = max(1, size // 2) if args.stride is None else args.stride
    check_windows(size, stride)
    return size, stride


def evaluate(name: str, rows: list[dict], args: Namespace) -> Result:
    """Load one model, let it read, and return its result, on every process alike."""
    from alignment.likelihood import log_likelihoods, sliding_windows, with_prefix
    from alignment.templates import ChatEncoder

    model, tokenizer = load(args.models[name], args)
    encoder = ChatEncoder(tokenizer)
    size, stride = window_of(model, args)
    settings = {"max_length": size, "stride": stride, "vocabulary": text_hash(tokenizer.get_vocab())}
    result = new_result(name, args, (TASK, VERSION), "one BOS, else EOS, before each text", settings)

    def measure(some: list[dict]) -> tuple[list[dict], int]:
        ids = [with_prefix(encoder.encode_text(row["text"]), tokenizer) for row in some]
        parts = [list(sliding_windows(one, size, stride)) for one in ids]
        windows = [window for part in parts for window in part]
        found = iter(log_likelihoods(model, windows, tokenizer.pad_token_id, args.batch_size))
        sums = [math.fsum(next(found) for _ in part) for part in parts]
        tokens = [len(one) - 1 for one in ids]
        return list(map(finished, some, sums, tokens)), sum(tokens)

    measure_rows(result, rows, measure, args, name)
    result.metrics = summarise(result.rows)
    return result


def finished(row: dict, log_likelihood: float, tokens: int) -> dict:
    """Return the row of the result file; its score is minus the bits per byte, so that higher is better."""
    bits = -log_likelihood / math.log(2) / row["bytes"]
    made = {"log_likelihood": log_likelihood, "tokens": tokens, "words": row["words"], "bytes": row["bytes"]}
    return {"id": row["id"], "score": -bits, **made, "text": row["text"][:80]}


def summarise(rows: list[dict]) -> dict[str, dict]:
    """Return the three measures over all texts together: sums are divided, as lm-eval does, not means of means."""
    losses = [-row["log_likelihood"] for row in rows]
    bits = ratio_metric([loss / math.log(2) for loss in losses], [row["bytes"] for row in rows], unit="bits")
    found = {"bits per byte": bits | {"digits": 3}}
    for name, column in (("perplexity per word", "words"), (PER_TOKEN, "tokens")):
        ratio = ratio_metric(losses, [row[column] for row in rows], unit="perplexity")
        value = math.exp(min(ratio["value"], 700))  # beyond, the number would not fit into a float
        found[name] = ratio | {"value": value, "digits": 2}
        if ratio["stderr"] is not None:
            found[name]["stderr"] = value * ratio["stderr"]  # the delta method
    return found


def main() -> None:
    """Measure every model on the same texts, write their results and print one table."""
    parser = make_parser(__doc__.split("\n")[0], data="data/tiny/text", output="outputs/eval/perplexity")
    add = parser.add_argument
    add("--max_length", type=int, help=f"tokens read together [the model's positions, at most {LONGEST}]")
    add("--stride", type=int, help="tokens from one window to the next: smaller, slower, more context [half of it]")
    args = read_arguments(parser)
    if args.max_length is not None and args.stride is not None:
        check_windows(args.max_length, args.stride)  # before the model is loaded
    rows = read_texts(args)
    results = {}
    for name in args.models:
        results[name] = evaluate(name, rows, args)
        keep(name, results[name], args, rows)
    vocabularies = {result.settings["vocabulary"] for result in results.values()}
    why = "these models cut a text into other tokens, and fewer, dearer ones are not worse. Compare by byte or by word."
    show_all(results, args, {PER_TOKEN: why} if len(vocabularies) > 1 else None)


if __name__ == "__main__":
    main()
