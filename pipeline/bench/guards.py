"""What makes the numbers of a benchmark mean less than they seem to; each is said in one sentence."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.bench.loops import is_looping
from pipeline.bench.workload import request_index
from pipeline.engine.request import Completion

SLOW_SHARE = 0.1  # of what the machine's memory and arithmetic allow a plain step
NOTHING_ACCEPTED = 1.1  # accept_length
MUCH_CUT = 0.1  # of the answers
TRAINING_SHARE = 0.95  # of the accept_length that training measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Holds which answers the headline is measured on, and how many loop, of how many."""

    request_ids: tuple[str, ...]
    num_looping: int
    num_answers: int

    @property
    def num_left_out(self) -> int:
        """The number of answers that the headline leaves out."""
        return self.num_answers - len(self.request_ids)


def select(answers: Mapping[str, Completion], max_looping: float) -> Selection:
    """Leaves looping answers out when more than the share `max_looping` of the plain answers loop; never all.

    Requests are in the order of their prompts.
    """
    looping = {name for name, answer in answers.items() if is_looping(answer.token_ids)}
    leaves_out = max_looping * len(answers) < len(looping) < len(answers)
    chosen = tuple(name for name in sorted(answers, key=request_index) if not leaves_out or name not in looping)
    return Selection(request_ids=chosen, num_looping=len(looping), num_answers=len(answers))


def warnings_of(measured: Mapping[str, Any], selection: Selection, max_looping: float) -> list[str]:
    """Returns a sentence for everything in a benchmark's values that a reader must know before believing them."""
    found = []
    count, looping, cut = selection.num_answers, selection.num_looping, measured["cut_answers"]
    if looping > max_looping * count:
        left = f"{selection.num_left_out} are left out" if selection.num_left_out else "the numbers are of loops"
        found.append(
            f"{looping} of {count} answers repeat themselves, which drafts guess easily; {left}: give prompts that "
            "the target answers, or a lower bench.max_new_tokens"
        )
    if cut > MUCH_CUT * count:
        found.append(f"{cut} of {count} answers were cut at their length; real ones end: raise bench.max_new_tokens")
    share = measured.get("plain_share_of_machine")
    if share is not None and share < SLOW_SHARE:
        found.append(
            f"plain decoding reaches {share:.1%} of what this machine's memory and arithmetic allow; a speedup over a "
            "slow baseline is no speedup: stop what else runs, or see bench.profile_slots for where its time goes"
        )
    if measured["accept_length"] < NOTHING_ACCEPTED:
        found.append(
            f"accept_length is {measured['accept_length']:.2f}: next to nothing that is drafted is accepted. A draft "
            "for another target, other tapped layers (target_layer_ids) or a wrong mask token look like this"
        )
    ratio = measured.get("engine_over_training")
    if ratio is not None and ratio < TRAINING_SHARE:
        found.append(
            f"accept_length is {ratio:.0%} of what training measured on its held-out texts: these prompts are of "
            "another kind, or the draft does not see the features that it was trained on"
        )
    if not measured["num_rounds"]:
        found.append("no round was measured: the arm DFLASH does not say what it accepts")
    return found


def num_cut(answers: Sequence[Completion]) -> int:
    """Returns the number of answers that ended at their length."""
    return sum(answer.finish_reason == "length" for answer in answers)
