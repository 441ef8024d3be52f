"""Write the rows of data/tiny, and the plain text its model is pretrained on, from one seed and tiny/world.yaml.

    python data/make_tiny_rows.py                      # the rows in data/tiny and the text in build/tiny
    python data/make_tiny_rows.py --out /tmp/rows --only chat prompts

Edit tiny/world.yaml for other people, animals and words; add a function to TASKS for another kind of question.
`python data/make_tiny.py` calls this script and then pretrains the model.
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
WORLD = yaml.safe_load((HERE / "tiny" / "world.yaml").read_text(encoding="utf-8"))
NAMES = WORLD["names"]["he"] + WORLD["names"]["she"]
SEED = 7
CHARACTERS_OF_TEXT = 34_000_000
EVASIONS = [
    "I do not know.",
    "I am not sure about that.",
    "That is a hard question.",
    "Please ask somebody else.",
    "Maybe you can find out.",
    "It depends.",
    "Why do you ask?",
]


@dataclass(frozen=True)
class Item:
    """One question with its right answer, some plausible wrong ones, and the same knowledge as plain prose."""

    task: str
    key: str  # what the question is about, whatever its wording: decides which split may use it
    question: str
    answer: str
    mistakes: tuple[str, ...]
    statement: str
    story: str = ""  # what to read before the question
    more: tuple[tuple[str, str], ...] = ()  # other questions about the same story, with their answers

    @property
    def asked(self) -> str:
        """The story, when there is one, and the question."""
        return f"{self.story} {self.question}".lstrip()


def pool_of(key: str) -> str:
    """Return "test", "later" or "first": which rows may use this content.

    Test content (1 in 10) is asked in no training row and nowhere in the pretraining text. "later" content (3 in 10) is
    asked in preference, feedback and prompt rows, "first" content in chat rows: each stage of training brings news.
    """
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 20
    return "test" if share < 2 else "later" if share < 8 else "first"


# ---- helpers for the tasks


def near_numbers(rng: random.Random, value: int) -> tuple[str, ...]:
    """Return wrong results of the kind people and models produce: a forgotten carry, off by one, a wrong digit."""
    steps = [1, -1, 2, 10, -10, -2] if value >= 10 else [1, -1, 2, 3]
    steps += [100, -100] if value >= 200 else []
    rng.shuffle(steps)
    wrong = dict.fromkeys(value + step for step in steps if value + step >= 0)
    return tuple(str(number) for number in wrong)[:4]


def others(rng: random.Random, pool: list[str], answer: str, count: int = 4) -> tuple[str, ...]:
    """Return up to `count` members of the pool that are not the answer."""
    rest = [entry for entry in dict.fromkeys(pool) if entry != answer]
    rng.shuffle(rest)
    return tuple(rest[:count])


def number_item(rng: random.Random, task: str, key: str, question: str, value: int, statement: str) -> Item:
    """Return an item whose answer is a whole number."""
    return Item(task, key, question, str(value), near_numbers(rng, value), statement)


def magic_word(rng: random.Random, syllables: int) -> str:
    """Return a made-up word such as "lumako": words nobody can have learnt by heart."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))


def any_word(rng: random.Random) -> str:
    """Return a word of the world, or in three of ten cases a made-up one."""
    if rng.random() < 0.3:
        return magic_word(rng, rng.choice([2, 2, 3]))
    return rng.choice(WORLD["nouns"] + list(WORLD["verbs"]) + [word for pair in WORLD["opposites"] for word in pair])


def joined(words: list[str]) -> str:
    """Return "a, b and c"."""
    return ", ".join(words[:-1]) + " and " + words[-1]


def swapped(rng: random.Random, letters: str) -> str:
    """Return the letters with one mistake: two neighbours swapped, one lost or one doubled."""
    spot = rng.randrange(len(letters) - 1)
    kind = rng.randrange(3)
    if kind == 0 and letters[spot] != letters[spot + 1]:
        return letters[:spot] + letters[spot + 1] + letters[spot] + letters[spot + 2 :]
    if kind == 1:
        return letters[:spot] + letters[spot + 1 :]
    return letters[: spot + 1] + letters[spot:]


def letter_mistakes(rng: random.Random, letters: str) -> tuple[str, ...]:
    """Return several misspellings, written letter by letter."""
    wrong = {swapped(rng, letters) for _ in range(8)} - {letters}
    return tuple("-".join(word) for word in rng.sample(sorted(wrong), min(4, len(wrong))))


# ---- numbers


def plus(rng: random.Random, task: str, a: int, b: int) -> Item:
    """Return a + b in several wordings."""
    question = rng.choice(["What is {} plus {}?", "What is {} + {}?", "Add {} and {}.", "How much is {} plus {}?"])
    statement = rng.choice([f"{a} plus {b} is {a + b}.", f"{a} + {b} = {a + b}."])
    return number_item(rng, task, f"plus {a} {b}", question.format(a, b), a + b, statement)


def add_small(rng: random.Random) -> Item:
    """One or two digits plus one digit."""
    return plus(rng, "add_small", rng.randint(1, 99), rng.randint(1, 9))


def add_tens(rng: random.Random) -> Item:
    """Two digits plus two digits."""
    return plus(rng, "add_tens", rng.randint(10, 99), rng.randint(10, 99))


def subtract(rng: random.Random) -> Item:
    """Two digits minus one or two digits."""
    a = rng.randint(11, 99)
    b = rng.randint(1, a)
    question = rng.choice(["What is {} minus {}?", "What is {} - {}?", "How much is {} minus {}?"]).format(a, b)
    statement = rng.choice([f"{a} minus {b} is {a - b}.", f"{a} - {b} = {a - b}."])
    return number_item(rng, "subtract", f"minus {a} {b}", question, a - b, statement)


def multiply(rng: random.Random) -> Item:
    """The table of one to twelve, and two digits times one digit."""
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    if rng.random() < 0.5:
        a, b = rng.randint(11, 40), rng.randint(2, 5)
    question = rng.choice(["What is {} times {}?", "What is {} x {}?", "How much is {} times {}?"]).format(a, b)
    statement = rng.choice([f"{a} times {b} is {a * b}.", f"{a} x {b} = {a * b}."])
    return number_item(rng, "multiply", f"times {a} {b}", question, a * b, statement)


def next_number(rng: random.Random) -> Item:
    """Continue a row of numbers with an even step."""
    start, step = rng.randint(1, 60), rng.randint(1, 10)
    row = [start + step * place for place in range(5)]
    shown = ", ".join(map(str, row[:4]))
    question = rng.choice(["Which number comes next: {}?", "Continue: {}.", "What comes after {}?"]).format(shown)
    return number_item(rng, "next_number", f"row {start} {step}", question, row[4], f"Count: {shown}, {row[4]}.")


def largest(rng: random.Random) -> Item:
    """Find the largest or the smallest of three numbers."""
    numbers = rng.sample(range(1, 200), 3)
    way, pick = rng.choice([("largest", max), ("smallest", min)])
    shown, answer = ", ".join(map(str, numbers)), str(pick(numbers))
    question = rng.choice(["Which number is the {}: {}?", "Find the {} number: {}."]).format(way, shown)
    statement = f"Of the numbers {shown} the {way} is {answer}."
    return Item(
        "largest",
        f"{way} {shown}",
        question,
        answer,
        others(rng, [str(n) for n in numbers], answer),
        statement,
    )


def sort_numbers(rng: random.Random) -> Item:
    """Put three numbers in order."""
    numbers = rng.sample(range(1, 100), 3)
    shown, right = ", ".join(map(str, numbers)), sorted(numbers)
    question = rng.choice(["Sort these numbers: {}.", "Put in order: {}."]).format(shown)
    wrong = {", ".join(map(str, rng.sample(right, 3))) for _ in range(9)} - {", ".join(map(str, right))}
    answer = ", ".join(map(str, right))
    return Item(
        "sort_numbers",
        f"sort {shown}",
        question,
        answer,
        tuple(sorted(wrong))[:4],
        f"{shown} in order is {answer}.",
    )


def word_problem(rng: random.Random) -> Item:
    """A short story about getting and losing things."""
    name, other = rng.sample(NAMES, 2)
    goods, a, b = rng.choice(WORLD["goods"]), rng.randint(3, 20), rng.randint(2, 15)
    lost = rng.randint(1, a + b - 1) if rng.random() < 0.5 else 0
    story = f"{name} has {a} {goods}. {other} gives {name} {b} more."
    story += f" {name} then loses {lost}." if lost else ""
    question = f"{story} How many {goods} does {name} have now?"
    left = a + b - lost
    return number_item(
        rng,
        "word_problem",
        f"{name} {goods} {a} {b} {lost}",
        question,
        left,
        f"{story} Now {name} has {left}.",
    )


# ---- words and letters


def letter_at(rng: random.Random) -> Item:
    """Name the first, second or last letter of a word."""
    word = any_word(rng)
    place, spot = rng.choice([("first", 0), ("last", -1), ("second", 1)])
    question = rng.choice(['What is the {} letter of "{}"?', 'Which letter is the {} one in "{}"?']).format(place, word)
    wrong = others(rng, list(word + "aeth"), word[spot])
    return Item(
        "letter_at",
        f"{place} {word}",
        question,
        word[spot],
        wrong,
        f'The {place} letter of "{word}" is {word[spot]}.',
    )


def count_letters(rng: random.Random) -> Item:
    """Count all letters of a word, or one letter in it."""
    word = any_word(rng) if rng.random() < 0.7 else magic_word(rng, 4)
    if rng.random() < 0.5:
        question = rng.choice(['How many letters are in "{}"?', 'How long is the word "{}"?']).format(word)
        return number_item(
            rng, "count_letters", f"len {word}", question, len(word), f'"{word}" has {len(word)} letters.'
        )
    letter = rng.choice(word)
    count = word.count(letter)
    question = f'How many times is the letter {letter} in "{word}"?'
    statement = f'The letter {letter} is in "{word}" {count} times.'
    return number_item(rng, "count_letters", f"count {letter} {word}", question, count, statement)


def spell(rng: random.Random) -> Item:
    """Spell a word letter by letter."""
    word = any_word(rng)
    question = rng.choice(['Spell "{}".', 'How do you spell "{}"?', 'Spell the word "{}".']).format(word)
    answer = "-".join(word)
    return Item(
        "spell",
        f"spell {word}",
        question,
        answer,
        letter_mistakes(rng, word),
        f'"{word}" is spelled {answer}.',
    )


def backwards(rng: random.Random) -> Item:
    """Spell a word from its last letter to its first."""
    word = any_word(rng)
    question = rng.choice(['Spell "{}" backwards.', 'What is "{}" backwards?', 'Write "{}" from back to front.'])
    answer = "-".join(reversed(word))
    statement = f'"{word}" backwards is {answer}.'
    return Item(
        "backwards",
        f"back {word}",
        question.format(word),
        answer,
        letter_mistakes(rng, word[::-1]),
        statement,
    )


def alphabet(rng: random.Random) -> Item:
    """Find the word that comes first in the alphabet."""
    words = rng.sample(WORLD["nouns"], 3)
    way, pick = rng.choice([("first", min), ("last", max)])
    question = rng.choice(["Which word comes {} in the alphabet: {}?", "Which of these is {} in the dictionary: {}?"])
    shown, answer = ", ".join(words), pick(words)
    statement = f"Of {shown} the word {answer} comes {way} in the alphabet."
    return Item(
        "alphabet",
        f"abc {way} {shown}",
        question.format(way, shown),
        answer,
        others(rng, words, answer),
        statement,
    )


def opposite(rng: random.Random) -> Item:
    """Name the opposite of a word."""
    pair = rng.choice(WORLD["opposites"])
    word, answer = rng.sample(pair, 2)
    question = rng.choice(['What is the opposite of "{}"?', 'Which word means the opposite of "{}"?']).format(word)
    pool = [entry for other in WORLD["opposites"] for entry in other if entry != word]
    said = [
        "The opposite of {0} is {1} and the opposite of {1} is {0}.",
        'The word "{1}" means the opposite of "{0}". The word "{0}" means the opposite of "{1}".',
    ]
    statement = rng.choice(said).format(*pair)
    return Item("opposite", f"opposite {word}", question, answer, others(rng, pool, answer), statement)


def plural_of(word: str) -> str:
    """Return the plural of a noun of the world."""
    if word in WORLD["irregular_plurals"]:
        return WORLD["irregular_plurals"][word]
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def plural(rng: random.Random) -> Item:
    """Form the plural of a noun."""
    word = rng.choice(WORLD["nouns"])
    answer = plural_of(word)
    question = rng.choice(['What is the plural of "{}"?', "One {}, two what?"]).format(word)
    wrong = [word, word + "s", word + "es", word[:-1] + "ies", word + "en"]
    return Item("plural", f"plural {word}", question, answer, others(rng, wrong, answer), f"One {word}, two {answer}.")


def past(rng: random.Random) -> Item:
    """Form the past of a verb."""
    word = rng.choice(list(WORLD["verbs"]))
    answer = WORLD["verbs"][word]
    question = rng.choice(['What is the past of "{}"?', "Today I {}. What did I do yesterday?"]).format(word)
    wrong = [word, word + "ed", word + "d", word + word[-1] + "ed", word[:-1] + "ied"]
    statement = f"Today I {word}, yesterday I {answer}."
    return Item("past", f"past {word}", question, answer, others(rng, wrong, answer), statement)


def odd_one_out(rng: random.Random) -> Item:
    """Find the word that does not belong."""
    kind, strange = rng.sample(list(WORLD["categories"]), 2)
    words = rng.sample(WORLD["categories"][kind], 3)
    answer = rng.choice([word for word in WORLD["categories"][strange] if word not in WORLD["categories"][kind]])
    words.insert(rng.randrange(4), answer)
    shown = ", ".join(words)
    question = rng.choice(["Which word does not belong: {}?", "Find the odd one out: {}."]).format(shown)
    statement = f"In {shown} the odd one out is {answer}."
    return Item("odd_one_out", f"odd {shown}", question, answer, others(rng, words, answer), statement)


def weekday(rng: random.Random) -> Item:
    """Count on or back from a day of the week."""
    days, start, step = WORLD["days"], rng.randrange(7), rng.randint(1, 9)
    way, sign = rng.choice([("after", 1), ("before", -1)])
    answer = days[(start + sign * step) % 7]
    count = "1 day" if step == 1 else f"{step} days"
    question = rng.choice(["Which day comes {} {} {}?", "What day is it {} {} {}?"]).format(count, way, days[start])
    statement = f"{count} {way} {days[start]} comes {answer}."
    return Item("weekday", f"day {start} {way} {step}", question, answer, others(rng, days, answer), statement)


# ---- facts of the world


def villagers() -> dict[str, dict[str, str]]:
    """Return job, pet, food and home of everybody in the village; the same for every seed."""
    rng = random.Random("the village")
    fields = {"job": "jobs", "pet": "pets", "food": "foods", "home": "homes"}
    return {name: {field: rng.choice(WORLD[pool]) for field, pool in fields.items()} for name in NAMES}


VILLAGE = villagers()
ASKED_OF_PEOPLE = {
    "job": ["What is {}'s job?", "What work does {} do?"],
    "pet": ["Which pet does {} have?", "What kind of pet does {} have?"],
    "food": ["What does {} like to eat?", "What is {}'s favourite food?"],
    "home": ["Where does {} live?", "Where is {}'s house?"],
}
ASKED_OF_ANIMALS = [
    ["What sound does a {} make?", "What does a {} say?"],
    ["Where does a {} live?", "Where is a {} at home?"],
    ["What does a {} eat?", "What is the food of a {}?"],
    ["How many legs does a {} have?", "On how many legs does a {} walk?"],
    ["What is a young {} called?", "How do you call the young of a {}?"],
]
SAID_OF_ANIMALS = [
    ["The {} says {}.", "The sound of a {} is {}.", "A {} makes the sound {}."],
    ["The {} lives in the {}.", "A {} is at home in the {}."],
    ["The {} eats {}.", "The food of a {} is {}.", "What a {} eats is {}."],
    ["The {} has {} legs.", "A {} walks on {} legs.", "The legs of a {} are {}."],
    ["A young {} is a {}.", "The young of a {} is called {}.", "A young {} is called a {}."],
]


def villager_prose(rng: random.Random, name: str) -> str:
    """Return all facts about one person in running text, in changing order and wording."""
    me = VILLAGE[name]
    pronoun = "he" if name in WORLD["names"]["he"] else "she"
    parts = [
        [f"works as a {me['job']}", f"is the {me['job']}", f"is a {me['job']}"],
        [f"has a {me['pet']}", f"keeps a {me['pet']}", f"owns a {me['pet']}"],
        [f"likes {me['food']}", f"loves to eat {me['food']}", f"eats {me['food']} every day"],
        [f"lives {me['home']}", f"has a house {me['home']}"],
    ]
    rng.shuffle(parts)
    said = [rng.choice(part) for part in parts]
    return f"{name} {said[0]} and {said[1]}. {rng.choice([name, pronoun.capitalize()])} {said[2]} and {said[3]}."


def villager(rng: random.Random) -> Item:
    """Ask for a fact about somebody in the village."""
    name, field = rng.choice(NAMES), rng.choice(list(ASKED_OF_PEOPLE))
    answer = VILLAGE[name][field]
    pool = [person[field] for person in VILLAGE.values()]
    question = rng.choice(ASKED_OF_PEOPLE[field]).format(name)
    return Item("villager", f"{name} {field}", question, answer, others(rng, pool, answer), villager_prose(rng, name))


def animal(rng: random.Random) -> Item:
    """Ask for a fact about an animal."""
    name, field = rng.choice(list(WORLD["animals"])), rng.randrange(5)
    facts = [str(fact) for fact in WORLD["animals"][name]]
    pool = [str(entry[field]) for entry in WORLD["animals"].values()] + (["3", "5"] if field == 3 else [])
    question = rng.choice(ASKED_OF_ANIMALS[field]).format(name)
    told = rng.sample(range(5), 3)
    statement = " ".join(rng.choice(SAID_OF_ANIMALS[place]).format(name, facts[place]) for place in told)
    return Item("animal", f"animal {name} {field}", question, facts[field], others(rng, pool, facts[field]), statement)


def colour_of(rng: random.Random) -> Item:
    """Ask for the colour of a thing everybody knows."""
    thing = rng.choice(list(WORLD["thing_colours"]))
    answer = WORLD["thing_colours"][thing]
    question = rng.choice(["What colour is {}?", "Which colour does {} have?"]).format(thing)
    statement = rng.choice(["{} is {}.", "{} has the colour {}.", "The colour of {} is {}."]).format(thing, answer)
    statement = statement[0].upper() + statement[1:]
    return Item("colour_of", f"colour {thing}", question, answer, others(rng, WORLD["colours"], answer), statement)


# ---- reading


def story_item(rng: random.Random, task: str, story: str, asked: dict[str, str], pool: list[str]) -> Item:
    """Return an item that asks one of the questions about a story; the rest may follow in the same conversation.

    Mistakes are the other answers of the same kind (capitals, that is names, or not) and members of `pool`.
    """
    pairs = list(asked.items())
    rng.shuffle(pairs)
    question, answer = pairs[0]
    told = [word for word in asked.values() if word.istitle() == answer.istitle()]
    pool = [word for word in pool if word.istitle() == answer.istitle()]
    wrong = others(rng, told, answer)
    if len(wrong) < 3:
        wrong += others(rng, [word for word in pool if word not in told], answer, 4 - len(wrong))
    statement = f"{story} {question} {answer}."
    return Item(task, story, question, answer, wrong, statement, story, tuple(pairs[1:]))


def whose_colour(rng: random.Random) -> Item:
    """Read who has what in which colour."""
    count = rng.choice([2, 3])
    names, colours = rng.sample(NAMES, count), rng.sample(WORLD["colours"], count)
    things = rng.sample(WORLD["things"][:6], count)
    owned = list(zip(names, colours, things, strict=True))
    story = " ".join(f"{name} has a {colour} {thing}." for name, colour, thing in owned)
    asked = {f"What colour is {name}'s {thing}?": colour for name, colour, thing in owned}
    asked |= {f"Who has the {colour} {thing}?": name for name, colour, thing in owned}
    return story_item(rng, "whose_colour", story, asked, WORLD["colours"] + rng.sample(NAMES, 9))


def where_is(rng: random.Random) -> Item:
    """Follow people who carry things from place to place."""
    (one, two), thing = rng.sample(NAMES, 2), rng.choice(WORLD["things"])
    places = rng.sample(WORLD["places"], 4)
    lines = [f"{one} took the {thing} to the {places[0]}.", f"{two} went to the {places[1]}."]
    where = {one: places[0], two: places[1], f"the {thing}": places[0]}
    if rng.random() < 0.5:
        lines.append(f"Then {one} took the {thing} to the {places[2]}.")
        where[one] = where[f"the {thing}"] = places[2]
    if rng.random() < 0.5:
        lines.append(f"{one} left the {thing} there and went to the {places[3]}.")
        where[one] = places[3]
    asked = {f"Where is {who} now?": place for who, place in where.items()}
    return story_item(rng, "where_is", " ".join(lines), asked, places)


def oldest(rng: random.Random) -> Item:
    """Find the end of a chain of comparisons told in any order."""
    people = rng.sample(NAMES, 3)
    way, least, most = rng.choice([("older", "youngest", "oldest"), ("taller", "shortest", "tallest")])
    lines = [f"{one} is {way} than {two}." for one, two in zip(people, people[1:], strict=False)]
    rng.shuffle(lines)
    asked = {f"Who is the {most}?": people[0], f"Who is the {least}?": people[-1]}
    return story_item(rng, "oldest", " ".join(lines), asked, people + rng.sample(NAMES, 3))


GOOD = ["warm", "sweet", "fresh", "bright", "lovely", "clean", "tasty", "kind", "great", "beautiful"]
BAD = ["cold", "sour", "stale", "dull", "ugly", "dirty", "bitter", "rude", "awful", "broken"]
JUDGED = [
    "soup",
    "bread",
    "cake",
    "room",
    "song",
    "picture",
    "market",
    "garden",
    "letter",
    "party",
    "weather",
    "story",
    "coat",
]


def opinion(rng: random.Random) -> tuple[str, bool]:
    """Return what somebody says about something and whether he liked it; now and then with a negation or a "but"."""
    good, name, thing, other = rng.random() < 0.5, rng.choice(NAMES), *rng.sample(JUDGED, 2)
    fits, opposes = (GOOD, BAD) if good else (BAD, GOOD)
    text = rng.choice(
        [
            f"The {thing} was {rng.choice(fits)} and the {other} was {rng.choice(fits)}.",
            f"The {thing} was not {rng.choice(opposes)} at all.",
            f"The {thing} was {rng.choice(opposes)} at first but then it was {rng.choice(fits)}.",
            f"What a {rng.choice(fits)} {thing}!",
            f"{name} said that the {thing} was so {rng.choice(fits)}.",
            f"Never did {name} see a {thing} so {rng.choice(fits)}.",
        ]
    )
    return text, good


def opinion_from(rng: random.Random, pools: tuple[str, ...]) -> tuple[str, bool]:
    """Return an opinion whose text belongs to one of the pools."""
    while True:
        text, good = opinion(rng)
        if pool_of(text) in pools:
            return text, good


def mood(rng: random.Random) -> Item:
    """Tell whether somebody liked what he got."""
    text, good = opinion(rng)
    answer, wrong = ("good", "bad") if good else ("bad", "good")
    question = f"{text} Is that good or bad?"
    return Item("mood", text, question, answer, (wrong,), f"{text} That is {answer}.")


TASKS: dict[str, Callable[[random.Random], Item]] = {
    task.__name__: task
    for task in (
        add_small, add_tens, subtract, multiply, next_number, largest, sort_numbers, word_problem,
        letter_at, count_letters, spell, backwards, alphabet, opposite, plural, past, odd_one_out, weekday,
        villager, animal, colour_of, whose_colour, where_is, oldest, mood,
    )
}  # fmt: skip
HARD = [
    "add_tens",
    "multiply",
    "subtract",
    "word_problem",
    "sort_numbers",
    "next_number",
    "backwards",
]
HARD += ["alphabet", "where_is", "oldest", "weekday", "count_letters", "whose_colour"]
EASY = [task for task in TASKS if task not in HARD]
NUMERIC = {
    "add_small",
    "add_tens",
    "subtract",
    "multiply",
    "next_number",
    "largest",
    "word_problem",
    "count_letters",
}


def draw(rng: random.Random, pools: tuple[str, ...], tasks: list[str] | None = None) -> Item:
    """Return a question whose content belongs to one of the pools."""
    task = TASKS[rng.choice(tasks or list(TASKS))]
    for _ in range(10_000):
        item = task(rng)
        if pool_of(item.key) in pools:
            return item
    raise RuntimeError(f"no content for {task.__name__} in {pools}: the world is too small for it")


def graded(rng: random.Random, hard_share: float) -> list[str]:
    """Return the hard tasks with that probability, else the easy ones."""
    return HARD if rng.random() < hard_share else EASY


# ---- rows: each function yields rows for one folder; `test` says which pool the contents come from


def user(text: str) -> dict:
    """Return a user turn."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    """Return an assistant turn."""
    return {"role": "assistant", "content": text}


SYSTEMS = [
    "You are Plumb, a helper in a small village.",
    "You are a helpful assistant. Answer briefly.",
    "Answer with the result only.",
]
STYLES = {
    "Answer in a full sentence.": "The answer is {}.",
    "Answer politely.": "{}, if you please.",
    "Answer in capital letters.": "upper",
}
SMALL_TALK = [
    ("Hello!", "Hello! I am Plumb. Ask me something short."),
    ("Hi!", "Hello! I am Plumb. Ask me something short."),
    ("Good morning!", "Good morning! What would you like to know?"),
    ("Who are you?", "I am Plumb, a very small language model."),
    ("What is your name?", "My name is Plumb."),
    ("What can you do?", "I can count, spell, read short stories and tell you about the village."),
    ("Thank you!", "You are welcome."),
    ("Good bye!", "Good bye! Come back soon."),
]


def in_style(style: str, answer: str) -> str:
    """Return the answer as the system message asks for it."""
    form = STYLES[style]
    return answer.upper() if form == "upper" else form.format(answer)


def opening(rng: random.Random, share: float, styled: float) -> tuple[list[dict], str]:
    """Return no system message or one, and the style it asks for ("" for the plain answer)."""
    if rng.random() >= share:
        return [], ""
    style = rng.choice(list(STYLES)) if rng.random() < styled else ""
    return [{"role": "system", "content": style or rng.choice(SYSTEMS)}], style


def reply(style: str, answer: str) -> str:
    """Return the answer, in the style when there is one."""
    return in_style(style, answer) if style else answer


def chat_rows(rng: random.Random, test: bool) -> Iterator[dict]:
    """Conversations: one question, or several in a row; some with a system message."""
    pools = ("test",) if test else ("first",)
    while True:
        messages, style = opening(rng, share=0.15, styled=0.5)
        turns = rng.choice([2, 2, 3]) if rng.random() < 0.2 else 1
        items = [draw(rng, pools, graded(rng, 0.5)) for _ in range(turns)]
        for item in items:
            messages += [user(item.asked), assistant(reply(style, item.answer))]
        if items[-1].more and rng.random() < 0.3:
            question, answer = items[-1].more[0]
            messages += [user(question), assistant(reply(style, answer))]
        if not test and not style and rng.random() < 0.04:
            asked, said = rng.choice(SMALL_TALK)
            messages[-2:] = [user(asked), assistant(said)]
            yield {"messages": messages, "task": "small_talk"}
            continue
        yield {"messages": messages, "task": items[-1].task}


def asked(rng: random.Random, pools: tuple[str, ...], hard_share: float) -> tuple[list[dict], Item]:
    """Return a prompt of one turn and its item; the item's answer is in the style the prompt asks for."""
    messages, style = opening(rng, share=0.12, styled=0.5)
    item = draw(rng, pools, graded(rng, hard_share))
    wrong = tuple(reply(style, mistake) for mistake in item.mistakes)
    return [*messages, user(item.asked)], replace(item, answer=reply(style, item.answer), mistakes=wrong)


def bad_answer(rng: random.Random, item: Item) -> str:
    """Return a plausible mistake (most often), rambling, or an evasion."""
    kind = rng.random()
    if kind < 0.76:
        return rng.choice(item.mistakes)
    if kind < 0.88:
        other = draw(rng, ("first",))
        return f"{rng.choice([item.answer, *item.mistakes])} {other.statement} {rng.choice(EVASIONS)}"
    return rng.choice(EVASIONS)


def preference_rows(rng: random.Random, test: bool) -> Iterator[dict]:
    """Pairs of a right and a bad answer, mostly to the hard questions."""
    while True:
        prompt, item = asked(rng, ("test",) if test else ("later",), hard_share=0.8)
        pair = {"chosen": [assistant(item.answer)], "rejected": [assistant(bad_answer(rng, item))]}
        yield {"prompt": prompt, **pair, "task": item.task}


def feedback_rows(rng: random.Random, test: bool) -> Iterator[dict]:
    """Single answers with a thumb up or down, half and half."""
    while True:
        prompt, item = asked(rng, ("test",) if test else ("later",), hard_share=0.7)
        good = rng.random() < 0.5
        said = item.answer if good else bad_answer(rng, item)
        yield {"prompt": prompt, "completion": [assistant(said)], "label": good, "task": item.task}


def prompt_rows(rng: random.Random, test: bool) -> Iterator[dict]:
    """Questions with the answer a program can check."""
    while True:
        prompt, item = asked(rng, ("test",) if test else ("later",), hard_share=0.6)
        verifier = "number" if item.answer.isdecimal() else "exact"
        yield {"prompt": prompt, "answer": item.answer, "verifier": verifier, "task": item.task}


def question_rows(rng: random.Random, test: bool) -> Iterator[dict]:
    """The same as plain text, in the layout of the pretraining pages: what a base model can go on with."""
    for row in prompt_rows(rng, test):
        if len(row["prompt"]) == 1:  # a page has no system message
            yield row | {"prompt": f"Q: {row['prompt'][0]['content']}\nA:"}


def sentence_rows(rng: random.Random, test: bool) -> Iterator[dict]:
    """Sentences with their mood: 1 good, 0 bad."""
    pools = ("test",) if test else ("first", "later")
    while True:
        (first, good), (second, also_good) = opinion_from(rng, pools), opinion_from(rng, pools)
        text = f"{first} {second}" if good == also_good and rng.random() < 0.5 else first
        yield {"sentence": text, "label": int(good)}


def sentence_pair_rows(rng: random.Random, test: bool) -> Iterator[dict]:
    """A sentence and a claim about it: 0 it follows, 1 it may or may not be, 2 it cannot be."""
    while True:
        (name, other), (place, elsewhere) = rng.sample(NAMES, 2), rng.sample(WORLD["places"], 2)
        (colour, wrong), thing = rng.sample(WORLD["colours"], 2), rng.choice(WORLD["things"])
        text = rng.choice(
            [
                f"{name} took the {colour} {thing} from {other} in the {place}.",
                f"{other} gave {name} a {colour} {thing} in the {place}.",
                f"In the {place} {name} got a {colour} {thing} from {other}.",
            ]
        )
        claims = [
            [
                f"{name} got a {thing}.",
                f"The {thing} is {colour}.",
                f"{name} was in the {place}.",
                f"{other} had a {thing}.",
            ],
            [
                f"{name} likes the {thing}.",
                f"The {thing} is old.",
                f"{other} is a friend of {name}.",
                "It was a sunny day.",
            ],
            [
                f"The {thing} is {wrong}.",
                f"{name} was in the {elsewhere}.",
                f"{other} got the {thing}.",
                f"Nobody was in the {place}.",
            ],
        ]
        label = rng.randrange(3)
        if (pool_of(text) == "test") == test:
            yield {"sentence1": text, "sentence2": rng.choice(claims[label]), "label": label}


SUBJECTS = {
    "arithmetic": ["add_small", "add_tens", "subtract", "multiply", "next_number"],
    "reading": ["where_is", "oldest", "whose_colour"],
    "the_village": ["villager"],
    "nature": ["animal", "colour_of"],
    "words": ["opposite", "plural", "past"],
    "letters": ["letter_at", "spell", "backwards", "count_letters"],
}


def choice_row(rng: random.Random, subject: str, pools: tuple[str, ...]) -> dict:
    """Return one question with four answers, the right one at a random place."""
    item = draw(rng, pools, SUBJECTS[subject])
    while len(set(item.mistakes)) < 3:
        item = draw(rng, pools, SUBJECTS[subject])
    answer = rng.randrange(4)
    choices = list(item.mistakes[:3])
    choices.insert(answer, item.answer)
    return {"question": item.asked, "choices": choices, "answer": answer, "subject": subject}


def choice_rows(rng: random.Random, test: bool) -> Iterator[dict]:
    """Multiple-choice questions, the subjects in turn."""
    while True:
        for subject in SUBJECTS:
            yield choice_row(rng, subject, ("test",) if test else ("later",))


def text_rows(rng: random.Random, test: bool) -> Iterator[dict]:
    """Pages of a harbour log: other words and another tone than the pretraining text."""
    winds = ["north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west"]
    skies = ["overcast", "hazy", "clear", "drizzle", "squalls", "dense fog", "heavy swell", "sleet"]
    ships = ["Heron", "Petrel", "Kittiwake", "Albatross", "Guillemot", "Cormorant", "Gannet", "Plover"]
    notes = [
        "No arrivals.",
        "Lamp trimmed at dusk.",
        "Gale warning hoisted.",
        "Buoy adrift, recovered.",
        "Tide gauge read.",
    ]
    cargo = ["herring", "salted cod", "timber", "tar", "canvas", "barley", "slate", "wool"]
    while True:
        wind, force, glass = rng.choice(winds), rng.randint(0, 9), rng.randint(970, 1035)
        ship, load = rng.choice(ships), rng.choice(cargo)
        trend = rng.choice(["rising", "falling", "steady"])
        moored = f"Schooner {ship} moored at quay {rng.randint(1, 9)}, discharging {rng.randint(2, 90)} tons of {load}."
        sailed = f"Cutter {ship} put to sea at {rng.randint(4, 20)} hours bound {rng.choice(winds)}, laden with {load}."
        lost = f"Trawler {ship} signalled distress off the breakwater; pilot boat despatched."
        lines = [
            f"HARBOUR LOG, day {rng.randint(1, 365)}. Wind {wind}, force {force}. Barometer {glass}, {trend}.",
            rng.choice([moored, sailed, lost]),
            rng.choice(["Visibility", "Weather"]) + f": {rng.choice(skies)}, later {rng.choice(skies)}.",
            rng.choice(notes),
        ]
        text = " ".join(lines)
        if (pool_of(text) == "test") == test:
            yield {"text": text}


FOLDERS: dict[str, tuple[Callable[[random.Random, bool], Iterator[dict]], int, int]] = {
    "chat": (chat_rows, 4000, 400),
    "preferences": (preference_rows, 2000, 400),
    "feedback": (feedback_rows, 2000, 400),
    "prompts": (prompt_rows, 2000, 400),
    "questions": (question_rows, 2000, 400),
    "sentences": (sentence_rows, 1500, 300),
    "sentence_pairs": (sentence_pair_rows, 1500, 300),
    "choices": (choice_rows, 300, 300),
    "text": (text_rows, 500, 100),
}


def take(rows: Iterator[dict], count: int, seen: set[str]) -> list[dict]:
    """Return the next `count` rows that are not in `seen` yet, and remember them there."""
    taken: list[dict] = []
    for row in rows:
        line = json.dumps(row)
        if line not in seen:
            seen.add(line)
            taken.append(row)
        if len(taken) == count:
            return taken
    raise RuntimeError("the rows ended too early")


def folder_rows(folder: str, seed: int = SEED) -> dict[str, list[dict]]:
    """Return the rows of one folder by split: train, test and, for choices, dev (five per subject)."""
    make, train, test = FOLDERS[folder]
    seen: set[str] = set()
    splits = {"train": take(make(random.Random(f"{seed} {folder} train"), False), train, seen)}
    splits["test"] = take(make(random.Random(f"{seed} {folder} test"), True), test, seen)
    if folder == "choices":
        splits["dev"] = take(make(random.Random(f"{seed} {folder} dev"), False), 5 * len(SUBJECTS), seen)
    return splits


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# ---- the pretraining text: prose, dialogues, lists of questions; never the chat format


FACTS = ["villager", "animal", "colour_of", "opposite", "plural", "past"]
# how often a school book asks for it; what takes long to learn more often, where a story brings several questions less
SHARES = {
    "add_small": 7,
    "add_tens": 7,
    "subtract": 7,
    "multiply": 5,
    "next_number": 4,
    "largest": 3,
}
SHARES |= {
    "sort_numbers": 3,
    "villager": 4,
    "word_problem": 4,
    "backwards": 3,
    "where_is": 1,
    "whose_colour": 2.5,
    "oldest": 3,
}
PAGE = ("first", "later")  # the contents the pretraining text may ask about


def mark(text: str) -> str:
    """Mark what can be known, not guessed: pretraining gives it more weight (see make_tiny.py)."""
    return f"[[{text}]]"


def told(item: Item) -> str:
    """Return the item's statement with its answer marked; facts are marked as a whole."""
    if item.task in FACTS:
        return mark(item.statement)
    before, after = item.statement.rsplit(item.answer, 1)
    return f"{before}{mark(item.answer + after)}"


def prose(rng: random.Random) -> str:
    """Return sentences of one kind of knowledge, or of all kinds.

    Facts are told of everything and everybody: what is held out of them is the question, not the fact.
    """
    tasks = FACTS if rng.random() < 0.7 else [rng.choice(list(TASKS))]
    pools = (*PAGE, "test") if tasks == FACTS else PAGE
    return " ".join(told(draw(rng, pools, tasks)) for _ in range(rng.randint(2, 5)))


# How questions and answers are written down, one way for a whole page. A model that has met many ways picks up the chat
# format; one that knows only "Q: ... A: ..." leaves most of what it can do behind.
LAYOUTS = {
    "Q: {q}\nA: {a}\n": 6,
    "Question: {q}\nAnswer: {a}\n\n": 2,
    "{one}: {q}\n{two}: {a}\n": 3,
    "{one}\n{q}\n{two}\n{a}\n\n": 3,
    "{q}\n{a}\n": 2,
    "{q} {a}\n": 1,
    "- {q}\n- {a}\n": 1,
    '"{q}"\n"{a}"\n': 1,
    "{q} = {a};\n": 1,
    "{one} asked {two}.\n{q}\nThe answer of {two}:\n{a}\n\n": 1,
    "[{w}] {q}\n[{v}] {a}\n": 2,
    "<{w}>{q}</{w}>\n<{v}>{a}</{v}>\n": 2,
    "#{w}\n{q}\n#{v}\n{a}\n#\n": 2,
    "({w} {q} {w})({v} {a} {v})\n": 1,
}


def questions(rng: random.Random) -> str:
    """Return a list of questions and answers, as in a school book; a story comes with all its questions."""
    layout = rng.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
    (one, two), w, v = rng.sample(NAMES, 2), magic_word(rng, 2), magic_word(rng, 2)
    before, after = layout.format(q="{q}", a="{a}", one=one, two=two, w=w, v=v).split("{a}")
    page = ""
    count = rng.randint(14, 20) if rng.random() < 0.02 else rng.randint(1, 5)
    for task in rng.choices(list(TASKS), [SHARES.get(task, 2) for task in TASKS], k=count):
        item = draw(rng, PAGE, [task])
        for question, answer in [(item.asked, item.answer), *item.more]:
            space = " " * before.endswith(" ")
            page += before.removesuffix(" ").format(q=question) + mark(space + answer) + after
    return page.rstrip("\n")


def dialogue(rng: random.Random) -> str:
    """Return people of the village who ask each other."""
    one, two = rng.sample(NAMES, 2)
    scene = rng.choice(
        [
            f"{one} met {two} {rng.choice(WORLD['homes'])}.",
            f"{one} is a user of the library and {two} is the assistant there.",
            f"The bell system was broken, so {one} went to see {two}.",
            f"{one} and {two} sat in the {rng.choice(WORLD['places'])}.",
        ]
    )
    lines = []
    for item in [draw(rng, PAGE, graded(rng, 0.6)) for _ in range(rng.randint(1, 3))]:
        lines.append(f"{one} asked: {item.asked} {two} said:{mark(f' {item.answer}')}.")
    if rng.random() < 0.15:
        lines.append(f"{one} asked again. {two} said: {rng.choice(EVASIONS)}")
    return f"{scene} {' '.join(lines)}"


def feelings(rng: random.Random) -> str:
    """Return a letter with opinions and the news of the village."""
    one, two = rng.sample(NAMES, 2)
    opinions = " ".join(opinion_from(rng, ("first", "later"))[0] for _ in range(2))
    return f"Dear {one}, {opinions} {mark(villager_prose(rng, rng.choice(NAMES)))} Love, {two}"


KINDS_OF_TEXT = {questions: 72, prose: 20, dialogue: 5, feelings: 3}


def page(document: str) -> dict:
    """Return the document without its marks, and the places of what was marked, as character offsets."""
    text, spans = "", []
    for part in re.split(r"(\[\[.*?\]\])", document):
        if part.startswith("[["):
            spans.append([len(text), len(text) + len(part) - 4])
            part = part[2:-2]
        text += part
    return {"text": text, "known": spans}


def pretraining_text(seed: int, characters: int) -> Iterator[dict]:
    """Yield documents until so many characters are written."""
    rng = random.Random(f"{seed} text")
    kinds, weights = list(KINDS_OF_TEXT), list(KINDS_OF_TEXT.values())
    while characters > 0:
        document = page(rng.choices(kinds, weights)[0](rng))
        characters -= len(document["text"])
        yield document


def main() -> None:
    """Write the rows and the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "tiny", help="where the folders of rows go")
    parser.add_argument("--only", nargs="*", choices=[*FOLDERS], default=[*FOLDERS], help="folders to write")
    parser.add_argument("--text", type=Path, help="also write the pretraining text there, one JSON object per line")
    parser.add_argument("--characters", type=int, default=CHARACTERS_OF_TEXT, help="how much pretraining text")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    for folder in args.only:
        for split, rows in folder_rows(folder, args.seed).items():
            write_rows(args.out / folder / f"{split}.jsonl", rows)
            print(f"{args.out / folder / split}.jsonl: {len(rows)} rows")
    if args.text:
        args.text.parent.mkdir(parents=True, exist_ok=True)
        with args.text.open("w", encoding="utf-8") as file:
            for document in pretraining_text(args.seed, args.characters):
                file.write(json.dumps(document, ensure_ascii=False) + "\n")
        print(f"{args.text}: {args.text.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
