"""Reports the results of a benchmark: as values for results.json and MLflow, and as a table for people."""

import operator
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.bench.arms import Comparison
from pipeline.bench.losslessness import Losslessness
from pipeline.bench.workload import request_index
from pipeline.dflash.acceptance import Acceptance, break_even
from pipeline.engine.step_profile import StepProfile

BY_FAMILY, FAMILIES_A_LINE = "accept_length_by_family", 4


def profile_table(profiles: Mapping[int, tuple[StepProfile, StepProfile]]) -> str:
    """Returns a table of single steps, plain and DFLASH, by the number of slots; times are milliseconds."""
    rows: list[tuple[str, ...]] = [
        ("slots", "step", "device", "engine", "host", "draft", "verify", "commit", "in plain steps")
    ]
    for slots, (slow, fast) in sorted(profiles.items()):
        for name, one in (("plain", slow), ("DFLASH", fast)):
            times = [f"{value * 1e3:.2f}" if value is not None else "" for value in one.parts]
            cost = f"{one.device / slow.device:.2f}"
            rows.append((f"{slots}", name, *times[:2], f"{one.host_share:.1%}", *times[2:], cost))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def profile_metrics(profiles: Mapping[int, tuple[StepProfile, StepProfile]]) -> dict[str, float]:
    """Returns what a round costs in plain steps and the host's share of it, by the number of slots, for MLflow."""
    metrics = {}
    for slots, (slow, fast) in profiles.items():
        metrics[f"profile/round_in_plain_steps_{slots}_slots"] = fast.device / slow.device
        metrics[f"profile/host_share_{slots}_slots"] = fast.host_share
    return metrics


def results(comparison: Comparison, lossless: Losslessness, evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns everything measured, JSON-ready; speeds are decode tokens per second.

    `evaluations` are those that the draft carries: `heldout` by the training, `engine` by the export.
    """
    plain = [one.tokens_per_second for one in comparison.plain]
    dflash = [one.tokens_per_second for one in comparison.dflash]
    measured = {
        **comparison.acceptance.metrics(),
        "speedup": comparison.speedup,
        "speedup_min": min(comparison.speedups),
        "speedup_max": max(comparison.speedups),
        "break_even_accept_length": break_even(comparison.acceptance.accept_length, comparison.speedup),
        "plain_tokens_per_second": statistics.median(plain),
        "dflash_tokens_per_second": statistics.median(dflash),
        "plain_prefill_seconds": statistics.median(one.prefill_seconds for one in comparison.plain),
        "dflash_prefill_seconds": statistics.median(one.prefill_seconds for one in comparison.dflash),
        "num_prompts": lossless.num_answers,
        "num_rounds": comparison.acceptance.num_rounds,
        "decode_tokens": comparison.plain[0].decode_tokens,
        "equal_answers": lossless.num_equal,
        "tied_answers": len(lossless.differences) - len(lossless.bugs),
        "wrong_answers": len(lossless.bugs),
    }
    if "heldout" in evaluations:
        trained = evaluations["heldout"]["accept_length"]
        measured["training_accept_length"] = trained
        measured["engine_over_training"] = comparison.acceptance.accept_length / trained
    if "engine" in evaluations:
        measured["export_accept_length"] = evaluations["engine"]["accept_length"]
    return measured


def by_family(comparison: Comparison, families: Sequence[str | None]) -> dict[str, dict[str, float]]:
    """Returns the accept_length of each family of prompts under BY_FAMILY; nothing where no prompt has one.

    `families` are those of the prompts that `requests_of` had; empty where they do not apply.
    """
    sums: dict[str, Acceptance] = {}
    for answer in comparison.dflash[0].answers.values() if families else ():
        family = families[request_index(answer.request_id)]
        if family is not None and answer.accepted_per_round:
            found = Acceptance.of(answer.accepted_per_round, comparison.acceptance.block_size)
            sums[family] = sums[family] + found if family in sums else found
    return {BY_FAMILY: {family: sums[family].accept_length for family in sorted(sums)}} if sums else {}


def results_table(measured: dict[str, Any], block_size: int) -> str:
    """Returns the results as the lines that end a demo."""
    at_k = [measured[f"accept_rate_at_{k}"] for k in range(1, block_size)]
    rows = [
        ("accept_length", f"{measured['accept_length']:.3f} of {block_size}"),
        ("accept_rate", f"{measured['accept_rate']:.3f}"),
        ("accept_rate_at_k", " ".join(f"{rate:.2f}" for rate in at_k)),
        ("plain", f"{measured['plain_tokens_per_second']:.0f} tokens/s"),
        ("DFLASH", f"{measured['dflash_tokens_per_second']:.0f} tokens/s"),
        (
            "speedup",
            f"{measured['speedup']:.2f}x ({measured['speedup_min']:.2f} to {measured['speedup_max']:.2f})",
        ),
        ("break-even", f"accept_length {measured['break_even_accept_length']:.2f}, a round's cost in plain steps"),
        ("losslessness", _lossless(measured)),
    ]
    if "training_accept_length" in measured:
        ratio = measured["engine_over_training"]
        rows.append(("in training", f"accept_length {measured['training_accept_length']:.3f} (here {ratio:.1%} of it)"))
    if "export_accept_length" in measured:
        rows.append(("at export", f"accept_length {measured['export_accept_length']:.3f}"))
    if BY_FAMILY in measured:
        rows += _family_rows(measured[BY_FAMILY])
    rows.append(("measured on", f"{measured['num_prompts']} prompts, {measured['decode_tokens']} tokens"))
    width = max(len(name) for name, _ in rows)
    ruler = "-" * (width + 2 + max(len(value) for _, value in rows))
    return "\n".join([ruler, *(f"{name:<{width}}  {value}" for name, value in rows), ruler])


def _family_rows(lengths: Mapping[str, float]) -> list[tuple[str, str]]:
    """Returns the families in lines of a few, the shortest accept_length first."""
    shown = [f"{family} {length:.2f}" for family, length in sorted(lengths.items(), key=operator.itemgetter(1))]
    lines = [shown[index : index + FAMILIES_A_LINE] for index in range(0, len(shown), FAMILIES_A_LINE)]
    return [("by family" if not index else "", ", ".join(line)) for index, line in enumerate(lines)]


def _lossless(measured: dict[str, Any]) -> str:
    text = f"{measured['equal_answers']} of {measured['num_prompts']} answers equal plain greedy's"
    if measured["tied_answers"]:
        text += f", {measured['tied_answers']} differ at a tie"
    if measured["wrong_answers"]:
        text += f", {measured['wrong_answers']} WRONG"
    return text
