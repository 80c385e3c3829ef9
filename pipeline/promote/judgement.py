"""Whether a draft may become the champion: every reason why not, in words."""

from collections.abc import Mapping
from typing import Any

from pipeline.pages import comparison_page

# of a benchmark's record: what a version carries, beside what two must share for their speeds to be compared
CARRIED = (
    "speedup", "speedup_low", "speedup_high", "accept_length", "accept_length_low", "accept_length_high",
    "engine_over_training", "wrong_answers", "equal_answers", "num_prompts", "plain_tokens_per_second",
    "dflash_tokens_per_second", "commit", "version",
)  # fmt: skip


def carried(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a record that a version carries."""
    return {name: record[name] for name in (*CARRIED, *comparison_page.SAME) if name in record}


def reasons_against(candidate: Mapping[str, Any], champion: Mapping[str, Any] | None, tolerance: float) -> list[str]:
    """Returns why a draft with this record may not replace the champion's; an empty list says that it may.

    It must change no answer, accept within `tolerance` what training measured, and be faster than the champion beyond
    both intervals, on the same prompts and machine. Without a champion it must be faster than plain decoding.
    """
    found = []
    if candidate["wrong_answers"]:
        found.append(f"it changes {candidate['wrong_answers']} answers, which is a bug")
    ratio = candidate.get("engine_over_training")
    if ratio is None:
        found.append("its benchmark does not say what training measured: benchmark it on held-out prompts, greedily")
    elif abs(ratio - 1) > tolerance:
        found.append(f"it accepts {ratio:.1%} of what training measured; that must be within {tolerance:.0%}")
    if champion is None:
        if candidate["speedup_low"] <= 1:
            found.append(f"it is not faster than plain decoding beyond the interval: {_speedup(candidate)}")
        return found
    apart = [name for name in comparison_page.SAME if candidate.get(name) != champion.get(name)]
    if apart:
        found.append(f"the champion was measured with another {', '.join(apart)}: run stage=bench for both alike")
    elif candidate["speedup_low"] <= champion["speedup_high"]:
        found.append(
            f"it is not faster than the champion beyond the intervals: {_speedup(candidate)}, the champion's is "
            f"{_speedup(champion)}"
        )
    return found


def _speedup(record: Mapping[str, Any]) -> str:
    return f"{record['speedup']:.3f}x ({record['speedup_low']:.3f} to {record['speedup_high']:.3f})"
