"""The exported draft in the engine, on the texts that its training evaluation counted rounds of.

Both must count the same rounds. Training reads a text and its features from the cache, all blocks at once, with the
weights as trained; the engine prefills the prompt, drafts, verifies and rolls back, with features of its own and the
weights that were written. Rounding (bfloat16 weights and features) moves a round here and there; a convention that one
of the two does not share (layers, their order, mask token, RoPE, what a block sees) moves most of them.

The engine decodes the prompts greedily. Where it writes the cached text, which a greedy float32 cache always gives, its
rounds are compared as they are. Where it writes another (texts that were sampled or came from an endpoint, near-ties
in bfloat16), it is forced along the cached text instead: rounds over two texts differ by what the texts are, and a
comparison of them would say nothing within 2%.
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
    def from_json(cls, value: dict[str, Any]) -> "EngineCheck":
        """The inverse of `to_json`."""
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
    """Decodes the prompts of `texts`, and forces the engine along those texts that come out otherwise.

    The engines' `max_length` is that of the longest text. Raises PipelineError when no text has a round.
    """
    texts = [text for text in texts if len(text.answer_ids) > 1]  # a first token alone is prefill's
    if not texts:
        raise PipelineError(
            "no held-out answer has two tokens, so that there are no rounds to compare; give other prompts"
        )
    config = dataclasses.replace(config, max_length=max(len(text.token_ids) for text in texts))
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
    return ForcedRequest(**dataclasses.asdict(_request(index, text)), forced_ids=text.answer_ids)


def _decoded(engine: Engine, requests: Sequence[Request]) -> dict[int, Completion]:
    found = {}
    with Progress("export", len(requests), "texts") as progress:
        for one in engine.generate(requests):
            found[int(one.request_id)] = one
            progress.advance()
    return found


def _acceptance(rounds: Iterable[Sequence[int]], block_size: int) -> Acceptance:
    return Acceptance.of([count for several in rounds for count in several], block_size)
