"""Multiple-choice questions put to a model with examples in front, and the log-likelihood of each letter."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignment.errors import InputError
from alignment.generation import process_state
from alignment.multiple_choice import LETTERS, Question
from alignment.scoring import Encoded, encode_requests, score_encoded, window
from alignment.wording import WORDINGS, Wording, chat_messages, plain_context, render


@dataclass(frozen=True)
class Prompting:
    """How questions become prompts.

    Attributes:
        shots: examples in front of each question, the first of its subject's dev split.
        apply_chat_template: put the prompt as a conversation.
        fewshot_as_multiturn: in a conversation, each example is a turn of its own.
        wording: the words around the question.
    """

    shots: int = 5
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    wording: Wording = field(default_factory=lambda: WORDINGS["lm_eval"])


@dataclass(frozen=True)
class Choice:
    """What the model makes of one question.

    Attributes:
        log_likelihoods: of the letters A, B, C, D after the prompt.
        shots: examples that were in the prompt.
        cut: tokens that were cut off the front of a prompt that was too long without any example.
    """

    log_likelihoods: tuple[float, ...]
    shots: int
    cut: int = 0

    @property
    def prediction(self) -> int:
        """The number of the likeliest letter; the first of equals."""
        return max(range(len(self.log_likelihoods)), key=self.log_likelihoods.__getitem__)


def choose(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    examples: Mapping[str, Sequence[Question]],
    prompting: Prompting,
    *,
    batch_size: int = 64,
    label: str = "choices",
    made: Callable[[dict[int, Choice]], None] | None = None,
    say: Callable[[str], None] = tqdm.write,
) -> list[Choice]:
    """Return what the model makes of each question, on every process.

    Same prompts and log-likelihoods as lm-eval's `mmlu` (0.4.13) where the prompt fits into the model. Where it does
    not, lm-eval cuts tokens off its front; here whole examples are left out, the first ones first, and tokens are cut
    only when the question alone is too long. Both are counted and told.

    Args:
        model: on its device, in eval mode.
        tokenizer: the model's own.
        questions: to answer.
        examples: subject -> its examples, `prompting.shots` of them or more.
        prompting: how a question becomes a prompt.
        batch_size: questions per batch and process; changes the speed only.
        label: what the progress bar says.
        made: is given each batch of this process as soon as it is there: question number -> Choice.
        say: is told, on the main process, what the user should know.

    Raises:
        InputError: too few examples, no language-model head, no chat template.
    """
    _check_examples(questions, examples, prompting.shots)
    tell = say if process_state().is_main_process else lambda text: None
    fitted = _Fitted(model, tokenizer, questions, examples, prompting)
    for note in fitted.notes():
        tell(f"{label}: {note}")

    def choice(number: int, values: Sequence[float]) -> Choice:
        return Choice(tuple(values), fitted.shots[number], fitted.cut.get(number, 0))

    def book(batch: dict[int, list[float]]) -> None:
        if made is not None:
            made({number: choice(number, values) for number, values in batch.items()})

    groups = [(question.subject, shots) for question, shots in zip(questions, fitted.shots, strict=True)]
    values = score_encoded(model, fitted.encoded, groups=groups, batch_size=batch_size, label=label, made=book, say=say)
    return [choice(number, values[number]) for number in range(len(questions))]


def _check_examples(questions: Sequence[Question], examples: Mapping[str, Sequence[Question]], shots: int) -> None:
    """Raise InputError for a subject with fewer examples than shots."""
    for subject in sorted({question.subject for question in questions}) if shots else []:
        there = len(examples.get(subject, ()))
        if there < shots:
            raise InputError(
                f"{shots} shots, and {subject} has {there} questions in its dev split",
                where="--shots",
                why="examples come from there, never from the questions that are scored",
                fix=f"--shots {there}" if there else "add them, or --shots 0",
            )


class _Fitted:
    """The prompts in tokens, each with as many examples as fit into the model."""

    def __init__(self, model, tokenizer, questions, examples, prompting: Prompting):
        self.questions, self.examples, self.prompting = questions, examples, prompting
        self.tokenizer, self.limit = tokenizer, window(model)
        self.without_system = False
        self.cut: dict[int, int] = {}
        self.shots = [prompting.shots] * len(questions)
        self.encoded = self._encode(range(len(questions)))
        long = self._too_long(range(len(questions)))
        for shots in range(prompting.shots - 1, -1, -1):
            for number in long:
                self.shots[number] = shots
            for number, request in zip(long, self._encode(long), strict=True):
                self.encoded[number] = request
            long = self._too_long(long)
        for number in long:
            request = self.encoded[number]
            self.cut[number] = request.length - self.limit
            self.encoded[number] = replace(request, context=request.context[self.cut[number] :])

    def _encode(self, numbers: Sequence[int]) -> list[Encoded]:
        return encode_requests(self.tokenizer, [self._request(number) for number in numbers])

    def _too_long(self, numbers: Sequence[int]) -> list[int]:
        return [n for n in numbers if self.limit is not None and self.encoded[n].length > self.limit]

    def _request(self, number: int) -> tuple[str, list[str]]:
        """Return the context of a question with as many examples as it has now, and its continuations."""
        question, wording = self.questions[number], self.prompting.wording
        first = self.prompting.shots - self.shots[number]
        shots = self.examples.get(question.subject, ())[first : self.prompting.shots]
        if not self.prompting.apply_chat_template:
            return plain_context(wording, shots, question), [f" {letter}" for letter in LETTERS]
        messages = chat_messages(wording, shots, question, self.prompting.fewshot_as_multiturn)
        text, bare = render(self.tokenizer, messages)
        self.without_system |= bare
        return text, list(LETTERS)

    def notes(self) -> list[str]:
        """Return what the user should know of the prompts."""
        notes, all_shots = [], self.prompting.shots
        fewer = [all_shots - shots for shots in self.shots if shots < all_shots]
        total = f"of {len(self.questions):,} prompts"
        if fewer:
            notes.append(
                f"{len(fewer):,} {total} did not fit into {self.limit:,} tokens and lost {sum(fewer):,} of "
                f"{len(self.questions) * all_shots:,} examples, whole ones, from the front"
            )
        if self.cut:
            notes.append(
                f"{len(self.cut):,} {total} were too long without any example and lost {sum(self.cut.values()):,} "
                "tokens from the front"
            )
        longest = max((len(ids) for request in self.encoded for ids in request.continuations), default=1)
        if longest > 1:
            notes.append(f"a letter is up to {longest} tokens for this tokenizer; their log-likelihoods are added")
        if self.without_system:
            notes.append("the chat template takes no system message: the description of the subject is left out")
        return notes
