"""Free text that a program can judge: sentences of a small probabilistic grammar.

    S -> the ADJ NOUN VERB [PREP the [ADJ] NOUN] .

Verbs agree with their noun. Choices are weighted, so that some sentences are likelier than others
and a policy can collapse on them.
"""

from __future__ import annotations

import random

ADJECTIVES = ("small", "old", "red", "quick", "sad", "big", "wise", "lost", "tall", "shy")
NOUNS = (
    "dog", "cat", "bird", "king", "farmer", "horse", "child",
    "friend", "teacher", "goat", "queen", "sailor", "frog", "robot",
)  # fmt: skip
PLURALS = {"child": "children"}
VERBS = ("run", "sleep", "sing", "wait", "play")
PREPOSITIONS = ("near", "behind", "under", "with")
LONG = 0.6
"""Share of sentences with a prepositional phrase."""


def plural(noun: str) -> str:
    return PLURALS.get(noun, noun + "s")


NUMBER_OF = {noun: "one" for noun in NOUNS} | {plural(noun): "many" for noun in NOUNS}
VERB_FORMS = {"one": tuple(f"{verb}s" for verb in VERBS), "many": VERBS}


def topic(rng: random.Random) -> str:
    """What a prompt asks about, such as "old dogs"."""
    return f"{rng.choice(ADJECTIVES)} {rng.choice(tuple(NUMBER_OF))}"


def sentence(about: str, rng: random.Random, *, agree: bool = True) -> str:
    """A sentence on the topic; with `agree=False` its verb is in the wrong number."""
    number = NUMBER_OF[about.split()[1]]
    if not agree:
        number = "many" if number == "one" else "one"
    words = ["the", about, _weighted(VERB_FORMS[number], rng)]
    if rng.random() < LONG:
        words += [_weighted(PREPOSITIONS, rng), "the"]
        if rng.random() < 0.5:
            words.append(_weighted(ADJECTIVES, rng))
        words.append(_weighted(tuple(NUMBER_OF), rng))
    return " ".join(words) + "."


def grade(about: str, text: str) -> float:
    """1 for a sentence of the grammar on the topic, 0.5 if only its verb disagrees, else 0."""
    start = f"the {about} "
    if not text.startswith(start) or not text.endswith("."):
        return 0.0
    verb, *rest = text[len(start) : -1].split(" ")
    if rest:
        if rest[0] not in PREPOSITIONS or rest[1:2] != ["the"] or not 3 <= len(rest) <= 4:
            return 0.0
        if rest[-1] not in NUMBER_OF or (len(rest) == 4 and rest[2] not in ADJECTIVES):
            return 0.0
    number = NUMBER_OF[about.split()[1]]
    if verb in VERB_FORMS[number]:
        return 1.0
    return 0.5 if any(verb in forms for forms in VERB_FORMS.values()) else 0.0


def _weighted(choices: tuple[str, ...], rng: random.Random) -> str:
    """The k-th choice with weight 1 / (k + 1)."""
    return rng.choices(choices, [1 / (k + 1) for k in range(len(choices))])[0]
