"""Says when too many prompts of a teacher cache have no answer, and why they have none."""

import collections
import logging
from collections.abc import Sequence

from pipeline.errors import PipelineError
from pipeline.teacher_cache.answer import FailedPrompt

log = logging.getLogger("pipeline")

FAILED_SHARE = 0.1  # of the prompts asked: with more failures the cache would be of another prompt set
SHOWN_REASONS = 5


def are_too_many(num_failed: int, num_asked: int) -> bool:
    """Returns whether more prompts have failed than may: a tenth, and one in any case."""
    return num_failed > max(1, FAILED_SHARE * num_asked)


def failure_error(failed: str, reasons: Sequence[str], num_asked: int, mend: str) -> PipelineError:
    """Returns the error of too many failures, with the most frequent reasons; `failed` says who failed at what."""
    counts = collections.Counter(reasons).most_common()
    more = [f"and {len(counts) - SHOWN_REASONS} other reasons"] if len(counts) > SHOWN_REASONS else []
    listed = "\n  ".join([f"{count} prompts: {reason}" for reason, count in counts[:SHOWN_REASONS]] + more)
    return PipelineError(
        f"{failed} {len(reasons)} of {num_asked} prompts, at most {FAILED_SHARE:.0%} may fail; {mend}\n  {listed}"
    )


def log_failures(failed: Sequence[FailedPrompt], num_asked: int) -> None:
    """Warns that prompts are left out because they have no answer, if there are any."""
    if failed:
        log.warning(
            "teacher_cache: %d of %d prompts got no answer, and are left out; the first, %s: %s",
            len(failed),
            num_asked,
            failed[0].prompt.prompt_id[:12],
            failed[0].reason,
        )
