"""The exported draft in the engine, on the texts that its training evaluation counted rounds of.

Both must count the same rounds. Training reads a text and its features from the cache, all blocks at once, with the
weights as trained; the engine prefills the prompt, drafts, verifies and rolls back, with features of its own and the
weights that were written. Rounding (bfloat16 weights and features) moves a round here and there; a convention that one
of the two does not share (layers, their order, mask token, RoPE, what a block sees) moves most of them.

The engine decodes the prompts greedily. Where it writes the cached text, which a greedy float32 cache always gives, its
rounds are compared as they are. Where it writes another (texts that were sampled or came from an endpoint, near-ties
in bfloat16), it is taken along the cached text instead: rounds over two texts differ by what the texts are, and a
comparison of them would tell nothing within 2%.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.artifacts import PipelineError
from pipeline.dflash.acceptance import Acceptance
from pipeline.dflash.scored import ScoredText, acceptance_of
from pipeline.machine import ONE_DEVICE, Machine
from pipeline.model.gpt_oss_config import GptOssConfig
from pipeline.model.gpt_oss_weights import GptOssWeights
from pipeline.progress import Progress
from pipeline.serve.engine import Draft, Engine, Finished
from pipeline.serve.replay import KnownRequest, ReplayEngine
from pipeline.serve.scheduler import Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """Rounds over the same texts: `trained` by the training evaluation, `engine` by the engine.

    `greedy` are the engine's rounds over what it writes itself, `num_greedy` how many of the texts that is.
    """

    trained: Acceptance
    engine: Acceptance
    greedy: Acceptance
    num_texts: int
    num_greedy: int

    @property
    def difference(self) -> float:
        """The engine's accept_length over training's, minus 1."""
        return self.engine.accept_length / self.trained.accept_length - 1

    def to_json(self) -> dict[str, Any]:
        """As evaluation.json has it: the engine's metrics, and all rounds."""
        return {
            "num_sequences": self.num_texts,
            "histogram": list(self.engine.histogram),
            **self.engine.metrics(),
            "training_histogram": list(self.trained.histogram),
            "training_accept_length": self.trained.accept_length,
            "greedy_histogram": list(self.greedy.histogram),
            "greedy_accept_length": self.greedy.accept_length,
            "num_greedy": self.num_greedy,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Trial":
        """The inverse of `to_json`."""
        return cls(
            trained=Acceptance(tuple(value["training_histogram"])),
            engine=Acceptance(tuple(value["histogram"])),
            greedy=Acceptance(tuple(value["greedy_histogram"])),
            num_texts=value["num_sequences"],
            num_greedy=value["num_greedy"],
        )


def run_trial(
    weights: GptOssWeights,
    config: GptOssConfig,
    draft: Draft,
    texts: Sequence[ScoredText],
    *,
    stop_token_ids: Sequence[int],
    slots: int,
    prefill_chunk: int,
    here: Machine = ONE_DEVICE,
) -> Trial:
    """Decode the prompts of `texts`, and go along those texts that come out otherwise.

    Raises PipelineError when no text has a round.
    """
    texts = [text for text in texts if len(text.answer_ids) > 1]  # a first token alone is prefill's
    if not texts:
        raise PipelineError(
            "no held-out answer has two tokens, so that there are no rounds to compare; give other prompts"
        )
    options = {
        "slots": slots,
        "max_length": max(len(text.token_ids) for text in texts),
        "prefill_chunk": prefill_chunk,
        "draft": draft,
        "run": here.run,
        "mesh": here.mesh,
    }
    engine = Engine(weights, config, stop_token_ids=stop_token_ids, **options)
    decoded = _decoded(engine, [_request(index, text) for index, text in enumerate(texts)])
    others = [index for index, text in enumerate(texts) if decoded[index].token_ids != text.answer_ids]
    kept = {index: answer.kept for index, answer in decoded.items()}
    if others:
        del engine  # and its caches
        known = [_known(index, texts[index]) for index in others]
        kept |= {index: one.kept for index, one in _decoded(ReplayEngine(weights, config, **options), known).items()}
    block_size = draft.config.block_size
    return Trial(
        trained=acceptance_of(texts, block_size),
        engine=_acceptance(kept.values(), block_size),
        greedy=_acceptance((answer.kept for answer in decoded.values()), block_size),
        num_texts=len(texts),
        num_greedy=len(texts) - len(others),
    )


def require_agreement(trial: Trial, tolerance: float) -> None:
    """Raise PipelineError when the engine and the training evaluation differ by more than `tolerance`."""
    if not abs(trial.difference) <= tolerance:
        raise PipelineError(
            f"the draft is not published: accept_length is {trial.trained.accept_length:.3f} in the training "
            f"evaluation and {trial.engine.accept_length:.3f} in the engine, {trial.difference:+.1%} on the same "
            f"{trial.num_texts} held-out texts ({trial.engine.num_rounds} rounds); at most "
            f"{tolerance:.1%} is wanted (export.tolerance). Training and serving disagree about tapped layers, their "
            "order, the mask token, RoPE, what a block sees, or the weights: make the teacher cache and the draft anew "
            "with this version; if they still differ, report it"
        )


def _request(index: int, text: ScoredText) -> Request:
    return Request(request_id=str(index), prompt_ids=text.prompt_ids, max_new_tokens=len(text.answer_ids))


def _known(index: int, text: ScoredText) -> KnownRequest:
    return KnownRequest(**dataclasses.asdict(_request(index, text)), answer_ids=text.answer_ids)


def _decoded(engine: Engine, requests: Sequence[Request]) -> dict[int, Finished]:
    found = {}
    with Progress("export", len(requests), "texts") as progress:
        for one in engine.generate(requests):
            found[int(one.request_id)] = one
            progress.advance()
    return found


def _acceptance(rounds: Iterable[Sequence[int]], block_size: int) -> Acceptance:
    return Acceptance.of([kept for several in rounds for kept in several], block_size)
