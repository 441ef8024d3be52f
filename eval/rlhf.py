"""The whole road from one tuned model: PPO, DPO, GRPO, best of n; one table of what each gained and what it cost.

    make rlhf                      (or: python eval/rlhf.py)
    python eval/rlhf.py --output_dir outputs/mine --only ppo grpo

Every step is a command that you could type, and is printed before it runs. The table says: reward (of the reward
model), right answers, KL from the SFT model, perplexity on plain sentences (the alignment tax), length of the
answers, time and memory. The same with curves is in one page, outputs/rlhf/index.html.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from alignment import page
from alignment.config import Parser, install_excepthook, with_underscores
from alignment.report import curve_series, draw_curves, sparkline, write_text
from alignment.road import ROOT, clear, read_log, run_command

BASE, ROWS, TEXT = "data/tiny/model", "data/tiny/prompts/test.jsonl", "data/tiny/sentences/test.jsonl"
WAYS = ("ppo", "dpo", "grpo", "best_of_n")
TITLES = {"sft": "SFT", "ppo": "PPO", "dpo": "DPO", "grpo": "GRPO", "best_of_n": "best of n"}
CURVES = {
    "sft": "mean_token_accuracy",
    "reward": "accuracy",
    "ppo": "reward",
    "dpo": "rewards/accuracies",
    "grpo": "reward",
}
HEAD = ("", "reward", "right", "KL from SFT", "perplexity", "length", "ended", "seconds", "peak memory")


def steps(folder: str, ways: list[str]) -> dict[str, tuple[str, list[str]]]:
    """Return name -> (what happens, the command after `accelerate launch`)."""
    sft, reward = f"{folder}/sft", f"{folder}/reward"
    start = ["--model_name_or_path", sft]
    # a tuned model wants half the rate of the base that the recipes start from
    asked = ["--data", "data/tiny/prompts", "--learning_rate", "1e-4", "--max_steps", "80"]
    found = {"sft": ("teach the base model to answer", ["recipes/sft.py"])}
    if "ppo" in ways:
        found["reward"] = ("learn what people prefer: a reward model", ["recipes/reward.py", *start])
        scored = ["--reward_model", reward, "--reward_weights", "1.0", "0.1"]
        found["ppo"] = (
            "PPO: the answers' own verifier and the reward model",
            ["recipes/ppo.py", *start, *scored, *asked],
        )
    found["dpo"] = ("DPO: the same preferences, no reward model", ["recipes/dpo.py", *start])
    found["grpo"] = ("GRPO: groups of answers and their verifier", ["recipes/grpo.py", *start, *asked])
    found["best_of_n"] = ("best of n: keep the best answers, tune on them", ["recipes/best_of_n.py", *start])
    kept = {"sft", "reward", *ways}
    return {
        name: (what, ["accelerate launch", *words, "--output_dir", f"{folder}/{name}"])
        for name, (what, words) in found.items()
        if name in kept
    }


def measure(folder: Path, names: list[str], limit: int | None) -> dict[str, dict]:
    """Return, for each model, the means over the held-out prompts; all answer the same prompts."""
    from alignment.drift import answer_kl
    from alignment.generation import Decoding, generate_answers
    from alignment.likelihood import perplexity
    from alignment.models import load_checkpoint
    from alignment.rewarding import RewardModel
    from alignment.rewards import verifier

    rows = [json.loads(line) for line in (ROOT / ROWS).read_text(encoding="utf-8").splitlines()][:limit]
    texts = [json.loads(line)["sentence"] for line in (ROOT / TEXT).read_text(encoding="utf-8").splitlines()]
    prompts = [row["prompt"] for row in rows]
    judge = RewardModel(folder / "reward") if (folder / "reward").exists() else None
    reference, _ = load_checkpoint(checkpoint(folder, "sft"))
    found = {}
    for name in names:
        model, tokenizer = load_checkpoint(checkpoint(folder, name))
        answers = generate_answers(model, tokenizer, prompts, Decoding(48), batch_size=100, label=name)
        drawn = generate_answers(model, tokenizer, prompts, Decoding(48, 1.0), batch_size=100, label=name)
        right = [verifier(row["verifier"])(a.text, row["answer"]) for row, a in zip(rows, answers, strict=True)]
        said = [[{"role": "assistant", "content": answer.text}] for answer in answers]
        moved = answer_kl(model, reference, tokenizer, prompts, [answer.text for answer in drawn])
        found[name] = {
            "reward": average(judge(prompts, said)) if judge else None,
            "right": average(right),
            "kl": average(moved),
            "perplexity": perplexity(model, tokenizer, texts),
            "length": average([answer.tokens for answer in answers]),
            "ended": average([answer.stopped for answer in answers]),
        }
    return found


def checkpoint(folder: Path, name: str) -> Path:
    """Return where the final weights of a step are."""
    return folder / name / "round_1" if name == "best_of_n" else folder / name


def average(values: list) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def cells(name: str, row: dict, seconds: float, memory: float) -> list[str]:
    """Return one line of the table."""
    return [
        TITLES[name],
        "" if row["reward"] is None else f"{row['reward']:+.2f}",
        f"{row['right']:.1%}",
        f"{row['kl']:.2f}",
        f"{row['perplexity']:.1f}",
        f"{row['length']:.1f}",
        f"{row['ended']:.0%}",
        f"{seconds:.0f}",
        f"{memory / 2**20:,.0f} MiB",
    ]


def show_curve(console: Console, folder: Path, name: str) -> None:
    """Print the main curve of a run as one line of blocks."""
    if name not in CURVES:
        return
    series = curve_series(read_log(folder / name)).get(CURVES[name], {})
    values = [value for _, value in series.get("train", series.get("held out", []))]
    if len(values) > 1:
        line = f"{TITLES.get(name, name):<9} {CURVES[name]:<20} {values[0]:7.3f}  {sparkline(values)}  {values[-1]:.3f}"
        console.print(line, markup=False)


def write_page(folder: Path, lines: list[list[str]], commands: list[str], seconds: float) -> Path:
    """Write index.html: the table, the curves, the commands."""
    pictures = []
    for name, metric in CURVES.items():
        if not (folder / name).is_dir():
            continue
        light, dark = folder / f"{name}.png", folder / f"{name}-dark.png"
        log = read_log(folder / name)
        if draw_curves(log, light) and draw_curves(log, dark, dark=True):
            pictures.append(page.picture(light, dark, f"{TITLES.get(name, 'reward model')}: {metric} and more"))
    notes = [
        "reward: mean score of the reward model; right: share of answers their own verifier accepts (both greedy).",
        "KL from SFT: nats per answer, along the model's own samples. perplexity: per token of 300 plain "
        "sentences of the kind the base was pretrained on; what it rises by is the alignment tax.",
        "seconds and peak memory of the training command, imports included; PPO's without its reward model's training.",
    ]
    sections = [
        ("What each way gained, and what it cost", [page.table(HEAD, lines), page.bullets(notes)]),
        ("While they learnt", pictures),
        ("The commands", [page.code("\n".join(commands))]),
    ]
    lead = (
        f"One model tuned to answer, then trained on in several ways, in {seconds // 60:.0f} min {seconds % 60:.0f} s "
        f"on {os.cpu_count()} CPU cores; all answered the same held-out questions."
    )
    path = folder / "index.html"
    write_text(path, page.page("From one start, several ways", lead, sections, f"Python {platform.python_version()}."))
    return path


def main() -> None:
    """Run the steps, measure, show the table, write the page."""
    install_excepthook()
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default="outputs/rlhf", help="cleared first, if this script made it")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), help="these ways only")
    parser.add_argument("--max_steps", type=int, help="stop each training after this many steps (for a quick look)")
    parser.add_argument("--limit", type=int, help="ask this many questions only")
    args = parser.parse_args([with_underscores(word) for word in sys.argv[1:]])
    os.chdir(ROOT)
    folder, began = Path(args.output_dir), time.monotonic()
    clear(folder)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    short = ["--max_steps", str(args.max_steps)] if args.max_steps else []
    took, commands = {}, []
    for number, (name, (what, words)) in enumerate(steps(str(folder), args.only).items(), start=1):
        took[name] = run_command(console, number, what, [*words, *short])
        commands.append(" ".join([*words, *short]))
    names = [name for name in took if name != "reward"]
    found = measure(folder, names, args.limit)
    lines = [cells(name, found[name], took[name].seconds, took[name].memory) for name in names]
    table = Table(title="\nFrom one start", title_justify="left")
    for head in HEAD:
        table.add_column(head, justify="right" if head else "left")
    for line in lines:
        table.add_row(*line)
    for name in took:
        show_curve(console, folder, name)
    console.print(table)
    seconds = time.monotonic() - began
    path = write_page(folder, lines, commands, seconds)
    write_text(folder / "results.json", json.dumps(found, indent=1) + "\n")
    console.print(f"Done in {seconds // 60:.0f} min {seconds % 60:.0f} s. The whole story: {path}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the next start begins anew")
