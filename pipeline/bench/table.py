"""Shows the values of a benchmark as the lines that end a demo."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.bench.arms import DFLASH, PLAIN
from pipeline.pages.columns import columns

GROUPS_A_LINE = 4


def results_table(measured: Mapping[str, Any], block_size: int) -> str:
    """Returns the results of a benchmark, with 95% intervals, as a table of a line for each."""
    at_k = [measured[f"accept_rate_at_{k}"] for k in range(1, block_size)]
    rows = [
        ("accept_length", f"{measured['accept_length']:.3f} of {block_size}{_between(measured, 'accept_length', 2)}"),
        ("accept_rate", f"{measured['accept_rate']:.3f}"),
        ("accept_rate_at_k", " ".join(f"{rate:.2f}" for rate in at_k)),
        *((name, _arm(measured, arm)) for arm, name in ((PLAIN, "plain"), (DFLASH, "DFLASH"))),
        ("speedup", f"{measured['speedup']:.2f}x{_between(measured, 'speedup', 2)}, {_passes(measured)}"),
        ("break-even", f"accept_length {measured['break_even_accept_length']:.2f}, a round's cost in plain steps"),
        *((f"at {name}", _further(one)) for name, one in measured.get("arms", {}).items()),
        ("losslessness", _lossless(measured)),
    ]
    if "training_accept_length" in measured:
        ratio = measured["engine_over_training"]
        rows.append(("in training", f"accept_length {measured['training_accept_length']:.3f} (here {ratio:.1%} of it)"))
    if "export_accept_length" in measured:
        rows.append(("at export", f"accept_length {measured['export_accept_length']:.3f}"))
    for kind, groups in measured.get("by", {}).items():
        rows += _group_rows(kind, groups)
    rows.append(("measured on", _measured_on(measured)))
    width = max(len(name) for name, _ in rows)
    ruler = "-" * (width + 2 + max(len(value) for _, value in rows))
    lines = [ruler, *(f"{name:<{width}}  {value}" for name, value in rows), ruler]
    return "\n".join([*lines, *(f"WARNING: {text}" for text in measured.get("warnings", ()))])


def profile_table(profiles: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a table of single steps, plain and DFLASH, by the number of slots; times are milliseconds."""
    rows: list[tuple[str, ...]] = [
        ("slots", "step", "device", "engine", "host", "draft", "verify", "commit", "in plain steps")
    ]
    for slots, one in profiles.items():
        for arm, name in ((PLAIN, "plain"), (DFLASH, "DFLASH")):
            values = [one[f"{arm}_{part}_ms"] for part in ("device", "engine")]
            values += [one.get(f"{arm}_{part}_ms") for part in ("draft", "verify", "commit")]
            times = ["" if value is None else f"{value:.2f}" for value in values]
            cost = f"{one[f'{arm}_device_ms'] / one['plain_device_ms']:.2f}"
            rows.append((slots, name, *times[:2], f"{one[f'{arm}_host_share']:.1%}", *times[2:], cost))
    return columns(rows)


def prompt_set_table(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a table with a line for each prompt set; a server does not say what it accepted by set."""
    names = [name for name in ("speedup", "accept_length") if all(name in one for one in sets.values())]
    rows = [("prompt set", "prompts", *(word for name in names for word in (name, "interval")))]
    for label, one in sets.items():
        values = [(f"{one[name]:.2f}", f"{one[f'{name}_low']:.2f} to {one[f'{name}_high']:.2f}") for name in names]
        rows.append((label, f"{one['num_prompts']}", *(text for pair in values for text in pair)))
    return columns(rows)


def sweep_table(points: Sequence[Mapping[str, float]]) -> str:
    """Returns a table with a line for each number of requests at once."""
    rows: list[tuple[str, ...]] = [
        ("slots", "plain tokens/s", "DFLASH tokens/s", "speedup", "interval", "accept_length")
    ]
    for one in points:
        speeds = [f"{one[f'{arm}_tokens_per_second']:.0f}" for arm in (PLAIN, DFLASH)]
        interval = f"{one['speedup_low']:.2f} to {one['speedup_high']:.2f}"
        rows.append((f"{one['slots']}", *speeds, f"{one['speedup']:.2f}x", interval, f"{one['accept_length']:.2f}"))
    return columns(rows)


def open_loop_table(points: Sequence[Mapping[str, float]]) -> str:
    """Returns a table with a line for each arm and rate of requests; times are milliseconds."""
    rows: list[tuple[str, ...]] = [("requests/s", "arm", "goodput", "ttft p50", "p99", "tpot p50", "p99")]
    for one in points:
        for arm in (PLAIN, DFLASH):
            names = ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms")
            times = [f"{one[f'{arm}_{name}']:.1f}" for name in names]
            rows.append((f"{one['request_rate']:g}", arm, f"{one[f'{arm}_goodput']:.2f}", *times))
    return columns(rows)


def _between(measured: Mapping[str, Any], name: str, digits: int) -> str:
    low, high = measured.get(f"{name}_low"), measured.get(f"{name}_high")
    return "" if low is None else f" ({low:.{digits}f} to {high:.{digits}f})"


def _arm(measured: Mapping[str, Any], arm: str) -> str:
    text = f"{measured[f'{arm}_tokens_per_second']:.0f} tokens/s"
    if f"{arm}_tpot_p50_ms" in measured:
        ttft, tpot = measured[f"{arm}_ttft_p50_ms"], measured[f"{arm}_tpot_p50_ms"]
        text += f"; first token after {ttft:.1f} ms, then {tpot:.2f} ms a token (medians)"
    return text


def _passes(measured: Mapping[str, Any]) -> str:
    count = measured["num_repeats"]
    return f"{count} passes of each" if count > 1 else "one pass of each"


def _further(one: Mapping[str, float]) -> str:
    return f"speedup {one['speedup']:.2f}x{_between(one, 'speedup', 2)}"


def _group_rows(kind: str, groups: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Returns the groups in lines of a few, the shortest accept_length first."""
    lengths = {name: one["accept_length"] for name, one in groups.items()}
    shown = [f"{name} {length:.2f}" for name, length in sorted(lengths.items(), key=operator.itemgetter(1))]
    lines = [shown[index : index + GROUPS_A_LINE] for index in range(0, len(shown), GROUPS_A_LINE)]
    return [(f"by {kind}" if not index else "", ", ".join(line)) for index, line in enumerate(lines)]


def _lossless(measured: Mapping[str, Any]) -> str:
    text = f"{measured['equal_answers']} of {measured['num_prompts']} answers equal plain decoding's"
    if measured["tied_answers"]:
        text += f", {measured['tied_answers']} near-ties (largest gap {measured['largest_tie']:.2g})"
    return f"{text}, {measured['wrong_answers']} bugs"


def _measured_on(measured: Mapping[str, Any]) -> str:
    text = f"{measured['num_prompts']} prompts, {measured['decode_tokens']} tokens"
    for name, what in (("left_out_answers", "looping answers left out"), ("cut_answers", "cut at their length")):
        if measured[name]:
            text += f", {measured[name]} {what}"
    return text
