"""Pages of one benchmark and of several: self-contained, in both themes, and saying what the numbers allow."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from pipeline.pages import bench_page, comparison_page, figures, html


def around(name, value, width):
    """A value with its interval."""
    return {name: value, f"{name}_low": value - width, f"{name}_high": value + width}


RECORD = {
    "record_format": 3,
    "target": "tiny",
    "target_fingerprint": "t",
    "prompts_fingerprint": "p",
    "draft": "/drafts/a-dflash",
    "commit": "abc",
    "precision": "float32",
    "temperature": 0.0,
    "slots": 1,
    "machine": {"device": "cpu"},
    **around("accept_length", 3.0, 0.2),
    "accept_rate": 0.66,
    **around("accept_rate_at_1", 0.8, 0.05),
    **around("accept_rate_at_2", 0.7, 0.05),
    **around("accept_rate_at_3", 0.6, 0.05),
    **around("speedup", 1.5, 0.1),
    "break_even_accept_length": 2.0,
    "plain_tokens_per_second": 100.0,
    "dflash_tokens_per_second": 150.0,
    "num_prompts": 50,
    "num_rounds": 400,
    "num_repeats": 4,
    "equal_answers": 50,
    "wrong_answers": 0,
    "by": {
        "family": {
            name: {**around("accept_length", length, 0.1), "num_rounds": 9}
            for name, length in (("sums", 2.0), ("<code>", 4.0))
        }
    },
    "sweep": [{"slots": slots, **around("speedup", 1.5, 0.1)} for slots in (1, 8)],
    "profile": {
        "1": {"plain_device_ms": 1.0, "dflash_draft_ms": 0.5, "dflash_verify_ms": 1.5, "dflash_commit_ms": 0.1}
    },
    "warnings": ["the answers loop"],
}
SLOWER = RECORD | {"draft": "/drafts/b-dflash", **around("speedup", 1.2, 0.1), "warnings": []}
NOISY = RECORD | {"draft": "/drafts/c-dflash", **around("speedup", 1.7, 0.25), "warnings": []}


def is_whole(page):
    """No script, nothing from elsewhere, and every drawing well-formed."""
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    names = re.findall(r'\sid="([^"]+)"', page)
    assert len(names) == len(set(names))
    return len(drawings)


def test_a_benchmarks_page_says_first_what_decides():
    page = bench_page.bench_page(RECORD, 4)
    assert is_whole(page) == 2 * 5  # five figures in two themes
    assert "1.50 times as fast (95% interval 1.40 to 1.60): faster than plain decoding, beyond the interval" in page
    assert "the answers loop" in page
    assert "&lt;code&gt;" in page
    assert page.index("beyond the interval") < page.index("<table")


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.8, 0.9, "slower than plain decoding"), (0.9, 1.1, "not distinguishable from plain decoding")],
)
def test_what_an_interval_does_not_show_is_not_claimed(low, high, said):
    values = RECORD | {"speedup": (low + high) / 2, "speedup_low": low, "speedup_high": high}
    assert said in bench_page.headline(values, 4)
    assert "3 answers are WRONG" in bench_page.headline(values | {"wrong_answers": 3}, 4)


def test_figures_are_drawn_alike_twice_and_readable_on_either_ground():
    drawn = figures.figures_of(RECORD, 4)
    assert drawn.keys() == {
        "acceptance_by_position", "speedup_by_acceptance", "acceptance_by_family", "speedup_by_load", "round_split"
    }  # fmt: skip
    _, draw = drawn["acceptance_by_position"]
    light, dark = (figures.drawn(draw, theme) for theme in figures.INK)
    assert light == figures.drawn(draw, "light") != dark
    assert figures.INK["dark"].encode() in dark
    assert figures.drawn(draw, "dark", image="png").startswith(b"\x89PNG")


def test_a_record_without_rounds_intervals_or_sweeps_still_has_a_page():
    bare = {name: value for name, value in RECORD.items() if not name.startswith("accept_") or name.count("_") < 2}
    bare |= {"by": {}, "sweep": [], "profile": {}, "accept_length": 3.0, "accept_rate": 0.5}
    bare |= {f"accept_rate_at_{k}": 0.5 for k in (1, 2, 3)}
    assert is_whole(bench_page.bench_page(bare, 4)) == 2 * 2


def test_better_and_worse_are_said_only_beyond_the_intervals():
    page = comparison_page.comparison_page({"a": RECORD, "b": SLOWER, "c": NOISY}, 4)
    assert is_whole(page) == 2
    found = comparison_page.findings({"a": RECORD, "b": SLOWER, "c": NOISY})
    assert "b: speedup -20.0% worse" in found[1]
    assert "c: speedup +13.3% within the intervals" in found[2]
    assert comparison_page.verdict(SLOWER, RECORD, "speedup").word == "better"


def test_records_of_other_machines_or_prompts_are_not_compared_silently():
    other = SLOWER | {"machine": {"device": "TPU v6e"}, "prompts_fingerprint": "q", "wrong_answers": 2}
    found = comparison_page.cautions({"a": RECORD, "b": other})
    assert "a: the answers loop" in found
    assert "b was measured with another prompts, machine: its speeds cannot be compared" in found
    assert "b changed 2 answers, which is a bug" in found


def test_text_from_outside_cannot_become_markup():
    assert "<b>" not in html.page("<b>", [html.paragraph("<b>"), html.table(("<b>",), [("<b>",)]), html.heading("<b>")])
