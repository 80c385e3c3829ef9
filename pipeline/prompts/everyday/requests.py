"""What people ask: one function per kind of request, each a few wordings over many things to ask about."""

import random
from collections.abc import Callable

from pipeline.prompts.everyday import fillers, passages
from pipeline.prompts.everyday.fillers import ACTIVITIES, NAMES, SUBJECTS

Request = Callable[[random.Random], str]


def _worded(rng: random.Random, forms: tuple[str, ...], **slots: object) -> str:
    return rng.choice(forms).format(**slots)


def explanation(rng: random.Random) -> str:
    """Something to be explained, often to somebody."""
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
    """A list of tips, mistakes or steps."""
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
    """Two or three things of one kind, side by side."""
    one, two, three = rng.sample(rng.choice([kind for kind in fillers.RIVALS if len(kind) > 2]), 3)
    forms = (
        "Compare {one} and {two}.",
        "What are the main differences between {one} and {two}?",
        "Which is better, {one} or {two}? Give reasons.",
        "List the advantages and disadvantages of {one} compared with {two}.",
        "What do {one} and {two} have in common?",
        "Compare {one}, {two} and {three} in a few sentences.",
        "My friend prefers {one} and I prefer {two}. Who is right?",
        "When would you choose {one}, and when {two}?",
        "Make a table that compares {one}, {two} and {three}.",
    )
    return _worded(rng, forms, one=one, two=two, three=three)


def story(rng: random.Random) -> str:
    """A story, a poem, a scene or a beginning."""
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
    """An email, a note or a message."""
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
    """A short text to be summed up, questioned, continued or judged."""
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
    """A sentence to be changed, corrected or translated."""
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
    """A small program."""
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
    """Somebody with a problem."""
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
    """One or two words."""
    one, two = rng.sample(fillers.WORDS, 2)
    forms = (
        'What does the word "{one}" mean?',
        'Use the word "{one}" in three sentences.',
        'What is the difference between "{one}" and "{two}"?',
        'Give synonyms and antonyms of "{one}".',
        'Write a short dialogue that uses the words "{one}" and "{two}".',
        'Explain the word "{one}" to {audience}.',
        'Make a riddle whose answer is the word "{one}".',
    )
    return _worded(rng, forms, one=one, two=two, audience=rng.choice(fillers.AUDIENCES))


def cooking(rng: random.Random) -> str:
    """A recipe or something about one."""
    one, two = rng.sample(fillers.DISHES, 2)
    forms = (
        "How do I make {one} {limit}?",
        "Give me a recipe for {one} {limit}.",
        "What ingredients do I need for {one} {limit}?",
        "What goes well with {one}?",
        "Plan a dinner with {one} and {two}.",
        "Write a shopping list for {one} and {two}.",
        "What can I cook instead of {one} {limit}?",
        "My guests do not like {one}. What else could I serve {limit}?",
    )
    return _worded(rng, forms, one=one, two=two, limit=rng.choice(fillers.LIMITS))


def travel(rng: random.Random) -> str:
    """A country, a trip, a week."""
    one, two = rng.sample(fillers.COUNTRIES, 2)
    forms = (
        "Plan a trip of {days} days to {one} for {group}.",
        "What should {group} see in {one}?",
        "Tell me about the history of {one}.",
        "What is {one} known for?",
        "What is the food like in {one}?",
        "What is the weather like in {one} in {month}?",
        "Should we go to {one} or to {two} in {month}?",
        "Write a postcard from {one}.",
        "What should I pack for {days} days in {one} in {month}?",
        "Which customs should a visitor to {one} know?",
    )
    slots = {"days": rng.randint(3, 14), "group": rng.choice(fillers.GROUPS), "month": rng.choice(passages.MONTHS)}
    return _worded(rng, forms, one=one, two=two, **slots)


def selling(rng: random.Random) -> str:
    """Something to be described, named or advertised."""
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
    """Reasons for and against."""
    one, two = rng.sample(fillers.DEBATES, 2)
    forms = (
        "What are the pros and cons of {one}?",
        "Write a short essay about {one}.",
        "Argue against {one} in one paragraph.",
        "Argue in favour of {one} in one paragraph.",
        "Should there be more rules about {one}?",
        "How have people's views on {one} changed?",
        "Write a discussion between two friends about {one}.",
        "What does {one} have to do with {two}?",
        "Write three questions for a debate about {one}.",
    )
    return _worded(rng, forms, one=one, two=two)


def biography(rng: random.Random) -> str:
    """A person whom many know."""
    one, two = rng.sample(fillers.FIGURES, 2)
    forms = (
        "Who was {one}?",
        "Why is {one} still remembered today?",
        "Write a short biography of {one} for {audience}.",
        "What could {one} and {two} have talked about?",
        "Write a diary entry of {one}.",
        "What can we learn from the life of {one}?",
        "Write five quiz questions about {one}.",
        "Describe the time in which {one} lived.",
    )
    return _worded(rng, forms, one=one, two=two, audience=rng.choice(fillers.AUDIENCES))


def schedule(rng: random.Random) -> str:
    """A plan for a day, a week or a month."""
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
    """A word problem."""
    one, two = rng.sample(NAMES, 2)
    forms = (
        "{one} buys {a} pencils for {b} cents each. How much does {one} pay?",
        "{one} has {c} stamps and gives {a} to {two}. How many are left?",
        "A train leaves at {b} o'clock and travels for {a} hours. When does it arrive?",
        "{one} reads {a} pages a day. How long does a book of {c} pages take?",
        "{one} and {two} share {c} sweets equally. How many does each of them get?",
        "{one} earns {c} euros a week and saves {a} of them. How much is saved after {b} weeks?",
        "A garden is {a} metres long and {b} metres wide. How large is it, and how long is its fence?",
    )
    return _worded(rng, forms, one=one, two=two, a=rng.randint(2, 12), b=rng.randint(2, 11), c=rng.randint(20, 200))


KINDS: tuple[Request, ...] = (
    explanation, explanation, ideas, ideas, comparison, story, story, letter, letter, reading, reading, wording, code,
    code, advice, advice, vocabulary, cooking, travel, selling, debate, biography, schedule, sums,
)  # fmt: skip
ENDINGS = ("",) * 16 + (
    " Keep it short.", " Answer in two sentences.", " Use simple words.", " Give an example.", " Please be brief.",
    " Answer with a list.", " Explain your answer.", " Be honest.",
)  # fmt: skip


def request(seed: int, index: int) -> str:
    """The `index`-th request of the sequence `seed`."""
    rng = random.Random(f"everyday/{seed}/{index}")
    return rng.choice(KINDS)(rng) + rng.choice(ENDINGS)
