"""Draws a benchmark's figures as SVG, for a light and for a dark page; they are readable without colours.

Matplotlib is imported when the first figure is drawn: the import takes a second.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Draw = Callable[[Any, str], None]  # gets the axes and the colour of ink

SIZE = (6.4, 3.6)  # inches
INK = {"light": "#1b1f24", "dark": "#e6e9ec"}
HUES = {"light": ("#0b5cad", "#b3480f"), "dark": ("#6cb0f5", "#f5a06c")}
HATCHES = ("", "///", "...", "xx")
BLANK = {"svg.hashsalt": "figures", "svg.fonttype": "path", "font.size": 10}


def drawn(draw: Draw, theme: str, *, image: str = "svg") -> bytes:
    """Returns a figure for a theme, `light` or `dark`: as `svg` without a ground, as `png` on one."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    ink = INK[theme]
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), ink)
    settings: dict[Any, Any] = {**BLANK, **colours, "axes.prop_cycle": cycler(color=HUES[theme])}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
        draw(axes, ink)
        buffer = io.BytesIO()
        ground = "none" if image == "svg" else {"light": "white", "dark": "#15181c"}[theme]
        metadata = {"Date": None} if image == "svg" else None
        figure.savefig(buffer, format=image, facecolor=ground, metadata=metadata, dpi=144)
    return buffer.getvalue()


def acceptance_by_position(measured: Mapping[str, Any], block_size: int) -> Draw:
    """Draws accept_rate_at_k for every position of a block, with intervals."""
    positions = list(range(1, block_size))
    rates = [measured[f"accept_rate_at_{k}"] for k in positions]

    def draw(axes: Any, ink: str) -> None:
        errors = _errors(measured, [f"accept_rate_at_{k}" for k in positions])
        axes.bar(positions, rates, width=0.7)
        if errors is not None:
            axes.errorbar(positions, rates, yerr=errors, fmt="none", ecolor=ink, capsize=3)
        for position, rate in zip(positions, rates, strict=True):
            axes.annotate(f"{rate:.0%}", (position, rate), (6, 3), textcoords="offset points", fontsize=8, color=ink)
        axes.set(xlabel="drafted token", ylabel="accepted, and all before it", ylim=(0, 1.05), xticks=positions)

    return draw


def acceptance_by_group(groups: Mapping[str, Mapping[str, Any]]) -> Draw:
    """Draws the accept_length of groups of prompts or of rounds, the longest on top, with intervals."""
    names = sorted(groups, key=lambda name: groups[name]["accept_length"])
    lengths = [groups[name]["accept_length"] for name in names]

    def draw(axes: Any, ink: str) -> None:
        low = [max(groups[name]["accept_length"] - groups[name]["accept_length_low"], 0) for name in names]
        high = [max(groups[name]["accept_length_high"] - groups[name]["accept_length"], 0) for name in names]
        axes.barh(names, lengths, xerr=[low, high], ecolor=ink, capsize=2, height=0.7)
        axes.tick_params(axis="y", labelsize=min(9, 160 / max(len(names), 1)))
        axes.grid(axis="x", alpha=0.25)
        axes.grid(visible=False, axis="y")
        axes.set(xlabel="accept_length", xlim=(0, None))

    return draw


def speedup_by_acceptance(points: Sequence[Mapping[str, Any]], block_size: int) -> Draw:
    """Draws speedup against accept_length: each benchmark, and what its round's cost makes of other lengths."""

    def draw(axes: Any, ink: str) -> None:
        for index, one in enumerate(points):
            cost = one["break_even_accept_length"]
            style = ("-", "--", ":", "-.")[index % 4]
            label = one.get("label", "measured")
            (line,) = axes.plot([1, block_size], [1 / cost, block_size / cost], style, alpha=0.6)
            at = one["accept_length"], one["speedup"]
            axes.errorbar(
                [at[0]],
                [at[1]],
                xerr=_errors(one, ["accept_length"]),
                yerr=_errors(one, ["speedup"]),
                fmt="osD^v"[index % 5],
                color=line.get_color(),
                ecolor=ink,
                capsize=3,
                label=label,
            )
        axes.axhline(1, color=ink, linewidth=0.8)
        axes.annotate("plain decoding", (1, 1), (2, 3), textcoords="offset points", fontsize=8, color=ink)
        axes.set(xlabel="accept_length", ylabel="speedup", xlim=(1, block_size), ylim=(0, None))
        axes.legend(frameon=False, loc="upper left")

    return draw


def speedup_by_load(points: Sequence[Mapping[str, Any]]) -> Draw:
    """Draws speedup against the number of requests at once, with intervals."""
    slots = [one["slots"] for one in points]
    speedups = [one["speedup"] for one in points]

    def draw(axes: Any, ink: str) -> None:
        errors = [
            [one["speedup"] - one["speedup_low"] for one in points],
            [one["speedup_high"] - one["speedup"] for one in points],
        ]
        axes.errorbar(
            slots, speedups, yerr=[[max(e, 0) for e in some] for some in errors], fmt="o-", capsize=3, ecolor=ink
        )
        axes.axhline(1, color=ink, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(slots, [str(count) for count in slots])
        axes.set(xlabel="requests at once", ylabel="speedup", ylim=(0, None))

    return draw


def round_split(profiles: Mapping[str, Mapping[str, Any]]) -> Draw:
    """Draws the parts of a round, in milliseconds, beside a plain step, for each number of slots."""
    names = [
        f"{slots} {'slot' if slots == '1' else 'slots'}, {arm}" for slots in profiles for arm in ("plain", "DFLASH")
    ]
    parts = ("draft", "verify", "commit")

    def draw(axes: Any, ink: str) -> None:
        ends = [0.0] * len(names)
        for part, hatch in zip(("step", *parts), HATCHES, strict=True):
            widths = []
            for one in profiles.values():
                widths.append(one["plain_device_ms"] if part == "step" else 0.0)
                widths.append(one[f"dflash_{part}_ms"] or 0.0 if part in parts else 0.0)
            label = "plain step" if part == "step" else part
            axes.barh(names, widths, left=ends, hatch=hatch, edgecolor=ink, label=label, height=0.6)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
        axes.invert_yaxis()
        axes.set(xlabel="milliseconds on the devices")
        axes.legend(frameon=False)

    return draw


def figures_of(measured: Mapping[str, Any], block_size: int) -> dict[str, tuple[str, Draw]]:
    """Returns the figures that a benchmark's record has the values for: a title and a drawing, by file name."""
    found: dict[str, tuple[str, Draw]] = {}
    if measured["num_rounds"]:
        found["acceptance_by_position"] = ("Acceptance by position", acceptance_by_position(measured, block_size))
        found["speedup_by_acceptance"] = ("Speedup by acceptance", speedup_by_acceptance([measured], block_size))
    for kind, groups in measured.get("by", {}).items():
        if len(groups) > 1:
            found[f"acceptance_by_{kind}"] = (f"Acceptance by {kind}", acceptance_by_group(groups))
    if len(measured.get("sweep", ())) > 1:
        found["speedup_by_load"] = ("Speedup by load", speedup_by_load(measured["sweep"]))
    if measured.get("profile"):
        found["round_split"] = ("Where a round's time goes", round_split(measured["profile"]))
    return found


def _errors(measured: Mapping[str, Any], names: Sequence[str]) -> list[list[float]] | None:
    """Returns the distances to the ends of the intervals; None where there are none."""
    if any(f"{name}_low" not in measured for name in names):
        return None
    low = [max(measured[name] - measured[f"{name}_low"], 0) for name in names]
    return [low, [max(measured[f"{name}_high"] - measured[name], 0) for name in names]]
