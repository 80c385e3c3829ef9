"""Reports the results of a benchmark: as values for results.json and MLflow, and as a table for people."""

import statistics
from typing import Any

from pipeline.bench.arms import Comparison
from pipeline.bench.losslessness import Losslessness


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
        ("losslessness", _lossless(measured)),
    ]
    if "training_accept_length" in measured:
        ratio = measured["engine_over_training"]
        rows.append(("in training", f"accept_length {measured['training_accept_length']:.3f} (here {ratio:.1%} of it)"))
    if "export_accept_length" in measured:
        rows.append(("at export", f"accept_length {measured['export_accept_length']:.3f}"))
    rows.append(("measured on", f"{measured['num_prompts']} prompts, {measured['decode_tokens']} tokens"))
    width = max(len(name) for name, _ in rows)
    ruler = "-" * (width + 2 + max(len(value) for _, value in rows))
    return "\n".join([ruler, *(f"{name:<{width}}  {value}" for name, value in rows), ruler])


def _lossless(measured: dict[str, Any]) -> str:
    text = f"{measured['equal_answers']} of {measured['num_prompts']} answers equal plain greedy's"
    if measured["tied_answers"]:
        text += f", {measured['tied_answers']} differ at a tie"
    if measured["wrong_answers"]:
        text += f", {measured['wrong_answers']} WRONG"
    return text
