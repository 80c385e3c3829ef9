"""Generates exchanges of arithmetic, digit by digit, so that no step needs more than a small table."""

import random

from pipeline.prompts.families.exchange import NAMES, THINGS, Exchange, worded


def addition(rng: random.Random) -> Exchange:
    """Returns an exchange that adds two numbers of two digits, ones first, then tens with the carry."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    forms = (
        ("What is {a} + {b}?", "{a} + {b} = {c}"),
        ("Add {a} and {b}.", "The sum is {c}."),
        ("Find the sum of {a} and {b}.", "The sum of {a} and {b} is {c}."),
        ("How much is {a} plus {b}?", "{a} plus {b} is {c}."),
        ("Compute {a} + {b} step by step.", "The result is {c}."),
        ("I have {a} and get {b} more. What is the total?", "The total is {c}."),
    )
    question, answer = worded(rng, forms, a=a, b=b, c=a + b)
    ones, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10
    tens = a // 10 + b // 10
    carried = f", {tens} + 1 = {tens + 1}" if carry else ""
    steps = f"Ones: {a % 10} + {b % 10} = {ones}. Tens: {a // 10} + {b // 10} = {tens}{carried}. Total: {a + b}."
    return Exchange(question, "Add the ones, then the tens.", steps, f"So {a} + {b} = {a + b}.", answer)


def subtraction(rng: random.Random) -> Exchange:
    """Returns an exchange that subtracts two numbers of two digits without borrowing."""
    b_tens, b_ones = rng.randint(1, 8), rng.randint(0, 8)
    a_tens, a_ones = rng.randint(b_tens, 9), rng.randint(b_ones, 9)
    a, b = 10 * a_tens + a_ones, 10 * b_tens + b_ones
    forms = (
        ("What is {a} - {b}?", "{a} - {b} = {c}"),
        ("Take {b} from {a}.", "{c} is left."),
        ("Find {a} minus {b}.", "{a} minus {b} is {c}."),
        ("How much more is {a} than {b}?", "{a} is {c} more than {b}."),
        ("Compute {a} - {b} step by step.", "The result is {c}."),
    )
    question, answer = worded(rng, forms, a=a, b=b, c=a - b)
    steps = (
        f"Ones: {a_ones} - {b_ones} = {a_ones - b_ones}. Tens: {a_tens} - {b_tens} = {a_tens - b_tens}. Total: {a - b}."
    )
    return Exchange(question, "Take the ones, then the tens.", steps, f"So {a} - {b} = {a - b}.", answer)


def multiplication(rng: random.Random) -> Exchange:
    """Returns an exchange that multiplies two small numbers by listing the products up to theirs."""
    a, b = rng.randint(2, 9), rng.choice((2, 3, 4, 5, 10))
    forms = (
        ("What is {a} x {b}?", "{a} x {b} = {c}"),
        ("Multiply {a} and {b}.", "The product is {c}."),
        ("How much is {a} times {b}?", "{a} times {b} is {c}."),
        (
            "There are {a} boxes with {b} " + rng.choice(THINGS) + " each. What is the total?",
            "The total is {c}.",
        ),
        ("Compute {a} x {b} step by step.", "The result is {c}."),
    )
    question, answer = worded(rng, forms, a=a, b=b, c=a * b)
    products = ", ".join(f"{i} x {b} = {b * i}" for i in range(1, a + 1))
    return Exchange(question, f"Count by {b}, {a} times.", f"{products}.", f"So {a} x {b} = {a * b}.", answer)


def story_problem(rng: random.Random) -> Exchange:
    """Returns an exchange in which somebody has things, gets some and gives some away."""
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    start, more = rng.randint(2, 9), rng.randint(2, 9)
    less = rng.randint(1, min(9, start + more - 1))
    total = start + more
    forms = (
        (
            "{name} has {start} {things}, gets {more} more and gives {less} to {other}. How many are left?",
            "{name} has {left} {things} left.",
        ),
        (
            "{name} has {start} {things}. {other} gives {name} {more} and takes {less}. How many are left?",
            "{left} {things} are left.",
        ),
        (
            "A box has {start} {things}. {name} adds {more} and {other} takes {less}. How many are there?",
            "There are {left} {things} in the box.",
        ),
        (
            "{name} buys {start} {things} and {more} more. {other} takes {less}. How many does {name} have?",
            "{name} has {left} {things}.",
        ),
    )
    slots = {
        "name": name,
        "other": other,
        "things": things,
        "start": start,
        "more": more,
        "less": less,
        "left": total - less,
    }
    question, answer = worded(rng, forms, **slots)
    steps = f"Start: {start}. Add: {start} + {more} = {total}. Take: {total} - {less} = {total - less}."
    check = f"So {total - less} {things} are left."
    return Exchange(question, f"Count the {things} step by step.", steps, check, answer)


UNITS = (
    ("weeks", "days", 7),
    ("feet", "inches", 12),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("meters", "cm", 100),
    ("years", "months", 12),
    ("km", "meters", 1000),
)


def conversion(rng: random.Random) -> Exchange:
    """Returns an exchange that converts a large unit into a small one."""
    large, small, factor = rng.choice(UNITS)
    n = rng.randint(2, 9)
    forms = (
        ("How many {small} are in {n} {large}?", "There are {m} {small} in {n} {large}."),
        ("Convert {n} {large} to {small}.", "{n} {large} = {m} {small}"),
        ("What is {n} {large} in {small}?", "{n} {large} is {m} {small}."),
        ("Write {n} {large} in {small}.", "It is {m} {small}."),
        ("{name} has {n} {large}. How many {small} is that?", "{name} has {m} {small}."),
    )
    question, answer = worded(rng, forms, n=n, m=n * factor, large=large, small=small, name=rng.choice(NAMES))
    steps = f"1 of the {large} is {factor} {small}. {n} x {factor} = {n * factor}."
    return Exchange(question, f"Go from {large} to {small}.", steps, f"So it is {n * factor} {small}.", answer)
