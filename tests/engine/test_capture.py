"""The teacher-forced pass against a plain forward over each text alone."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pipeline.artifacts.artifact import Artifact
from pipeline.engine.capture import Captured, capture, disagreements, padded_text_length
from pipeline.engine.config import EngineConfig
from pipeline.model.gpt_oss import forward as gpt_oss
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_target
from pipeline.model.layers.sampling import Sampling
from pipeline.prompts.messages import Message
from pipeline.prompts.sources import prompt_of
from pipeline.store.reader import open_split
from pipeline.teacher_cache.answer import AnsweredPrompt, answer_prompts
from pipeline.teacher_cache.origin import AnswerOrigin
from pipeline.teacher_cache.render import RenderedPrompt

pytestmark = pytest.mark.usefixtures("compiled_quickly")

TAPPED = (0, 2)
DRAWN = AnswerOrigin(sampling=Sampling(temperature=0.9, top_p=0.95), seed=2)


@partial(jax.jit, static_argnames=("tapped_layers",))
def _plain_forward(
    target: TargetModel, token_ids: jax.Array, *, tapped_layers: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    out = gpt_oss.forward(target, token_ids[None], jnp.zeros(1, jnp.int32), None, tapped_layers)
    return out.features[0], gpt_oss.logits(target.weights, out.hidden[0])


def _assert_equal_but_for_rounding(features: np.ndarray, wanted: np.ndarray) -> None:
    """bfloat16 of the same numbers; one summed in another order may round the other way.

    Float32 sums round by the size of what is summed: by the row's norm, also where an element is near zero.
    """
    assert features.dtype == ml_dtypes.bfloat16
    assert features.shape == wanted.shape
    rounded = wanted.astype(ml_dtypes.bfloat16).astype(np.float32)
    found = features.astype(np.float32)
    summed = 1e-6 * np.linalg.norm(wanted, axis=1, keepdims=True)
    assert np.all(np.abs(found - rounded) <= np.abs(wanted) * 2**-7 + summed)
    assert np.mean(found == rounded) > 0.99


def test_features_and_choices_are_those_of_the_plain_forward(target_directory: Path) -> None:
    target = read_target(target_directory, WeightFormat())
    random = np.random.default_rng(0)
    texts = [random.integers(0, target.config.vocab_size, count).tolist() for count in (70, 3, 64)]
    found = dict(capture(target, TAPPED, texts))
    assert sorted(found) == [0, 1, 2]
    for index, text in enumerate(texts):
        features, logits = _plain_forward(target, jnp.array(text), tapped_layers=TAPPED)
        _assert_equal_but_for_rounding(found[index].features, np.asarray(features))
        logits = np.asarray(logits)
        assert np.array_equal(found[index].next_ids, logits.argmax(axis=-1))
        below = logits.max(axis=-1)[:-1] - logits[np.arange(len(text) - 1), text[1:]]
        np.testing.assert_allclose(found[index].shortfall[:-1], below, atol=1e-4)


def test_a_cached_answer_is_greedy_and_its_features_are_the_plain_forwards(
    cache: Artifact, target_directory: Path
) -> None:
    target = read_target(target_directory, WeightFormat())
    tapped = tuple(cache.contract["features"]["tapped_layers"])
    for sequence in open_split(cache.path, "train").read([1, 9]):
        token_ids, first = sequence.token_ids, sequence.prompt_tokens
        features, logits = _plain_forward(target, jnp.array(token_ids), tapped_layers=tapped)
        _assert_equal_but_for_rounding(sequence.features, np.asarray(features))
        assert np.array_equal(np.asarray(logits).argmax(axis=-1)[first - 1 : -1], token_ids[first:])


def test_only_generated_tokens_can_disagree() -> None:
    captured = Captured(
        features=np.zeros((5, 2), ml_dtypes.bfloat16),
        next_ids=np.array([9, 9, 7, 9, 9], np.int32),
        shortfall=np.array([1.0, 0.0, 0.25, 0.0, 3.0], np.float32),
    )
    found = disagreements(captured, [1, 2, 3, 4, 5], prompt_tokens=2)
    assert [(one.position, one.found_id, one.wanted_id, one.gap) for one in found] == [(3, 4, 7, 0.25)]


@pytest.mark.parametrize(("count", "length"), [(1, 64), (64, 64), (65, 128), (512, 512), (513, 1024), (1025, 1536)])
def test_texts_are_padded_to_few_lengths(count: int, length: int) -> None:
    assert padded_text_length(count) == length


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def drawn_texts(target_directory: Path) -> tuple[TargetModel, list[AnsweredPrompt]]:
    """Answers that the engine sampled at a temperature of 0.9 from a nucleus of 0.95."""
    target = read_target(target_directory, WeightFormat())
    random = np.random.default_rng(5)
    rows = [
        RenderedPrompt(
            prompt_of([Message("user", str(index))], "low"), tuple(random.integers(0, 290, size).tolist()), None
        )
        for index, size in enumerate((5, 70, 33, 12, 9))
    ]
    answers = answer_prompts(
        target,
        rows,
        EngineConfig(num_slots=3, max_length=120, prefill_chunk=70, stop_token_ids=(299,), samples=True),
        max_new_tokens=50,
        on_finished=lambda _: None,
        origin=DRAWN,
    )
    return target, answers


def test_the_noise_of_a_drawn_text_chooses_it_again_and_that_of_another_text_does_not(drawn_texts) -> None:
    target, answers = drawn_texts
    keys = DRAWN.keys([one.prompt.prompt_id for one in answers])
    texts = [one.token_ids for one in answers]
    found = dict(capture(target, TAPPED, texts, sampling=DRAWN.sampling, keys=keys))
    greedy = dict(capture(target, TAPPED, texts))
    other = dict(capture(target, TAPPED, texts, sampling=DRAWN.sampling, keys=keys[1:] + keys[:1]))
    for index, one in enumerate(answers):
        generated = np.arange(one.prompt_tokens, len(one.token_ids))
        assert np.array_equal(found[index].next_ids[generated - 1], np.array(one.token_ids)[generated])
        assert found[index].shortfall[generated - 1].max() <= 1e-3
        assert disagreements(found[index], one.token_ids, one.prompt_tokens) == []
        assert np.mean(greedy[index].shortfall[generated - 1] > 1e-3) > 0.3
        assert np.mean(other[index].shortfall[generated - 1] > 1e-3) > 0.3
        assert np.array_equal(found[index].features, greedy[index].features)


def test_the_shortfall_of_a_drawn_text_is_the_distance_from_the_noisy_choice_within_the_nucleus(drawn_texts) -> None:
    """numpy's, from the sorted logits and JAX's random bits, over a text that was not drawn at all."""
    target, _ = drawn_texts
    text = np.random.default_rng(6).integers(0, target.config.vocab_size, 40)
    key, sampling = DRAWN.keys(["another"])[0], DRAWN.sampling
    found = dict(capture(target, TAPPED, [text.tolist()], sampling=sampling, keys=[key]))[0]
    _, logits = _plain_forward(target, jnp.array(text), tapped_layers=TAPPED)
    scaled = np.asarray(logits, np.float64) / sampling.temperature
    outside = 0
    for at in range(len(text) - 1):
        probabilities = _softmax(scaled[at])
        order = np.argsort(-scaled[at])
        above = np.cumsum(probabilities[order]) - probabilities[order]
        nucleus = order[above < sampling.top_p]
        here = jax.random.fold_in(jax.random.wrap_key_data(np.array(key, np.uint32), impl="threefry2x32"), at + 1)
        uniform = (np.asarray(jax.random.bits(here, scaled[at].shape), np.float64) + 0.5) / 2**32
        noisy = scaled[at] - np.log(-np.log1p(-uniform))
        best = nucleus[np.argmax(noisy[nucleus])]
        assert found.next_ids[at] == best
        inside = text[at + 1] in nucleus
        outside += not inside
        wanted = noisy[best] - noisy[text[at + 1]] if inside else scaled[at].max() - scaled[at][text[at + 1]]
        np.testing.assert_allclose(found.shortfall[at], sampling.temperature * wanted, atol=1e-3)
    assert 5 < outside < 35


def test_a_text_drawn_elsewhere_surprises_on_average_as_what_the_target_draws(drawn_texts) -> None:
    target, answers = drawn_texts
    texts = [one.token_ids for one in answers]
    sampling = DRAWN.sampling
    found = dict(capture(target, TAPPED, texts, sampling=sampling))
    for index, text in enumerate(texts[:1]):
        _, logits = _plain_forward(target, jnp.array(text), tapped_layers=TAPPED)
        probabilities = _softmax(np.asarray(logits) / sampling.temperature)[:-1]
        order = np.argsort(-probabilities, axis=-1)
        above = np.cumsum(np.take_along_axis(probabilities, order, -1), axis=-1)
        nucleus = np.zeros(probabilities.shape, bool)
        np.put_along_axis(nucleus, order, above - np.take_along_axis(probabilities, order, -1) < sampling.top_p, -1)
        logs, drawn = np.log(probabilities), np.where(nucleus, probabilities, 0)
        mean = (drawn * logs).sum(axis=-1) / drawn.sum(axis=-1)
        wanted = mean - logs[np.arange(len(text) - 1), text[1:]]
        np.testing.assert_allclose(found[index].shortfall[:-1], wanted, atol=1e-3)
    own = np.concatenate([found[i].shortfall[one.prompt_tokens - 1 : -1] for i, one in enumerate(answers)])
    assert abs(own.mean()) < 4 * own.std() / np.sqrt(len(own))
