"""The corpus as batches: a function of the seed alone, every row of the right length, nothing lost on resume."""

import itertools

import numpy as np
import pytest

from pipeline.prompts import chat_format, corpus
from pipeline.prompts.tokenizer import train_tokenizer
from pipeline.target import batches
from pipeline.target.batches import Example

LENGTHS, BATCH_TOKENS = (12, 24), 96


@pytest.fixture
def examples():
    """Of 4 to 30 tokens, so that some are too long; every token tells its example."""
    random = np.random.default_rng(0)
    return [
        Example(np.full(int(length), index + 1, np.int32), int(random.integers(1, length)))
        for index, length in enumerate(random.integers(4, 31, 150))
    ]


def take(examples, start, stop, seed=0):
    return list(itertools.islice(batches.batch_schedule(examples, LENGTHS, BATCH_TOKENS, seed), start, stop))


def same(first, second):
    return (first.token_ids == second.token_ids).all() and (first.generated == second.generated).all()


def test_every_batch_holds_as_many_tokens_in_rows_of_one_length(examples):
    shapes = {batch.token_ids.shape for batch in take(examples, 0, 60)}
    assert shapes == {(8, 12), (4, 24)}


def test_rows_hold_whole_examples_in_the_shortest_length_that_fits(examples):
    for batch in take(examples, 0, 60):
        for row, generated in zip(batch.token_ids, batch.generated, strict=True):
            example = examples[row[0] - 1]
            count = len(example.token_ids)
            assert LENGTHS.index(len(row)) == (count > LENGTHS[0])
            assert row.tolist() == [*example.token_ids, *[0] * (len(row) - count)]
            assert generated.tolist() == [example.prompt_tokens <= at < count for at in range(len(row))]


def test_an_epoch_uses_every_example_that_fits_once_and_the_next_one_another_order(examples):
    fitting = {index + 1 for index, example in enumerate(examples) if len(example.token_ids) <= LENGTHS[-1]}
    assert len(fitting) < len(examples)
    order = [int(token) for batch in take(examples, 0, 100) for token in batch.token_ids[:, 0]]
    counts = np.bincount(order, minlength=len(examples) + 1)
    assert {token for token, count in enumerate(counts) if count} == fitting
    assert np.ptp([counts[token] for token in fitting]) <= 2  # a batch under way holds a few back
    first, second = order[: len(fitting) // 2], order[len(fitting) : len(fitting) * 3 // 2]
    assert first != second


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(examples):
    once, again, other = take(examples, 0, 40), take(examples, 0, 40), take(examples, 0, 40, seed=1)
    assert all(map(same, once, again))
    assert not all(
        first.token_ids.shape == second.token_ids.shape and same(first, second)
        for first, second in zip(once, other, strict=True)
    )


def test_a_schedule_entered_in_the_middle_goes_on_as_if_never_left(examples):
    assert all(map(same, take(examples, 17, 40), take(examples, 0, 40)[17:]))


def test_conversations_are_rendered_as_in_serving_and_the_prompts_length_is_known():
    conversations = [corpus.conversation(0, index) for index in range(40)]
    texts = [text for each in conversations for text in (each.prompt, each.analysis, each.final)]
    tokenizer = train_tokenizer(texts, 320)
    for conversation, example in zip(conversations, batches.tokenize(tokenizer, conversations), strict=True):
        prompt = chat_format.render_prompt(
            tokenizer, [{"role": "user", "content": conversation.prompt}], conversation.effort
        )
        assert list(example.token_ids[: example.prompt_tokens]) == prompt
        completion = list(example.token_ids[example.prompt_tokens :])
        assert completion[-1] in chat_format.stop_token_ids(tokenizer)
        text = tokenizer.decode(completion)
        assert conversation.analysis in text
        assert conversation.final in text
