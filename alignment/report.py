"""Result files of every evaluation (one JSON schema), their tables, and the curves of a training run."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from alignment.errors import InputError

SCHEMA = 1
TYPES = {
    "task": str, "version": int, "data": str, "model": str, "prompt_hash": str, "settings": dict,
    "rows": list, "metrics": dict, "versions": dict, "seconds": (int, float),
}  # fmt: skip
# What a curve shows, best first; "eval_" curves join the panel of their training twin.
PANELS = (
    "loss", "rewards/accuracies", "rewards/margins", "reward", "matthews_correlation", "exact_match", "f1", "pearsonr",
    "accuracy", "margin", "mean_token_accuracy", "kl",
)  # fmt: skip
NO_CURVE = {"epoch", "step", "total_flos", "train_loss"}
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass
class Result:
    """What one model scored on one set of rows.

    Attributes:
        task, version: what was measured; the version rises when the same answers would be scored otherwise.
        data: the rows as they were named on the command line.
        model, run: the checkpoint, and the id of the run that made it (None when it has no run.json).
        prompt_hash: hash of the wording around each row; models are compared on the same wording only.
        settings: how answers were made (greedy or sampled, limits, seed, dtype).
        rows: per row at least "id" (the same for every model) and "score" (higher is better).
        metrics: name -> {"value", "stderr", "n", "unit"}; stderr is None for one row; unit "share" or a word.
        versions: of the packages that made it.
        seconds: wall time of the measurement without loading.
        contamination: what `alignment.contamination.check` found, None when it could not look.
    """

    task: str
    version: int
    data: str
    model: str
    run: str | None
    prompt_hash: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    metrics: dict[str, dict[str, Any]]
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    contamination: dict[str, Any] | None = None


def mean_metric(values: Sequence[float], unit: str = "share") -> dict[str, Any]:
    """Return the mean of per-row values with its standard error, sd / sqrt(n) with n - 1 in the sd."""
    n = len(values)
    if n == 0:
        raise ValueError("the mean of no rows")
    mean = math.fsum(values) / n
    spread = math.fsum((v - mean) ** 2 for v in values)
    stderr = math.sqrt(spread / (n - 1) / n) if n > 1 else None
    return {"value": mean, "stderr": stderr, "n": n, "unit": unit}


def ratio_metric(tops: Sequence[float], bottoms: Sequence[float], unit: str) -> dict[str, Any]:
    """Return sum(tops) / sum(bottoms) with its standard error over the rows (the ratio estimator's, linearised)."""
    n, below = len(tops), math.fsum(bottoms)
    if n == 0 or below <= 0:
        raise ValueError("a ratio over nothing")
    value = math.fsum(tops) / below
    spread = math.fsum((a - value * b) ** 2 for a, b in zip(tops, bottoms, strict=True))
    return {"value": value, "stderr": math.sqrt(spread * n / (n - 1)) / below if n > 1 else None, "n": n, "unit": unit}


def pooled_metric(groups: Sequence[Sequence[float]], unit: str = "share") -> dict[str, Any]:
    """Return the mean over all values of several groups, with the spread within the groups as its error.

    As lm-eval's `pooled_sample_stderr` for groups weighted by size: sqrt(sum of squares within / (n - groups) / n). A
    group of one value has no spread to pool: then the error is that of `mean_metric`.
    """
    values = [value for group in groups for value in group]
    found = mean_metric(values, unit)
    if min(map(len, groups)) < 2:
        return found
    within = math.fsum((v - math.fsum(group) / len(group)) ** 2 for group in groups for v in group)
    return found | {"stderr": math.sqrt(within / (len(values) - len(groups)) / len(values))}


def text_hash(*parts: Any) -> str:
    """Return 16 hex digits that depend on the parts alone (as JSON with sorted keys)."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def unique_ids(names: Iterable[str]) -> list[str]:
    """Return the names in their order, "#2" added to the second of two that are equal, "#3" to the third."""
    seen: dict[str, int] = {}
    ids = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        ids.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return ids


def package_versions(*names: str) -> dict[str, str]:
    """Return name -> installed version of the packages."""
    from importlib.metadata import version

    return {name: version(name) for name in names}


def run_id(model: str | Path) -> str | None:
    """Return the id of the run that made a checkpoint folder: a hash of its run.json, None without one."""
    file = Path(model) / "run.json"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else None


def read_run(model: str | Path) -> dict[str, Any]:
    """Return what a recipe wrote about the run that made a checkpoint folder; nothing where no recipe made it."""
    file = Path(model) / "run.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def check_free(path: str | Path, *, overwrite: bool = False) -> Path:
    """Raise InputError when a result could not be written to `path` later, before any work is done for it."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder", where="--output", fix=f"--output {path / 'results.json'}")
    if path.exists() and not overwrite:
        raise InputError(
            f"{path} exists",
            where="--output",
            why="it may be a result you need",
            fix="another name, or --overwrite",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{path.parent} cannot be written to: {error.strerror}", where="--output") from error
    return path


def write_text(path: str | Path, text: str) -> None:
    """Write the file as a whole or not at all: a reader never sees half of it."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_result(result: Result, path: str | Path) -> None:
    """Write a result file: the head indented, one row per line, so that it can be read and diffed."""
    content = {"schema": SCHEMA, **asdict(result)}
    rows = content.pop("rows")
    head = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    write_text(path, f'{head[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')


def read_result(path: str | Path) -> Result:
    """Read a result file.

    Raises:
        InputError: no such file, no JSON, another schema, a field missing or of another type, an id twice, a
            score that is no number.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no result file {path}", fix="the --output of a script in eval/") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a result file: {error}") from error
    if not isinstance(content, dict) or "schema" not in content:
        raise InputError(f'{path} is not a result file: it has no "schema"', fix="give a file of an eval/ script")
    if content["schema"] != SCHEMA:
        raise InputError(
            f"{path} has schema {content['schema']}, this version reads {SCHEMA}",
            fix="evaluate the model again",
        )
    for name, kind in TYPES.items():
        if name not in content or not isinstance(content[name], kind):
            raise InputError(
                f'"{name}" is missing or of the wrong type', where=str(path), fix="evaluate the model again"
            )
    _check_rows(content["rows"], path)
    _check_metrics(content["metrics"], path)
    optional = {name: content.get(name) for name in ("run", "contamination")}
    return Result(**optional, **{name: content[name] for name in TYPES})


def _check_rows(rows: list, path: Path) -> None:
    """Raise InputError for the first row that a comparison could not use."""
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict) or not isinstance(row.get("id"), str):
            raise InputError('a row has no "id"', where=where, why="rows are compared by their id")
        if row["id"] in seen:
            raise InputError(f"the id {row['id']} is there twice", where=f"{where} and row {seen[row['id']]}")
        seen[row["id"]] = number
        score = row.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise InputError(f"the score is {score!r}, not a finite number", where=where)


def _check_metrics(metrics: dict, path: Path) -> None:
    """Raise InputError for the first aggregate without a value, a stderr (or null) and n."""
    for name, metric in metrics.items():
        fine = (
            isinstance(metric, dict)
            and isinstance(metric.get("value"), int | float)
            and isinstance(metric.get("n"), int)
            and isinstance(metric.get("stderr", ""), int | float | None)
        )
        if not fine:
            raise InputError(
                f"the metric {name!r} has no value, stderr and n",
                where=str(path),
                fix="evaluate the model again",
            )


def show(metric: Mapping[str, Any] | None) -> str:
    """Return "63.2 ± 2.4", in per cent for shares; "-" when it was not measured. `digits` after the point, or one."""
    if metric is None:
        return "-"
    scale, digits = 100 if metric.get("unit", "share") == "share" else 1, metric.get("digits", 1)
    form = ".1e" if abs(metric["value"] * scale) >= 1e6 else f".{digits}f"
    error = "" if metric["stderr"] is None else f" ± {metric['stderr'] * scale:{form}}"
    return f"{metric['value'] * scale:{form}}{error}"


def results_table(results: Mapping[str, Result], widest: int = 4, refused: Sequence[str] = ()) -> Table:
    """Return the metrics of models on the same rows: a column per model, or beyond `widest` a row per model.

    Shares are in per cent; the number behind ± is the standard error. A metric in `refused` is not comparable between
    these models, and its numbers are not shown side by side.
    """

    def cell(name: str, result: Result) -> str:
        return "not comparable" if name in refused else show(result.metrics.get(name))

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    names = list(dict.fromkeys(name for result in results.values() for name in result.metrics))
    if len(results) > widest:
        names = [name for name in names if "/" not in name][:4]
        table.add_column("model", overflow="fold")
        for name in names:
            table.add_column(name, justify="right")
        for model, result in results.items():
            table.add_row(model, *(cell(name, result) for name in names))
        return table
    table.add_column("", overflow="fold")
    table.add_column("rows", justify="right", style="dim")
    for model in results:
        table.add_column(model, justify="right", overflow="fold")
    previous = ""
    for name in names:
        metrics = [result.metrics.get(name) for result in results.values()]
        counts = {metric["n"] for metric in metrics if metric}
        group = name.partition("/")[0] if "/" in name else ""
        if group != previous:
            table.add_section()
        previous = group
        label = (
            name if metrics[0] is None or metrics[0].get("unit", "share") == "share" else _with_unit(name, metrics[0])
        )
        cells = [cell(name, result) for result in results.values()]
        table.add_row(label, "/".join(f"{c:,}" for c in sorted(counts)), *cells)
    return table


def _with_unit(name: str, metric: Mapping[str, Any]) -> str:
    """Return the metric's name with its unit, unless it says it already."""
    return name if metric["unit"] in name else f"{name} ({metric['unit']})"


def curve_series(log_history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Sort a Trainer's log into panels: {"loss": {"train": [(step, value), …], "held out": […]}, …}."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for entry in log_history:
        for key, value in entry.items():
            base = key.removeprefix("eval_")
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if number and base in PANELS and key not in NO_CURVE and "step" in entry:
                which = "held out" if key != base else "train"
                panels.setdefault(base, {}).setdefault(which, []).append((entry["step"], value))
    return {name: panels[name] for name in PANELS if name in panels}


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return the values as a row of blocks, averaged down to at most `width` of them."""
    if not values:
        return ""
    width = min(width, len(values))
    cells = [
        values[i * len(values) // width : max((i + 1) * len(values) // width, i * len(values) // width + 1)]
        for i in range(width)
    ]
    means = [sum(cell) / len(cell) for cell in cells]
    low, high = min(means), max(means)
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round((m - low) / (high - low) * top) if high > low else 0] for m in means)


def draw_curves(
    log_history: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "", dark: bool = False
) -> bool:
    """Draw loss and metrics of a run into a PNG; return False, and write nothing, when there are no numbers.

    Args:
        log_history: `trainer.state.log_history`, or the same list from `trainer_state.json`.
        path: the PNG to write.
        title: over the picture.
        dark: for a page with a dark background.
    """
    panels = dict(list(curve_series(log_history).items())[:3])
    if not panels:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, paper, grid = ("#d8dbe0", "#17191d", "#33373e") if dark else ("#33383f", "#ffffff", "#e4e7eb")
    colours = {"train": "#6ea8fe" if dark else "#2563c9", "held out": "#f0a35e" if dark else "#d9720f"}
    columns = len(panels)
    figure = Figure(figsize=(3.4 * max(columns, 2), 2.7), dpi=144, facecolor=paper, layout="constrained")
    FigureCanvasAgg(figure)
    for index, (name, series) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, columns, index, facecolor=paper)
        for which, points in series.items():
            few = len(points) < 12
            axes.plot(
                *zip(*points, strict=True), color=colours[which], label=which, linewidth=1.7,
                marker="o" if few else None, markersize=3.5,
            )  # fmt: skip
        axes.set_title(name, loc="left", fontsize=10, color=ink)
        axes.set_xlabel("step", fontsize=8, color=ink)
        axes.grid(axis="y", color=grid, linewidth=0.8)
        axes.spines[:].set_visible(False)
        axes.tick_params(colors=ink, labelsize=8, length=0)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=ink)
    if title:
        figure.suptitle(title, fontsize=11, color=ink, x=0.01, ha="left")
    figure.savefig(Path(path), facecolor=paper)
    return True
