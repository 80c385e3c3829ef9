"""Makes the values of a benchmark's record out of what was measured. Their meanings: docs/guide/benchmark.md."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.bench import breakdown, intervals, timeline
from pipeline.bench.arms import DFLASH, PLAIN, ArmPass, Comparison
from pipeline.bench.breakdown import Labels
from pipeline.bench.guards import Selection, num_cut
from pipeline.bench.intervals import PassTimes
from pipeline.bench.losslessness import Losslessness
from pipeline.bench.workload import request_index
from pipeline.dflash.acceptance import Acceptance, break_even

RECORD_FORMAT = 3


def metrics(measured: Mapping[str, Any]) -> dict[str, float]:
    """Returns the values of a record that MLflow takes as metrics: all of its numbers, groups under names of theirs."""
    found = {name: value for name, value in measured.items() if isinstance(value, (int, float))}
    del found["record_format"]
    for kind, groups in measured.get("by", {}).items():
        prefix = "accept_length" if kind == "family" else f"accept_length_by_{kind}"
        found |= {f"{prefix}/{name}": one["accept_length"] for name, one in groups.items()}
    for name, one in measured.get("arms", {}).items():
        found[f"speedup/{name}"] = one["speedup"]
    for one in measured.get("sweep", ()):
        found[f"speedup_by_load/{one['slots']}_slots"] = one["speedup"]
    for name, one in measured.get("prompt_sets", {}).items():
        found[f"speedup_by_set/{name}"] = one["speedup"]
    for slots, one in measured.get("profile", {}).items():
        found[f"profile/round_in_plain_steps_{slots}_slots"] = one["dflash_device_ms"] / one["plain_device_ms"]
        found[f"profile/host_share_{slots}_slots"] = one["dflash_host_share"]
    return found


def results(
    comparison: Comparison,
    lossless: Losslessness,
    evaluations: Mapping[str, Mapping[str, Any]],
    selection: Selection,
    *,
    num_at_once: int,
) -> dict[str, Any]:
    """Returns everything measured, JSON-ready; speeds are decode tokens per second, `_low` and `_high` 95% intervals.

    `evaluations` are those that the draft carries: `heldout` by the training, `engine` by the export.
    """
    chosen, block_size = selection.request_ids, comparison.acceptance.block_size
    plain, dflash = (comparison.times(arm, chosen) for arm in (PLAIN, DFLASH))
    rounds = [comparison.dflash[0].answers[name].accepted_per_round for name in chosen]
    everything = [one for some in rounds for one in some]
    seen = comparison.acceptance if not everything else Acceptance.of(everything, block_size)
    speedup = _speedup(plain, dflash)
    of_pairs = dflash.speeds / plain.speeds
    measured: dict[str, Any] = {
        "record_format": RECORD_FORMAT,
        **seen.metrics(),
        **_acceptance_intervals(rounds, block_size),
        **speedup,
        "speedup_min": float(of_pairs.min()),
        "speedup_max": float(of_pairs.max()),
        "break_even_accept_length": break_even(seen.accept_length, speedup["speedup"]),
        "num_repeats": len(comparison.plain),
        "num_prompts": lossless.num_answers,
        "num_rounds": seen.num_rounds,
        "decode_tokens": comparison.plain[0].decode_tokens,
        "equal_answers": lossless.num_equal,
        "tied_answers": len(lossless.differences) - len(lossless.bugs),
        "largest_tie": max((one.logit_gap for one in lossless.ties), default=0.0),
        "wrong_answers": len(lossless.bugs),
        "looping_answers": selection.num_looping,
        "left_out_answers": selection.num_left_out,
        "cut_answers": num_cut(list(comparison.plain[0].answers.values())),
    }
    for arm in (PLAIN, DFLASH):
        measured |= {f"{arm}_{name}": value for name, value in _of_arm(comparison.passes[arm], num_at_once).items()}
    if "heldout" in evaluations:
        trained = evaluations["heldout"]["accept_length"]
        measured["training_accept_length"] = trained
        measured["engine_over_training"] = seen.accept_length / trained
    if "engine" in evaluations:
        measured["export_accept_length"] = evaluations["engine"]["accept_length"]
    return measured


def breakdowns(comparison: Comparison, selection: Selection, labels: Sequence[Labels]) -> dict[str, Any]:
    """Returns the acceptance by family and by effort of prompts; `labels` are those of the prompts that requests had.

    Empty `labels` do not apply to the requests, and nothing is returned.
    """
    chosen = selection.request_ids if labels else ()
    rounds = [comparison.dflash[0].answers[name].accepted_per_round for name in chosen]
    of_chosen = [labels[request_index(name)] for name in chosen]
    return breakdown.label_breakdowns(rounds, of_chosen, comparison.acceptance.block_size)


def by_prompt_set(comparison: Comparison, selection: Selection, labels: Sequence[Labels]) -> dict[str, dict[str, Any]]:
    """Returns speedup, and acceptance where answers say it, with intervals, of the prompts of each family.

    Empty `labels` do not apply to the requests, and nothing is returned.
    """
    names: dict[str, list[str]] = {}
    for name in selection.request_ids if labels else ():
        names.setdefault(labels[request_index(name)].family or "", []).append(name)
    found = {}
    for family, chosen in names.items():
        rounds = [comparison.dflash[0].answers[name].accepted_per_round for name in chosen]
        everything = [one for some in rounds for one in some]
        found[family] = {
            "num_prompts": len(chosen),
            **_speedup(*(comparison.times(arm, chosen) for arm in (PLAIN, DFLASH))),
        }
        if everything:
            block_size = comparison.acceptance.block_size
            found[family]["accept_length"] = Acceptance.of(everything, block_size).accept_length
            found[family] |= _acceptance_intervals(rounds, block_size)
    return found


def arm_speedups(comparison: Comparison, selection: Selection) -> dict[str, dict[str, float]]:
    """Returns the speedup over plain decoding of every further arm, with its interval."""
    found = {}
    plain = comparison.times(PLAIN, selection.request_ids)
    for name in comparison.passes:
        if name in (PLAIN, DFLASH):
            continue
        times = comparison.times(name, selection.request_ids)
        found[name] = {
            **_speedup(plain, times),
            "tokens_per_second": statistics.median(one.tokens_per_second for one in comparison.passes[name]),
        }
    return found


def at_load(comparison: Comparison, num_at_once: int) -> dict[str, float]:
    """Returns what a sweep has for a number of requests at once: speeds, speedup with its interval, acceptance."""
    names = list(comparison.plain[0].answers)
    plain, dflash = (comparison.times(arm, names) for arm in (PLAIN, DFLASH))
    found = {
        "slots": num_at_once,
        **_speedup(plain, dflash),
        "accept_length": comparison.acceptance.accept_length,
    }
    for arm in (PLAIN, DFLASH):
        found |= {f"{arm}_{name}": value for name, value in _of_arm(comparison.passes[arm], num_at_once).items()}
    return found


def _speedup(plain: PassTimes, other: PassTimes) -> dict[str, float]:
    """Returns the speedup of an arm over plain decoding, with its interval."""
    between = intervals.speedup_interval(plain, other)
    return {
        "speedup": intervals.speedup_of(plain, other),
        "speedup_low": between.low,
        "speedup_high": between.high,
    }


def _acceptance_intervals(rounds: Sequence[Sequence[int]], block_size: int) -> dict[str, float]:
    """Returns the intervals of acceptance; nothing where no answer says what its rounds accepted."""
    if not any(rounds):
        return {}
    length, rates = breakdown.accept_length_interval(rounds), breakdown.at_k_intervals(rounds, block_size)
    found = {"accept_length_low": length.low, "accept_length_high": length.high}
    for k, one in enumerate(rates, start=1):
        found |= {f"accept_rate_at_{k}_low": one.low, f"accept_rate_at_{k}_high": one.high}
    return found


def _of_arm(passes: Sequence[ArmPass], num_at_once: int) -> dict[str, float]:
    """Returns an arm's speeds, medians over its passes, and its latencies over all of them."""
    timelines = [one for each in passes for one in each.timelines.values()]
    found = {
        "tokens_per_second": statistics.median(one.tokens_per_second for one in passes),
        "end_to_end_tokens_per_second": statistics.median(one.end_to_end_tokens_per_second for one in passes),
        "tokens_per_second_of_a_user": statistics.median(one.tokens_per_second for one in passes) / num_at_once,
        "prefill_seconds": statistics.median(one.prefill_seconds for one in passes),
        **timeline.latencies(timelines),
    }
    steady = [timeline.steady_tokens_per_second(list(each.timelines.values()), num_at_once) for each in passes]
    if num_at_once > 1 and all(value == value for value in steady):  # not NaN
        found["steady_tokens_per_second"] = statistics.median(steady)
    return found
