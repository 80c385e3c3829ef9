"""Generates exchanges about letters, repeated words, colors and days."""

import random
import string

from pipeline.prompts.families.exchange import COLORS, NAMES, Exchange, listed, numbered, with_numbers, worded

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def letters(rng: random.Random) -> Exchange:
    """Returns an exchange that writes a few letters forwards or backwards."""
    items = rng.sample(string.ascii_uppercase, rng.randint(4, 6))
    backwards = rng.random() < 0.5
    result = items[::-1] if backwards else items
    task = "backwards" if backwards else "forwards"
    forms = (
        ("Write the letters {items} {task} as a list.", "{result}"),
        ("Say {items} {task}.", "{task}: {result}"),
        ("Spell the word {word} {task}, one letter at a time.", "The letters are {result}."),
        ("Take the word {word} and list its letters {task}.", "Here it is: {result}"),
    )
    slots = {"items": listed(items), "word": "-".join(items), "task": task, "result": listed(result)}
    question, answer = worded(rng, forms, **slots)
    steps = f"{numbered(items)}."
    if backwards:
        steps += f" Back: {listed(with_numbers(items)[::-1])}."
    plan = f"Go {task} one letter at a time."
    return Exchange(question, plan, steps, f"So we get {' '.join(result)}.", answer)


def repetition(rng: random.Random) -> Exchange:
    """Returns an exchange that repeats a word or two and numbers them."""
    words = rng.sample((*COLORS, *NAMES), rng.choice((1, 2)))
    times = rng.randint(2, 5)
    phrase = " and ".join(words)
    result = numbered([" ".join(words)] * times)
    forms = (
        ("Write {phrase} {times} times with numbers.", "{result}"),
        ("Say {phrase} {times} times and count along.", "Here it is: {result}"),
        ("Repeat {phrase} {times} times and number them.", "{result}."),
        ("Make a numbered list with {phrase} {times} times.", "The list is {result}."),
    )
    question, answer = worded(rng, forms, phrase=phrase, times=times, result=result)
    steps = f"Write {phrase}, {times} times: {result}."
    check = f"That is {times} x {len(words)} = {times * len(words)} words."
    return Exchange(question, "Repeat and count.", steps, check, answer)


def tally(rng: random.Random) -> Exchange:
    """Returns an exchange that counts a color in a short numbered row of colors."""
    pair = rng.sample(COLORS, 2)
    row = [rng.choice(pair) for _ in range(rng.randint(4, 7))]
    wanted = rng.choice(pair)
    forms = (
        ("How many times is {wanted} in the row {row}?", "{wanted} is there {n} times."),
        ("Count {wanted} in the list {row}.", "There are {n} of {wanted}."),
        ("Here is a row: {row}. How many are {wanted}?", "{n} are {wanted}."),
        ("In the list {row}, how many are {wanted}?", "The number is {n}."),
    )
    n = row.count(wanted)
    question, answer = worded(rng, forms, wanted=wanted, row=numbered(row), n=n)
    seen, walk = 0, []
    for number, color in enumerate(row, start=1):
        seen += color == wanted
        walk.append(f"{number} {color} {'yes' if color == wanted else 'no'}: {seen}")
    steps = f"Count {wanted}: {', '.join(walk)}."
    return Exchange(question, "Look at each color.", steps, f"So {wanted} is there {n} times.", answer)


def weekday(rng: random.Random) -> Exchange:
    """Returns an exchange that steps forwards or backwards through the week."""
    start, days = rng.randrange(7), rng.randint(2, 7)
    sign, word = (1, "after") if rng.random() < 0.6 else (-1, "before")
    walk = [DAYS[(start + sign * i) % 7] for i in range(1, days + 1)]
    forms = (
        ("What day is {days} days {word} {start}?", "It is {end}."),
        ("Today is {start}. Which day is {days} days {word} that?", "{days} days {word} {start} is {end}."),
        ("{name} comes {days} days {word} {start}. On which day is that?", "{name} comes on {end}."),
        ("Go from {start} to {days} days {word} it. Which day is it?", "The day is {end}."),
    )
    slots = {"days": days, "word": word, "start": DAYS[start], "end": walk[-1], "name": rng.choice(NAMES)}
    question, answer = worded(rng, forms, **slots)
    return Exchange(question, f"Go {days} days, one at a time.", f"{numbered(walk)}.", f"So it is {walk[-1]}.", answer)
