"""Generates exchanges that count, continue, sort and choose from lists of small numbers."""

import random

from pipeline.prompts.families.exchange import Exchange, listed, numbered, worded


def counting(rng: random.Random) -> Exchange:
    """Returns an exchange that counts up or down by a fixed step; the numbers are counted along, to know the last."""
    step, length = rng.choice((1, 1, 1, 2, 2, 5, 10)), rng.randint(6, 9)
    down = rng.random() < 0.4
    low = rng.randint(1, 30)
    numbers = [low + step * i for i in range(length)]
    if down:
        numbers.reverse()
    way = "down" if down else "up"
    forms = (
        ("Count {way} from {a} by {s}, {n} numbers.", "{numbers}"),
        ("Start at {a} and count {way} by {s} for {n} numbers.", "Here it is: {numbers}"),
        ("List {n} numbers from {a} {way} in steps of {s}.", "The numbers are {numbers}."),
        ("Write {n} numbers from {a} {way} by {s}.", "{n} numbers: {numbers}"),
        ("Go {way} from {a} in steps of {s} and stop after {n} numbers.", "{numbers}. Stop."),
    )
    slots = {
        "way": way,
        "a": numbers[0],
        "s": step,
        "n": length,
        "numbers": listed(numbers),
    }
    question, answer = worded(rng, forms, **slots)
    steps = f"Write {length} numbers {way} by {step}: {numbered(numbers)}."
    check = f"There are {length} numbers."
    return Exchange(question, f"Count {way} in steps of {step}.", steps, check, answer)


def continuation(rng: random.Random) -> Exchange:
    """Returns an exchange that finds the step of a sequence and continues it."""
    step, start = rng.choice((1, 2, 3, 5, 10)), rng.randint(1, 20)
    sign = "-" if rng.random() < 0.3 else "+"
    shown = [start + step * i for i in range(7)]
    if sign == "-":
        shown.reverse()
    beginning, following = shown[:4], shown[4:]
    forms = (
        ("What comes next: {beginning}?", "The next numbers are {following}."),
        ("Continue the list {beginning} with 3 more.", "{beginning}, {following}"),
        ("Find the next 3 numbers after {beginning}.", "{following}"),
        ("Here is a list: {beginning}. What are the next 3?", "Next are {following}."),
    )
    question, answer = worded(rng, forms, beginning=listed(beginning), following=listed(following))
    last = beginning[-1]
    walk = []
    for number in following:
        walk.append(f"{last} {sign} {step} = {number}.")
        last = number
    steps = f"From {shown[0]} to {shown[1]} is {sign} {step}. " + " ".join(walk)
    return Exchange(question, "Find the step of the list.", steps, "The list is done.", answer)


def ordering(rng: random.Random) -> Exchange:
    """Returns an exchange that sorts a few different digits."""
    items = rng.sample(range(1, 10), rng.randint(4, 6))
    down = rng.random() < 0.4
    order = sorted(items, reverse=down)
    extreme = "largest" if down else "smallest"
    ends = ("large", "small") if down else ("small", "large")
    forms = (
        ("Sort {items} from {first} to {last}.", "{order}"),
        ("Put the numbers {items} in order, {extreme} first.", "In order: {order}"),
        ("Write {items} from {first} to {last}.", "The order is {order}."),
        ("Order this list, {extreme} first: {items}", "Here it is: {order}"),
    )
    slots = {
        "items": listed(items),
        "order": listed(order),
        "extreme": extreme,
        "first": ends[0],
        "last": ends[1],
    }
    question, answer = worded(rng, forms, **slots)
    steps = f"The {extreme} is {order[0]}, then {listed(order[1:])}."
    return Exchange(question, f"Take the {extreme} first.", steps, f"There are {len(items)} numbers.", answer)


def extreme(rng: random.Random) -> Exchange:
    """Returns an exchange that finds the largest or smallest of a list, from left to right."""
    items = rng.sample(range(1, 10), rng.randint(4, 5))
    want_max = rng.random() < 0.5
    word, choose = ("largest", max) if want_max else ("smallest", min)
    best = choose(items)
    forms = (
        ("What is the {word} of {items}?", "The {word} is {best}."),
        ("Find the {word} number: {items}", "{best}"),
        ("Which is the {word}: {items}?", "{best} is the {word}."),
        ("Take the {word} number from the list {items}.", "The {word} number is {best}."),
    )
    question, answer = worded(rng, forms, word=word, items=listed(items), best=best)
    running = [choose(items[: i + 1]) for i in range(len(items))]
    steps = " ".join(f"See {item}, keep {extreme_so_far}." for item, extreme_so_far in zip(items, running, strict=True))
    return Exchange(question, f"Keep the {word} so far.", steps, f"So it is {best}.", answer)


def parity(rng: random.Random) -> Exchange:
    """Returns an exchange that selects the even or the odd members of a list of digits."""
    items = [*rng.sample((1, 3, 5, 7, 9), rng.randint(1, 4)), rng.choice((2, 4, 6, 8))]
    items += rng.sample(sorted({2, 4, 6, 8} - set(items)), 5 - len(items))
    rng.shuffle(items)
    word, rest = ("even", 0) if rng.random() < 0.5 else ("odd", 1)
    matching = [item for item in items if item % 2 == rest]
    forms = (
        ("Which of {items} are {word}?", "The {word} numbers are {matching}."),
        ("Keep the {word} numbers: {items}", "{matching}"),
        ("List the {word} numbers in {items}.", "{word}: {matching}"),
        ("Find all {word} numbers in the list {items}.", "They are {matching}."),
    )
    question, answer = worded(rng, forms, items=listed(items), word=word, matching=listed(matching))
    chosen: list[int] = []
    walk = []
    for item in items:
        chosen += [item] if item in matching else []
        walk.append(f"{item} is {'odd' if item % 2 else 'even'}: {listed(chosen) or 'none'}.")
    steps = " ".join(walk)
    return Exchange(question, "Look at each number.", steps, f"There are {len(matching)} {word} numbers.", answer)
