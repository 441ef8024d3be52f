"""What models are asked: rows with a prompt and what checks the answer, worked examples, and ways to word them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import InputError
from alignment.report import text_hash, unique_ids
from alignment.rewards import verifier

TESTS = ("test", "tests", "test_list")
SHOWABLE = ("exact", "number", "contains", "f1", "gsm8k")  # verifiers whose reference is an answer to show
PLACE = "{prompt}"


@dataclass(frozen=True)
class Benchmark:
    """How a known set of questions is put: lm-eval's wording, verifier and ends of answers.

    Attributes:
        wording: the text around the question.
        verifier: for its rows.
        stop_strings: an answer ends before the first of these.
        max_new_tokens: where an answer is cut.
    """

    wording: str
    verifier: str
    stop_strings: tuple[str, ...]
    max_new_tokens: int


BENCHMARKS = {
    "gsm8k": Benchmark(f"Question: {PLACE}\nAnswer:", "gsm8k", ("Question:",), 256),
    "humaneval": Benchmark(PLACE, "code", ("\nclass", "\ndef", "\n#", "\nif", "\nprint"), 1024),
}


def read_questions(spec: str, check: str, unanswered: bool = False) -> list[dict[str, Any]]:
    """Return the rows of --data as {id, prompt, answer, verifier, task, source, row}, checked.

    Args:
        spec: a file, a folder (its test split unless `@train` picks another), a hub id or a declaration.
        check: the verifier of rows that name none.
        unanswered: rows without a reference are taken as well, with an empty one.

    Raises:
        InputError: a row without a reference answer or tests, or one that its verifier cannot use.
    """
    from alignment.data import load_rows

    data = load_rows(spec, "prompt")
    rows: list[dict[str, Any]] = []
    for raw in data:
        where = f"{raw['source']}, row {raw['row']}"
        row = {k: raw.get(k) for k in ("prompt", "task", "source", "row")}
        if unanswered and "answer" not in raw:
            raw = {**raw, "answer": ""}
        row |= reference(raw, check, where, spec)
        verifier(row["verifier"], where=f"{where}, column verifier")
        rows.append(row)
    ids = unique_ids(text_hash(row["prompt"], row["answer"], row["verifier"]) for row in rows)
    return [row | {"id": name} for row, name in zip(rows, ids, strict=True)]


def reference(raw: dict[str, Any], check: str, where: str, spec: str) -> dict[str, Any]:
    """Return {answer, verifier} of a row: its own, its tests (HumanEval, MBPP) or its instructions (IFEval).

    A row whose text a function body goes on with (HumanEval: an entry_point and a plain prompt) has "entry_point" too.
    """
    if raw.get("instruction_id_list") is not None:
        asked = {"instruction_id_list": raw["instruction_id_list"], "kwargs": raw.get("kwargs")}
        return {"answer": json.dumps(asked), "verifier": "ifeval"}
    tests = next((raw[name] for name in TESTS if raw.get(name)), None)
    if tests is not None:
        setup = raw.get("test_setup_code") or ""
        body = "\n".join([setup, *([tests] if isinstance(tests, str) else tests)]).strip()
        point = raw.get("entry_point")
        if point and "def check(" in body:
            body += f"\ncheck({point})"
        return {"answer": body, "verifier": "code"} | ({"entry_point": point} if point else {})
    if raw.get("entry_point") or (check == "code" and raw.get("answer") is None):
        raise InputError(
            "a row asks for code and has no tests",
            where=f"{where}, columns {', '.join(k for k, v in raw.items() if v is not None)}",
            why="code is right when it passes them",
            fix=f'a column "{TESTS[0]}" with Python assertions, or "test_list" with a list of them',
        )
    if "answer" not in raw:
        raise InputError(
            "the rows have no reference answer",
            where=f"{spec}, columns {', '.join(raw)}",
            why="an answer is right or wrong only against one",
            fix='add a column "answer" (and "verifier"), or end conversations with the assistant\'s turn',
        )
    if not isinstance(raw["answer"], str | int | float):
        raise InputError(f"the answer is {raw['answer']!r}", where=where, fix="text or a number")
    return {"answer": str(raw["answer"]), "verifier": raw.get("verifier") or check}


def read_wordings(path: str) -> dict[str, str]:
    """Return name -> wording from a YAML file: a list of texts, or a mapping of names to texts, each with {prompt}.

    Raises:
        InputError: no such file, nothing in it, or a wording without the place of the question.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}", where="--prompts", fix="a YAML list of texts") from error
    named = dict(enumerate(found, start=1)) if isinstance(found, list) else found
    if not isinstance(named, dict) or not named:
        raise InputError(f"{path} holds no wordings", where="--prompts", fix=f'a list: - "Question: {PLACE}"')
    for name, wording in named.items():
        if not isinstance(wording, str) or PLACE not in wording:
            raise InputError(
                f"wording {name} has no {PLACE}",
                where=f"{path}, --prompts",
                why="the question of the row stands there",
                fix=f'"Question: {PLACE}"',
            )
    return {str(name): wording for name, wording in named.items()}


def examples_of(data: str) -> str:
    """Return where the examples for `data` are: its own training split, or the training file beside a file.

    Raises:
        InputError: there is no such file.
    """
    path = Path(data).expanduser()
    if not path.is_file() or path.suffix in (".yaml", ".yml"):
        return f"{data}@train"
    beside = sorted(p for p in path.parent.iterdir() if p.name.split(".")[0] == "train" and p.suffix == path.suffix)
    if not beside or beside[0] == path:
        raise InputError(
            f"there is no train{path.suffix} beside {path}",
            where="--shots",
            why="examples out of the rows that are asked would give their answers away",
            fix="--fewshot_data FILE",
        )
    return str(beside[0])


def choose_shots(spec: str, check: str, count: int, asked: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the first `count` questions of a source with their answers: the same examples before every question.

    Rows with more than one user's turn are passed over: an example is one question and one answer.

    Raises:
        InputError: fewer rows than that, one of them is asked as well, or its reference is no answer to show.
    """
    rows = [row for row in read_questions(spec, check) if single(row["prompt"]) is not None]
    if count > len(rows):
        raise InputError(
            f"{count} examples wanted, and {spec} has {len(rows):,} rows of one question",
            where="--shots",
            fix=f"--shots {len(rows)} or fewer, or another --fewshot_data",
        )
    twins = {row["id"].partition("#")[0] for row in asked} & {row["id"] for row in rows[:count]}
    if twins:
        raise InputError(
            f"{len(twins)} of the {count} examples are asked as well",
            where=f"--fewshot_data {spec}",
            why="the answer would stand in the prompt",
            fix="examples from the training split",
        )
    hidden = next((row for row in rows[:count] if row["verifier"] not in SHOWABLE), None)
    if hidden:
        raise InputError(
            f"an example has the verifier {hidden['verifier']!r}, whose reference is no answer",
            where=f"{spec}, row {hidden['row']}",
            why="an example shows what is to be answered",
            fix=f"examples with {', '.join(SHOWABLE)}",
        )
    return [(single(row["prompt"]), row["answer"]) for row in rows[:count]]


def single(prompt: str | list[dict[str, Any]]) -> str | None:
    """Return the question of a prompt with one user's turn, or a text; None for a longer conversation."""
    if isinstance(prompt, str):
        return prompt
    users = [turn["content"] for turn in prompt if turn["role"] == "user"]
    return users[0] if len(users) == 1 and all(t["role"] in ("user", "system") for t in prompt) else None


@dataclass(frozen=True)
class Asking:
    """How a row's prompt is put to the model.

    Attributes:
        wording: text with {prompt}; put around a text, or the last user's turn of a conversation.
        shots: (question, answer) of the examples in front.
        system: a system message for conversations that have none.
        chat: ask what is plain text as a user's turn.
        plain: ask single questions as text to go on with, not as a conversation (a benchmark's own way).
    """

    wording: str = PLACE
    shots: tuple[tuple[str, str], ...] = ()
    system: str = ""
    chat: bool = False
    plain: bool = False

    def __call__(self, prompt: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        """Return the prompt as text or turns. Texts are joined as in lm-eval: " " before answers, a line between."""
        if self.plain and single(prompt) is not None:
            prompt = single(prompt)
        if isinstance(prompt, str):
            text = "\n\n".join([*(f"{self.word(q)} {a}" for q, a in self.shots), self.word(prompt)])
            if not self.chat:
                return text
            turns = [{"role": "user", "content": text}]
        else:
            lead = prompt[:1] if prompt[0]["role"] == "system" else []
            shown = [(("user", self.word(q)), ("assistant", a)) for q, a in self.shots]
            examples = [{"role": role, "content": said} for pair in shown for role, said in pair]
            last = {**prompt[-1], "content": self.word(prompt[-1]["content"])}
            turns = [*lead, *examples, *prompt[len(lead) : -1], last]
        if self.system and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.system}, *turns]
        return turns

    def word(self, question: str) -> str:
        """Return the question in its wording."""
        return self.wording.replace(PLACE, question)
