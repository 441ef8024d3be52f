"""Measure classifiers on labelled rows: a label for a text or pair, a tag for each word, an answer found in a text.

    accelerate launch eval/classify.py --model outputs/classify
    accelerate launch eval/classify.py --model full=outputs/reviews lora=outputs/reviews-lora --data reviews_test.csv
    accelerate launch eval/classify.py --model org/some-tagger --data conll_test.jsonl

Takes what recipes/classify.py leaves and classifiers of the hub; the head is read from the checkpoint. GLUE's official
files and average are eval/glue.py's. eval/README.md says what the numbers mean.
"""

from argparse import Namespace
from collections import Counter
from functools import partial

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
from alignment.report import Result, mean_metric, read_run, text_hash, unique_ids

TASK, VERSION = "classify", 1  # raise the version when the same predictions would get another score
MOST_CLASSES = 12  # with more of them there is no line for each
TEXTS = {"sequence": ("text", "text_pair"), "token": ("tokens",), "span": ("question", "context")}


def read_rows(args: Namespace, head: str) -> list[dict]:
    """Return the rows with their ids: text and label; tokens and tags; or question, context and answers."""
    from alignment.data import load_rows

    rows = [{key: value for key, value in dict(raw).items() if key != "id"} for raw in load_rows(args.data, head)]
    ids = unique_ids(map(text_hash, rows))
    return choose_rows([{"id": name, **row} for name, row in zip(ids, rows, strict=True)], args.limit)


def find_head(args: Namespace) -> str:
    """Return the head all models have; raises InputError for one that is no classifier, or of another kind."""
    from alignment.heads import head_of

    heads = {name: head_of(path) for name, path in args.models.items()}
    for name, head in heads.items():
        record = read_run(args.models[name])
        if head == "causal" or (record and record["identity"]["form"] not in TEXTS):
            other = "eval/generate.py or eval/mmlu.py" if head == "causal" else "eval/reward.py"
            raise InputError(
                f"{args.models[name]} is no classifier",
                where=f"--model {name}",
                fix=f"train one from it with recipes/classify.py; or measure what it is with {other}",
            )
    if len(set(heads.values())) > 1:
        said = ", ".join(f"{name} a {head} head" for name, head in heads.items())
        raise InputError("these models answer different questions", where="--model", why=said, fix="one kind at a time")
    return next(iter(heads.values()))


def reading_of(path: str, args: Namespace):
    """Return how long a row may be and how answers are chosen: as in training, unless --max_length says otherwise."""
    from dataclasses import fields

    from alignment.classifier import ClassifyConfig
    from alignment.spans import Reading

    found = {field.name: field.default for field in fields(ClassifyConfig)}
    found |= {name: entry["value"] for name, entry in read_run(path).get("arguments", {}).items() if name in found}
    names = ("max_length", "doc_stride", "max_answer_length", "n_best_size", "null_score_diff_threshold")
    values = [found[name] for name in names]
    return Reading(args.max_length or values[0], *values[1:])


def name_of(value, names: list[str]) -> str:
    """Return a label by its name: rows may give its number instead."""
    place = int(value) if str(value).isdigit() else len(names)
    return str(value) if str(value) in names or place >= len(names) else names[place]


def check_labels(rows: list[dict], head: str, names: list[str], model: str) -> str:
    """Say which labels of the rows the model has no output for; raises InputError when it has none for any."""
    column = "label" if head == "sequence" else "tags"
    values = Counter(v for row in rows for v in ([row[column]] if head == "sequence" else row[column]))
    unknown = {str(value): n for value, n in values.items() if name_of(value, names) not in names}
    if len(unknown) == len(values):
        raise InputError(
            f"no label of the rows is one of {model}'s",
            where=f"column {column}: {', '.join(list(unknown)[:6])}",
            why=f"it knows {', '.join(names[:6])}",
            fix=f"write them as the model does, or as its numbers, 0 to {len(names) - 1}",
        )
    listed = ", ".join(f"{name} ({n:,})" for name, n in unknown.items())
    return f"labels that {model} has no output for count as wrong: {listed}" if unknown else ""


def evaluate(name: str, head: str, rows: list[dict], args: Namespace) -> tuple[Result, str]:
    """Load one classifier, let it label every row, and return its result and what has to be said about its labels."""
    from alignment.classifier import scores_of
    from alignment.classifying import Encoder, reads_types
    from alignment.labels import Labels

    path = args.models[name]
    model, tokenizer = load(path, args, head)
    count = 0 if head == "span" else model.config.num_labels
    names = [model.config.id2label[i] for i in range(count)]
    number = head == "sequence" and count == 1
    note = "" if head == "span" or number else check_labels(rows, head, names, name)
    reading = reading_of(path, args)
    # labels are compared by name here: what the encoder gets are the places of the words, or nothing
    blank = Labels(head, ["0", "1"] if head == "sequence" else [])
    encode = Encoder(tokenizer, blank, reading, "cut", reads_types(model)).function()

    def measure(some: list[dict]) -> tuple[list[dict], int]:
        batch = {key: [row[key] for row in some] for key in some[0]}
        batch |= {"source": [""] * len(some), "row": list(range(len(some)))}
        batch |= {"label": ["0"] * len(some)} if head == "sequence" else {}
        batch |= {"tags": [list(range(len(row["tokens"]))) for row in some]} if head == "token" else {}
        columns = encode(batch)
        encoded = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        scored = [row for row in encoded if row["input_ids"]]
        scores = []
        for at in range(0, len(scored), args.batch_size):
            scores += scores_of(model, tokenizer, scored[at : at + args.batch_size])
        if head == "span":
            made = [answer(row, scored, scores, reading) for row in some]
        else:
            book = partial(label_text, number=number) if head == "sequence" else tag_words
            made = [book(*three, names) for three in zip(some, scored, scores, strict=True)]
        return made, sum(len(row["input_ids"]) for row in scored)

    settings = {"max_length": reading.max_length, "labels": names}
    result = new_result(name, args, (TASK, VERSION), head, settings)
    longest_first = sorted(rows, key=lambda row: -sum(len(row.get(key) or "") for key in TEXTS[head]))
    measure_rows(result, longest_first, measure, args, name)
    done = {row["id"]: row for row in result.rows}
    result.rows = [done[row["id"]] for row in rows]
    result.metrics = summarise(result.rows, head, number)
    return result, note


def label_text(row: dict, encoded: dict, scores, names: list[str], number: bool) -> dict:
    """Return the row of the result file for a text or pair: score 1 for the right class, or minus the squared error."""
    import numpy as np

    if number:
        guess, truth = float(scores[0]), float(row["label"])
        made = {"score": -((guess - truth) ** 2), "prediction": guess, "answer": truth}
    else:
        odds = np.exp(scores - scores.max())
        guess, truth = names[int(scores.argmax())], name_of(row["label"], names)
        made = {"score": float(guess == truth), "prediction": guess, "answer": truth}
        made["probability"] = round(float(odds.max() / odds.sum()), 6)
    made |= {"cut_tokens": encoded["lost"]} if encoded["lost"] else {}
    asked = " | ".join(row[key] for key in TEXTS["sequence"] if row.get(key))
    return {"id": row["id"], **made, "prompt": asked[:300]}


def tag_words(row: dict, encoded: dict, scores, names: list[str]) -> dict:
    """Return the row of the result file for tagged words: score is the share of right tags.

    A word that was cut off, or that the tokenizer gives no token, gets the tag O; without such a tag, none.
    """
    truth = [name_of(tag, names) for tag in row["tags"]]
    guess = ["O" if "O" in names else ""] * len(truth)
    for token, word in enumerate(encoded["labels"]):
        if word >= 0:
            guess[word] = names[int(scores[token].argmax())]
    score = sum(a == b for a, b in zip(guess, truth, strict=True)) / len(truth)
    made = {"id": row["id"], "score": score, "prediction": guess, "answer": truth}
    made |= {"cut_tokens": encoded["lost"]} if encoded["lost"] else {}
    return made | {"prompt": " ".join(row["tokens"])[:300]}


def answer(row: dict, windows: list[dict], scores: list, reading) -> dict:
    """Return the row of the result file for a question on a context: score is F1, exact the exact match."""
    from alignment.metrics import squad_row
    from alignment.spans import best_spans

    mine = [(*s, w["starts"], w["ends"]) for w, s in zip(windows, scores, strict=True) if w["id"] == row["id"]]
    guess = best_spans(mine, row["context"], reading)[0]["text"] if mine else ""
    wanted = row["answers"]["text"]
    exact, overlap = squad_row(guess, wanted)
    made = {"id": row["id"], "score": overlap, "exact": exact, "prediction": guess, "answer": wanted}
    return made | {"prompt": row["question"][:300]}


def summarise(rows: list[dict], head: str, number: bool) -> dict[str, dict]:
    """Return the metrics of a head, those the recipe prints, and of each class."""
    if head == "span":
        found = {"exact_match": mean_metric([row["exact"] for row in rows])}
        found["f1"] = mean_metric([row["score"] for row in rows])
        for name, there in (("with an answer", True), ("without an answer", False)):
            part = [row["score"] for row in rows if any(row["answer"]) == there]
            if part and len(part) < len(rows):
                found[f"f1/{name}"] = mean_metric(part)
        return found
    from alignment.metrics import metric

    guesses, truths = [row["prediction"] for row in rows], [row["answer"] for row in rows]

    def plain(value: float, unit: str = "share", n: int = len(rows), **more) -> dict:
        return {"value": value, "stderr": None, "n": n, "unit": unit, **more}

    if number:
        both = metric("glue", "stsb").compute(predictions=guesses, references=truths)
        return {name: plain(value, "correlation", digits=3) for name, value in both.items()}
    if head == "token":
        spans = metric("seqeval").compute(predictions=guesses, references=truths)
        found = {"accuracy": plain(spans["overall_accuracy"])}
        if any(tag[:2] in ("B-", "I-") for tags in truths for tag in tags):
            found = {name: plain(spans[f"overall_{name}"]) for name in ("f1", "precision", "recall")} | found
        return found
    classes = sorted({*truths, *guesses})
    sides = [[classes.index(value) for value in side] for side in (guesses, truths)]
    found = {"accuracy": mean_metric([row["score"] for row in rows])}
    found["always the most frequent"] = plain(max(Counter(truths).values()) / len(rows))
    f1 = metric("f1")
    found["f1_macro"] = plain(f1.compute(predictions=sides[0], references=sides[1], average="macro")["f1"])
    matthews = metric("matthews_correlation").compute(predictions=sides[0], references=sides[1])
    found["matthews_correlation"] = plain(*matthews.values(), "correlation", digits=3)
    for i, name in enumerate(classes if len(classes) <= MOST_CLASSES else []):
        value = f1.compute(predictions=sides[0], references=sides[1], pos_label=i)["f1"]
        found[f"f1/{name}"] = plain(value, n=truths.count(name))
    return found


def better_than_guessing(result: Result) -> bool:
    """Say whether the accuracy is above that of always giving the most frequent label; True of a regression."""
    found = result.metrics
    return "accuracy" not in found or found["accuracy"]["value"] > found["always the most frequent"]["value"]


def main() -> None:
    """Measure every classifier on the same rows, write the results and print one table."""
    parser = make_parser(__doc__.split("\n")[0], data="data/tiny/sentences", output="outputs/eval/classify")
    parser.add_argument(
        "--max_length", type=int, help="tokens of a row, or of a window of its context [as in training]"
    )
    args = read_arguments(parser)
    head = find_head(args)
    rows = read_rows(args, head)
    results, notes = {}, []
    for name in args.models:
        results[name], note = evaluate(name, head, rows, args)
        asked = [{"id": row["id"], **{key: row[key] for key in TEXTS[head] if row.get(key)}} for row in rows]
        keep(name, results[name], args, asked)
        if head == "sequence" and not better_than_guessing(results[name]):
            notes.append(f"{name} is no better than always giving the most frequent label")
        cut = sum("cut_tokens" in row for row in results[name].rows)
        notes += [note] if note else []
        notes += [f"{name} read {cut:,} rows cut to its max_length"] if cut else []
    from alignment.generation import process_state

    if process_state().is_main_process and notes:
        print("\n".join(notes))
    show_all(results, args)


if __name__ == "__main__":
    main()
