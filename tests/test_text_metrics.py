"""Extraction, overlap and constraints against the code they follow: lm-eval, sacrebleu, rouge_score, brute force."""

import itertools
import json
import statistics
import string
import sys
import types

import pytest

from alignment import text_metrics
from alignment.constraints import CONSTRAINTS, follows
from alignment.errors import InputError
from alignment.rewards import VERIFIERS, verifier
from alignment.text_metrics import (
    bleu,
    gsm8k_equal,
    gsm8k_flexible,
    gsm8k_strict,
    majority,
    pass_at_k,
    rouge,
    token_f1,
)

SOLUTIONS = [
    "She has 16 - 3 = <<16-3=13>>13 eggs.\n#### 13",
    "#### -1,234.50",
    "#### 18.",
    "It is $70,000 in total",
    "The answer is 5. No, 12.",
    "#### 7 and #### 8",
    "nothing",
    "",
    "-3-4",
    "a ... b",
    "####5",
    "costs $ 9",
]
REFERENCES = ["… 13\n#### 13", "x\n#### 1234.50", "y\n#### 18", "z\n#### 70,000", "w\n#### 12", "#### 7"]


def lm_eval_regex(text, **options):
    from lm_eval.filters.extraction import RegexFilter

    return RegexFilter(**options).apply([[text]], [{}])[0][0]


@pytest.mark.parametrize("text", SOLUTIONS)
def test_gsm8k_extraction_and_match_are_those_of_lm_eval(text):
    from lm_eval.api.metrics import exact_match_hf_evaluate

    strict = lm_eval_regex(text, regex_pattern=r"#### (\-?[0-9\.\,]+)")
    flexible = lm_eval_regex(text, regex_pattern="(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    assert (gsm8k_strict(text) or "[invalid]") == strict
    assert (gsm8k_flexible(text) or "[invalid]") == flexible
    ignored = [",", r"\$", r"(?s).*#### ", r"\.$"]
    for reference, (mine, theirs) in itertools.product(
        REFERENCES, ((gsm8k_strict(text), strict), (gsm8k_flexible(text), flexible))
    ):
        wanted = exact_match_hf_evaluate([theirs], [reference], regexes_to_ignore=ignored, ignore_case=True)
        assert gsm8k_equal(mine, reference) == wanted["exact_match"]


@pytest.mark.real_data
def test_gsm8k_extraction_finds_the_answer_of_every_real_solution(real_data):
    lines = (real_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 1319
    for answer in answers:
        assert verifier("gsm8k")(answer, answer) == 1.0
        assert gsm8k_strict(answer) == lm_eval_regex(answer, regex_pattern=r"#### (\-?[0-9\.\,]+)")
        other = lm_eval_regex(answer, regex_pattern="(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
        assert gsm8k_flexible(answer) == other


def squad_f1(gold, said):
    """The rules of SQuAD's evaluate-v2.0.py, in other words: nothing of ours is called."""

    def words(text):
        kept = "".join(" " if c.isspace() else "" if c in string.punctuation else c.lower() for c in text)
        return [word for word in kept.split() if word not in ("a", "an", "the")]

    gold, said = words(gold), words(said)
    if not gold or not said:
        return int(gold == said)
    same = sum(min(gold.count(word), said.count(word)) for word in set(gold))
    precision, recall = same / len(said), same / len(gold)
    return 2 * precision * recall / (precision + recall) if same else 0


@pytest.mark.parametrize(
    ("text", "answer", "wanted"),
    [
        ("The cat sat", "a cat", 2 / 3),
        ("in 1845", "1845", 2 / 3),
        ("", "", 1.0),
        ("the", "", 1.0),
        ("x", "y", 0.0),
        ("b b a-b", "b, b!", 0.8),
    ],
)
def test_token_f1_is_squads(text, answer, wanted):
    assert token_f1(text, answer) == pytest.approx(wanted) == squad_f1(answer, text)


TEXTS = ["the cat sat on the mat", "a dog barked at the cat in the dark night", "so it goes", "on the mat it sat"]
ANSWERS = ["the cat sat on a mat", "the dog barked at a cat in the dark", "so it went on and on", "it sat on the mat"]


def test_bleu_is_sacrebleus_and_its_error_that_of_sacrebleus_bootstrap():
    import sacrebleu

    texts, answers = TEXTS * 30, ANSWERS * 30
    found = bleu(texts, answers)
    assert found["value"] == pytest.approx(sacrebleu.corpus_bleu(texts, [answers]).score)
    assert found["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    theirs = sacrebleu.BLEU().corpus_score(texts, [answers], n_bootstrap=1000)._ci / 1.96
    assert found["stderr"] == pytest.approx(theirs, rel=0.15)
    assert bleu(texts, answers) == found, "the bootstrap is seeded"
    assert bleu(TEXTS[:1], ANSWERS[:1])["stderr"] is None


def test_rouge_is_rouge_scores():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for text, answer, found in zip(TEXTS, ANSWERS, rouge(TEXTS, ANSWERS), strict=True):
        assert found == {name: score.fmeasure for name, score in scorer.score(answer, text).items()}


def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(InputError, match=r"sacrebleu is not installed[\s\S]*plumbline\[eval\]"):
        text_metrics.need_packages(["bleu"])


@pytest.mark.parametrize(("n", "c", "k"), [(1, 1, 1), (4, 0, 2), (4, 1, 2), (5, 3, 2), (5, 4, 5), (6, 2, 3)])
def test_pass_at_k_is_the_share_of_choices_of_k_with_a_right_one(n, c, k):
    right = [i < c for i in range(n)]
    assert pass_at_k(n, c, k) == pytest.approx(statistics.mean(map(any, itertools.combinations(right, k))))


def test_pass_at_k_of_fewer_answers_is_refused():
    with pytest.raises(InputError, match="pass@5 needs 5 answers"):
        pass_at_k(4, 1, 5)


def test_the_majority_is_the_commonest_vote_and_nothing_extracted_has_none():
    assert majority(["1", "2", "2", None, None, None]) == "2"
    assert majority(["3", "1", "1", "3"]) == "3", "of equals the earliest"
    assert majority([None, None]) is None


RELATIONS = ("less than", "at least")
KEYWORDS = {
    "keywords:existence": [{"keywords": ["cat", "dog"]}],
    "keywords:frequency": [{"keyword": "cat", "frequency": 2, "relation": r} for r in RELATIONS],
    "keywords:forbidden_words": [{"forbidden_words": ["cat", "mouse"]}],
    "keywords:letter_frequency": [{"letter": "t", "let_frequency": 3, "let_relation": r} for r in RELATIONS],
    "length_constraints:number_words": [{"num_words": 6, "relation": r} for r in RELATIONS],
    "length_constraints:number_paragraphs": [{"num_paragraphs": n} for n in (1, 2)],
    "detectable_content:number_placeholders": [{"num_placeholders": 2}],
    "detectable_format:number_bullet_lists": [{"num_bullets": 2}],
    "startend:end_checker": [{"end_phrase": "the end."}],
}  # fmt: skip
SAID = [
    "The cat sat.", "cat Cat CAT dog", "no animals, here", '"quoted"', "** a\n* b\n- c\n", "* a\n* b", "[x] and [y]",
    "<<title>>", "<< >>", "one\n***\ntwo", "a *** *** b", "***\none", '{"a": 1}', "```json\n[1, 2]\n```", "all lower",
    "ALL UPPER", "It is the end.", " ", "mouse", "ab c'd e-f g",
]  # fmt: skip


def test_constraints_decide_what_lm_evals_ifeval_decides(monkeypatch):
    """Its language detector, which is not installed, says English."""
    import nltk

    fake = types.SimpleNamespace(detect=lambda text: "en", LangDetectException=RuntimeError)
    monkeypatch.setitem(sys.modules, "langdetect", fake)
    monkeypatch.setitem(sys.modules, "immutabledict", types.SimpleNamespace(immutabledict=dict))
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: True)
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    outcomes = set()
    for name in CONSTRAINTS:
        for kwargs in KEYWORDS.get(name, [{}]):
            theirs = INSTRUCTION_DICT[name](name)
            theirs.build_description(**kwargs)
            for text in SAID:
                asked = json.dumps({"instruction_id_list": [name], "kwargs": [kwargs]})
                wanted = bool(text.strip() and theirs.check_following(text))
                assert follows(text, asked) == [wanted], (name, kwargs, text)
                outcomes.add((name, wanted))
    assert len(outcomes) == 2 * len(CONSTRAINTS), "each says yes and no"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("no json", "cannot read"),
        ('{"instruction_id_list": ["punctuation:no_comma"]}', "cannot read"),
        ('{"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}', "did you mean punctuation:no_comma"),
        ('{"instruction_id_list": ["keywords:existence"], "kwargs": [{"words": ["a"]}]}', "it takes keywords"),
        (
            '{"instruction_id_list": ["length_constraints:number_words"], '
            '"kwargs": [{"num_words": 3, "relation": "more than"}]}',
            "at least",
        ),
    ],
)
def test_instructions_that_cannot_be_checked_are_refused(answer, message):
    with pytest.raises(InputError, match=message):
        VERIFIERS["ifeval"]("some text", answer)


def test_an_answer_has_to_follow_all_instructions():
    asked = {
        "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
        "kwargs": [None, {"x": None}],
    }
    check = VERIFIERS["ifeval"]
    assert [check(text, json.dumps(asked)) for text in ("all fine", "not, fine", "Not fine", "")] == [1, 0, 0, 0]
