"""Train the embedded verifier, the small causal LM behind `load_verifier("embedded")`.

One command, one seed, CPU only. The text is the GSM8K training set (MIT) and text this script
writes itself: arithmetic word problems with worked solutions, arithmetic facts, and short English
answers. GSM8K ends a solution in `#### N`, other collections in `A: N`; either ending is written
at random.

    python scripts/train_embedded.py --gsm8k gsm8k_train.jsonl.gz --out embedded-new
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = ["<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"]
# The trainer numbers special tokens first, in this order.
BOS, SYSTEM, USER, ASSISTANT, END, PAD = range(6)
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ '<|system|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'] + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer clearly and briefly.",
    "You are a careful teacher. Think step by step.",
    "Solve the problem step by step and give the final answer on the last line.",
)
MAX_POSITIONS = 2048
Pair = tuple[str, str]

SHE = (
    "Anna Maria Emma Sofia Julia Nora Lily Grace Mia Ella Ruth Alice Clara Zoe Ivy Janet Betty "
    "Kim Rachel Wendy Tina Lena Priya Fatima Mei Amara Samantha"
)
HE = (
    "Tom Ben Sam Leo Max Jack Paul Noah Adam Eric Henry Oscar Luke Omar Ravi Carlos James John "
    "Mark Peter David Ken Raymond Jerry Toby Alex Hugo"
)
PEOPLE = [(n, "she", "her") for n in SHE.split()] + [(n, "he", "his") for n in HE.split()]
ITEM_WORDS = (
    "apples oranges eggs marbles stickers pencils books cookies cards shells balloons candles "
    "stamps flowers toys coins cupcakes muffins bottles beads pears lemons bricks tickets photos "
    "ribbons peaches notebooks crayons buttons"
)
GOOD_WORDS = (
    "shirt hat pen notebook toy bag book lamp cup plate scarf ball chair watch cake pizza mug "
    "sandwich jacket blanket puzzle candle basket umbrella wallet"
)
ITEMS, GOODS = ITEM_WORDS.split(), GOOD_WORDS.split()
GROUPS = ["boxes", "bags", "baskets", "shelves", "rows", "packs", "trays", "jars", "tables"]
JOBS = ["babysitting", "gardening", "tutoring", "painting", "cleaning", "walking dogs", "baking"]
Writer = Callable[..., tuple[str, str]]


def fmt(value: float) -> str:
    """Write a number the way the solutions do: no trailing zeros, at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value != int(value) else str(int(value))


def make_writer(r: random.Random) -> Writer:
    """Fix one notation for a solution; the result writes `a+b = <<a+b=c>>c` and returns c."""
    space, eq_space = r.choice(["", " "]), r.choice(["", " "])
    times = r.choice(["*", "*", "x"])

    def write(*parts: object, money: bool = False) -> tuple[str, str]:
        words = [p if isinstance(p, str) else fmt(p) for p in parts]  # type: ignore[arg-type]
        expr = "".join(words)
        value = fmt(eval(expr))  # only numbers and operators drawn in this file
        shown = space.join(times if w == "*" else w for w in words)
        return f"{shown}{eq_space}={eq_space}{'$' if money else ''}<<{expr}={value}>>{value}", value

    return write


def with_answer(r: random.Random, lines: list[str], answer: str) -> str:
    stop = r.choice(["", "."])
    return "\n".join(line + stop for line in lines) + "\n" + r.choice(["#### ", "A: "]) + answer


def chain_problem(r: random.Random, w: Writer) -> Pair:
    (name, he, _), item = r.choice(PEOPLE), r.choice(ITEMS)
    n = r.randint(5, 90)
    story, lines = [f"{name} has {n} {item}."], []
    for _ in range(r.randint(1, 4)):
        if n < 2:
            break
        op, k = r.choice("+-*/"), r.randint(2, 40)
        if op == "+":
            verb = r.choice(["buys", "finds", "gets", "makes", "collects"])
            story.append(f"{he.capitalize()} {verb} {k} more.")
            text, value = w(n, "+", k)
            lines.append(f"After that {name} has {text} {item}")
        elif op == "*" and n < 200:
            k = r.choice([2, 2, 3])
            often = {2: "twice", 3: "three times"}[k]
            story.append(f"Then {he} gets {often} as many as {he} has now from a friend.")
            text, more = w(n, "*", k)
            lines.append(f"The friend gives {text} {item}")
            text, value = w(n, "+", float(more))
            lines.append(f"Now {name} has {text} {item}")
        elif op == "/" and n % 2 == 0:
            story.append(f"{he.capitalize()} gives half of the {item} to a neighbor.")
            text, value = w(n, "/", 2)
            lines.append(f"{name} gives away {text} {item}" + f", so {value} {item} are left")
        else:
            k = r.randint(1, n - 1)
            verb = r.choice(["gives away", "loses", "sells", "uses", "breaks"])
            story.append(f"{he.capitalize()} {verb} {k} of them.")
            text, value = w(n, "-", k)
            lines.append(r.choice([f"{he.capitalize()} has {text} {item} left",
                                   f"That leaves {text} {item}"]))  # fmt: skip
        n = int(value)
    end = r.choice(["have now", "have left", "have in the end"])
    return f"{' '.join(story)} How many {item} does {name} {end}?", with_answer(r, lines, str(n))


def shopping_problem(r: random.Random, w: Writer) -> Pair:
    (name, he, _), goods = r.choice(PEOPLE), r.sample(GOODS, r.randint(2, 3))
    buys, lines, costs = [], [], []
    for good in goods:
        n = r.randint(2, 12)
        price = r.randint(2, 25) if r.random() < 0.8 else r.choice([0.5, 1.5, 2.5, 3.25, 4.75])
        buys.append(f"{n} {good}s for ${fmt(price)} each")
        text, cost = w(n, "*", price, money=True)
        verb = r.choice(["cost", "cost a total of"])
        lines.append(f"The {good}s {verb} {text}")
        costs.append(float(cost))
    parts: list[object] = [costs[0]]
    for c in costs[1:]:
        parts += ["+", c]
    text, total = w(*parts, money=True)
    lines.append(r.choice([f"In total {he} pays {text}", f"The total cost is {text}",
                           f"So {name} spends {text}"]))  # fmt: skip
    listed = ", ".join(buys[:-1]) + " and " + buys[-1]
    if r.random() < 0.5:
        return (f"{name} buys {listed}. How much does {he} spend in all?",
                with_answer(r, lines, total))  # fmt: skip
    has = math.ceil(float(total) / 50 + r.randint(0, 1)) * 50
    text, left = w(has, "-", float(total), money=True)
    lines.append(f"{he.capitalize()} has {text} left")
    prompt = f"{name} has ${has}. {he.capitalize()} buys {listed}. How much money is left?"
    return prompt, with_answer(r, lines, left)


def work_problem(r: random.Random, w: Writer) -> Pair:
    (name, he, _), job = r.choice(PEOPLE), r.choice(JOBS)
    rate, hours, days, weeks = r.randint(6, 30), r.randint(2, 9), r.randint(2, 6), r.randint(2, 8)
    t1, day = w(rate, "*", hours, money=True)
    t2, week = w(float(day), "*", days, money=True)
    lines = [f"{name} earns {t1} a day", f"In a week {he} earns {t2}"]
    prompt = (f"{name} earns ${rate} an hour for {job}. {he.capitalize()} works {hours} hours a "
              f"day, {days} days a week. How much does {he} earn in ")  # fmt: skip
    if r.random() < 0.5:
        return prompt + "a week?", with_answer(r, lines, week)
    t3, total = w(float(week), "*", weeks, money=True)
    return (f"{prompt}{weeks} weeks?",
            with_answer(r, [*lines, f"In {weeks} weeks that is {t3}"], total))  # fmt: skip


def compare_problem(r: random.Random, w: Writer) -> Pair:
    (a, *_), (b, *_), (c, *_) = r.sample(PEOPLE, 3)
    item, n, k, m = r.choice(ITEMS), r.randint(3, 40), r.randint(2, 6), r.randint(2, 20)
    often = {2: "twice", 3: "three times"}.get(k, f"{k} times")
    t1, x = w(n, "*", k)
    more = r.random() < 0.6 or int(x) <= m
    t2, y = w(int(x), "+" if more else "-", m)
    t3, total = w(n, "+", int(x), "+", int(y))
    lines = [f"{b} has {t1} {item}", f"{c} has {t2} {item}"]
    prompt = (f"{a} has {n} {item}. {b} has {often} as many {item} as {a}. {c} has {m} "
              f"{'more' if more else 'fewer'} {item} than {b}. ")  # fmt: skip
    if r.random() < 0.4:
        return prompt + f"How many {item} does {c} have?", with_answer(r, lines, y)
    lines.append(f"Together they have {t3} {item}")
    return prompt + f"How many {item} do they have altogether?", with_answer(r, lines, total)


def share_problem(r: random.Random, w: Writer) -> Pair:
    (name, he, _), item, group = r.choice(PEOPLE), r.choice(ITEMS), r.choice(GROUPS)
    friends, each, boxes = r.randint(2, 9), r.randint(2, 15), r.randint(2, 12)
    boxes = min(boxes, friends * each // 2)
    per_box = friends * each // boxes
    rest = friends * each - per_box * boxes
    t1, n = w(boxes, "*", per_box)
    prompt = f"{name} has {boxes} {group} with {per_box} {item} in each."
    lines = [f"There are {t1} {item} in the {group}"]
    if rest > 0:
        t, n = w(int(n), "+", rest)
        prompt += f" {he.capitalize()} has {rest} more {item} in a drawer."
        lines.append(f"{name} has {t} {item}")
    t2, each_text = w(int(n), "/", friends)
    prompt += f" {he.capitalize()} shares all the {item} equally among {friends} friends. "
    lines.append(f"Each friend gets {t2} {item}")
    return prompt + f"How many {item} does each friend get?", with_answer(r, lines, each_text)


def percent_problem(r: random.Random, w: Writer) -> Pair:
    (name, *_), good = r.choice(PEOPLE), r.choice(GOODS)
    price, p, n = r.randint(1, 20) * 20, r.choice([5, 10, 15, 20, 25, 30, 40, 50]), r.randint(1, 5)
    up = r.random() < 0.25
    t1, off = w(price, "*", p / 100, money=True)
    t2, new = w(price, "+" if up else "-", float(off), money=True)
    word = "tax" if up else "discount"
    lines = [f"The {word} is {t1}", f"So one {good} costs {t2}"]
    prompt = f"A {good} costs ${price}" + (f" plus {p}% tax. " if up else f". It is {p}% off. ")
    if n == 1:
        return prompt + f"How much does {name} pay for it?", with_answer(r, lines, new)
    t3, total = w(float(new), "*", n, money=True)
    lines.append(f"{name} pays {t3} for {n} {good}s")
    return prompt + f"How much does {name} pay for {n} of them?", with_answer(r, lines, total)


def unit_problem(r: random.Random, w: Writer) -> Pair:
    (name, he, _), item = r.choice(PEOPLE), r.choice(ITEMS)
    n, k = r.randint(2, 12), r.randint(2, 9)
    kind = r.randrange(4)
    if kind == 0:
        t1, day = w(n, "*", 7)
        t2, total = w(int(day), "*", k)
        lines = [f"There are 7 days in a week, so {he} uses {t1} {item} a week",
                 f"In {k} weeks {he} uses {t2} {item}"]  # fmt: skip
        return (f"{name} uses {n} {item} every day. How many {item} does {he} use in {k} weeks?",
                with_answer(r, lines, total))  # fmt: skip
    if kind == 1:
        t1, eggs = w(k * 12, "/", 12)
        return (f"{name} needs {k * 12} {item}. They are sold by the dozen. How many dozens should "
                f"{he} buy?",
                with_answer(r, [f"12 make a dozen, so {he} needs {t1} dozens"], eggs))  # fmt: skip
    if kind == 2:
        speed = r.randint(3, 13) * 5
        t1, far = w(speed, "*", n)
        t2, left = w(int(far), "+", k)
        lines = [f"{name} drives {t1} miles", f"Altogether {he} travels {t2} miles"]
        return (f"{name} drives at {speed} miles an hour for {n} hours and then walks {k} miles. "
                "How many miles is that altogether?", with_answer(r, lines, left))  # fmt: skip
    age, more = r.randint(5, 40), r.randint(2, 25)
    other = r.choice([p for p in PEOPLE if p[0] != name])[0]
    t1, now = w(age, "+", more)
    t2, later = w(int(now), "+", k)
    lines = [f"{other} is {t1} years old", f"In {k} years {other} will be {t2} years old"]
    return (f"{name} is {age} years old. {other} is {more} years older than {name}. How old will "
            f"{other} be in {k} years?", with_answer(r, lines, later))  # fmt: skip


def arithmetic_facts(r: random.Random, w: Writer) -> Pair:
    def one() -> tuple[str, str, str]:
        op, a, b = r.choice("+-**/"), r.randint(1, 99), r.randint(1, 99)
        if op == "*":
            a, b = (r.randint(2, 12), r.randint(2, 99)) if r.random() < 0.8 else (a, b)
            a, b = r.choice([(a, b), (b, a)])
        elif op == "/":
            b = r.randint(2, 12)
            a = b * r.randint(1, 30)
        elif op == "-":
            a, b = max(a, b), min(a, b)
        if op in "+-" and r.random() < 0.3:
            a *= 10
        return f"{a}{op}{b}", *w(a, op, b)

    expr, text, value = one()
    form = r.randrange(4)
    if form == 0:
        ask = r.choice(["What is {}?", "Compute {}.", "Calculate {}", "How much is {}?", "{} ="])
        return ask.format(expr), r.choice([value, f"{expr} = {value}", text, f"It is {value}."])
    if form == 1:
        return f"What is {expr}? Show the work.", with_answer(r, [text], value)
    rows = [one() for _ in range(r.randint(4, 12))]
    asked = ", ".join(e for e, _, _ in rows)
    return (f"Compute: {asked}",
            "\n".join((f"{e} = {v}" if form == 2 else t) for e, t, v in rows))  # fmt: skip


DEFINITIONS = """triangle|a flat shape with three straight sides and three angles
square|a flat shape with four equal sides and four right angles
circle|a round shape whose points are all the same distance from the center
river|a long stream of water that flows to a lake or to the sea
mountain|a very high piece of land with steep sides
island|a piece of land with water all around it
desert|a dry place where very little rain falls
forest|a large area of land that is covered with trees
teacher|a person who helps students learn in a school
doctor|a person who helps sick people get well
farmer|a person who grows food and keeps animals
baker|a person who makes bread and cakes
computer|a machine that stores information and follows instructions very quickly
bicycle|a vehicle with two wheels that a rider moves by pushing pedals
telescope|a tool that makes far away things look closer
thermometer|a tool that measures how hot or cold something is
map|a drawing that shows where places are
dictionary|a book that lists words and explains what they mean
library|a place where people can read and borrow books
museum|a building where art or old things are kept and shown
bridge|a structure that carries a road or a path over water
clock|an instrument that shows the time
dog|an animal with four legs that many people keep as a friend
cat|a small animal with soft fur that likes to hunt mice
bird|an animal with wings and feathers that lays eggs
fish|an animal that lives in water and breathes with gills
bee|a small insect that makes honey and helps flowers to grow
whale|a very large animal that lives in the sea and breathes air
tree|a tall plant with a trunk, branches and leaves
sun|the star at the center of our solar system, which gives us light and heat
moon|the round body that travels around the earth once a month
planet|a large body that moves around a star
rain|water that falls from the clouds in drops
snow|small white pieces of frozen water that fall from the sky
fraction|a number that stands for a part of a whole
sum|the result of adding two or more numbers
product|the result of multiplying two or more numbers
prime number|a whole number greater than one that only one and itself divide
average|the sum of the values divided by how many values there are
percentage|a part of a whole written as a number out of one hundred
language model|a program that predicts the next word from the words before it
probability|a number between zero and one that says how likely an event is
algorithm|a list of clear steps that solve a problem
function|a named piece of a program that takes some input and returns a result"""
OPPOSITES = (
    "hot cold,big small,fast slow,happy sad,early late,light dark,hard soft,open closed,full empty,"
    "young old,high low,long short,strong weak,rich poor,clean dirty,wet dry,near far,left right,"
    "loud quiet,true false,first last,inside outside,always never,cheap expensive,easy difficult"
)
CAPITALS = (
    "France Paris,Germany Berlin,Italy Rome,Spain Madrid,Portugal Lisbon,Austria Vienna,Greece "
    "Athens,Norway Oslo,Sweden Stockholm,Finland Helsinki,Denmark Copenhagen,Poland Warsaw,Hungary "
    "Budapest,Ireland Dublin,Japan Tokyo,China Beijing,India Delhi,Egypt Cairo,Kenya Nairobi,"
    "Canada Ottawa,Peru Lima,Chile Santiago,Cuba Havana,Russia Moscow,Turkey Ankara,Iran Tehran"
)
KINDS = {
    "animals": "dogs cats horses lions elephants birds bears wolves rabbits tigers cows sheep",
    "fruits": "apples pears oranges bananas grapes lemons peaches plums cherries melons",
    "colors": "red blue green yellow purple orange white black brown pink",
    "vegetables": "carrots potatoes onions beans peas tomatoes cabbage spinach",
    "sports": "football tennis swimming running basketball cycling skiing rowing",
    "tools": "hammer saw knife drill brush rope ladder shovel",
}
HOW_TO = """\
make tea|Boil some water|Put a tea bag in a cup|Pour the hot water over it\
|Wait for three minutes|Take the tea bag out|Add milk or sugar if you like
plant a seed|Fill a pot with soil|Make a small hole|Put the seed in the hole\
|Cover it with soil|Give it water|Put the pot in the sun
learn for a test|Make a plan for each day|Read your notes\
|Practice with old questions|Take short breaks|Sleep well before the test
write a letter|Start with a greeting|Say why you are writing\
|Keep your sentences short and clear|Thank the reader|Sign your name
bake a cake|Heat the oven|Mix the butter and the sugar|Add the eggs and the flour\
|Pour the mix into a pan|Bake it for forty minutes|Let it cool
save money|Write down what you spend|Decide how much you need each week|Cook at home\
|Put a small amount aside every month
solve a word problem|Read the question carefully|Write down the numbers you know\
|Decide which operation to use|Do the calculation|Check that the answer makes sense
debug a program|Read the error message|Find the line where it happens\
|Make a small example that fails|Change one thing at a time|Run the tests again
stay healthy|Eat fresh food|Drink enough water|Move every day|Sleep eight hours\
|Spend time with your friends"""
ADJECTIVES = ["little", "old", "kind", "brave", "quiet", "clever", "happy", "young", "curious"]
ANIMALS = ["dog", "cat", "bird", "horse", "rabbit", "bear", "fish", "mouse", "fox"]
PLACES = ["the forest", "the park", "a small town", "the beach", "the garden", "the city", "a farm"]
OPENERS = ["Sure! ", "Of course. ", "", "", "", "Yes. ", "Here is one way to say it. "]


def english(r: random.Random, _write: Writer) -> Pair:
    """Return a short question or instruction with its answer, composed from the tables above."""
    (name, he, his), (other, *_) = r.sample(PEOPLE, 2)
    adj, place = r.choice(ADJECTIVES), r.choice(PLACES)
    kind = r.randrange(10)
    if kind <= 1:
        what, meaning = r.choice(DEFINITIONS.splitlines()).split("|")
        the = "the " if what in ("sun", "moon") else "" if what in ("rain", "snow") else (
            "an " if what[0] in "aeiou" else "a ")  # fmt: skip
        ask = r.choice(["What is {}?", "Explain what {} is.", "Define {}.",
                        "Tell me what {} is in one sentence."]).format(the + what)  # fmt: skip
        start = f"{the}{what}".capitalize()
        return ask, f"{r.choice(OPENERS)}{start} is {meaning}."
    if kind == 2:
        pair = r.choice(OPPOSITES.split(",")).split()
        r.shuffle(pair)
        ask = r.choice(["What is the opposite of {}?", "Give the opposite of {}."])
        answer = r.choice(['The opposite of "{}" is "{}".', "{1}"])
        return ask.format(pair[0]), answer.format(*pair)
    if kind == 3:
        country, city = r.choice(CAPITALS.split(",")).split()
        if r.random() < 0.3:
            return f"Which country has the capital {city}?", f"{city} is the capital of {country}."
        return (f"What is the capital of {country}?",
                r.choice([f"The capital of {country} is {city}.", f"{city}.", city]))  # fmt: skip
    if kind == 4:
        group, members = r.choice(list(KINDS.items()))
        n = r.randint(2, 5)
        chosen = r.sample(members.split(), n)
        count = ["two", "three", "four", "five"][n - 2]
        listed = (", ".join(chosen[:-1]) + f" and {chosen[-1]}" if r.random() < 0.5 else
                  "\n".join(f"{i}. {c.capitalize()}" for i, c in enumerate(chosen, 1)))  # fmt: skip
        return f"{r.choice(['List', 'Name', 'Give me'])} {count} {group}.", listed
    if kind == 5:
        goal, *steps = r.choice(HOW_TO.splitlines()).split("|")
        style = r.randrange(3)
        ask = r.choice([f"How do I {goal}?", f"Tell me how to {goal}.",
                        f"What is the best way to {goal}?"])  # fmt: skip
        if style == 0:
            return ask, "\n".join(f"{i}. {s}." for i, s in enumerate(steps, 1))
        if style == 1:
            return ask, f"To {goal}, follow these steps:\n" + "\n".join(f"- {s}" for s in steps)
        joined = [("First, " if i == 0 else r.choice(["Then ", "Next, ", "After that, "]))
                  + s[0].lower() + s[1:] + "." for i, s in enumerate(steps)]  # fmt: skip
        return ask, " ".join(joined)
    if kind == 6:
        gift = r.choice(GOODS)
        return (f"Write a short thank-you note from {name} to {other} for the {gift}.",
                f"Dear {other},\n\nThank you very much for the {gift}. It was so kind of you. I "
                f"{r.choice(['use it every day', 'like it very much', 'was very happy to get it'])}"
                f" and think of you. I hope to see you soon.\n\n{r.choice(['Best wishes', 'Love'])}"
                f",\n{name}")  # fmt: skip
    if kind == 7:
        animal = r.choice(ANIMALS)
        found = r.choice(GOODS)
        weather, mood = r.choice(["sunny", "cold", "rainy"]), r.choice(["sad", "worried"])
        middle = [
            f"They liked to walk in {place} together.",
            f"It was a {weather} day.",
            f"One day {he} found a {found} on the way.",
            f"{other} was {mood} because the {found} was lost.",
            f'"Is this your {found}?" {he} asked {other}.',
            f'"Thank you!" said {other} with a smile.',
        ]
        picked = [s for s in middle if r.random() < 0.75]
        return (f"Write a short story about a {adj} {animal}.",
                f"Once upon a time, there was a {adj} {animal} who lived in {place} with {name}. "
                + " ".join(picked) + f" In the end {name} and {his} {animal} went home, "
                "and they were happy.")  # fmt: skip
    if kind == 8:
        op, sym, verb = r.choice([("add", "+", "sum"), ("multiply", "*", "product"),
                                  ("subtract", "-", "difference")])  # fmt: skip
        a, b = r.sample("abnmxyuv", 2)
        return (f"Write a Python function that returns the {verb} of two numbers.",
                f"def {op}({a}, {b}):\n    return {a} {sym} {b}")  # fmt: skip
    # Copying rare characters keeps every byte token out of the dead corner of the embedding.
    ranges = [(0xA1, 0x24F), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x621, 0x64A),
              (0x904, 0x939), (0x3041, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3),
              (0x1F300, 0x1F64F), (33, 126)]  # fmt: skip
    low, high = r.choice(ranges)
    text = "".join(chr(r.randint(low, high)) for _ in range(r.randint(3, 16)))
    text = text if r.random() < 0.6 else f"{name} {text} {r.choice(ITEMS)}"
    return f"Repeat this text exactly: {text}", text


GENERATORS: list[tuple[float, Callable[[random.Random, Writer], Pair]]] = [
    (3, chain_problem), (3, shopping_problem), (2, work_problem), (3, compare_problem),
    (2, share_problem), (2, percent_problem), (3, unit_problem), (4, arithmetic_facts),
    (7, english),
]  # fmt: skip


def synthetic_pair(r: random.Random) -> Pair:
    """Draw one (prompt, response) pair written by this script."""
    make = r.choices([g for _, g in GENERATORS], [weight for weight, _ in GENERATORS])[0]
    return make(r, make_writer(r))


def read_gsm8k(path: Path, held_out: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return (train, held-out) pairs; one problem never appears in both."""
    if not path.is_file():
        raise SystemExit(f"GSM8K file {path} not found; pass --gsm8k PATH to a .jsonl.gz with "
                         "fields prompt and response.")  # fmt: skip
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    prompts = sorted({row["prompt"] for row in rows})
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: int(len(prompts) * held_out)])
    pairs = [(row["prompt"], row["response"]) for row in rows]
    return [p for p in pairs if p[0] not in held], [p for p in pairs if p[0] in held]


def either_ending(r: random.Random, response: str) -> str:
    """Write the last line `#### N` as `A: N` half of the time."""
    return re.sub(r"\n#### (?=[^\n]*$)", "\nA: ", response) if r.random() < 0.5 else response


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with every digit its own token and no normaliser."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=SPECIALS[BOS], eos_token=SPECIALS[END],
        pad_token=SPECIALS[PAD], additional_special_tokens=SPECIALS[SYSTEM : ASSISTANT + 1],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False, padding_side="right")  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class Example(NamedTuple):
    """Token ids of one conversation and the loss weight of each of them."""

    ids: list[int]
    weights: list[float]


def make_example(
    tok: PreTrainedTokenizerFast, pairs: list[Pair], system: str | None, prompt_weight: float
) -> Example:
    """Lay out pairs exactly as the chat template does, with a loss weight for each token."""
    ids, weights = [BOS], [0.0]

    def add(text: str, role: int, weight: float) -> None:
        body = tok.encode(text, add_special_tokens=False)
        ids.extend([role, *body])
        weights.extend([0.0, *[weight] * len(body)])

    if system is not None:
        add(system, SYSTEM, prompt_weight)
    for prompt, response in pairs:
        add(prompt, USER, prompt_weight)
        add(response, ASSISTANT, 1.0)
        ids.append(END)
        weights.append(1.0)
    return Example(ids[:MAX_POSITIONS], weights[:MAX_POSITIONS])


def example_stream(
    tok: PreTrainedTokenizerFast, train: list[Pair], args: argparse.Namespace
) -> Iterator[Example]:
    """Yield examples for ever: mostly single turns, some dialogues, a few of 2,048 tokens."""
    r = random.Random(args.seed + 1)
    order: list[Pair] = []

    def pair() -> Pair:
        if r.random() < args.synthetic:
            return synthetic_pair(r)
        if not order:
            order.extend(train)
            r.shuffle(order)
        prompt, response = order.pop()
        return prompt, either_ending(r, response)

    while True:
        kind = r.random()
        # A 2,048-token dialogue holds about ten turns, so 0.4 % of draws is 4 % of tokens.
        turns = 40 if kind < 0.004 else r.randint(2, 4) if kind < 0.03 else 1
        system = r.choice(SYSTEM_PROMPTS) if r.random() < 0.1 else None
        yield make_example(tok, [pair() for _ in range(turns)], system, args.prompt_weight)


def batches(examples: Iterator[Example], tokens: int, seed: int) -> Iterator[list[Example]]:
    """Group examples of similar length, at most `tokens` padded tokens a batch, in random order."""
    r = random.Random(seed)
    while True:
        pool = sorted((next(examples) for _ in range(800)), key=lambda e: len(e.ids))
        groups: list[list[Example]] = [[]]
        for example in pool:
            if (len(groups[-1]) + 1) * len(example.ids) > tokens and groups[-1]:
                groups.append([])
            groups[-1].append(example)
        r.shuffle(groups)
        yield from groups


def collate(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad to `ids [B, T]` and `weights [B, T]`; causal attention needs no mask for that."""
    width = max(len(e.ids) for e in examples)
    ids = torch.tensor([e.ids + [PAD] * (width - len(e.ids)) for e in examples])
    weights = torch.tensor([e.weights + [0.0] * (width - len(e.weights)) for e in examples])
    return ids, weights


def build_model(args: argparse.Namespace, tok: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=args.hidden, intermediate_size=args.ffn,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128), max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True, initializer_range=0.04, bos_token_id=BOS,
        eos_token_id=END, pad_token_id=PAD)  # fmt: skip
    return LlamaForCausalLM(config)


def make_optimizers(
    model: LlamaForCausalLM, args: argparse.Namespace
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms.

    After 0.4 M tokens Muon stood at 2.92 held-out nats a token, AdamW alone (same batch) at 3.12.
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.01, ns_steps=4)
    adam = torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for group in (*muon.param_groups, *adam.param_groups):
        group["initial_lr"] = group["lr"]
    return [muon, adam]


def token_losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return `-log p(ids[:, 1:])` in nats, shape `[B, T-1]`."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    # Flattened, because cross_entropy over a strided class dimension costs a third of the step.
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1)


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, held: list[Pair]
) -> tuple[float, float]:
    """Held-out loss of the response with its end token, in nats: (per token, per UTF-8 byte)."""
    r = random.Random(0)
    pairs = [(p, either_ending(r, s)) for p, s in held]
    examples = sorted((make_example(tok, [p], None, 0.0) for p in pairs), key=lambda e: len(e.ids))
    nats = tokens = 0.0
    for start in range(0, len(examples), 16):
        ids, weights = collate(examples[start : start + 16])
        nats += float((token_losses(model, ids) * weights[:, 1:]).sum())
        tokens += float(weights[:, 1:].sum())
    return nats / tokens, nats / sum(len(s.encode()) for _, s in pairs)


@torch.no_grad()
def loss_by_position(
    model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, held: list[Pair]
) -> dict[str, float]:
    """Held-out response loss by position, over dialogues that fill the whole context."""
    edges = (0, 128, 256, 512, 1024, 1536, MAX_POSITIONS)
    sums, counts = torch.zeros(MAX_POSITIONS), torch.zeros(MAX_POSITIONS)
    for start in range(0, len(held) - 14, 14):
        ids, weights = collate([make_example(tok, held[start : start + 14], None, 0.0)])
        losses = (token_losses(model, ids) * weights[:, 1:])[0]
        sums[1 : len(losses) + 1] += losses
        counts[1 : len(losses) + 1] += weights[0, 1:]
    return {f"{a}-{b}": round(float(sums[a:b].sum() / counts[a:b].sum()), 4)
            for a, b in itertools.pairwise(edges)}  # fmt: skip


def save(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the folder file by file, each by rename, so that a reader never sees half a file."""
    staging = out.with_name(out.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    tok.save_pretrained(staging, save_jinja_files=False)
    settings = json.loads((staging / "tokenizer_config.json").read_text())
    # transformers 4 knows the class and the list by these names only; transformers 5 takes both.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings.pop("backend", None)
    (staging / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    # Half precision on disk, but the config says float32 so that it is loaded, and run, in float32.
    config = model.config.to_diff_dict()
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "rope_theta": 10000.0}
    (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = {k: v.to(torch.float16).contiguous() for k, v in model.state_dict().items()
               if k != "lm_head.weight"}  # fmt: skip
    save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
        (staging / name).chmod(0o644)
        os.replace(staging / name, out / name)
    shutil.rmtree(staging)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    train_pairs, held = read_gsm8k(args.gsm8k, 0.05, args.seed)
    r = random.Random(args.seed + 2)
    own = [synthetic_pair(r) for _ in range(6000)]
    mixed = [(p, either_ending(r, s)) for p, s in train_pairs] + own
    tok = train_tokenizer((t for pair in mixed for t in pair), args.vocab)
    model = build_model(args, tok)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters; {len(train_pairs)} problems, {len(held)} held out", flush=True)

    optimizers = make_optimizers(model, args)
    stream = batches(example_stream(tok, train_pairs, args), args.batch, args.seed + 3)
    best, seen, steps, next_eval, start = math.inf, 0, 0, args.eval_every, time.time()
    report = {"parameters": size, "seed": args.seed}
    bar = Progress(TextColumn("{task.description}"), BarColumn(),
                   TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())  # fmt: skip
    with bar:
        task = bar.add_task("training", total=args.tokens)
        while seen < args.tokens:
            ids, weights = collate(next(stream))
            warm = min(1.0, (seen + 1) / (0.02 * args.tokens))
            scale = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * seen / args.tokens)))
            # Explicit attention is faster on a CPU until its [T, T] matrices leave the cache.
            model.set_attn_implementation("eager" if ids.shape[1] <= 512 else "sdpa")
            with torch.autocast("cpu", torch.bfloat16):
                losses = token_losses(model, ids)
            loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in optimizers:
                for group in opt.param_groups:
                    group["lr"] = group["initial_lr"] * scale
                opt.step()
                opt.zero_grad()
            new = int(ids.ne(PAD).sum())
            seen, steps = seen + new, steps + 1
            speed = seen / (time.time() - start)
            bar.update(task, completed=seen,
                       description=f"loss {loss.item():.3f}  {speed:,.0f} tokens/s")  # fmt: skip
            if seen >= next_eval or seen >= args.tokens:
                next_eval += args.eval_every
                per_token, per_byte = evaluate(model, tok, held)
                losses_text = f"{per_token:.4f} nats/token, {per_byte:.4f} nats/byte"
                clock = f"{seen:,} tokens, {time.time() - start:.0f} s, lr x {scale:.2f}"
                print(f"{clock}: held-out {losses_text}", flush=True)
                if per_token < best:
                    best = per_token
                    save(model, tok, args.out)
                    report |= {"held_out_nats_per_token": round(per_token, 4),
                               "held_out_nats_per_byte": round(per_byte, 4),
                               "tokens_at_best": seen}  # fmt: skip
    trained = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    report |= {"tokens": seen, "steps": steps, "seconds": round(time.time() - start),
               "bytes": (args.out / "model.safetensors").stat().st_size,
               "nats_per_token_by_position": loss_by_position(trained, tok, held)}  # fmt: skip
    print(json.dumps(report, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    shared = Path(os.environ.get("CME_SHARED", "."))
    package = Path(__file__).resolve().parent.parent / "cme_reward" / "verifiers" / "embedded"
    add = parser.add_argument
    add("--gsm8k", type=Path, default=shared / "texts" / "gsm8k_train.jsonl.gz",
        help="JSON lines, gzipped, with fields prompt and response")  # fmt: skip
    add("--out", type=Path, default=package, help="folder to write; the best checkpoint so far")
    add("--tokens", type=float, default=7e6, help="training tokens, padding not counted")
    add("--eval-every", type=float, default=5e5, help="tokens between held-out evaluations")
    add("--batch", type=int, default=2048, help="padded tokens an optimiser step")
    add("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    add("--muon-lr", type=float, default=2e-2, help="peak learning rate of Muon")
    add("--synthetic", type=float, default=0.4, help="share of examples this script writes itself")
    add("--prompt-weight", type=float, default=0.3, help="loss weight of prompt tokens")
    add("--vocab", type=int, default=2048, help="tokens of the byte-level BPE")
    add("--hidden", type=int, default=256, help="model width, a multiple of 128")
    add("--ffn", type=int, default=512, help="width of the feed-forward layers")
    add("--layers", type=int, default=5, help="number of layers")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--seed", type=int, default=20260529, help="seed of the split, the text and the weights")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
