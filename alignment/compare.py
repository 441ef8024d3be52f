"""Is one model better than another on the same rows? The paired difference, its interval, a test, a sentence.

Both models answered the same rows, so the rows' difficulty cancels in the difference: its noise is much
smaller than the noise of the two means, and comparing the two separate intervals would hide real changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from alignment.errors import InputError

RESAMPLES = 10_000
CHUNK = 4_000_000  # random numbers drawn at a time: bounds the memory on sets of any size
FEW_FLIPS = 10  # below this the bootstrap of 0/1 scores has too few distinct outcomes to give an interval
EXACT_SIGNS = 12  # up to this many changed rows all 2**k sign patterns are enumerated


@dataclass(frozen=True)
class Difference:
    """The paired difference "second minus first" of the mean score over `rows` rows.

    `low`..`high` is the interval at `confidence`, made by `interval`; `p` the two-sided p-value of `test` for
    "no difference"; `p_holm` the same after Holm's correction for the whole table (equal to `p` when there is
    one comparison); `visible` the smallest true difference such a set would reveal in 4 of 5 tries;
    `up`/`down` count rows whose score rose and fell. All scores are in the unit of the rows.
    """

    rows: int
    first: float
    second: float
    value: float
    stderr: float
    low: float
    high: float
    confidence: float
    interval: str
    p: float
    p_holm: float
    test: str
    up: int
    down: int
    visible: float


def paired(first: Sequence[float], second: Sequence[float], *, seed: int = 0, confidence: float = 0.95) -> Difference:
    """Compare two score vectors over the same rows, in the same order.

    0/1 scores: McNemar's exact test; any other: a sign-flip permutation test of the mean difference. The
    interval is the percentile bootstrap over rows (10,000 resamples, seeded); for 0/1 scores with fewer than
    ten changed rows it is Tango's score interval (Tango 1998), because a bootstrap of so few cannot show
    how many more might have changed.

    Raises:
        InputError: fewer than two rows, different lengths, or a score that is not finite.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape or a.ndim != 1:
        raise InputError(f"{a.size} scores cannot be paired with {b.size}", fix="give both models the same rows")
    if a.size < 2:
        raise InputError(f"{a.size} row(s) in common", why="a difference needs at least two rows")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("a score is not a finite number", fix="evaluate the model again")
    change = b - a
    up, down = int((change > 0).sum()), int((change < 0).sum())
    binary = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    if binary and up + down < FEW_FLIPS:
        low, high = score_interval(up, down, a.size, confidence)
        how = "Tango's score interval"
    else:
        low, high = bootstrap_interval(change, seed=seed, confidence=confidence)
        how = f"paired bootstrap, percentile, {RESAMPLES:,} resamples, seed {seed}"
    p = mcnemar(up, down) if binary else sign_flip(change, seed=seed)
    stderr = float(change.std(ddof=1) / np.sqrt(a.size))
    return Difference(
        rows=a.size,
        first=float(a.mean()),
        second=float(b.mean()),
        value=float(change.mean()),
        stderr=stderr,
        low=low,
        high=high,
        confidence=confidence,
        interval=how,
        p=p,
        p_holm=p,
        test="McNemar, exact" if binary else "sign-flip permutation",
        up=up,
        down=down,
        visible=_visible(stderr, a.size, confidence, binary),
    )


def mcnemar(up: int, down: int) -> float:
    """Two-sided exact p-value that rows change upwards and downwards equally often (McNemar 1947)."""
    if up + down == 0:
        return 1.0
    return float(min(1.0, 2 * stats.binom.cdf(min(up, down), up + down, 0.5)))


def sign_flip(change: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of the mean of `change` when each row's sign is a coin toss (Fisher's randomisation).

    Exact for up to twelve changed rows, else `resamples` random sign patterns with the observed one counted
    among them, so that the p-value is never 0.
    """
    moved = np.abs(change[change != 0])
    if moved.size == 0:
        return 1.0
    # Slightly less than observed: the same sum added in another order may differ in its last bit.
    observed = abs(float(change.sum())) * (1 - 1e-12)
    if moved.size <= EXACT_SIGNS:
        patterns = (np.arange(2**moved.size)[:, None] >> np.arange(moved.size)) & 1
        return float(np.mean(np.abs((2 * patterns - 1) @ moved) >= observed))
    rng = np.random.default_rng(seed)
    extreme = 0
    for count in _chunks(resamples, moved.size):
        signs = rng.integers(0, 2, size=(count, moved.size), dtype=np.int8) * 2.0 - 1.0
        extreme += int((np.abs(signs @ moved) >= observed).sum())
    return (extreme + 1) / (resamples + 1)


def bootstrap_interval(
    change: np.ndarray, *, seed: int = 0, confidence: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `change`: rows are drawn with replacement, as pairs."""
    rng = np.random.default_rng(seed)
    means = [
        change[rng.integers(0, change.size, size=(count, change.size))].mean(axis=1)
        for count in _chunks(resamples, change.size)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def score_interval(up: int, down: int, rows: int, confidence: float = 0.95) -> tuple[float, float]:
    """Tango's (1998) score interval for the difference of two paired shares, (up - down) / rows.

    It holds every difference that the score test does not reject. Unlike the bootstrap it has a width when
    no row changed at all: then it says how many changes may have been missed.
    """
    limit = float(stats.norm.ppf(0.5 + confidence / 2))
    grid = (-1.0, (up - down) / rows, 1.0)

    def excess(delta: float, sign: int) -> float:
        a, c = 2 * rows, -down * delta * (1 - delta)
        b = -up - down + (2 * rows - up + down) * delta
        share = (np.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = rows * (2 * share + delta * (1 - delta))
        gap = sign * (up - down - rows * delta)
        return float(gap - limit * np.sqrt(max(variance, 0.0)))

    def edge(outside: float, inside: float, sign: int) -> float:
        for _ in range(60):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if excess(middle, sign) > 0 else (outside, middle)
        return inside

    return edge(grid[0], grid[1], 1), edge(grid[2], grid[1], -1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for having looked at all of them (Holm 1979), in the given order."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, (len(p_values) - rank) * p_values[index])
        corrected[index] = min(running, 1.0)
    return [float(p) for p in corrected]


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """Return the differences with `p_holm` set for the table they form."""
    values = holm([d.p for d in differences])
    return [replace(d, p_holm=p) for d, p in zip(differences, values, strict=True)]


def verdict(difference: Difference) -> str:
    """Return "better", "worse", "no difference shown" or "the same": the word for second against first."""
    if difference.up == difference.down == 0:
        return "the same"
    if difference.p_holm < 1 - difference.confidence:
        return "better" if difference.value > 0 else "worse"
    return "no difference shown"


def sentence(difference: Difference, first: str = "A", second: str = "B") -> str:
    """Say in plain words what the comparison shows, and what it could not have shown."""
    d, word = difference, verdict(difference)
    scale = scale_of(d)
    unit = "points" if scale == 100 else "units"
    visible = f"a true difference smaller than about {d.visible * scale:.1f} {unit} would mostly go unseen"
    if word == "the same":
        return f"{second} scores the same as {first} on every one of {d.rows:,} rows."
    span = f"{d.confidence:.0%} interval {d.low * scale:+.1f} to {d.high * scale:+.1f}"
    if word == "no difference shown":
        return (
            f"No difference shown with {d.rows:,} rows: {second} - {first} is {d.value * scale:+.1f} {unit} "
            f"({span}, {p_text(d.p_holm)}). With this many rows {visible}."
        )
    return (
        f"{second} is {word} than {first} by {abs(d.value) * scale:.1f} {unit} on {d.rows:,} rows "
        f"({span}, {p_text(d.p_holm)}): {d.up:,} rows rose, {d.down:,} fell."
    )


def draw_differences(differences: Mapping[str, Difference], path: str | Path) -> None:
    """Draw each difference with its interval into a PNG, a line each: green where better, red where worse."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {"better": "#1f8a4c", "worse": "#c2382f"}
    figure = Figure(figsize=(6.4, 0.9 + 0.34 * len(differences)), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axvline(0, color="#9aa1ab", linewidth=1)
    for line, d in enumerate(differences.values()):
        scale, colour = scale_of(d), colours.get(verdict(d), "#5b6470")
        axes.plot([d.low * scale, d.high * scale], [line, line], color=colour, linewidth=2)
        axes.plot(d.value * scale, line, "o", color=colour, markersize=5)
    axes.set_yticks(range(len(differences)), list(differences))
    axes.invert_yaxis()
    axes.set_xlabel("second minus first, with its 95 % interval (shares in points of 100)", fontsize=8)
    axes.spines[:].set_visible(False)
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.8)
    axes.tick_params(labelsize=8, length=0)
    figure.savefig(Path(path))


def scale_of(difference: Difference) -> int:
    """Return 100 where the scores are shares, to show them in per cent, else 1."""
    return 100 if 0 <= min(difference.first, difference.second) <= max(difference.first, difference.second) <= 1 else 1


def p_text(p: float) -> str:
    """Return "p = 0.03", or "p < 0.001" where more digits would say nothing."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def join(
    first: list[dict], second: list[dict], *, names: tuple[str, str] = ("A", "B"), common: bool = False
) -> list[tuple[dict, dict]]:
    """Pair two lists of result rows by their "id", in the order of the first.

    Raises:
        InputError: the two do not hold the same rows (with `common` only: when they share fewer than two).
    """
    others = {row["id"]: row for row in second}
    pairs = [(row, others[row["id"]]) for row in first if row["id"] in others]
    if len(pairs) == len(first) == len(second):
        return pairs
    if common and len(pairs) >= 2:
        return pairs
    raise InputError(
        f"the files do not hold the same rows: {len(pairs):,} in both, {len(first) - len(pairs):,} only in "
        f"{names[0]}, {len(second) - len(pairs):,} only in {names[1]}",
        where=f"{names[0]} and {names[1]}",
        why="the difference of two models on different rows is mostly the difference of the rows",
        fix="evaluate both on the same --data and --limit"
        + (", or compare the shared rows with --common" if len(pairs) >= 2 and not common else ""),
    )


def _visible(stderr: float, rows: int, confidence: float, binary: bool) -> float:
    """Return the difference that is found with probability 0.8 at this noise.

    With 0/1 scores no exact test can call fewer than k one-sided changes significant (k = 6 at 95 %).
    """
    seen = float(stats.norm.ppf(0.5 + confidence / 2) + stats.norm.ppf(0.8)) * stderr
    if not binary:
        return seen
    fewest = next(k for k in range(1, 64) if mcnemar(k, 0) < 1 - confidence)
    return max(seen, fewest / rows)


def _chunks(resamples: int, width: int) -> list[int]:
    """Split `resamples` rows of `width` random numbers into pieces of at most `CHUNK` numbers."""
    step = max(1, CHUNK // width)
    return [min(step, resamples - start) for start in range(0, resamples, step)]
