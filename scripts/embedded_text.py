"""Text that this project writes itself, to train the embedded verifier on.

Arithmetic word problems with worked solutions, arithmetic facts, short English answers and copies
of rare characters: (prompt, response) pairs drawn from one seeded generator.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

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
    """Draw one (prompt, response) pair."""
    make = r.choices([g for _, g in GENERATORS], [weight for weight, _ in GENERATORS])[0]
    return make(r, make_writer(r))
