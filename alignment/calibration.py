"""Is a preference model as sure as it is right? Calibration error, Brier score, a reliability picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Bin:
    """Pairs about which a model is about equally sure: their number, mean confidence and share of right ones."""

    pairs: int
    confidence: float
    accuracy: float


def win_probabilities(margins: Sequence[float]) -> np.ndarray:
    """Return sigmoid(margin): the probability that the Bradley-Terry model gives to the chosen answer."""
    return np.array([0.5 * (1 + math.tanh(margin / 2)) for margin in margins])


def reliability(margins: Sequence[float], bins: int = 10) -> list[Bin]:
    """Sort pairs by confidence max(p, 1 - p), from 0.5 to 1 in `bins` equal bins; empty ones are left out.

    A tie (margin 0) counts as half right.
    """
    p = win_probabilities(margins)
    confidence, right = np.maximum(p, 1 - p), np.where(p == 0.5, 0.5, p > 0.5)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    groups = [place == i for i in range(bins)]
    return [Bin(int(g.sum()), float(confidence[g].mean()), float(right[g].mean())) for g in groups if g.any()]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Return the mean of |confidence - accuracy| over the pairs (Guo et al. 2017); 0 is best."""
    return sum(b.pairs * abs(b.confidence - b.accuracy) for b in bins) / sum(b.pairs for b in bins)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> tuple[float, float | None]:
    """Return (Spearman's correlation, its standard error after Bonett and Wright 2000); 0 where one does not vary."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0, None
    value = float(stats.spearmanr(first, second).statistic)
    return value, math.sqrt((1 + value**2 / 2) / (len(first) - 3)) if len(first) > 3 else None


def draw_reliability(models: dict[str, list[Bin]], path: str | Path) -> None:
    """Draw accuracy against confidence into a PNG, a line per model; on the diagonal a model is calibrated."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, grid = "#33383f", "#e4e7eb"
    figure = Figure(figsize=(3.8, 3.4), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], color="#9aa1ab", linestyle="--", linewidth=1, label="calibrated")
    for name, bins in models.items():
        sizes = [12 + 60 * b.pairs / sum(one.pairs for one in bins) for b in bins]
        (line,) = axes.plot([b.confidence for b in bins], [b.accuracy for b in bins], linewidth=1.5, label=name)
        axes.scatter([b.confidence for b in bins], [b.accuracy for b in bins], s=sizes, color=line.get_color())
    axes.set_xlabel("confidence, sigmoid(|margin|)", fontsize=8, color=ink)
    axes.set_ylabel("share of pairs ranked right", fontsize=8, color=ink)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(color=grid, linewidth=0.8)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=ink, labelsize=8, length=0)
    axes.legend(frameon=False, fontsize=8, labelcolor=ink)
    figure.savefig(Path(path))
