"""Runs the exported draft in the engine, on the texts over which its training evaluation counted rounds.

Both must count the same rounds. Training reads a text and its features from the cache, all blocks at once, with the
weights as trained; the engine prefills the prompt, drafts, verifies and rolls back, with features of its own and the
weights that were written. Rounding (bfloat16 weights and features) changes a few rounds; a convention that the two do
not share (layers, their order, mask token, RoPE, what a block sees) changes most of them.

The engine decodes the prompts greedily. Where it writes the cached text, as it always does with a greedy float32 cache,
its rounds are compared directly. Where it writes another (texts that were sampled or came from outside, near-ties
in bfloat16), it is forced along the cached text instead: rounds over different texts differ by several percent anyway,
and their comparison would show nothing.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.dflash.acceptance import Acceptance
from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.forced_decoding import ForcedDecodingEngine
from pipeline.engine.request import Completion, ForcedRequest, Request
from pipeline.errors import PipelineError
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.parallel.runtime import SINGLE_DEVICE, Runtime
from pipeline.progress import Progress
from pipeline.store.heldout_rounds import HeldoutText, acceptance_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineCheck:
    """Holds the rounds over the same texts: `trained` by the training evaluation, `engine` by the engine.

    `greedy` are the engine's rounds over the texts it writes itself; `num_greedy` of these are the cached texts.
    """

    trained: Acceptance
    engine: Acceptance
    greedy: Acceptance
    num_texts: int
    num_greedy: int

    @property
    def difference(self) -> float:
        """Returns the engine's accept_length over training's, minus 1."""
        return self.engine.accept_length / self.trained.accept_length - 1

    def to_json(self) -> dict[str, Any]:
        """Returns the check as evaluation.json has it: the engine's metrics, and all rounds."""
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
    def from_json(cls, value: dict[str, Any]) -> "EngineCheck":
        """Reads the value that `to_json` returns."""
        return cls(
            trained=Acceptance(tuple(value["training_histogram"])),
            engine=Acceptance(tuple(value["histogram"])),
            greedy=Acceptance(tuple(value["greedy_histogram"])),
            num_texts=value["num_sequences"],
            num_greedy=value["num_greedy"],
        )


def run_engine_check(
    target: TargetModel,
    draft: DraftModel,
    texts: Sequence[HeldoutText],
    config: EngineConfig,
    runtime: Runtime = SINGLE_DEVICE,
) -> EngineCheck:
    """Decodes the prompts of `texts`, and forces the engine along those texts that it does not write itself.

    The engines' `max_length` is that of the longest text. Raises PipelineError when no text has a round.
    """
    texts = [text for text in texts if len(text.answer_ids) > 1]  # prefill decodes the first token
    if not texts:
        raise PipelineError(
            "no held-out answer has two tokens, so that there are no rounds to compare; give other prompts"
        )
    longest = max(len(text.token_ids) for text in texts)
    config = dataclasses.replace(config, max_length=longest, cache_tokens=None, block_sizes=(), samples=False)
    engine = Engine(target, draft, config, runtime)
    decoded = _decoded(engine, [_request(index, text) for index, text in enumerate(texts)])
    others = [index for index, text in enumerate(texts) if decoded[index].token_ids != text.answer_ids]
    accepted = {index: answer.accepted_per_round for index, answer in decoded.items()}
    if others:
        del engine  # and its caches
        forced = _decoded(
            ForcedDecodingEngine(target, draft, config, runtime), [_forced(index, texts[index]) for index in others]
        )
        accepted |= {index: answer.accepted_per_round for index, answer in forced.items()}
    block_size = draft.config.block_size
    return EngineCheck(
        trained=acceptance_of(texts, block_size),
        engine=_acceptance(accepted.values(), block_size),
        greedy=_acceptance((answer.accepted_per_round for answer in decoded.values()), block_size),
        num_texts=len(texts),
        num_greedy=len(texts) - len(others),
    )


def require_agreement(check: EngineCheck, tolerance: float) -> None:
    """Raises PipelineError when the engine and the training evaluation differ by more than `tolerance`."""
    if not abs(check.difference) <= tolerance:
        raise PipelineError(
            f"the draft is not published: accept_length is {check.trained.accept_length:.3f} in the training "
            f"evaluation and {check.engine.accept_length:.3f} in the engine, {check.difference:+.1%} on the same "
            f"{check.num_texts} held-out texts ({check.engine.num_rounds} rounds); at most "
            f"{tolerance:.1%} is wanted (export.tolerance). Training and serving disagree about tapped layers, their "
            "order, the mask token, RoPE, what a block sees, or the weights: make the teacher cache and the draft anew "
            "with this version; if they still differ, report it"
        )


def _request(index: int, text: HeldoutText) -> Request:
    return Request(request_id=str(index), prompt_ids=text.prompt_ids, max_new_tokens=len(text.answer_ids))


def _forced(index: int, text: HeldoutText) -> ForcedRequest:
    return ForcedRequest(**vars(_request(index, text)), forced_ids=text.answer_ids)


def _decoded(engine: Engine, requests: Sequence[Request]) -> dict[int, Completion]:
    found = {}
    with Progress("export", len(requests), "texts") as progress:
        for completion in engine.generate(requests):
            found[int(completion.request_id)] = completion
            progress.advance()
    return found


def _acceptance(rounds: Iterable[Sequence[int]], block_size: int) -> Acceptance:
    return Acceptance.of([count for rounds_of_text in rounds for count in rounds_of_text], block_size)
