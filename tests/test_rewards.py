"""The verifiers: what counts as right, what does not, and what they refuse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.errors import InputError
from alignment.rewards import (
    VERIFIERS,
    contains,
    exact,
    form,
    last_number,
    length,
    lengthy,
    number,
    regex,
    repetition,
    repetitive,
    stopped,
    verifier,
    verify,
)


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("  a  b\n", "a b", 1.0),
        ("A b", "a b", 0.0),
        ("a b.", "a b", 0.0),
        ("caf\u0065\u0301", "caf\u00e9", 1.0),
        ("", "a", 0.0),
    ],
)
def test_exact_forgives_white_space_only(text, answer, score):
    assert exact(text, answer) == score


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("It is 12.", "12"),
        ("1,234.50 dollars", "1234.5"),
        ("$1,000", "1000"),
        ("-7", "-7"),
        ("\u22127", "-7"),
        ("3-4", "4"),
        ("10 - 3 = 7", "7"),
        ("from 3 to .5", "0.5"),
        ("2e3", "2000"),
        ("1,2", "2"),
        ("12,3456", "3456"),
        ("50%", "50"),
        ("no digits", None),
        ("a1b22", "22"),
        ("9" * 40, "9" * 40),
    ],
)
def test_last_number(text, value):
    found = last_number(text)
    assert found is None if value is None else found == type(found)(value)


@given(st.integers(-(10**12), 10**12))
def test_number_reads_what_python_writes(n):
    assert number(f"So the answer is {n:,}.", f"#### {n}") == 1.0
    assert number(f"So the answer is {n + 1}", str(n)) == 0.0


def test_number_in_the_text_is_the_last_one():
    assert number("7 and then 8", "7") == 0.0
    assert number("no number", "7") == 0.0


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("The answer is Red.", "red", 1.0),
        ("It was bored", "red", 0.0),
        ("new  york", "New York", 1.0),
        ("a+b", "a+b", 1.0),
        ("aab", "a+b", 0.0),
    ],
)
def test_contains_whole_words(text, answer, score):
    assert contains(text, answer) == score


def test_regex_searches():
    assert regex("yes, 12", r"\d{2}$") == 1.0
    assert regex("12, yes", r"^\d{2}$") == 0.0


@pytest.mark.parametrize(
    ("check", "answer"),
    [(number, "none"), (contains, " "), (regex, "("), (form, "("), (length, "long"), (length, "")],
    ids=["number", "contains", "regex", "format", "length", "no length"],
)
def test_an_answer_that_cannot_be_checked_is_refused(check, answer):
    with pytest.raises(InputError):
        check("text", answer)


def test_unknown_verifier_names_the_nearest():
    with pytest.raises(InputError, match="did you mean exact"):
        verifier("exakt")
    with pytest.raises(InputError):
        verifier(None)


@given(st.sampled_from(["exact", "contains"]), st.text(min_size=1).filter(lambda t: t.split()))
def test_every_text_passes_as_its_own_answer(name, text):
    assert VERIFIERS[name](text, text) == 1.0


def test_format_is_about_the_whole_text():
    pattern = r"<think>.*</think>\s*<answer>\d+</answer>"
    assert form(" <think>two\nlines</think>\n<answer>7</answer>\n", pattern) == 1.0
    assert form("<think>a</think><answer>7</answer> and more", pattern) == 0.0
    assert form("so: <think>a</think><answer>7</answer>", pattern) == 0.0


@pytest.mark.parametrize(
    ("words", "answer", "score"),
    [(3, "3", 1.0), (4, "3", 0.0), (0, "3", 1.0), (3, "2-4", 1.0), (1, "2-4", 0.0), (9, "5-", 1.0), (4, "5-", 0.0)],
)
def test_length_counts_words(words, answer, score):
    assert length("word " * words, answer) == score


def test_an_answer_that_lists_everything_does_not_pass():
    """What a policy finds first: all candidates in one answer."""
    assert number("1 2 3 4 5 6 7 8 9", "7") == 0.0
    assert exact("red blue green", "red") == 0.0
    assert form("7 8 9", r"\d") == 0.0


def test_repetition():
    assert repetition("one two three four five") == 0.0
    assert repetition("") == 0.0 and repetition("word") == 0.0
    assert repetition("ha ha ha") == pytest.approx(2 / 3)
    assert repetition("a b c " * 10) > 0.8
    assert repetition("A b c d a B c") == pytest.approx(1 / 5)


def test_rewards_of_a_batch():
    said = [[{"role": "assistant", "content": " 12 "}], [{"role": "assistant", "content": "no no no"}]]
    assert verify(said, ["number", "exact"], ["12", "yes"]) == [1.0, 0.0]
    assert verify(["a", "b"], ["exact", "contains"], ["a", "b"]) == [1.0, 1.0]
    assert stopped(said, ended=[True, False], answer=["", ""]) == [1.0, 0.0]
    assert repetitive(said) == [0.0, pytest.approx(-2 / 3)]
    assert lengthy(said) == [-0.01, -0.03]
    with pytest.raises(InputError, match="did you mean number"):
        verify(["a"], ["nubmer"], ["a"])


def test_code_among_other_verifiers():
    answers = ["```python\ndef f(x):\n    return x * 2\n```", "def f(x):\n    return x", "7"]
    assert verify(answers, ["code", "code", "number"], ["assert f(4) == 8"] * 2 + ["7"]) == [1.0, 0.0, 1.0]
