"""Generates exchanges that ask for small markdown tables and JSON objects."""

import random
from collections.abc import Sequence

from pipeline.prompts.families.exchange import COLORS, NAMES, THINGS, Exchange, listed, worded


def pairs_table(rng: random.Random) -> Exchange:
    """Returns an exchange that asks for a table of two columns, in the order of the question."""
    first, second, keys = rng.choice(
        (
            ("name", "age", NAMES),
            ("item", "count", THINGS),
            ("color", "count", COLORS),
            ("name", "points", NAMES),
        )
    )
    rows = [(key, rng.randint(1, 20)) for key in rng.sample(keys, rng.randint(2, 3))]
    pairs = ", ".join(f"{key} {value}" for key, value in rows)
    forms = (
        ("Make a table with {first} and {second}: {pairs}.", "{table}"),
        ("Write a table of {first} and {second} for {pairs}.", "Here it is:\n{table}"),
        ("Show {pairs} as a table with columns {first} and {second}.", "The table:\n{table}"),
    )
    table = _table((first, second), rows)
    question, answer = worded(rng, forms, first=first, second=second, pairs=pairs, table=table)
    steps = f"There are {len(rows)} rows: {pairs}."
    return Exchange(question, f"The columns are {first} and {second}.", steps, "Keep the order.", answer)


def times_table(rng: random.Random) -> Exchange:
    """Returns an exchange that asks for a few rows of a times table."""
    k, first = rng.choice((2, 3, 4, 5, 10)), rng.randint(1, 6)
    rows = [(n, k * n) for n in range(first, first + rng.randint(3, 4))]
    forms = (
        ("Make a table of n and {k} x n for n from {a} to {b}.", "{table}"),
        ("Show a times table of {k} from {a} to {b}.", "Here it is:\n{table}"),
    )
    table = _table(("n", f"{k} x n"), rows)
    question, answer = worded(rng, forms, k=k, a=rows[0][0], b=rows[-1][0], table=table)
    steps = f"n is {listed([n for n, _ in rows])}. " + " ".join(f"{k} x {n} = {product}." for n, product in rows)
    return Exchange(question, f"Multiply each n by {k}.", steps, f"There are {len(rows)} rows.", answer)


def json_object(rng: random.Random) -> Exchange:
    """Returns an exchange that asks for an object with a name, a number and a color."""
    name, number, color = rng.choice(NAMES), rng.randint(1, 99), rng.choice(COLORS)
    field = rng.choice(("age", "count", "points"))
    text = f'{{"name": "{name}", "{field}": {number}, "color": "{color}"}}'
    forms = (
        ("Write JSON with name {name}, {field} {number} and color {color}.", "{text}"),
        ("Give a JSON object: name is {name}, {field} is {number}, color is {color}.", "Here it is: {text}"),
        ("{name} has {field} {number} and likes {color}. Write it as JSON.", "The JSON is {text}"),
    )
    question, answer = worded(rng, forms, name=name, field=field, number=number, color=color, text=text)
    steps = f"name is {name}. {field} is {number}. color is {color}."
    return Exchange(question, "The object has 3 fields.", steps, "Use quotes for text.", answer)


def _table(header: tuple[str, str], rows: Sequence[tuple[object, int]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "| --- | --- |"]
    return "\n".join(lines + [f"| {key} | {value} |" for key, value in rows])
