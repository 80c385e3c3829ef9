"""The page that compares benchmarks: which draft is better, beyond the intervals or not, and what differs besides."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipeline.pages import figures, html

SAME = (
    "target_fingerprint",
    "prompts_fingerprint",
    "precision",
    "temperature",
    "slots",
    "machine",
)  # or speeds say nothing
NAMES = {"target_fingerprint": "target", "prompts_fingerprint": "prompts"}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Says how one value of a record stands to the baseline's: their ratio, and whether the intervals are apart."""

    ratio: float
    word: str

    @property
    def text(self) -> str:
        """The verdict for people, as `+12% better`."""
        return f"{self.ratio - 1:+.1%} {self.word}"


def verdict(baseline: Mapping[str, Any], other: Mapping[str, Any], name: str) -> Verdict:
    """Compares a value of which more is better. Better and worse are said only where the 95% intervals are apart."""
    low, high = (other.get(f"{name}_{end}", other[name]) for end in ("low", "high"))
    base_low, base_high = (baseline.get(f"{name}_{end}", baseline[name]) for end in ("low", "high"))
    word = "better" if low > base_high else "worse" if high < base_low else "within the intervals"
    return Verdict(other[name] / baseline[name], word)


def differences(baseline: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns what two records do not share and ought to, for their speeds to be compared; in words."""
    return [NAMES.get(name, name) for name in SAME if baseline.get(name) != other.get(name)]


def comparison_page(records: Mapping[str, Mapping[str, Any]], block_size: int) -> str:
    """Returns the page of several records, by label; the first one is what the others are compared with."""
    labels = list(records)
    baseline = records[labels[0]]
    parts = [html.paragraph(text) for text in findings(records)]
    parts += [html.paragraph(text, "warning") for text in cautions(records)]
    rows = [_row(label, records[label], baseline, is_baseline=not index) for index, label in enumerate(labels)]
    head = ("", "speedup", "95% interval", "against the first", "accept_length", "95% interval", "against the first")
    parts += [html.heading("Speedup and acceptance"), html.table(head, rows)]
    cost = [
        (
            label,
            f"{one['plain_tokens_per_second']:.0f}",
            f"{one['dflash_tokens_per_second']:.0f}",
            f"{one['break_even_accept_length']:.2f}",
            f"{one['wrong_answers']}",
            str(one.get("training_tokens", "")),
        )
        for label, one in records.items()
    ]
    columns = ("", "plain tokens/s", "DFLASH tokens/s", "a round in plain steps", "wrong answers", "trained on tokens")
    parts += [html.heading("Speed and cost"), html.table(columns, cost)]
    points = [{**one, "label": label} for label, one in records.items()]
    drawing = figures.speedup_by_acceptance(points, block_size)
    parts += [html.heading("Figures"), html.figure_grid([("Speedup by acceptance", drawing)])]
    identity = [(label, str(one.get("draft", "")), str(one.get("commit", ""))[:19]) for label, one in records.items()]
    parts += [html.heading("What was measured"), html.table(("", "draft", "commit"), identity, first_number=None)]
    return html.page("Drafts compared", parts)


def findings(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a sentence for every record but the first: is it better, beyond the interval, by how much."""
    labels = list(records)
    first = records[labels[0]]
    found = [
        f"{labels[0]} decodes {first['speedup']:.2f} times as fast as plain decoding (95% interval "
        f"{first['speedup_low']:.2f} to {first['speedup_high']:.2f}), with accept_length {first['accept_length']:.2f}."
    ]
    for label in labels[1:]:
        speed, length = (verdict(first, records[label], name) for name in ("speedup", "accept_length"))
        found.append(f"{label}: speedup {speed.text}, accept_length {length.text}, compared with {labels[0]}.")
    return found


def cautions(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a sentence for every record whose speeds cannot be compared with the first one's, or that has bugs."""
    labels = list(records)
    found = []
    for label in labels:
        apart = differences(records[labels[0]], records[label])
        if apart:
            found.append(f"{label} was measured with another {', '.join(apart)}: its speeds cannot be compared")
        if records[label]["wrong_answers"]:
            found.append(f"{label} changed {records[label]['wrong_answers']} answers, which is a bug")
        found += [f"{label}: {text}" for text in records[label].get("warnings", ())]
    return found


def _row(label: str, one: Mapping[str, Any], baseline: Mapping[str, Any], *, is_baseline: bool) -> tuple[str, ...]:
    cells = [label]
    for name in ("speedup", "accept_length"):
        low, high = one.get(f"{name}_low"), one.get(f"{name}_high")
        cells += [f"{one[name]:.3f}", "" if low is None or high is None else f"{low:.3f} to {high:.3f}"]
        cells.append("" if is_baseline else verdict(baseline, one, name).text)
    return tuple(cells)
