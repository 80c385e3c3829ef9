"""Generates exchanges about small Python functions and loops."""

import random

from pipeline.prompts.families.exchange import Exchange, listed, worded

FUNCTIONS = ("f", "g", "h", "run", "step", "work")
ARGUMENTS = ("x", "y", "n", "a", "b", "k")
OPERATIONS = (
    ("adds {k} to {x}", "{x} + {k}"),
    ("takes {k} from {x}", "{x} - {k}"),
    ("multiplies {x} by {k}", "{x} * {k}"),
    ("tells if {x} is more than {k}", "{x} > {k}"),
    ("tells if {x} is less than {k}", "{x} < {k}"),
    ("tells if {x} is even", "{x} % 2 == 0"),
    ("gets the sum of the list {x}", "sum({x})"),
    ("gets the largest of the list {x}", "max({x})"),
    ("gets the first {k} of the list {x}", "{x}[:{k}]"),
    ("gets the last {k} of the list {x}", "{x}[-{k}:]"),
)


def definition(rng: random.Random) -> Exchange:
    """Returns an exchange that asks for a function of one line."""
    name, x, k = rng.choice(FUNCTIONS), rng.choice(ARGUMENTS), rng.randint(1, 20)
    task, expression = (text.format(x=x, k=k) for text in rng.choice(OPERATIONS))
    code = f"```python\ndef {name}({x}):\n    return {expression}\n```"
    forms = (
        ("Write a Python function {name} that {task}.", "{code}"),
        ("Make a function {name} in Python. It {task}.", "Here it is:\n{code}"),
        ("In Python, define {name}({x}) so that it {task}.", "{code}"),
        ("I want a Python function {name} that {task}.", "The function {name}:\n{code}"),
    )
    question, answer = worded(rng, forms, name=name, x=x, task=task, code=code)
    steps = f"The function {name} takes {x} and {task}. Return {expression}."
    return Exchange(question, "Write a small function.", steps, "One line is enough.", answer)


def branch(rng: random.Random) -> Exchange:
    """Returns an exchange that asks for a function that returns one of two numbers."""
    name, x = rng.choice(FUNCTIONS), rng.choice(ARGUMENTS)
    k, yes, no = rng.randint(1, 9), rng.randint(0, 9), rng.randint(0, 9)
    word, sign = rng.choice((("more", ">"), ("less", "<")))
    code = f"```python\ndef {name}({x}):\n    if {x} {sign} {k}:\n        return {yes}\n    return {no}\n```"
    forms = (
        ("Write a Python function {name}: if {x} is {word} than {k} return {yes}, else {no}.", "{code}"),
        (
            "In Python, define {name}({x}) to return {yes} if {x} {sign} {k} and {no} if not.",
            "Here it is:\n{code}",
        ),
    )
    slots = {"name": name, "x": x, "k": k, "yes": yes, "no": no, "word": word, "sign": sign, "code": code}
    question, answer = worded(rng, forms, **slots)
    steps = f"If {x} {sign} {k} return {yes}. Else return {no}."
    return Exchange(question, "Write a function with an if.", steps, "Two lines return.", answer)


def loop(rng: random.Random) -> Exchange:
    """Returns an exchange that asks what a `for` loop over a range prints."""
    step = rng.choice((1, 1, 2))
    times = rng.randint(3, 6 - step)
    first = rng.randint(0, 9 - step * times)  # no value of i has two digits
    last = first + step * times
    add = rng.choice((0, 1, 2, 10))
    body = f"i + {add}" if add else "i"
    values = list(range(first, last, step))
    printed = [value + add for value in values]
    bounds = f"{first}, {last}" + (f", {step}" if step > 1 else "")
    forms = (
        ("What does this print? for i in range({bounds}): print({body})", "It prints {printed}."),
        ("Run this Python code: for i in range({bounds}): print({body})", "{printed}"),
        ("for i in range({bounds}): print({body})\nWhich numbers are printed?", "The numbers are {printed}."),
    )
    question, answer = worded(rng, forms, bounds=bounds, body=body, printed=listed(printed))
    steps = f"The last i is {last} - {step} = {last - step}. i goes {listed(values)}."
    if add:
        steps += f" {listed([f'{i} + {add} = {i + add}' for i in values])}."
    return Exchange(question, "Follow the loop.", steps, f"It runs {times} times.", answer)
