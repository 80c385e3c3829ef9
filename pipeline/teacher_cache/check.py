"""Checks a teacher cache by acceptance: would a draft trained on it be accepted by this target?

The target reads every held-out text again. A draft that proposes exactly the labels of training must then be
accepted whole (B tokens a round), a draft of random tokens hardly ever (about 1 token a round), and the stored
features must equal those that the target computes now. A label, a token or a feature that is off by one position
fails one of the three tests.

A text that our engine sampled with a seed is checked in the same way, because its noise is known and selects the same
tokens again. The noise, kernels and precision behind a text from outside (an endpoint's, or a row's own answer) are
unknown. Such a draft is therefore checked against the text itself, which shows that the labels are at the right
positions, and the text as a whole against the target.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from pipeline.dflash import acceptance, blocks
from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.capture import Captured, padded_text_length
from pipeline.errors import PipelineError
from pipeline.model.dflash.config import DFlashConfig
from pipeline.store.feature_codec import relative_errors
from pipeline.store.layout import CachedSequence
from pipeline.store.reader import CacheSplit
from pipeline.teacher_cache.origin import ENGINE, AnswerOrigin, Divergence

Recapture = Callable[[Sequence[Sequence[int]], Sequence[str]], Iterable[tuple[int, Captured]]]  # texts and prompts' ids

READ_SEQUENCES = 64
RANDOM_LIMIT = 1.25  # of a random draft of a vocabulary of V the first token is accepted once in V rounds
FEATURE_TOLERANCE = 0.05  # relative; bfloat16 rounds to 0.004, the features of another token are about 1 away
FEATURE_OUTLIERS = 0.01  # tokens allowed beyond it: bfloat16 targets route a near-tie to another expert
NO_TOKEN = -1
UNCOUNTED = -2  # never equal to a token or to NO_TOKEN


@dataclasses.dataclass(frozen=True)
class CacheCheck:
    """Holds the acceptance of the gold and of the random draft, over rounds whose block fits whole."""

    gold: Acceptance
    random: Acceptance


def check_cache(
    split: CacheSplit,
    prompts: Sequence[Sequence[int]],
    recapture: Recapture,
    *,
    draft: DFlashConfig,
    tie_gap: float,
    is_exact: bool,
    seed: int,
    origin: AnswerOrigin = ENGINE,
) -> CacheCheck:
    """Checks every sequence of a split; `prompts` are their rendered prompts, `recapture` runs the target again.

    A token whose logit lies within `tie_gap` of the best counts as the target's choice. With `is_exact` (float32) the
    gold draft must reach B, otherwise 95% of B: in bfloat16 a text generated step by step and the same text read at
    once differ now and then. A text from outside (`origin`) counts as the target's as long as it is near enough as a
    whole. Raises PipelineError listing everything that fails.
    """
    block_size = draft.block_size
    divergence, longest_answer = Divergence(), 0
    random = np.random.default_rng(seed)
    gold, chance = acceptance.empty(block_size), acceptance.empty(block_size)
    wrong_prompts, num_tokens, num_off = [], 0, 0
    for index, sequence, captured in _recaptured(split, recapture):
        if sequence.token_ids[: sequence.prompt_tokens].tolist() != list(prompts[index]):
            wrong_prompts.append(split.prompt_ids[index][:12])
        num_tokens += len(sequence.token_ids)
        longest_answer = max(longest_answer, len(sequence.token_ids) - sequence.prompt_tokens)
        if sequence.features is not None:
            errors = relative_errors(sequence.features, captured.features, split.layout.num_tapped).max(axis=1)
            num_off += int((errors > FEATURE_TOLERANCE).sum())
        target_ids = _target_ids(sequence, captured, tie_gap if origin.is_engine else np.inf)
        if not origin.is_engine:
            divergence += Divergence.of(captured.shortfall[sequence.prompt_tokens - 1 : -1], origin, tie_gap)
        labels = gold_proposals(sequence, block_size)
        guesses = random.integers(0, draft.vocab_size, labels.shape, dtype=np.int32)
        gold += score(sequence, labels, target_ids, block_size)
        chance += score(sequence, guesses, target_ids, block_size)
    problems = _problems(gold, chance, block_size, is_exact or not origin.is_engine)
    if wrong_prompts:
        problems.append(f"{len(wrong_prompts)} sequences do not begin with their prompt: {', '.join(wrong_prompts)}")
    if num_off > FEATURE_OUTLIERS * num_tokens:
        problems.append(
            f"the features of {num_off} of {num_tokens} tokens are not the target's (off by more than "
            f"{FEATURE_TOLERANCE:.0%})"
        )
    if problems:
        listed = "\n  ".join(problems)
        raise PipelineError(
            f"the teacher cache fails its check on {split.num_sequences} held-out sequences; it would train a draft "
            f"that the target rejects. Delete it and make it again; if it fails again, report it\n  {listed}"
        )
    _require_texts(gold, divergence, origin, f"the {split.num_sequences} held-out answers", longest_answer)
    return CacheCheck(gold, chance)


def _require_texts(gold: Acceptance, divergence: Divergence, origin: AnswerOrigin, answers: str, longest: int) -> None:
    """Raises PipelineError for texts of which no cache can be made, with what mends that; the cache is right."""
    refusal = divergence.problem(origin)
    if refusal is not None and refusal[1]:
        raise PipelineError(f"{refusal[0]}: {origin.mend}")
    if not gold.num_rounds:
        raise PipelineError(
            f"none of {answers} holds a whole block of {gold.block_size} tokens after its first token: the longest "
            f"ends after {longest}; give prompts with longer answers, or lower draft.block_size"
        )


def gold_proposals(sequence: CachedSequence, block_size: int) -> Int[np.ndarray, "P drafted"]:
    """Returns what a draft that knows the labels of training from memory would propose at every position.

    P is the padded length; positions without a label hold UNCOUNTED.
    """
    generated = np.zeros(padded_text_length(len(sequence.token_ids)), bool)
    generated[sequence.prompt_tokens : len(sequence.token_ids)] = True
    token_ids = np.zeros(len(generated), np.int32)  # padded: one program for many lengths
    token_ids[: len(sequence.token_ids)] = sequence.token_ids
    anchors = jnp.arange(len(generated))[None]
    labels, counts = blocks.block_labels(
        jnp.asarray(token_ids)[None], jnp.asarray(generated)[None], anchors, block_size
    )
    return np.where(np.asarray(counts), np.asarray(labels), UNCOUNTED)[0, :, 1:]


def score(
    sequence: CachedSequence,
    proposals: Int[np.ndarray, "P drafted"],
    target_ids: Int[np.ndarray, " T"],
    block_size: int,
) -> Acceptance:
    """Returns the acceptance of the rounds that serving would run over a text, from its first generated token on.

    `proposals[a]` are drafted after an anchor at position a; `target_ids[p]` is the target's token for position
    p + 1. Verification reads the target's rows anchor..anchor + B - 2, as the engine does. A round is left out
    when its block, or the target's token after the block, passes the end of the text.
    """
    num_tokens = len(sequence.token_ids)
    padded = np.full(len(proposals) + block_size, NO_TOKEN)
    padded[:num_tokens] = target_ids
    rows = np.arange(len(proposals))[:, None] + np.arange(block_size - 1)
    accepted_at = np.asarray(acceptance.count_accepted(jnp.asarray(proposals), jnp.asarray(padded[rows])))
    rounds = acceptance.rounds_over_text(accepted_at, sequence.prompt_tokens, num_tokens)
    anchors = sequence.prompt_tokens + np.cumsum([0, *(count + 1 for count in rounds)])[:-1]
    whole = [count for anchor, count in zip(anchors, rounds, strict=True) if anchor + block_size < num_tokens]
    return Acceptance.of(whole, block_size)


def _target_ids(sequence: CachedSequence, captured: Captured, tie_gap: float) -> Int[np.ndarray, " T"]:
    following = np.append(sequence.token_ids[1:], NO_TOKEN)
    return np.where((captured.shortfall <= tie_gap) & (following != NO_TOKEN), following, captured.next_ids)


def _problems(gold: Acceptance, chance: Acceptance, block_size: int, is_exact: bool) -> list[str]:
    if not gold.num_rounds:  # nothing to judge: the answers are too short
        return []
    problems = []
    wanted = block_size if is_exact else 0.95 * block_size
    if gold.accept_length < wanted:
        problems.append(
            f"a draft that proposes the labels of training has accept_length {gold.accept_length:.3f}, wanted "
            f"{wanted:g}"
        )
    if not chance.accept_length <= RANDOM_LIMIT:
        problems.append(f"a random draft has accept_length {chance.accept_length:.3f}, wanted at most {RANDOM_LIMIT}")
    return problems


def _recaptured(split: CacheSplit, recapture: Recapture) -> Iterator[tuple[int, CachedSequence, Captured]]:
    for first in range(0, split.num_sequences, READ_SEQUENCES):
        sequences = split.read(range(first, min(first + READ_SEQUENCES, split.num_sequences)))
        texts = [sequence.token_ids.tolist() for sequence in sequences]
        for index, captured in recapture(texts, split.prompt_ids[first : first + READ_SEQUENCES]):
            yield first + index, sequences[index], captured
