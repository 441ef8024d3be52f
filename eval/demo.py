"""The whole way in a few minutes: base model -> SFT with LoRA -> DPO -> measure the three -> compare.

    make demo                      (or: python eval/demo.py)
    python eval/demo.py --output_dir outputs/mine

Every step is a command that you could type, and is printed before it runs. The result is in the terminal and
in one page, outputs/demo/index.html.
"""

import json
import os
import platform
import sys
from argparse import Namespace
from pathlib import Path

from rich.console import Console
from scipy import stats

from alignment import page
from alignment.config import Parser, install_excepthook, with_underscores
from alignment.report import Result, curve_series, draw_curves, read_result, sparkline, write_text
from alignment.road import ROOT, clear, read_log, run_command

BASE, ROWS = "data/tiny/model", "data/tiny/prompts"
NAMES = {"base": "base", "sft": "after SFT", "dpo": "after DPO"}
NEXT = (
    ("your own model", "accelerate launch recipes/sft.py --model_name_or_path Qwen/Qwen3-0.6B --peft lora"),
    ("your own rows", "accelerate launch recipes/sft.py --data mine.jsonl --dry_run"),
    ("your own GPU", "accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/sft.py"),
)


def steps(folder: Path, args: Namespace) -> list[tuple[str, list[str]]]:
    """Return (what happens, the command after `accelerate launch` or `python`) of each step."""
    short = ["--max_steps", str(args.max_steps)] if args.max_steps else []
    few = ["--limit", str(args.limit)] if args.limit else []
    sft, dpo, results = f"{folder}/sft", f"{folder}/dpo", f"{folder}/eval"
    models = [f"base={BASE}", f"sft={sft}", f"dpo={dpo}"]
    files = [f"{results}/{name}.json" for name in NAMES]
    tune = ["accelerate launch", "recipes/sft.py", "--peft", "lora", "--output_dir", sft]
    prefer = ["accelerate launch", "recipes/dpo.py", "--model_name_or_path", sft, "--output_dir", dpo]
    # With the loss of SFT on the chosen answers beside it, DPO also learns what the pairs ask that SFT has not seen.
    prefer += ["--loss_type", "sigmoid", "sft", "--loss_weights", "1", "1"]
    prefer += ["--learning_rate", "5e-4", "--num_train_epochs", "2"]
    ask = ["accelerate launch", "eval/generate.py", "--model", *models, "--data", ROWS, "--output", results]
    ask += ["--max_new_tokens", "48"]  # the base never stops; the longest right answer is far shorter
    compare = ["python", "eval/compare.py", *files, "--output", f"{folder}/compare.json", "--show", "2"]
    return [
        ("teach the base model to answer (supervised fine-tuning, LoRA)", tune + short),
        ("teach it to prefer right answers (DPO, on top of the tuned model)", prefer + short),
        ("let all three answer the same held-out questions", ask + few),
        ("compare them question by question", compare),
    ]


def wilson(result: Result) -> tuple[float, float, float]:
    """Return the share of right answers with its 95 % interval (Wilson)."""
    right = sum(row["score"] for row in result.rows)
    interval = stats.binomtest(round(right), len(result.rows)).proportion_ci(method="wilson")
    return right / len(result.rows), interval.low, interval.high


def choose_questions(results: dict[str, Result]) -> list[tuple[dict, ...]]:
    """Return a few questions with the three rows: what each step repaired, what it broke, what stays hard."""
    wanted = {(0, 0, 1): 2, (0, 1, 1): 2, (0, 1, 0): 1, (0, 0, 0): 1}
    chosen: list[tuple[dict, ...]] = []
    tasks: set[str] = set()
    for pattern, count in wanted.items():
        for rows in zip(*(result.rows for result in results.values()), strict=True):
            same = tuple(int(row["score"]) for row in rows) == pattern
            if count and same and rows[0]["task"] not in tasks:
                tasks.add(rows[0]["task"])
                chosen.append(rows)
                count -= 1
    return chosen


def read_run(folder: Path) -> tuple[list[dict], dict]:
    """Return the log of a training run and what it wrote about itself."""
    return read_log(folder), json.loads((folder / "run.json").read_text())


def show_curves(console: Console, name: str, log: list[dict]) -> None:
    """Print each curve of a run as one line of blocks."""
    for metric, series in curve_series(log).items():
        values = [value for _, value in series.get("train", series.get("held out", []))]
        if len(values) > 1:
            line = f"{name:<5} {metric:<20} {values[0]:8.3f}  {sparkline(values)}  {values[-1]:.3f}"
            console.print(line, markup=False)


def write_page(folder: Path, results: dict[str, Result], seconds: dict[str, float]) -> Path:
    """Write index.html from what the steps left in the folder."""
    comparison = json.loads((folder / "compare.json").read_text())["comparisons"]
    times = page.table(["step", "seconds"], [[what, f"{took:.0f}"] for what, took in seconds.items()])
    commands = page.code("\n".join(f"# {what}\n{command}" for what, command in NEXT))
    sections = [
        ("What training changed", outcome(results, [item["sentence"] for item in comparison])),
        ("Answers side by side", side_by_side(results)),
        ("By kind of question", [by_task(results)]),
        ("While it learnt", curves(folder)),
        ("What happened to the data", ledgers(folder)),
        ("Where the time went", [times]),
        ("Next", [commands]),
    ]
    total, asked = sum(seconds.values()), len(results["base"].rows)
    lead = (
        "A small language model was taught to answer (SFT with LoRA) and then to prefer right answers (DPO), "
        f"in {total // 60:.0f} min {total % 60:.0f} s on {os.cpu_count()} CPU cores, and asked "
        f"{asked:,} questions it was not trained on."
    )
    versions = ", ".join(f"{k} {v}" for k, v in results["base"].versions.items())
    footer = f"Plumbline demo. Python {platform.python_version()}, {versions}. Rows: {folder}/eval/*.json."
    path = folder / "index.html"
    write_text(path, page.page("From a base model to one that answers", lead, sections, footer))
    return path


def outcome(results: dict[str, Result], sentences: list[str]) -> list[str]:
    """Return the bars, the table and the verdicts."""
    shares = {name: wilson(result) for name, result in results.items()}
    head = ["model", "right answers", "95 % interval", "stops by itself", "tokens per answer"]
    lines = []
    for name, result in results.items():
        share, low, high = shares[name]
        stopped, length = (result.metrics[key]["value"] for key in ("stopped", "answer length"))
        span = f"{low:.1%} to {high:.1%}"
        lines.append([NAMES[name], f"{share:.1%}", span, f"{stopped:.0%}", f"{length:.1f}"])
    note = (
        "The three models answered the same questions, so each sentence is about the difference question by "
        "question, which is known more exactly than the bars suggest."
    )
    bars = page.intervals([(NAMES[name], *share) for name, share in shares.items()])
    return [bars, page.table(head, lines), page.bullets(sentences), page.paragraph(note, soft=True)]


def side_by_side(results: dict[str, Result]) -> list[str]:
    """Return the chosen questions, each with the three answers."""
    blocks = []
    for rows in choose_questions(results):
        answers = [(NAMES[name], said(row, 110), row["score"] == 1) for name, row in zip(results, rows, strict=True)]
        blocks.append(page.side_by_side(rows[0]["prompt"], rows[0]["answer"], answers))
    return blocks


def said(row: dict, limit: int) -> str:
    """Return the beginning of an answer; dots where it goes on, or went on until it was cut."""
    text = " ".join(row["text"].split())
    return text if len(text) <= limit and row["stopped"] else text[:limit].rstrip() + " …"


def by_task(results: dict[str, Result]) -> page.Html:
    """Return the score of each kind of question, the most improved first."""
    tasks = [name for name in results["base"].metrics if name.startswith("score/")]
    tasks.sort(key=lambda name: -results["dpo"].metrics[name]["value"])
    lines = []
    for name in tasks:
        cells = [result.metrics[name] for result in results.values()]
        values = [f"{cell['value']:.0%}" for cell in cells]
        lines.append([name.partition("/")[2].replace("_", " "), f"{cells[0]['n']:,}", *values])
    return page.table(["kind", "questions", *(NAMES[name] for name in results)], lines)


def curves(folder: Path) -> list[str]:
    """Draw both runs for light and dark screens and return the pictures."""
    pictures = []
    for name, title in (("sft", "supervised fine-tuning"), ("dpo", "preference tuning")):
        log, _ = read_run(folder / name)
        light, dark = folder / f"{name}.png", folder / f"{name}-dark.png"
        if draw_curves(log, light) and draw_curves(log, dark, dark=True):
            pictures.append(page.picture(light, dark, f"{title}: training and held-out rows"))
    return pictures


def ledgers(folder: Path) -> list[str]:
    """Return the ledger of both runs as a table: rows from each source, and where they went."""
    lines = []
    for name in ("sft", "dpo"):
        _, about = read_run(folder / name)
        for source, account in about["ledger"]["sources"].items():
            tokens = [sum(t[key] for t in account["tokens"].values()) for key in ("tokens", "trained")]
            dropped = sum(cause["rows"] for cause in account["dropped"].values())
            numbers = [account["read"], account["train"], account["test"], dropped, *tokens]
            lines.append([NAMES[name].removeprefix("after "), source, *(f"{n:,}" for n in numbers)])
    head = ["run", "source", "rows read", "trained on", "held out", "dropped", "tokens", "tokens with loss"]
    return [page.table(head, lines, texts=2)]


def main() -> None:
    """Run the steps, show the outcome, write the page."""
    install_excepthook()
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default="outputs/demo", help="cleared first, if a demo made it")
    parser.add_argument("--max_steps", type=int, help="stop each training after this many steps (for a quick look)")
    parser.add_argument("--limit", type=int, help="ask this many questions only")
    args = parser.parse_args([with_underscores(word) for word in sys.argv[1:]])
    os.chdir(ROOT)
    folder = Path(args.output_dir)
    clear(folder)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    seconds = {}
    for number, (what, words) in enumerate(steps(folder, args), start=1):
        seconds[what] = run_command(console, number, what, words).seconds
    console.print("\n[bold]5. how it learnt[/bold]")
    for name in ("sft", "dpo"):
        show_curves(console, name, read_run(folder / name)[0])
    results = {name: read_result(folder / "eval" / f"{name}.json") for name in NAMES}
    show_answers(console, results)
    path = write_page(folder, results, seconds)
    total = sum(seconds.values())
    console.print(f"\nDone in {total // 60:.0f} min {total % 60:.0f} s. The whole story: {path}", soft_wrap=True)
    console.print("\n[bold]Now with:[/bold]")
    for what, command in NEXT:
        console.print(f"  {what:<15} {command}", soft_wrap=True, markup=False)


def show_answers(console: Console, results: dict[str, Result]) -> None:
    """Print the chosen questions with the three answers."""
    console.print("\n[bold]6. the same questions, three answers[/bold]")
    for rows in choose_questions(results)[:4]:
        console.print(f"\n  {rows[0]['prompt']}", style="italic", markup=False)
        for name, row in zip(results, rows, strict=True):
            mark = "[green]right[/green]" if row["score"] == 1 else "[red]wrong[/red]"
            console.print(f"    {NAMES[name]:<10} {mark}  ", end="")
            console.print(said(row, 70), markup=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the next start begins anew")
