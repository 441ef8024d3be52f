"""Result files survive the way to the disk and back, bad ones are refused, tables fit, curves are drawn."""

import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from alignment import page
from alignment.errors import InputError
from alignment.report import (
    Result,
    check_free,
    curve_series,
    draw_curves,
    mean_metric,
    read_result,
    results_table,
    run_id,
    show,
    sparkline,
    text_hash,
    write_result,
    write_text,
)


def make(**changes) -> Result:
    rows = [{"id": f"r{i}", "score": float(i % 2), "text": 'a "quoted"\nline, é'} for i in range(6)]
    fields = {
        "task": "generate", "version": 1, "data": "rows.jsonl", "model": "m", "run": None, "prompt_hash": "h",
        "settings": {"seed": 0}, "rows": rows, "metrics": {"score": mean_metric([r["score"] for r in rows])},
        "versions": {"torch": "2"}, "seconds": 1.5,
    }  # fmt: skip
    return Result(**{**fields, **changes})


def test_a_result_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "r.json"
    for result in (make(), make(run="abc"), make(rows=[], metrics={})):
        write_result(result, path)
        assert read_result(path) == result
    assert json.loads(path.read_text())["schema"] == 1


def test_one_row_is_one_line(tmp_path):
    write_result(make(), tmp_path / "r.json")
    lines = (tmp_path / "r.json").read_text().splitlines()
    assert sum('"id": "r' in line for line in lines) == 6
    assert json.loads(lines[-3].strip().rstrip(","))["id"] == "r5"


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "r.json"
    write_result(make(), path)
    before = path.read_text()
    with pytest.raises(ValueError):
        write_result(make(seconds=math.nan), path)
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("schema"), 'no "schema"'),
        (lambda c: c.update(schema=2), "has schema 2, this version reads 1"),
        (lambda c: c.pop("metrics"), '"metrics" is missing'),
        (lambda c: c.update(rows={}), '"rows" is missing or of the wrong type'),
        (lambda c: c["rows"][1].pop("id"), "row 2"),
        (lambda c: c["rows"][2].update(id="r0"), "r0 is there twice"),
        (lambda c: c["rows"][3].update(score=True), "True, not a finite number"),
        (lambda c: c["rows"][3].update(score="1"), "'1', not a finite number"),
        (lambda c: c["rows"][3].pop("score"), "None, not a finite number"),
        (lambda c: c["metrics"].update(score={"value": 1}), "metric 'score'"),
    ],
)
def test_a_broken_result_file_is_refused(tmp_path, change, message):
    path = tmp_path / "r.json"
    write_result(make(), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        read_result(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1, 2", "[1]", "\xff"])
def test_what_is_no_result_file_is_refused(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="not a result file"):
        read_result(path)
    with pytest.raises(InputError, match="no result file"):
        read_result(tmp_path / "absent.json")


def test_check_free(tmp_path):
    path = tmp_path / "new" / "folder" / "r.json"
    assert check_free(path) == path and path.parent.is_dir()
    path.write_text("x")
    with pytest.raises(InputError, match="exists"):
        check_free(path)
    assert check_free(path, overwrite=True) == path
    with pytest.raises(InputError, match="is a folder"):
        check_free(tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        check_free(path / "below" / "a_file.json")


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50))
def test_mean_metric_is_numpys(values):
    metric = mean_metric(values)
    assert metric["value"] == pytest.approx(np.mean(values), abs=1e-6)
    assert metric["stderr"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)), abs=1e-6)


def test_mean_of_one_row_has_no_error():
    assert mean_metric([1.0]) == {"value": 1.0, "stderr": None, "n": 1, "unit": "share"}
    assert show(mean_metric([1.0])) == "100.0"
    assert show(mean_metric([0, 1, 1, 0])) == "50.0 ± 28.9"
    assert show(mean_metric([10, 12], unit="tokens")) == "11.0 ± 1.0"
    assert show(None) == "-"


def test_text_hash_depends_on_content_and_not_on_key_order():
    assert text_hash({"a": 1, "b": 2}) == text_hash({"b": 2, "a": 1})
    assert len({text_hash("a", "b"), text_hash("ab"), text_hash("b", "a"), text_hash(["a", "b"])}) == 4


def test_run_id_follows_run_json(tmp_path):
    assert run_id(tmp_path) is None
    (tmp_path / "run.json").write_text("{}")
    first = run_id(tmp_path)
    (tmp_path / "run.json").write_text('{"seed": 1}')
    assert first and run_id(tmp_path) != first


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_tables_fit_a_hundred_columns(count):
    metrics = {name: mean_metric([0.0, 1.0, 1.0]) for name in ("score", "exact", "stopped")}
    metrics["answer length"] = mean_metric([10, 20], unit="tokens")
    metrics |= {f"score/a_task_with_a_long_name_{i}": mean_metric([0, 1]) for i in range(3)}
    results = {f"a-model-with-a-long-name-{i}": make(metrics=metrics) for i in range(count)}
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table(results))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("66.7 ± 33.3") == 3 * count
    assert "15.0 ± 5.0" in text


LOG = [
    {"step": 1, "loss": 2.0, "learning_rate": 1e-3, "epoch": 0.1, "mean_token_accuracy": 0.2},
    {"step": 2, "loss": 1.0, "epoch": 0.2, "mean_token_accuracy": math.nan},
    {"step": 2, "eval_loss": 1.5, "eval_runtime": 3.0, "epoch": 0.2},
    {"step": 2, "train_runtime": 3.0, "train_loss": 1.5, "total_flos": 1.0},
]


def test_curves_are_sorted_into_panels():
    assert curve_series(LOG) == {
        "loss": {"train": [(1, 2.0), (2, 1.0)], "held out": [(2, 1.5)]},
        "mean_token_accuracy": {"train": [(1, 0.2)]},
    }
    assert curve_series([]) == {}


def test_a_picture_is_drawn_or_said_not_to_be(tmp_path):
    path = tmp_path / "c.png"
    assert draw_curves([], path) is False and not path.exists()
    assert draw_curves(LOG, path, title="sft") and path.read_bytes()[:4] == b"\x89PNG"
    light = path.read_bytes()
    draw_curves(LOG, path, title="sft", dark=True)
    assert path.read_bytes() != light


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3, 3]) == "▁▁" and sparkline([]) == ""
    assert len(sparkline(list(range(1000)), width=40)) == 40
    assert sparkline([1.0, 3.0, 2.0, 2.0], width=2) == "▁▁"


class Links(HTMLParser):
    """Collects what a page would fetch, and the tags that are left open."""

    void = {"meta", "img", "source", "line", "rect", "circle", "br"}

    def __init__(self):
        super().__init__()
        self.fetched, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k in ("src", "href", "srcset") and not v.startswith("data:")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_is_one_file_and_shows_text_as_text(tmp_path):
    draw_curves(LOG, tmp_path / "c.png")
    nasty = "<script>alert('&')</script>"
    parts = [
        page.paragraph(nasty),
        page.bullets([nasty]),
        page.code(nasty),
        page.table([nasty, "n"], [[nasty, 1]]),
        page.picture(tmp_path / "c.png", tmp_path / "c.png", nasty),
        page.intervals([(nasty, 0.5, 0.4, 0.6), ("b", 0.0, 0.0, 1.0)]),
        page.side_by_side(nasty, nasty, [(nasty, nasty, True), ("b", "", False)]),
    ]
    text = page.page(nasty, nasty, [(nasty, parts)], nasty)
    links = Links()
    links.feed(text)
    assert links.fetched == [] and links.open == []
    assert "<script" not in text and "url(" not in text and "@import" not in text
    assert text.count("&lt;script&gt;") >= 14
    assert "prefers-color-scheme: dark" in text
