"""The words around multiple-choice questions: description, examples and question as lm-eval or the authors put them."""

import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import TemplateError

from alignment.errors import InputError
from alignment.files import decode, locate, mark_of, reason_of
from alignment.multiple_choice import LETTERS, Question
from alignment.report import text_hash

FIELDS = ("question", "A", "B", "C", "D", "subject")
BLOCK = "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:"
DESCRIPTION = "The following are multiple choice questions (with answers) about {subject}.\n\n"


@dataclass(frozen=True)
class Wording:
    """How a question is put.

    Attributes:
        name: what results call it.
        question: template of one question up to where the answer follows, with {question}, {A} … {D}, {subject}.
        description: template of what stands once in front, with {subject}.
        strip: take white space off the question's ends, as lm-eval does.
    """

    name: str
    question: str = BLOCK
    description: str = DESCRIPTION
    strip: bool = True

    def ask(self, question: Question) -> str:
        """Return one question without its answer."""
        text = question.question.strip() if self.strip else question.question
        fields = dict(zip(LETTERS, question.choices, strict=True)) | {"question": text, "subject": subject_of(question)}
        return self.question.format_map(fields)

    def describe(self, question: Question) -> str:
        """Return what stands in front of the examples."""
        return self.description.format_map({"subject": subject_of(question)})


# Tasks `mmlu_*` of lm-eval 0.4.13, and evaluate.py of hendrycks/test: its subjects begin with a space of their own,
# and questions are left as they are. (It reads the csv with pandas, where a choice "None" becomes "nan": not copied.)
WORDINGS = {
    "lm_eval": Wording("lm_eval"),
    "hendrycks": Wording("hendrycks", description=DESCRIPTION.replace(" {", "  {"), strip=False),
}


def subject_of(question: Question) -> str:
    """Return the subject in words."""
    return question.subject.replace("_", " ")


def plain_context(wording: Wording, shots: Sequence[Question], question: Question) -> str:
    """Return the prompt of a question as text: description, examples with their letters, the question.

    The continuations are " A", " B", " C", " D".
    """
    examples = [f"{wording.ask(shot)} {LETTERS[shot.answer]}\n\n" for shot in shots]
    return wording.describe(question) + "".join(examples) + wording.ask(question)


def chat_messages(
    wording: Wording, shots: Sequence[Question], question: Question, multiturn: bool = False
) -> list[dict[str, str]]:
    """Return the prompt as a conversation: the description as system message, the rest as the user's turn.

    With `multiturn` each example is a user's turn and an assistant's. As lm-eval's --apply_chat_template and
    --fewshot_as_multiturn; the continuations are "A", "B", "C", "D".
    """
    description = wording.describe(question)
    turns = [{"role": "system", "content": description}] if description else []
    if not multiturn:
        text = plain_context(wording, shots, question).removeprefix(description)
        return [*turns, {"role": "user", "content": text}]
    for shot in shots:
        turns.append({"role": "user", "content": wording.ask(shot)})
        turns.append({"role": "assistant", "content": LETTERS[shot.answer]})
    return [*turns, {"role": "user", "content": wording.ask(question)}]


def render(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str, bool]:
    """Return the conversation as text up to the answer, and whether the template took no system message.

    Such a template is given the conversation without it, as lm-eval does.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            "the tokenizer has no chat template",
            where="--apply_chat_template",
            fix="leave the flag out, or give a model that was trained on conversations",
        )
    options = {"tokenize": False, "add_generation_prompt": True}
    try:
        return tokenizer.apply_chat_template(messages, **options), False
    except TemplateError:
        return tokenizer.apply_chat_template([m for m in messages if m["role"] != "system"], **options), True


def read_wordings(file: str) -> dict[str, Wording]:
    """Return name -> wording of a YAML list: templates, or mappings of `name`, `question`, `description`.

    Raises:
        InputError: no list, an unknown key or field, a template without the question or one of its choices.
    """
    path = locate(file)
    try:
        entries = yaml.safe_load(decode(Path(path).read_bytes(), path))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no valid YAML", where=mark_of(error), why=reason_of(error)) from error
    if isinstance(entries, dict):
        entries = [{"name": str(name)} | (e if isinstance(e, dict) else {"question": e}) for name, e in entries.items()]
    if not isinstance(entries, list) or len(entries) < 2:
        raise InputError(
            f"{file} holds no two wordings",
            where="--prompts",
            fix='a list, or a mapping of names to texts: plain: "{question}\\nA. {A}\\n…"',
        )
    found: dict[str, Wording] = {}
    for number, entry in enumerate(entries, start=1):
        entry = {"question": entry} if isinstance(entry, str) else entry
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict) or set(entry) - {"name", "question", "description"}:
            raise InputError("an entry is a template, or has the keys name, question, description", where=where)
        wording = Wording(**{"name": f"wording_{number}"} | entry)
        _check(wording, where)
        if wording.name in found:
            raise InputError(f"two wordings are called {wording.name}", where=where)
        found[wording.name] = wording
    return found


def _check(wording: Wording, where: str) -> None:
    """Raise InputError for a template with an unknown field, or without one that has to be there."""
    if not all(isinstance(value, str) for value in (wording.name, wording.question, wording.description)):
        raise InputError("name, question and description are texts", where=where)
    for key, known, needed in (("question", FIELDS, FIELDS[:5]), ("description", FIELDS[5:], ())):
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(vars(wording)[key]) if name is not None]
        except ValueError as error:
            raise InputError(f"{key} is no template: {error}", where=where, fix="write {{ for a brace") from error
        unknown, missing = set(fields) - set(known), set(needed) - set(fields)
        if unknown or missing:
            raise InputError(
                f"{key} has no field {{{sorted(missing)[0]}}}" if missing else f"{key} has an unknown field",
                where=f"{where}: {sorted(unknown)}" if unknown else where,
                fix=", ".join(f"{{{name}}}" for name in known),
            )


def wording_hash(wording: Wording, *settings: Any) -> str:
    """Return the hash of everything around the questions; its name does not count."""
    return text_hash({key: value for key, value in asdict(wording).items() if key != "name"}, *settings)
