"""The one form in which bad input is reported: what is wrong, where, why it matters, the fix."""


class InputError(ValueError):
    """Bad input from the user: a flag, a file, a row, a model folder.

    Args:
        what: what is wrong, one sentence without the final stop.
        where: the place: file, row, column, key or flag.
        why: why it matters.
        fix: what to type or to change.

    Scripts print it without a traceback and exit with status 2 (see `alignment.config.parse`).
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = ""):
        self.what, self.where, self.why, self.fix = what, where, why, fix
        lines = [what]
        lines += [f"  {name:<5} {text}" for name, text in (("where", where), ("why", why), ("fix", fix)) if text]
        super().__init__("\n".join(lines))


def nearest(name: str, known: list[str]) -> str:
    """Return the known name most like `name` for a "did you mean", or an empty string when none is close."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return close[0] if close else ""
