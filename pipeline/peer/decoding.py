"""Compares our decoding with another program's: the same prompts in turn, each timed by the program that decodes it.

The other program is a command that gets the names of two files as arguments. It reads the first one,

    {"model": directory, "prompts": [[id, ...], ...], "max_new_tokens": n, "dtype": "float32" or "bfloat16"}

and with `peer.draft` the directory of the draft as "draft". It decodes every prompt greedily and alone to exactly that
many tokens, and writes to the second

    {"outputs": [{"tokens": [id, ...], "decode_seconds": s}, ...]}

where the seconds leave out the first token, and with it prefill.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.bench.engine_arm import EngineArm
from pipeline.engine.engine import Engine
from pipeline.engine.request import Request
from pipeline.external import command as peer_command


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingComparison:
    """Holds decode speeds of neighbouring passes, ours and theirs, and how many answers are equal."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    num_equal: int
    num_answers: int

    @property
    def ratios(self) -> list[float]:
        """Returns ours over theirs, pair by pair, so that a drift in the machine's speed cancels."""
        return [our / their for our, their in zip(self.ours, self.theirs, strict=True)]

    def metrics(self) -> dict[str, float]:
        """Returns the metrics as they are logged."""
        return {
            "peer/ours_tokens_per_second": statistics.median(self.ours),
            "peer/theirs_tokens_per_second": statistics.median(self.theirs),
            "peer/ratio": statistics.median(self.ratios),
            "peer/ratio_min": min(self.ratios),
            "peer/ratio_max": max(self.ratios),
            "peer/equal_answers": float(self.num_equal),
        }


def compare_decoding(
    engine: Engine, requests: Sequence[Request], command: Sequence[str], models: Mapping[str, str], repeats: int
) -> DecodingComparison:
    """Alternates our engine (one slot) and the other program `repeats` times over the same requests.

    `models` are "model", "dtype" and, with a draft, "draft" of the question.
    """
    arm = EngineArm(engine)
    arm.warm_up()
    question = {
        **models,
        "prompts": [list(request.prompt_ids) for request in requests],
        "max_new_tokens": requests[0].max_new_tokens,
    }
    ours, theirs = [], []
    answers: dict[str, tuple[int, ...]] = {}
    outputs: list[dict[str, Any]] = []
    for _ in range(repeats):
        our_pass = arm.run(requests)
        ours.append(our_pass.tokens_per_second)
        answers = {name: answer.token_ids for name, answer in our_pass.answers.items()}
        outputs = run_peer_decoder(command, question)
        num_tokens = sum(len(output["tokens"]) - 1 for output in outputs)
        theirs.append(num_tokens / sum(output["decode_seconds"] for output in outputs))
    pairs = zip(requests, outputs, strict=True)
    equal = [answers[request.request_id] == tuple(output["tokens"]) for request, output in pairs]
    return DecodingComparison(ours=tuple(ours), theirs=tuple(theirs), num_equal=sum(equal), num_answers=len(equal))


def run_peer_decoder(command: Sequence[str], question: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs the other program once. Raises PipelineError with the end of its output when it fails."""
    return peer_command.run_json(command, question, "peer.command")["outputs"]
