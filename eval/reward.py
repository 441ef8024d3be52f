"""Measure a reward model on held-out pairs: accuracy, margin, calibration, and what length has to do with it.

    accelerate launch eval/reward.py --model outputs/reward
    accelerate launch eval/reward.py --model full=outputs/reward lora=outputs/reward-lora --data data/tiny/preferences
    accelerate launch eval/reward.py --model outputs/reward --data mine.jsonl --output outputs/reward.json

Rows: preference pairs as recipes/reward.py takes them, {"prompt", "chosen", "rejected"} or what converts to it.
eval/README.md says what the numbers mean.
"""

from argparse import Namespace

from alignment.calibration import (
    draw_reliability,
    expected_calibration_error,
    rank_correlation,
    reliability,
    win_probabilities,
)
from alignment.evaluation import (
    choose_rows,
    dtype_of,
    keep,
    make_parser,
    measure_rows,
    new_result,
    read_arguments,
    show_all,
)
from alignment.report import Result, mean_metric, text_hash, unique_ids
from alignment.rewards import last_text

TASK, VERSION = "reward", 1
SIDES = ("chosen", "rejected")


def read_pairs(args: Namespace) -> list[dict]:
    """Return the pairs as {id, prompt, chosen, rejected}."""
    from alignment.data import load_rows

    columns = ("prompt", "chosen", "rejected")
    rows = [{key: raw.get(key) for key in columns} for raw in load_rows(args.data, "preference")]
    ids = unique_ids(map(text_hash, rows))
    return choose_rows([{"id": name, **row} for name, row in zip(ids, rows, strict=True)], args.limit)


def evaluate(name: str, rows: list[dict], args: Namespace) -> Result:
    """Load one reward model, let it score both answers of each pair, and return its result."""
    from alignment.generation import process_state
    from alignment.rewarding import RewardModel

    options = {"load_in_4bit": args.load_in_4bit, "trust_remote_code": args.trust_remote_code}
    judge = RewardModel(args.models[name], args.batch_size, dtype_of(args), **options)
    judge.to(process_state(args.use_cpu).device)
    result = new_result(name, args, (TASK, VERSION), "the reward model's own template", {})

    def measure(some: list[dict]) -> tuple[list[dict], int]:
        ids = [judge.encode(row["prompt"] or "", row[side]) for side in SIDES for row in some]
        scores, n = judge.score(ids), len(some)
        lengths = [judge.answer_tokens(row[side]) for side in SIDES for row in some]
        made = zip(some, scores[:n], scores[n:], lengths[:n], lengths[n:], strict=True)
        return [finished(row, (a, b), (c, d)) for row, a, b, c, d in made], sum(map(len, ids))

    measure_rows(result, rows, measure, args, name)
    result.metrics = summarise(result.rows)
    return result


def finished(row: dict, scores: tuple[float, float], lengths: tuple[int, int]) -> dict:
    """Return the row of the result file: score 1 when the chosen answer has the higher reward, 0.5 for a tie."""
    margin = scores[0] - scores[1]
    found = {"id": row["id"], "score": float(margin > 0) if margin else 0.5, "margin": margin}
    found |= {"chosen_reward": scores[0], "rejected_reward": scores[1]}
    found |= {"chosen_tokens": lengths[0], "rejected_tokens": lengths[1]}
    return found | {"prompt": last_text(row["prompt"] or ""), "text": last_text(row["chosen"])}


def summarise(rows: list[dict]) -> dict[str, dict]:
    """Return accuracy, also by which answer is the longer, margin, calibration, and correlation with length."""
    margins = [row["margin"] for row in rows]
    longer = [row["chosen_tokens"] - row["rejected_tokens"] for row in rows]
    found = {"accuracy": mean_metric([row["score"] for row in rows])}
    for name, part in (("shorter", [d < 0 for d in longer]), ("longer", [d > 0 for d in longer])):
        scores = [row["score"] for row, wanted in zip(rows, part, strict=True) if wanted]
        if scores:
            found[f"accuracy/chosen is {name}"] = mean_metric(scores)
    unequal = [(row["score"], d) for row, d in zip(rows, longer, strict=True) if d]
    if unequal:
        found["length/the longer wins"] = mean_metric([s if d > 0 else 1 - s for s, d in unequal])
        found["length/the longer is chosen"] = mean_metric([float(d > 0) for _, d in unequal])
    scores = [row[f"{side}_reward"] for row in rows for side in SIDES]
    tokens = [row[f"{side}_tokens"] for row in rows for side in SIDES]
    for name, (value, stderr) in (
        ("length/reward and length", rank_correlation(scores, tokens)),
        ("length/margin and difference", rank_correlation(margins, longer)),
    ):
        found[name] = {"value": value, "stderr": stderr, "n": len(rows), "unit": "Spearman", "digits": 2}
    found["margin"] = mean_metric(margins, unit="reward") | {"digits": 2}
    losses = [float((1 - p) ** 2) for p in win_probabilities(margins)]
    found["Brier score"] = mean_metric(losses, unit="Brier score") | {"digits": 3}
    error = expected_calibration_error(reliability(margins))
    found["calibration error"] = {"value": error, "stderr": None, "n": len(rows), "unit": "share"}
    return found


def main() -> None:
    """Evaluate every reward model on the same pairs, write their results and a picture, and print one table."""
    parser = make_parser(__doc__.split("\n")[0], data="data/tiny/preferences", output="outputs/eval/reward")
    args = read_arguments(parser)
    rows = read_pairs(args)
    from alignment.generation import process_state
    from alignment.rewarding import check_scores

    for path in args.models.values():
        check_scores(path, "--model")
    results = {}
    for name in args.models:
        results[name] = evaluate(name, rows, args)
        keep(name, results[name], args, rows)
    picture = next(iter(args.files.values())).with_suffix(".png")
    if len(results) > 1:
        picture = picture.with_name("reliability.png")
    if process_state().is_main_process:
        bins = {name: reliability([row["margin"] for row in result.rows]) for name, result in results.items()}
        draw_reliability(bins, picture)
    show_all(results, args)
    if process_state().is_main_process:
        print(f"drawn:   {picture}")


if __name__ == "__main__":
    main()
