"""Measures of answers against references: GSM8K's extraction, token F1, BLEU, ROUGE, pass@k, majority votes.

Per answer they are functions (text, reference) -> number; BLEU is one number for a whole set of answers.
"""

import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from alignment.errors import InputError

RESAMPLES = 1000
ROUGE = ("rouge1", "rouge2", "rougeL")
# lm-eval 0.4.13, tasks/gsm8k/gsm8k.yaml (version 3): the two filters, and what its exact match ignores
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


def gsm8k_strict(text: str) -> str | None:
    """Return the number behind the first "#### " of an answer, as lm-eval's strict-match takes it."""
    found = STRICT.search(text)
    return found.group(1).strip() if found else None


def gsm8k_flexible(text: str) -> str | None:
    """Return the last number of an answer, as lm-eval's flexible-extract takes it."""
    found = FLEXIBLE.findall(text)
    return next(part for part in found[-1] if part).strip() if found else None


def gsm8k_equal(found: str | None, reference: str) -> float:
    """1.0 when an extracted number is that of the reference, whose solution ends with "#### number".

    Commas, dollar signs, a final stop and case are ignored, as in lm-eval's exact_match of gsm8k; no number is wrong.
    """
    return 0.0 if found is None else float(_plain(found) == _plain(reference))


def _plain(text: str) -> str:
    for pattern in IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()


def normalise(text: str) -> str:
    """Return the text as SQuAD's evaluation compares it: lower case, no punctuation, no articles, single blanks."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def token_f1(text: str, answer: str) -> float:
    """Return the F1 of the words two texts share, as SQuAD's evaluation does (Rajpurkar et al. 2016)."""
    said, wanted = normalise(text).split(), normalise(answer).split()
    if not said or not wanted:
        return float(said == wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


def rouge(texts: Sequence[str], answers: Sequence[str]) -> list[dict[str, float]]:
    """Return ROUGE-1, -2 and -L of each answer, as F-measures from 0 to 1 (rouge_score, words stemmed).

    Raises:
        InputError: rouge_score is not installed.
    """
    scorer = _need("rouge_score.rouge_scorer").RougeScorer(list(ROUGE), use_stemmer=True)
    pairs = zip(texts, answers, strict=True)
    return [{name: s.fmeasure for name, s in scorer.score(answer, text).items()} for text, answer in pairs]


def bleu(texts: Sequence[str], answers: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Return corpus BLEU from 0 to 100 as a metric, with sacrebleu's signature and a bootstrap standard error.

    BLEU is no mean over rows: n-gram counts are summed first. So the rows are drawn again, `RESAMPLES` times, and the
    standard error is the spread of what their counts give (Koehn 2004).

    Raises:
        InputError: sacrebleu is not installed.
    """
    module = _need("sacrebleu.metrics.bleu")
    scorer, one = module.BLEU(), module.BLEU(effective_order=True)
    value = scorer.corpus_score(list(texts), [list(answers)]).score
    each = [one.sentence_score(text, [answer]) for text, answer in zip(texts, answers, strict=True)]
    counts = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in each])  # (rows, 10)
    rng, size = np.random.default_rng(seed), len(each)
    drawn = [_bleu_of(scorer, counts[rng.integers(0, size, size)].sum(0)) for _ in range(RESAMPLES if size > 1 else 0)]
    stderr = float(np.std(drawn, ddof=1)) if drawn else None
    signature = str(scorer.get_signature())
    return {"value": value, "stderr": stderr, "n": size, "unit": "BLEU", "signature": signature}


def _bleu_of(scorer: Any, counts: np.ndarray) -> float:
    """Return BLEU of summed counts: matches of 1- to 4-grams, all 1- to 4-grams, both lengths."""
    numbers = [int(n) for n in counts]
    return scorer.compute_bleu(
        correct=numbers[:4], total=numbers[4:8], sys_len=numbers[8], ref_len=numbers[9],
        smooth_method=scorer.smooth_method, smooth_value=scorer.smooth_value, max_ngram_order=4,
    ).score  # fmt: skip


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that one of k answers is right when c of n were: 1 - C(n-c, k) / C(n, k), unbiased.

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code".

    Raises:
        InputError: fewer than k answers were sampled.
    """
    if n < k:
        raise InputError(
            f"pass@{k} needs {k} answers to each prompt, and there are {n}",
            where="--pass_at, --num_samples",
            why="fewer say nothing of the chance that one of them is right",
            fix=f"--num_samples {k} or more, or --pass_at {n}",
        )
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(votes: Sequence[str | None]) -> str | None:
    """Return the commonest vote, of equals the earliest; None (nothing was extracted) has no vote.

    Self-consistency, Wang et al. 2022.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    return counts.most_common(1)[0][0] if counts else None


def need_packages(metrics: Sequence[str]) -> list[str]:
    """Return the optional packages that "bleu" and "rouge" are measured with; raise InputError when one is missing."""
    wanted = {"bleu": "sacrebleu", "rouge": "rouge_score"}
    return [_need(wanted[name]).__name__ for name in metrics if name in wanted]


def _need(module: str) -> ModuleType:
    """Import a module of an optional package, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(
            f"{package} is not installed", where="--metrics", fix='pip install "plumbline[eval]"'
        ) from error
