"""The page of one benchmark: is it faster, by how much, how sure is that, and what was measured how."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.pages import figures, html

KIND_NAMES = {"family": "kind of question", "effort": "reasoning effort", "channel": "channel"}
ROWS = (  # key, what it is called, its format
    ("accept_length", "accept_length, tokens a round", "{:.3f}"),
    ("accept_rate", "accept_rate, of the drafted tokens", "{:.3f}"),
    ("break_even_accept_length", "break-even accept_length", "{:.2f}"),
    ("speedup", "speedup", "{:.3f}x"),
    ("training_accept_length", "accept_length in training", "{:.3f}"),
    ("export_accept_length", "accept_length at export", "{:.3f}"),
)
ARM_ROWS = (
    ("tokens_per_second", "decoding, tokens/s", "{:.1f}"),
    ("end_to_end_tokens_per_second", "with prompts, tokens/s", "{:.1f}"),
    ("steady_tokens_per_second", "while all slots decode, tokens/s", "{:.1f}"),
    ("tokens_per_second_of_a_user", "tokens/s of one user", "{:.1f}"),
    ("ttft_p50_ms", "first token, median ms", "{:.2f}"),
    ("ttft_p99_ms", "first token, p99 ms", "{:.2f}"),
    ("tpot_p50_ms", "a token, median ms", "{:.3f}"),
    ("tpot_p99_ms", "a token, p99 ms", "{:.3f}"),
    ("itl_p50_ms", "between arrivals, median ms", "{:.3f}"),
    ("itl_p99_ms", "between arrivals, p99 ms", "{:.3f}"),
)


def bench_page(measured: Mapping[str, Any], block_size: int) -> str:
    """Returns the page of a benchmark's record."""
    parts = [html.paragraph(headline(measured, block_size))]
    parts += [html.paragraph(text, "warning") for text in measured.get("warnings", ())]
    rows = [(name, form.format(measured[key]), _interval(measured, key)) for key, name, form in ROWS if key in measured]
    parts += [html.heading("Measured"), html.table(("", "value", "95% interval"), rows)]
    arms = [
        (name, *(form.format(measured[f"{arm}_{key}"]) for arm in ("plain", "dflash")))
        for key, name, form in ARM_ROWS
        if f"plain_{key}" in measured and f"dflash_{key}" in measured
    ]
    parts += [html.heading("Both arms"), html.table(("", "plain", "DFLASH"), arms)]
    parts += [html.heading("Figures"), html.figure_grid(figures.figures_of(measured, block_size).values())]
    if measured.get("prompt_sets"):
        parts += [html.heading("By prompt set"), _prompt_sets(measured["prompt_sets"])]
    if measured.get("open_loop"):
        parts += [html.heading("Requests that arrive at random"), _open_loop(measured["open_loop"])]
    for kind, groups in measured.get("by", {}).items():
        lines = [
            (name, f"{one['accept_length']:.3f}", _interval(one, "accept_length"), f"{one['num_rounds']}")
            for name, one in groups.items()
        ]
        parts.append(html.heading(f"By {KIND_NAMES.get(kind, kind)}"))
        parts.append(html.table(("", "accept_length", "95% interval", "rounds"), lines))
    parts += [html.heading("How it was measured"), html.table(("", ""), _identity(measured), first_number=None)]
    return html.page(f"DFLASH on {measured.get('target', 'the target')}: {measured['speedup']:.2f}x", parts)


def headline(measured: Mapping[str, Any], block_size: int) -> str:
    """Returns the sentences that a reader who reads nothing else should have read."""
    low, high = measured["speedup_low"], measured["speedup_high"]
    if low > 1:
        judged = "faster than plain decoding, beyond the interval"
    elif high < 1:
        judged = "slower than plain decoding, beyond the interval"
    else:
        judged = "not distinguishable from plain decoding: the interval holds 1"
    wrong = measured["wrong_answers"]
    lossless = (
        f"{wrong} answers are WRONG"
        if wrong
        else f"no answer was changed ({measured['equal_answers']} of {measured['num_prompts']} identical)"
    )
    return (
        f"Decoding with the draft is {measured['speedup']:.2f} times as fast (95% interval {low:.2f} to {high:.2f}): "
        f"{judged}. A round yields {measured['accept_length']:.2f} of {block_size} tokens, where "
        f"{measured['break_even_accept_length']:.2f} would be as fast as plain decoding; {lossless}."
    )


def _prompt_sets(sets: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            name,
            f"{one['num_prompts']}",
            f"{one['speedup']:.3f}x",
            _interval(one, "speedup"),
            f"{one['accept_length']:.3f}" if "accept_length" in one else "",
            _interval(one, "accept_length"),
        )
        for name, one in sets.items()
    ]
    return html.table(("", "prompts", "speedup", "95% interval", "accept_length", "95% interval"), rows)


def _open_loop(points: Sequence[Mapping[str, float]]) -> str:
    names = ("goodput", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms")
    rows = [
        (f"{one['request_rate']:g} a second, {name}", *(f"{one[f'{arm}_{key}']:.2f}" for key in names))
        for one in points
        for arm, name in (("plain", "plain"), ("dflash", "DFLASH"))
    ]
    head = ("", "within the objective, a second", "first token ms", "p99", "a token ms", "p99")
    return html.table(head, rows)


def _identity(measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = ("target", "draft", "commit", "precision", "temperature", "slots", "num_prompts", "num_repeats")
    rows = [(name, str(measured[name])) for name in names if name in measured]
    rows += [(name, str(value)) for name, value in measured.get("machine", {}).items()]
    return rows + [(name, str(value)) for name, value in measured.get("packages", {}).items()]


def _interval(measured: Mapping[str, Any], name: str) -> str:
    low, high = measured.get(f"{name}_low"), measured.get(f"{name}_high")
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
