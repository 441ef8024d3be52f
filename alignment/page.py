"""One self-contained HTML page: text, tables, pictures, answers side by side; light and dark."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

STYLE = """
:root { --paper: #fff; --ink: #1d2127; --soft: #626b77; --line: #e3e6ea; --card: #f6f7f9; --accent: #2563c9;
  --good: #18794e; --bad: #c0362c; --mark: #d9720f; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #17191d; --ink: #e4e6ea; --soft: #98a1ad;
  --line: #33373e; --card: #1f2227; --accent: #6ea8fe; --good: #58c48f; --bad: #f08379; --mark: #f0a35e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; } .lead { font-size: 1.08rem; color: var(--soft); }
.soft, footer, figcaption { color: var(--soft); font-size: .875rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: .94rem; }
th { font-weight: 600; text-align: left; border-bottom: 2px solid var(--line); vertical-align: bottom; }
td { border-bottom: 1px solid var(--line); vertical-align: top; }
th, td { padding: .4rem 1.1rem .4rem 0; } .n { text-align: right; white-space: nowrap; }
.wide { overflow-x: auto; } .good { color: var(--good); } .bad { color: var(--bad); }
ul.verdicts { padding-left: 1.1rem; max-width: 46rem; } ul.verdicts li { margin: .35rem 0; }
code, pre { font: .875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem;
  overflow-x: auto; }
.asked { border: 1px solid var(--line); border-radius: 8px; margin: 1rem 0; overflow: hidden; }
.asked > p { background: var(--card); margin: 0; max-width: none; padding: .65rem 1rem; font-weight: 600; }
.asked > p span { font-weight: 400; color: var(--soft); }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); }
.answers > div { padding: .65rem 1rem .8rem; border-top: 1px solid var(--line);
  border-left: 1px solid var(--line); margin-left: -1px; overflow-wrap: anywhere; white-space: pre-wrap; }
.answers h3 { font-size: .8rem; margin: 0 0 .25rem; color: var(--soft); font-weight: 600; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; border-radius: 6px; }
svg { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
svg text { fill: var(--ink); font-size: 13px; } svg text.soft { fill: var(--soft); font-size: 12px; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
"""


class Html(str):
    """Text that is HTML already; everything else is escaped."""


def to_html(value: object) -> str:
    """Return a value as HTML."""
    return value if isinstance(value, Html) else escape(str(value))


def page(title: str, lead: str, sections: Sequence[tuple[str, Sequence[str]]], footer: str = "") -> str:
    """Return the document.

    Args:
        title: heading and title of the window.
        lead: the sentences under it.
        sections: (heading, parts made by the functions below).
        footer: small print.
    """
    body = "".join(
        f"<section><h2>{to_html(head)}</h2>{''.join(map(to_html, parts))}</section>" for head, parts in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{to_html(title)}</title><style>{STYLE}</style></head><body><main><h1>{to_html(title)}</h1>"
        f'<p class="lead">{to_html(lead)}</p>{body}<footer>{to_html(footer)}</footer></main></body></html>\n'
    )


def paragraph(text: object, soft: bool = False) -> Html:
    """Return a paragraph."""
    return Html(f"<p{' class=soft' if soft else ''}>{to_html(text)}</p>")


def bullets(items: Sequence[object]) -> Html:
    """Return a list of sentences."""
    return Html(f'<ul class="verdicts">{"".join(f"<li>{to_html(item)}</li>" for item in items)}</ul>')


def code(text: str) -> Html:
    """Return lines to type."""
    return Html(f"<pre>{escape(text)}</pre>")


def table(head: Sequence[object], rows: Sequence[Sequence[object]], texts: int = 1) -> Html:
    """Return a table; the first `texts` columns are words, the others numbers."""

    def cells(values: Sequence[object], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if i >= texts else ''}>{to_html(value)}</{tag}>" for i, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return Html(f'<div class="wide"><table><tr>{cells(head, "th")}</tr>{body}</table></div>')


def picture(light: str | Path, dark: str | Path | None = None, caption: str = "") -> Html:
    """Return a PNG inside the page, at two thirds of its size, with another for dark screens."""
    width = int.from_bytes(Path(light).read_bytes()[16:20], "big")  # of the header

    def source(path: str | Path) -> str:
        return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()

    other = f'<source media="(prefers-color-scheme: dark)" srcset="{source(dark)}">' if dark else ""
    image = f'<img width="{width * 2 // 3}" alt="{escape(caption)}" src="{source(light)}">'
    return Html(f"<figure><picture>{other}{image}</picture><figcaption>{escape(caption)}</figcaption></figure>")


def intervals(rows: Sequence[tuple[str, float, float, float]], unit: str = "%") -> Html:
    """Draw (label, value, low, high), all from 0 to 1, as a bar with its interval per row."""
    left, width, step = 90, 560, 38
    height = step * len(rows) + 34
    parts = []
    for tick in range(0, 101, 20):
        x = left + width * tick / 100
        parts.append(
            f'<line x1="{x}" x2="{x}" y1="0" y2="{height - 30}" stroke="var(--line)"/>'
            f'<text class="soft" x="{x}" y="{height - 12}" text-anchor="middle">{tick} {unit}</text>'
        )
    for i, (label, value, low, high) in enumerate(rows):
        y = step * i + 20
        a, b, c = (left + width * min(max(v, 0), 1) for v in (value, low, high))
        parts.append(
            f'<text x="0" y="{y + 5}" font-weight="600">{escape(label)}</text>'
            f'<rect x="{left}" y="{y - 9}" width="{max(a - left, 1):.1f}" height="18" rx="2"'
            ' fill="var(--accent)" opacity=".35"/>'
            f'<line x1="{b:.1f}" x2="{c:.1f}" y1="{y}" y2="{y}" stroke="var(--accent)" stroke-width="2.5"/>'
            f'<circle cx="{a:.1f}" cy="{y}" r="4.5" fill="var(--accent)"/>'
            f'<text x="{c + 10:.1f}" y="{y + 5}">{value * 100:.1f} {unit}</text>'
        )
    label = "; ".join(f"{name}: {value:.1%}" for name, value, _, _ in rows)
    size = f'viewBox="0 0 {left + width + 70} {height}" width="{left + width + 70}"'
    return Html(f'<svg {size} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>')


def side_by_side(question: str, wanted: str, answers: Sequence[tuple[str, str, bool]]) -> Html:
    """Show a question with (model, answer, is it right) next to each other."""
    marks = {True: "<span class=good>right</span>", False: "<span class=bad>wrong</span>"}
    cells = "".join(
        f"<div><h3>{escape(name)} {marks[bool(right)]}</h3>{escape(text) or '<span class=soft>(nothing)</span>'}</div>"
        for name, text, right in answers
    )
    return Html(
        f'<div class="asked"><p>{escape(question)} <span>answer: {escape(wanted)}</span></p>'
        f'<div class="answers">{cells}</div></div>'
    )
