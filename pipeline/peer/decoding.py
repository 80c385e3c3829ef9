"""Another program that decodes, beside ours: the same prompts in turn, each timed by itself where it decodes.

The other program is a command that is given the names of two files. It reads the first one,

    {"model": directory, "prompts": [[id, ...], ...], "max_new_tokens": n, "dtype": "float32" or "bfloat16"}

decodes every prompt greedily and alone to exactly that many tokens, and writes to the second

    {"outputs": [{"tokens": [id, ...], "decode_seconds": s}, ...]}

where the seconds leave the first token, and with it prefill, out.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.bench.arms import run_pass
from pipeline.engine.engine import Engine
from pipeline.engine.request import Request
from pipeline.external import command as other_program


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingComparison:
    """Decode speeds of neighbouring passes, ours and theirs, and how many answers agree in how many tokens."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    num_equal: int
    num_answers: int

    @property
    def ratios(self) -> list[float]:
        """Ours over theirs, pair by pair, so that a drifting machine cancels out."""
        return [our / their for our, their in zip(self.ours, self.theirs, strict=True)]

    def metrics(self) -> dict[str, float]:
        """As they are logged."""
        return {
            "peer/ours_tokens_per_second": statistics.median(self.ours),
            "peer/theirs_tokens_per_second": statistics.median(self.theirs),
            "peer/ratio": statistics.median(self.ratios),
            "peer/ratio_min": min(self.ratios),
            "peer/ratio_max": max(self.ratios),
            "peer/equal_answers": float(self.num_equal),
        }


def compare_decoding(
    engine: Engine, requests: Sequence[Request], command: Sequence[str], model: Path, dtype: str, repeats: int
) -> DecodingComparison:
    """Alternate our plain engine, one slot, and the other program over the same requests."""
    engine.warm_up()
    given = {
        "model": str(model),
        "prompts": [list(one.prompt_ids) for one in requests],
        "max_new_tokens": requests[0].max_new_tokens,
        "dtype": dtype,
    }
    ours, theirs = [], []
    answers: dict[str, tuple[int, ...]] = {}
    outputs: list[dict[str, Any]] = []
    for _ in range(repeats):
        made = run_pass(engine, requests)
        ours.append(made.tokens_per_second)
        answers = {name: one.token_ids for name, one in made.answers.items()}
        outputs = run_peer_decoder(command, given)
        num_tokens = sum(len(one["tokens"]) - 1 for one in outputs)
        theirs.append(num_tokens / sum(one["decode_seconds"] for one in outputs))
    equal = [answers[one.request_id] == tuple(other["tokens"]) for one, other in zip(requests, outputs, strict=True)]
    return DecodingComparison(ours=tuple(ours), theirs=tuple(theirs), num_equal=sum(equal), num_answers=len(equal))


def run_peer_decoder(command: Sequence[str], given: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the other program once. Raises PipelineError with the end of what it said when it fails."""
    return other_program.run_json(command, given, "peer.command")["outputs"]
