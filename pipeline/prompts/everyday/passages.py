"""Generates short texts for requests: reports, reviews, stories, plans and single sentences."""

import random
from collections.abc import Callable

from pipeline.prompts.everyday.fillers import ACTIVITIES, COUNTRIES, DISHES, NAMES, PRODUCTS

MONTHS = ("January", "March", "April", "June", "July", "September", "October", "December")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
BUILDINGS = (
    "library", "swimming pool", "town hall", "cinema", "bridge", "train station", "museum", "market hall", "hospital",
    "primary school", "theatre", "bakery",
)  # fmt: skip
TOWNS = (
    "Millbrook", "Eastford", "Harrow Bay", "Oakley", "Stonehill", "Windmere", "Larkfield", "Port Alder", "Greenvale",
    "Northgate", "Redwater", "Summerton",
)  # fmt: skip
PROBLEMS = (
    "the roof was leaking", "the money had run out", "a storm damaged the windows", "too few visitors came",
    "the heating had failed", "the floor was no longer safe", "a fire broke out in the cellar",
    "nobody wanted to run it", "the wiring was fifty years old", "the river had flooded it twice",
)  # fmt: skip
NEWS_OUTCOMES = (
    "Volunteers spent the summer repairing it.", "The town has found a new owner.",
    "A local company paid for the work.",
    "More than two hundred people came to the opening.", "The mayor called it a good day for the town.",
    "Entry is free for children until the end of the year.", "Some residents would have preferred a park.",
    "It now has a café and a garden.", "The costs were twice as high as planned.", "It will be open on weekends only.",
)  # fmt: skip
PRAISE = (
    "works exactly as promised", "arrived a day early", "feels well made", "was cheaper than I expected",
    "is easy to clean", "made my mornings better", "is the best gift I have had in years", "looks lovely",
)  # fmt: skip
BLAME = (
    "broke after a week", "smells of plastic", "came without instructions", "is far too heavy",
    "was the wrong colour", "makes a strange noise", "took a month to arrive", "is not worth the price",
)  # fmt: skip
VERDICTS = (
    "I would buy it again.", "I sent it back.", "My family is divided about it.", "The shop answered at once.",
    "Nobody at the shop answers the phone.", "I have told all my friends.", "Next time I will look elsewhere.",
)  # fmt: skip
FINDS = (
    "a rusty key", "a bag of coins", "an old diary", "a kitten", "a message in a bottle", "a broken violin",
    "a train ticket from 1952", "a box of seeds", "a wedding ring", "a photograph of a stranger",
)  # fmt: skip
SPOTS = (
    "under the floor of the attic", "on the beach", "behind the school", "in a coat from the flea market",
    "at the bottom of the garden", "in the back of a taxi", "between two books", "beside the railway line",
)  # fmt: skip
REACTIONS = (
    "At first nobody believed the story.", "A reporter called the next morning.", "The police had no idea what to do.",
    "It had belonged to the previous owner.", "It turned out to be worth a small fortune.",
    "The owner had been looking for it for years.", "In the end it was given to the museum.",
    "It still stands on the kitchen shelf.", "The neighbours helped to clean it.",
)  # fmt: skip
SENTENCES = (
    "The meeting was moved because nobody had time on Monday.", "We regret that your order is late.",
    "He said that the movie was kind of boring.", "The dog ran across the street and barked at the postman.",
    "Our new shop opens tomorrow at nine.", "I can't come because my car broke down.",
    "It is really hot today and I want to go home.", "The children were happy when they saw the snow.",
    "Please send me the papers as soon as you can.", "The food was cold and the waiter was rude.",
    "She has worked here for ten years.", "We should think about the budget before we buy anything.",
    "My grandmother makes the best soup in the world.", "The train was late again, so I missed the exam.",
    "You did a good job but there are some mistakes.", "They want to build a new road through the forest.",
    "I don't understand this question at all.", "The old man sat on the bench and fed the birds.",
    "Everybody liked the idea, but nobody wanted to do the work.", "The lamp on my desk is broken.",
    "This phone is good, but the battery is bad.", "We walked along the river until it got dark.",
    "The teacher told us to read the first chapter.", "I have never seen such a big cake.",
    "Your room must be clean before you go out.", "The results of the test were better than last year.",
)  # fmt: skip
SLIPS = (  # a wrong sentence each, for requests to correct it
    "She don't like to eat fish on fridays.", "Me and him goes to the same school.",
    "Yesterday I have seen a very good film.", "The informations in this book is old.",
    "He is more taller than his brother.", "I am living here since three years.", "There house is bigger then ours.",
    "We was waiting for the bus when it start to rain.", "Can you tell me where is the station?",
    "The childs are playing in the garden.", "I didn't knew that you was ill.", "Its a pity that your not coming.",
    "She speaks english very good.", "If I will have time, I will call you.", "He suggested me to take the train.",
    "Who's book is this on the table?", "I look forward to meet you next week.", "The news are not good today.",
    "They has been married for twenty year.", "He drived to fast and lost he's licence.",
)  # fmt: skip


def report(rng: random.Random) -> str:
    """Returns a piece of local news."""
    month, year = rng.choice(MONTHS), rng.randint(1998, 2024)
    first, second = rng.sample(NEWS_OUTCOMES, 2)
    return (
        f"The {rng.choice(BUILDINGS)} in {rng.choice(TOWNS)} was closed in {month} {year} because "
        f"{rng.choice(PROBLEMS)}. {first} {second}"
    )


def review(rng: random.Random) -> str:
    """Returns a customer's review of a product."""
    kind = rng.choice(("mixed", "good", "bad"))
    praise, blame = rng.sample(PRAISE, 2), rng.sample(BLAME, 2)
    opinions = {
        "good": f"It {praise[0]} and {praise[1]}.",
        "bad": f"It {blame[0]} and {blame[1]}.",
        "mixed": f"It {praise[0]}, but it {blame[0]}.",
    }
    product = rng.choice(PRODUCTS)
    return f"I bought {product} from this shop in {rng.choice(MONTHS)}. {opinions[kind]} {rng.choice(VERDICTS)}"


def find(rng: random.Random) -> str:
    """Returns a small story about a find."""
    name = rng.choice(NAMES)
    first, second = rng.sample(REACTIONS, 2)
    return f"On a {rng.choice(DAYS)}, {name} found {rng.choice(FINDS)} {rng.choice(SPOTS)}. {first} {second}"


def plan(rng: random.Random) -> str:
    """Returns somebody's plans."""
    name, other = rng.sample(NAMES, 2)
    hobby, later = rng.sample(ACTIVITIES, 2)
    return (
        f"{name} has taken up {hobby} and does it every {rng.choice(DAYS)} with {other}. Next year they will travel "
        f"to {rng.choice(COUNTRIES)} for {rng.randint(2, 6)} weeks. {other} is more interested in {later}, and both "
        f"of them love {rng.choice(DISHES)}."
    )


PASSAGES: tuple[Callable[[random.Random], str], ...] = (report, review, find, plan)
