"""MMLU against lm-eval: CPU seconds on the same questions and model, and the largest difference between the two.

    python benchmarks/mmlu.py --data mine/mmlu                                   # all subjects, a model of 2 M
    python benchmarks/mmlu.py --data mine/mmlu --size 60m --subjects anatomy virology
    python benchmarks/mmlu.py --data data/tiny/choices --model data/tiny/model

lm-eval runs its own task configurations (prompts, examples, metrics) on the rows given here, through its HFLM. Both
score the loaded model in this process, one after the other, in float32; seconds are CPU seconds of the process, from
the questions in memory to the metrics. lm-eval gets the fastest of the batch sizes tried on a few questions. Without
--model: a tokenizer of 8,192 tokens trained on the questions, and random weights; speed and parity do not depend on
what a model has learnt. --output writes JSON, too.
"""

import argparse
import json
import logging
import platform
import time
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table

from alignment.few_shot import Prompting, choose
from alignment.models import load_checkpoint
from alignment.multiple_choice import Question, read_questions
from alignment.report import pooled_metric
from alignment.scoring import encode_requests
from alignment.wording import plain_context

WINDOW = 4096
SIZES = {  # width, layers, heads, inner width: 2.3 and 64 million parameters
    "2m": (128, 6, 4, 384),
    "60m": (640, 12, 10, 1728),
}
Rows = dict[str, list[Question]]


def make_model(size: str, questions: Rows):
    """Return a random Llama and a byte-level BPE tokenizer trained on the questions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    wording = Prompting().wording
    texts = (f"{wording.ask(question)} {'ABCD'[question.answer]}\n" for rows in questions.values() for question in rows)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=8192, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    width, layers, heads, inner = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=WINDOW, tie_word_embeddings=True,
        initializer_range=0.9 / width**0.5, pad_token_id=0, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


def lm_eval_tasks(questions: Rows, examples: Rows, shots: int) -> dict:
    """Return lm-eval's own tasks of these subjects, with their rows replaced by these.

    A subject that lm-eval does not know gets its template with a description after the same pattern.
    """
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask

    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    template = yaml.safe_load((folder / "_default_template_yaml").read_text())
    tasks = {}
    for subject, rows in questions.items():
        file = folder / f"mmlu_{subject}.yaml"
        words = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        own = yaml.safe_load(file.read_text()) if file.is_file() else {"description": words}
        name = own["task"] = f"mmlu_{subject}"
        parts = {"test": rows, "dev": examples.get(subject, [])}
        table = {
            split: datasets.Dataset.from_list(
                [{"question": q.question, "choices": list(q.choices), "answer": q.answer} for q in part]
            )
            for split, part in parts.items()
            if part
        }
        config = {k: v for k, v in (template | own).items() if k not in ("dataset_path", "dataset_name", "include")}
        config |= {"custom_dataset": lambda table=table, **_: table, "num_fewshot": shots, "metadata": {"version": 1.0}}
        tasks[name] = ConfigurableTask(config=config)
    return tasks


def run_lm_eval(model, tokenizer, tasks: dict, batch_size: int, **options) -> tuple[list, dict]:
    """Return lm-eval's log-likelihoods per question (subject by subject) and its results."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in tasks.values():
        task._instances = None
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
    results = evaluate(lm, {"tasks": tasks}, bootstrap_iters=0, **options)
    values = [
        [pair[0] for pair in sample["filtered_resps"]]
        for name in tasks
        for sample in sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    ]
    return values, results


def cpu_seconds(call):
    """Return what a call returns, and the CPU seconds of this process it took."""
    began = time.process_time()
    found = call()
    return found, time.process_time() - began


def try_sizes(model, tokenizer, args, questions: Rows, examples: Rows) -> tuple[int, float | None]:
    """Try lm-eval's batch sizes on a few questions of the first subject.

    Returns the fastest, and by how much its log-likelihoods differ between sizes: the rounding of float32.
    """
    subject, sizes = next(iter(questions)), args.their_batch_sizes
    if len(sizes) == 1:
        return sizes[0], None
    few = lm_eval_tasks({subject: questions[subject][:16]}, examples, args.shots)
    values, seconds = {}, {}
    for size in sizes:
        (values[size], _), seconds[size] = cpu_seconds(lambda size=size: run_lm_eval(model, tokenizer, few, size))
        print(f"lm-eval, batches of {size}: {seconds[size]:.1f} CPU seconds for 16 questions of {subject}")
    spread = max(gap(values[sizes[0]], values[size]) for size in sizes[1:])
    return min(seconds, key=seconds.get), spread


def gap(first: list, second: list) -> float:
    """Return the largest difference between two lists of log-likelihoods per question."""
    return max((abs(a - b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)), default=0.0)


def tokens_of(tokenizer, flat: list[Question], examples: Rows, shots: int) -> int:
    """Return the tokens of all prompts, each written out whole."""
    prompts = [(plain_context(Prompting().wording, examples.get(q.subject, [])[:shots], q), [" A"]) for q in flat]
    return sum(len(request.context) for request in encode_requests(tokenizer, prompts))


def measure(args: argparse.Namespace, questions: Rows, examples: Rows) -> dict:
    """Run both on the same questions; return seconds, counts and differences."""
    everything = {s: [*questions.get(s, []), *examples.get(s, [])] for s in {*questions, *examples}}
    model, tokenizer = load_checkpoint(args.model) if args.model else make_model(args.size, everything)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    flat = [question for rows in questions.values() for question in rows]
    prompting = Prompting(args.shots)
    choose(model, tokenizer, flat[:8], examples, prompting, label="warming up")
    batch, spread = try_sizes(model, tokenizer, args, questions, examples)
    tasks = lm_eval_tasks(questions, examples, args.shots)
    choices, ours = cpu_seconds(
        lambda: choose(model, tokenizer, flat, examples, prompting, batch_size=args.batch_size, label="ours")
    )
    (values, results), theirs = cpu_seconds(lambda: run_lm_eval(model, tokenizer, tasks, batch))
    whole = [i for i, choice in enumerate(choices) if choice.shots == args.shots and not choice.cut]
    picks = [max(range(4), key=values[i].__getitem__) for i in range(len(flat))]
    right = {s: [] for s in questions}
    for question, choice in zip(flat, choices, strict=True):
        right[question.subject].append(float(choice.prediction == question.answer))
    accuracy = {name: result["acc,none"] for name, result in results["results"].items()}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "subjects": len(questions),
        "questions": len(flat),
        "tokens": tokens_of(tokenizer, flat, examples, args.shots),
        "seconds": {"lm-eval": theirs, "ours": ours},
        "batch_size": {"lm-eval": batch, "ours": args.batch_size},
        "compared": len(whole),
        "largest difference": gap([choices[i].log_likelihoods for i in whole], [values[i] for i in whole]),
        "lm-eval between batch sizes": spread,
        "other predictions": sum(choices[i].prediction != picks[i] for i in whole),
        "accuracy": pooled_metric(list(right.values()))["value"],
        "accuracy gap": max(abs(accuracy[f"mmlu_{s}"] - sum(scores) / len(scores)) for s, scores in right.items()),
    }


def main() -> None:
    """Read the questions, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/tiny/choices", help="as eval/mmlu.py takes it")
    parser.add_argument("--model", help="a checkpoint; without it, random weights of --size")
    parser.add_argument("--size", choices=tuple(SIZES), default="2m")
    parser.add_argument("--subjects", nargs="+")
    parser.add_argument("--limit", type=int, help="the first so many questions of each subject")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--their_batch_sizes", type=int, nargs="+", default=[1, 8, 64], help="lm-eval gets the fastest")
    parser.add_argument("--output", help="write the numbers as JSON")
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    questions = {s: rows[: args.limit] for s, rows in read_questions(args.data, "test", args.subjects).items()}
    examples = read_questions(args.data, "dev", list(questions)) if args.shots else {}
    found = measure(args, questions, examples)
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console = Console(width=100, highlight=False)
    console.print(
        f"{found['questions']:,} questions of {found['subjects']} subjects, {args.shots} shots, "
        f"{found['tokens']:,} tokens; {found['parameters'] / 1e6:.1f} M parameters, float32; {where}"
    )
    table = Table()
    for head in ("", "batch", "CPU seconds", "questions / s", "speed"):
        table.add_column(head, justify="right" if head else "left")
    for name, seconds in found["seconds"].items():
        speed, rate = found["seconds"]["lm-eval"] / seconds, found["questions"] / seconds
        table.add_row(name, str(found["batch_size"][name]), f"{seconds:.1f}", f"{rate:.1f}", f"{speed:.2f} x")
    console.print(table)
    console.print(
        f"{found['compared']:,} prompts that fit whole: largest difference of a log-likelihood "
        f"{found['largest difference']:.1e}, other predictions {found['other predictions']}; "
        f"largest difference of a subject's accuracy {found['accuracy gap']:.1e}"
    )
    if found["lm-eval between batch sizes"] is not None:
        console.print(f"lm-eval's own differ by up to {found['lm-eval between batch sizes']:.1e} between batch sizes")
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
