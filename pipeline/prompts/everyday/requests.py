"""Generates what people ask: a function per kind of request draws a wording and what it is about."""

import random
from collections.abc import Callable

from pipeline.prompts.everyday import fillers, passages
from pipeline.prompts.everyday.fillers import ACTIVITIES, NAMES, SUBJECTS

RequestWriter = Callable[[random.Random], str]


def _worded(rng: random.Random, forms: tuple[str, ...], **slots: object) -> str:
    return rng.choice(forms).format(**slots)


def explanation(rng: random.Random) -> str:
    """Returns a request to explain something, often to somebody."""
    forms = (
        "Explain {subject} to {audience}.",
        "How would you explain {subject} to {audience}?",
        "Explain {subject} in simple words.",
        "Write a short introduction to {subject} for {audience}.",
        "What should everybody know about {subject}?",
        "Why does {subject} matter in daily life?",
        "I have to give a talk about {subject}. What are the most important points?",
        "Give an example from daily life that helps {audience} understand {subject}.",
        "What is a common misunderstanding about {subject}?",
        "Describe {subject} in one paragraph.",
        "What would {audience} ask about {subject}, and what would you answer?",
    )
    return _worded(rng, forms, subject=rng.choice(SUBJECTS), audience=rng.choice(fillers.AUDIENCES))


def ideas(rng: random.Random) -> str:
    """Returns a request for a list of tips, mistakes or steps."""
    forms = (
        "Give me {n} tips for {activity}.",
        "List {n} common mistakes in {activity}.",
        "What are {n} good reasons for {activity}?",
        "What do I need before I start {activity}?",
        "Write a checklist for {activity}.",
        "I want to start {activity}. What are the first {n} steps?",
        "What is the hardest part of {activity}, and how do people deal with it?",
        "How long does it take to get good at {activity}?",
        "Name {n} things that make {activity} easier.",
        "Write {n} questions I should ask an expert about {activity}.",
        "Describe a typical day of somebody who is serious about {activity}.",
    )
    return _worded(rng, forms, n=rng.choice(("three", "four", "five", "six")), activity=rng.choice(ACTIVITIES))


def comparison(rng: random.Random) -> str:
    """Returns a request to compare two or three things of a kind."""
    first, second, third = rng.sample(rng.choice([kind for kind in fillers.RIVALS if len(kind) > 2]), 3)
    forms = (
        "Compare {first} and {second}.",
        "What are the main differences between {first} and {second}?",
        "Which is better, {first} or {second}? Give reasons.",
        "List the advantages and disadvantages of {first} compared with {second}.",
        "What do {first} and {second} have in common?",
        "Compare {first}, {second} and {third} in a few sentences.",
        "My friend prefers {first} and I prefer {second}. Who is right?",
        "When would you choose {first}, and when {second}?",
        "Make a table that compares {first}, {second} and {third}.",
    )
    return _worded(rng, forms, first=first, second=second, third=third)


def story(rng: random.Random) -> str:
    """Returns a request for a story, a poem, a scene or a beginning."""
    forms = (
        "Write a {mood} story about {hero} who {turn} {place}.",
        "Write a short poem about {hero} {place}.",
        "Begin a {mood} story {place}. The main character is {hero}.",
        "Tell a bedtime story in which {hero} {turn}.",
        "Write a dialogue between {hero} and {other} {place}.",
        "Describe {hero} in three sentences.",
        "Invent a title and a summary for a novel about {hero} who {turn}.",
        "Write the last paragraph of a {mood} story in which {hero} {turn}.",
        "Write a letter from {hero} to {other}.",
        "What would {hero} write in a diary after a day {place}?",
    )
    hero, other = rng.sample(fillers.CHARACTERS, 2)
    slots = {"mood": rng.choice(fillers.MOODS), "place": rng.choice(fillers.PLACES), "turn": rng.choice(fillers.TURNS)}
    return _worded(rng, forms, hero=hero, other=other, **slots)


def letter(rng: random.Random) -> str:
    """Returns a request for an email, a note or a message."""
    forms = (
        "Write a {tone} email to {recipient} {purpose}.",
        "Help me write a {tone} message to {recipient} {purpose}.",
        "Draft a {tone} letter to {recipient} {purpose}. My name is {name}.",
        "I need {purpose}. Write a {tone} note to {recipient}.",
        "What is a good subject line for an email to {recipient} {purpose}?",
        "Write three sentences to {recipient} {purpose}.",
        "How do I begin a letter to {recipient} {purpose}?",
    )
    slots = {"tone": rng.choice(fillers.TONES), "recipient": rng.choice(fillers.RECIPIENTS)}
    return _worded(rng, forms, purpose=rng.choice(fillers.PURPOSES), name=rng.choice(NAMES), **slots)


def reading(rng: random.Random) -> str:
    """Returns a request to summarise, question, continue or judge a short text."""
    forms = (
        "Summarise this text in one sentence: {text}",
        "{text}\n\nWhat is this text about?",
        "Read the text and write a headline for it.\n\n{text}",
        "Give me the main points of the following text as a list.\n\n{text}",
        "Is the tone of this text positive, negative or neutral? Explain why.\n{text}",
        "Continue this text with three more sentences: {text}",
        "Write two questions that can be answered with this text.\n\n{text}",
        "Rewrite this text for a child.\n\n{text}",
        "Which names, places and dates are in this text?\n{text}",
        "Make this text shorter: {text}",
    )
    return _worded(rng, forms, text=rng.choice(passages.PASSAGES)(rng))


def wording(rng: random.Random) -> str:
    """Returns a request to change, correct or translate a sentence."""
    sentence = rng.choice(passages.SENTENCES)
    forms = (
        'Rewrite this sentence so that it sounds more {tone}: "{sentence}"',
        'Correct the mistakes in this sentence: "{slip}"',
        'Translate into {tongue}: "{sentence}"',
        'Say this in other words: "{sentence}"',
        'Write a paragraph that begins with this sentence: "{sentence}"',
        'Is this sentence correct? If not, explain why. "{slip}"',
        'Turn this sentence into a question: "{sentence}"',
        'Put this sentence into the past tense and then into the future: "{sentence}"',
        'Who could have said this, and to whom? "{sentence}"',
    )
    slots = {"tone": rng.choice(fillers.TONES), "tongue": rng.choice(fillers.TONGUES)}
    return _worded(rng, forms, sentence=sentence, slip=rng.choice(passages.SLIPS), **slots)


def code(rng: random.Random) -> str:
    """Returns a request for a small program."""
    forms = (
        "Write a {language} function that {task}.",
        "How do I write a {language} program that {task}?",
        "Show me {language} code that {task}, with comments.",
        "Write a {language} function that {task}. Explain how it works.",
        "Write a test for a {language} function that {task}.",
        "What could go wrong in a {language} function that {task}?",
        "Explain step by step how a program {task}.",
        "Give a short {language} example that {task}.",
    )
    return _worded(rng, forms, language=rng.choice(fillers.LANGUAGES_OF_CODE), task=rng.choice(fillers.CODE_TASKS))


def advice(rng: random.Random) -> str:
    """Returns a request for advice on a problem."""
    forms = (
        "I {situation}. What should I do?",
        "I {situation}. Can you help me?",
        "What would you say to a friend who told you: I {situation}?",
        "I {situation}. Give me three ideas.",
        "I {situation}. Is that normal?",
        "I {situation}. What can I do today, and what can I do this year?",
        "My sister says: I {situation}. How should I answer her?",
    )
    return _worded(rng, forms, situation=rng.choice(fillers.SITUATIONS))


def vocabulary(rng: random.Random) -> str:
    """Returns a question about one or two words."""
    first, second = rng.sample(fillers.WORDS, 2)
    forms = (
        'What does the word "{first}" mean?',
        'Use the word "{first}" in three sentences.',
        'What is the difference between "{first}" and "{second}"?',
        'Give synonyms and antonyms of "{first}".',
        'Write a short dialogue that uses the words "{first}" and "{second}".',
        'Explain the word "{first}" to {audience}.',
        'Make a riddle whose answer is the word "{first}".',
    )
    return _worded(rng, forms, first=first, second=second, audience=rng.choice(fillers.AUDIENCES))


def cooking(rng: random.Random) -> str:
    """Returns a request for a recipe, or a question about one."""
    first, second = rng.sample(fillers.DISHES, 2)
    forms = (
        "How do I make {first} {limit}?",
        "Give me a recipe for {first} {limit}.",
        "What ingredients do I need for {first} {limit}?",
        "What goes well with {first}?",
        "Plan a dinner with {first} and {second}.",
        "Write a shopping list for {first} and {second}.",
        "What can I cook instead of {first} {limit}?",
        "My guests do not like {first}. What else could I serve {limit}?",
    )
    return _worded(rng, forms, first=first, second=second, limit=rng.choice(fillers.LIMITS))


def travel(rng: random.Random) -> str:
    """Returns a question about a country or a trip."""
    first, second = rng.sample(fillers.COUNTRIES, 2)
    forms = (
        "Plan a trip of {days} days to {first} for {group}.",
        "What should {group} see in {first}?",
        "Tell me about the history of {first}.",
        "What is {first} known for?",
        "What is the food like in {first}?",
        "What is the weather like in {first} in {month}?",
        "Should we go to {first} or to {second} in {month}?",
        "Write a postcard from {first}.",
        "What should I pack for {days} days in {first} in {month}?",
        "Which customs should a visitor to {first} know?",
    )
    slots = {"days": rng.randint(3, 14), "group": rng.choice(fillers.GROUPS), "month": rng.choice(passages.MONTHS)}
    return _worded(rng, forms, first=first, second=second, **slots)


def selling(rng: random.Random) -> str:
    """Returns a request to describe, name or advertise something."""
    forms = (
        "Write a slogan for {product}.",
        "Write a product description for {product}.",
        "Who would buy {product}, and why?",
        "Write a customer review of {product}. It should be {mood}.",
        "Suggest five names for {product}.",
        "Write an advertisement for {product} aimed at {audience}.",
        "What questions would a customer have about {product}?",
        "How could {product} be improved?",
    )
    slots = {"product": rng.choice(fillers.PRODUCTS), "audience": rng.choice(fillers.AUDIENCES)}
    return _worded(rng, forms, mood=rng.choice(fillers.MOODS), **slots)


def debate(rng: random.Random) -> str:
    """Returns a request for reasons for and against something."""
    first, second = rng.sample(fillers.DEBATES, 2)
    forms = (
        "What are the pros and cons of {first}?",
        "Write a short essay about {first}.",
        "Argue against {first} in one paragraph.",
        "Argue in favour of {first} in one paragraph.",
        "Should there be more rules about {first}?",
        "How have people's views on {first} changed?",
        "Write a discussion between two friends about {first}.",
        "What does {first} have to do with {second}?",
        "Write three questions for a debate about {first}.",
    )
    return _worded(rng, forms, first=first, second=second)


def biography(rng: random.Random) -> str:
    """Returns a question about a well-known person."""
    first, second = rng.sample(fillers.FIGURES, 2)
    forms = (
        "Who was {first}?",
        "Why is {first} still remembered today?",
        "Write a short biography of {first} for {audience}.",
        "What could {first} and {second} have talked about?",
        "Write a diary entry of {first}.",
        "What can we learn from the life of {first}?",
        "Write five quiz questions about {first}.",
        "Describe the time in which {first} lived.",
    )
    return _worded(rng, forms, first=first, second=second, audience=rng.choice(fillers.AUDIENCES))


def schedule(rng: random.Random) -> str:
    """Returns a request for a plan for a day, a week or a month."""
    forms = (
        "Make a weekly schedule for somebody who {goal} and enjoys {activity}.",
        "Write a plan for one month for {name}, who {goal}.",
        "{name} {goal}. What should a normal {day} look like?",
        "Suggest a morning routine for somebody who {goal}.",
        "{name} {goal} but spends all evenings with {activity}. What do you suggest?",
        "Write a to-do list for {day} for somebody who {goal}.",
    )
    slots = {"goal": rng.choice(fillers.GOALS), "activity": rng.choice(ACTIVITIES), "name": rng.choice(NAMES)}
    return _worded(rng, forms, day=rng.choice(passages.DAYS), **slots)


def sums(rng: random.Random) -> str:
    """Returns a word problem."""
    first, second = rng.sample(NAMES, 2)
    forms = (
        "{first} buys {a} pencils for {b} cents each. How much does {first} pay?",
        "{first} has {c} stamps and gives {a} to {second}. How many are left?",
        "A train leaves at {b} o'clock and travels for {a} hours. When does it arrive?",
        "{first} reads {a} pages a day. How long does a book of {c} pages take?",
        "{first} and {second} share {c} sweets equally. How many does each of them get?",
        "{first} earns {c} euros a week and saves {a} of them. How much is saved after {b} weeks?",
        "A garden is {a} metres long and {b} metres wide. How large is it, and how long is its fence?",
    )
    return _worded(
        rng, forms, first=first, second=second, a=rng.randint(2, 12), b=rng.randint(2, 11), c=rng.randint(20, 200)
    )


REQUEST_WRITERS: tuple[RequestWriter, ...] = (
    explanation, explanation, ideas, ideas, comparison, story, story, letter, letter, reading, reading, wording, code,
    code, advice, advice, vocabulary, cooking, travel, selling, debate, biography, schedule, sums,
)  # fmt: skip
ENDINGS = ("",) * 16 + (
    " Keep it short.", " Answer in two sentences.", " Use simple words.", " Give an example.", " Please be brief.",
    " Answer with a list.", " Explain your answer.", " Be honest.",
)  # fmt: skip


def request(seed: int, index: int) -> str:
    """Returns the `index`-th request of the sequence `seed`."""
    rng = random.Random(f"everyday/{seed}/{index}")
    return rng.choice(REQUEST_WRITERS)(rng) + rng.choice(ENDINGS)
