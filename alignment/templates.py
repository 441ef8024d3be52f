"""Chat templates that are safe to train on: what a conversation becomes, and which of its tokens are trained.

A conversation is rendered by the tokenizer's own template; the spans that are trained are found by rendering, for each
assistant turn, the prompt that the model would be given at that turn. So training and generation see the same tokens,
no `{% generation %}` marker is needed, and a template that rewrites history is noticed instead of being trained on.
"""

import re
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from alignment.errors import InputError

# Two private-use characters enclose the number of a control token that stood in somebody's text: the template
# renders the placeholder, and the tokenizer later encodes the spelling as plain text.
_OPEN, _CLOSE = "\ue000", "\ue001"
_PLACEHOLDER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


@dataclass
class Encoded:
    """A conversation in tokens.

    Attributes:
        input_ids: token ids, shape (length,); they end with the last assistant turn.
        mask: 1 where the token is an assistant's answer or the token that ends it, shape (length,).
        messages: the index of each trained turn's message.
        turns: (start, end, stopped) of each trained turn, in tokens; `stopped` says whether its last token is one
            that generation stops at.
        skipped: assistant turns that the template renders otherwise once they are history, and so are not trained.
        escaped: control tokens that stood in the content and were encoded as text.
    """

    input_ids: list[int]
    mask: list[int]
    turns: list[tuple[int, int, bool]]
    messages: list[int] = field(default_factory=list)
    skipped: int = 0
    escaped: int = 0


def special_tokens(tokenizer: Any) -> list[str]:
    """Return the spellings that the tokenizer turns into control tokens, longest first."""
    found = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(found | set(tokenizer.all_special_tokens), key=len, reverse=True)


def stop_ids(tokenizer: Any, generation_config: Any = None) -> set[int]:
    """Return the ids at which generation stops: those of the generation config, else the tokenizer's eos token."""
    eos = generation_config.eos_token_id if generation_config is not None else None
    if eos is None:
        eos = tokenizer.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def load_template(tokenizer: Any, path: str) -> None:
    """Give the tokenizer the chat template of a jinja file.

    Raises:
        InputError: there is no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(
            f"there is no chat template at {path}",
            where="--chat_template_path",
            why="conversations are rendered with it",
            fix="give the path of a .jinja file, for example data/chat_templates/plain.jinja",
        )
    tokenizer.chat_template = file.read_text(encoding="utf-8")


class TemplateRefusal(InputError):
    """The chat template cannot render this conversation; others it may."""


class ChatEncoder:
    """Encodes conversations and prompts with one tokenizer; made once per run.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        generation_config: names the tokens at which generation stops.
        chat_template_kwargs: passed to every rendering (`{"enable_thinking": False}`).

    Raises:
        InputError: on first use, when there is no chat template or it refuses a conversation.
    """

    def __init__(
        self, tokenizer: Any, generation_config: Any = None, chat_template_kwargs: dict[str, Any] | None = None
    ):
        self.tokenizer = tokenizer
        self.kwargs = chat_template_kwargs or {}
        self.specials = special_tokens(tokenizer)
        self.special_pattern = re.compile("|".join(map(re.escape, self.specials)) or r"(?!)")
        # What must not reach the template as it stands; _OPEN, so that nobody's text is taken for a placeholder.
        self.foreign = [*self.specials, _OPEN]
        self.foreign_pattern = re.compile("|".join(map(re.escape, self.foreign)))
        self.lead = self._lead()
        self.stops = stop_ids(tokenizer, generation_config)
        self.stop_tokens = {tokenizer.convert_ids_to_tokens(i) for i in self.stops}

    def with_kwargs(self, kwargs: dict[str, Any]) -> "ChatEncoder":
        """Return an encoder that passes these to the template as well."""
        if not kwargs:
            return self
        other = copy(self)
        other.kwargs = {**self.kwargs, **kwargs}
        return other

    def encode_chat(self, messages: Sequence[dict[str, Any]], tools: list | None = None) -> Encoded:
        """Encode a conversation, with every assistant turn and its stop token marked as trained."""
        escaped = Counter()
        messages, tools = self._escape(list(messages), escaped), self._escape(tools, escaped)
        full = self._render(messages, tools)
        spans, trained, skipped = [], [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            span = self._turn(full, messages, index, tools)
            if span is None:
                skipped += 1
            else:
                spans.append(span)
                trained.append(index)
        encoded = self._encode_spans(full, spans)
        encoded.messages = trained
        encoded.skipped, encoded.escaped = skipped, escaped.total() - escaped[_OPEN]
        return encoded

    def encode_prompt(self, messages: Sequence[dict[str, Any]], tools: list | None = None) -> list[int]:
        """Return the ids the model is given before it answers: history and the opening of the assistant's turn."""
        messages, tools = self._escape(list(messages), Counter()), self._escape(tools, Counter())
        full = self._render(messages, tools, add_generation_prompt=True)
        spans = [self._turn(full, messages, i, tools) for i, m in enumerate(messages) if m["role"] == "assistant"]
        return self._encode_spans(full, [span for span in spans if span], keep_rest=True).input_ids

    def encode_text(self, text: str, *, bos: bool = True) -> list[int]:
        """Return the ids of plain text with the tokenizer's own BOS (once), and without an EOS.

        Without `bos` the text goes on where another one ended.
        """
        if not bos:
            return self._plain(text, before=_OPEN)
        ids = self.tokenizer(text)["input_ids"]
        bos_id, eos_id = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos_id is not None and ids[:2] == [bos_id, bos_id]:
            ids = ids[1:]
        if eos_id is not None and ids and ids[-1] == eos_id and not text.endswith(self.tokenizer.eos_token):
            ids = ids[:-1]
        return ids

    def _render(self, messages: Sequence[dict], tools: list | None, add_generation_prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise InputError(
                "the tokenizer has no chat template",
                where=self.tokenizer.name_or_path,
                why="without one there is no way to turn messages into tokens, nor to know where an answer ends",
                fix="--chat_template_path data/chat_templates/plain.jinja (needs no new tokens), or start from an "
                "instruction-tuned model",
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.kwargs,
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(m["role"] for m in messages)
            raise TemplateRefusal(
                f"the chat template refuses a conversation with the roles {roles}: {error}",
                where=f"the chat template of {self.tokenizer.name_or_path}",
                why="the row cannot be turned into tokens",
                fix="merge or reorder the turns, or drop such rows with --on_bad_row drop",
            ) from error

    def _escape(self, value: Any, count: Counter) -> Any:
        """Replace control tokens inside texts by placeholders: what a person wrote has to stay text."""
        if isinstance(value, str):

            def placeholder(match: re.Match) -> str:
                count[match.group()] += 1
                return f"{_OPEN}{self.foreign.index(match.group())}{_CLOSE}"

            return self.foreign_pattern.sub(placeholder, value)
        if isinstance(value, dict):
            return {k: item if k == "role" else self._escape(item, count) for k, item in value.items()}
        return [self._escape(item, count) for item in value] if isinstance(value, list) else value

    def _turn(self, full: str, messages: list[dict], index: int, tools: list | None) -> tuple[int, int, bool] | None:
        """Return (start, end, stopped) in characters of one assistant turn, or None when history was rewritten."""
        prompt = self._render(messages[:index], tools, add_generation_prompt=True)
        if not full.startswith(prompt):
            return None
        start = len(prompt)
        upto = full if index + 1 == len(messages) else self._render(messages[: index + 1], tools)
        limit = len(upto) if full.startswith(upto) else len(commonprefix([full, upto]))
        content = messages[index].get("content")
        content = content.strip() if isinstance(content, str) else ""
        at = full.find(content, start, limit)
        if limit < len(upto) and (at < 0 or not content):
            return None  # the answer itself is not the one the model would have given
        if at < 0 and content and content.split()[-1] not in full[start:limit]:
            raise TemplateRefusal(
                f"the chat template leaves out the text of an answer ({content[:40]!r})",
                where=f"the chat template of {self.tokenizer.name_or_path}",
                why="only the end of the turn would be trained",
                fix="--chat_template_path with a template for plain text (this one may want a list of parts)",
            )
        after = start if at < 0 else at + len(content)
        # Control tokens inside the content are escaped: those found here are the template's.
        ends = list(self.special_pattern.finditer(full, after, limit))
        stop = next((match for match in ends if match.group() in self.stop_tokens), None)
        if stop is not None:
            return start, stop.end(), True
        if ends:
            return start, ends[-1].end(), False
        # Without a control token the answer is the last thing in its turn, white space aside.
        end = full.rfind(content, start, limit) + len(content) if content and at >= 0 else limit
        return (start, end, False) if end > start else None

    def _encode_spans(self, full: str, spans: list[tuple[int, int, bool]], keep_rest: bool = False) -> Encoded:
        """Encode the text up to the last span (or all of it), splitting it at the spans' edges.

        The prompt is encoded as it is at inference, where the text ends with it: a token never reaches over an edge.
        """
        ids, mask, turns, cursor = [], [], [], 0
        for start, end, stopped in spans:
            before = self._ids(full, cursor, start)
            trained = self._ids(full, start, end)
            turns.append((len(ids) + len(before), len(ids) + len(before) + len(trained), stopped))
            ids += before + trained
            mask += [0] * len(before) + [1] * len(trained)
            cursor = end
        if keep_rest or not spans:
            rest = self._ids(full, cursor, len(full))
            ids += rest
            mask += [0] * len(rest)
        return Encoded(ids, mask, turns)

    def _ids(self, full: str, start: int, end: int) -> list[int]:
        """Encode a part of a rendered text; placeholders become the spelling of the control token, as text."""
        ids, cursor = [], start
        for match in _PLACEHOLDER.finditer(full, start, end):
            ids += self._plain(full[cursor : match.start()], before=full[:cursor])
            ids += self._as_text(self.foreign[int(match.group(1))])
            cursor = match.end()
        return ids + self._plain(full[cursor:end], before=full[:cursor])

    def _as_text(self, spelling: str) -> list[int]:
        """Encode the spelling of a control token as the plain text that it was in somebody's message."""
        lead = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids = self.tokenizer("\n" + spelling, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if ids[: len(lead)] == lead:
            return ids[len(lead) :]
        return self.tokenizer(spelling, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _plain(self, text: str, before: str) -> list[int]:
        """Encode text as what follows `before`: tokenizers that put a space in front of every text must not do so."""
        if not text:
            return []
        lead = self.lead if before else ""
        if lead:  # some tokenizers put a space after a control token, too
            lead = next((token for token in self.specials if before.endswith(token)), lead)
        skip = len(self.tokenizer(lead, add_special_tokens=False)["input_ids"]) if lead else 0
        return self.tokenizer(lead + text, add_special_tokens=False)["input_ids"][skip:]

    def _lead(self) -> str:
        """Return a text after which the tokenizer goes on without a space; empty where it never adds one."""

        def ids(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        def starts(tokens: list[int]) -> bool:
            return bool(tokens) and self.tokenizer.convert_ids_to_tokens(tokens[0]).startswith("x")

        if starts(ids("x")):
            return ""
        added = self.tokenizer.added_tokens_decoder.values()
        leads = [token.content for token in added if token.special and not token.rstrip]
        for lead in [*leads, "\n"]:
            if ids(lead + "x")[: len(ids(lead))] == ids(lead) and starts(ids(lead + "x")[len(ids(lead)) :]):
                return lead
        return ""
