"""The ledger: what happened to every row and token between the file and the trainer. It has to add up."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

SPLITS = ("train", "test", "unsampled")


class LedgerError(AssertionError):
    """The books do not balance: a defect of this program, not of the data."""


@dataclass
class Account:
    """One source's rows and tokens.

    Attributes:
        read: rows in the source. repeated: rows used more than once, or split into two (an unpaired pair).
        kept: rows now in "train", in "test", or "unsampled" (left out by a weight or a row count).
        dropped: cause -> [rows, tokens]. cut: (split, cause) -> [rows, tokens lost].
        tokens: split -> [tokens that reach the trainer, tokens that carry loss].
    """

    read: int = 0
    repeated: int = 0
    kept: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    dropped: dict[str, list[int]] = field(default_factory=dict)
    cut: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)


class Ledger:
    """Counts per source; `check` says whether rows in equal rows accounted for."""

    def __init__(self):
        self.accounts: dict[str, Account] = {}
        self.dropped: list[dict[str, Any]] = []
        self.pad: dict[str, list[int]] = {}

    def account(self, source: str) -> Account:
        """Return the account of a source, opening it when it is new."""
        return self.accounts.setdefault(source, Account())

    def read(self, source: str, n: int) -> None:
        """Book `n` rows read from a source."""
        self.account(source).read += n

    def repeat(self, source: str, n: int) -> None:
        """Book `n` more uses of rows of a source."""
        self.account(source).repeated += n

    def keep(self, source: str, split: str, n: int) -> None:
        """Book `n` rows as given to "train" or "test", or as "unsampled"."""
        self.account(source).kept[split] += n

    def drop(self, source: str, split: str | None, cause: str, rows: list[int], tokens: int = 0) -> None:
        """Book rows as dropped.

        Args:
            source: the source.
            split: where the rows had been booked with `keep` (they leave it), or None before the split.
            cause: why, in a few words; the same words for the same cause.
            rows: their numbers in the source.
            tokens: tokens lost with them, where they were tokenised.
        """
        account = self.account(source)
        if split is not None:
            account.kept[split] -= len(rows)
        total = account.dropped.setdefault(cause, [0, 0])
        total[0] += len(rows)
        total[1] += tokens
        self.dropped += [{"source": source, "row": row, "cause": cause} for row in rows]

    def cut(self, source: str, split: str, cause: str, rows: int, tokens: int) -> None:
        """Book `rows` rows that stay, `tokens` tokens shorter in all."""
        total = self.account(source).cut.setdefault((split, cause), [0, 0])
        total[0] += rows
        total[1] += tokens

    def tokens(self, source: str, split: str, tokens: int, trained: int) -> None:
        """Book tokens that reach the trainer, and how many of them carry loss."""
        total = self.account(source).tokens.setdefault(split, [0, 0])
        total[0] += tokens
        total[1] += trained

    def padding(self, split: str, computed: int, real: int) -> None:
        """Book token positions computed in batches, and how many of them are no padding."""
        total = self.pad.setdefault(split, [0, 0])
        total[0] += computed
        total[1] += real

    def check(self) -> None:
        """Raise LedgerError when a source does not add up."""
        for source, a in self.accounts.items():
            out = sum(a.kept.values()) + sum(rows for rows, _ in a.dropped.values())
            if a.read + a.repeated != out:
                raise LedgerError(f"{source}: {a.read} read + {a.repeated} repeated != {out} accounted for: {a}")
            numbers = [a.read, a.repeated, *a.kept.values()]
            numbers += [n for pair in (*a.dropped.values(), *a.cut.values(), *a.tokens.values()) for n in pair]
            if min(numbers) < 0:
                raise LedgerError(f"{source}: a count below zero: {a}")
            if any(trained > tokens for tokens, trained in a.tokens.values()):
                raise LedgerError(f"{source}: more trained tokens than tokens: {a.tokens}")
        for split, (computed, real) in self.pad.items():
            if real > computed:
                raise LedgerError(f"{split}: {real} real tokens in {computed} computed ones")

    def rows(self, split: str) -> int:
        """Return how many rows "train", "test" or "unsampled" holds over all sources."""
        return sum(a.kept[split] for a in self.accounts.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the whole ledger as JSON-ready numbers."""
        sources = {}
        for name, a in self.accounts.items():
            sources[name] = {
                "read": a.read,
                "repeated": a.repeated,
                **a.kept,
                "dropped": {c: {"rows": r, "tokens": t} for c, (r, t) in a.dropped.items()},
                "cut": [{"split": s, "cause": c, "rows": r, "tokens": t} for (s, c), (r, t) in a.cut.items()],
                "tokens": {s: {"tokens": t, "trained": m} for s, (t, m) in a.tokens.items()},
            }
        padding = {s: {"computed": c, "real": r} for s, (c, r) in self.pad.items()}
        return {"sources": sources, "padding": padding}

    def dropped_rows(self) -> list[dict[str, Any]]:
        """Return {source, row, cause} of every dropped row, in the order they were dropped."""
        return list(self.dropped)

    def table(self) -> "Table":
        """Return a table of at most 100 columns; `caption` lists the causes."""
        from rich.table import Table

        table = Table(title="What happened to the rows")
        table.add_column("source", max_width=32, overflow="fold")
        heads = ("read", "repeated", "train", "test", "unused", "dropped", "cut", "trained")
        shown = [h for h in heads if h in ("read", "train") or any(self.cells(a)[h] for a in self.accounts.values())]
        for head in shown:
            table.add_column(head, justify="right", no_wrap=True)
        for name, a in self.accounts.items():
            table.add_row(name, *(self.cells(a)[h] or "0" for h in shown))
        return table

    def cells(self, a: Account) -> dict[str, str]:
        """Return one account's numbers as text; empty where there is nothing to say."""
        total, trained = (sum(pair[i] for pair in a.tokens.values()) for i in (0, 1))
        numbers = {
            "read": a.read,
            "repeated": a.repeated,
            "train": a.kept["train"],
            "test": a.kept["test"],
            "unused": a.kept["unsampled"],
            "dropped": sum(rows for rows, _ in a.dropped.values()),
            "cut": sum(rows for rows, _ in a.cut.values()),
        }
        cells = {name: f"{n:,}" if n else "" for name, n in numbers.items()}
        return cells | {"trained": f"{trained / total:.0%}" if trained else ""}

    def caption(self) -> str:
        """Return the causes, tokens and padding in a few lines."""
        lines = []
        for name, a in self.accounts.items():
            lines += [f"{name}: {rows:,} rows dropped, {cause}" for cause, (rows, _) in a.dropped.items()]
            lines += [f"{name}: {r:,} rows of {s} cut by {t:,} tokens, {c}" for (s, c), (r, t) in a.cut.items()]
        for split in ("train", "test"):
            pairs = [a.tokens[split] for a in self.accounts.values() if split in a.tokens]
            if pairs:
                total, trained = (sum(p[i] for p in pairs) for i in (0, 1))
                part = f", {trained:,} of them trained on" if trained else ""  # none of prompts
                lines.append(f"{split}: {total:,} tokens{part}")
        for split, (computed, real) in self.pad.items():
            times = computed / max(real, 1)
            lines.append(f"{split}: {computed:,} tokens computed for {real:,} real ones, {times:.2f} x")
        return "\n".join(lines)
