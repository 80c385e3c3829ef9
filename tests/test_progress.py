import io
import logging
import sys

import pytest

from pipeline import progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_without_a_terminal_a_line_comes_every_ten_seconds_and_at_the_end(clock, caplog):
    with caplog.at_level(logging.INFO, "pipeline"), progress.Progress("train", 60, "step") as bar:
        for _ in range(60):
            clock.now += 0.5
            bar.advance(note="loss 2.1")
    assert caplog.messages == [
        "train: 20/60 step, 2 step/s, 00:20 left, loss 2.1",
        "train: 40/60 step, 2 step/s, 00:10 left, loss 2.1",
        "train: 60/60 step, 2 step/s, in 00:30, loss 2.1",
    ]


def test_work_of_an_earlier_run_counts_as_done_but_not_in_the_rate(clock, caplog):
    with caplog.at_level(logging.INFO, "pipeline"), progress.Progress("cache", 100, "token", done=50) as bar:
        clock.now += 10
        bar.advance(10)
        clock.now += 10
        bar.advance(40)
    assert caplog.messages == [
        "cache: 60/100 token, 1 token/s, 00:40 left",
        "cache: 100/100 token, 2.5 token/s, in 00:20",
    ]


def test_on_a_terminal_one_line_is_rewritten(monkeypatch, caplog):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with caplog.at_level(logging.INFO, "pipeline"), progress.Progress("train", 3, "step") as bar:
        for _ in range(3):
            bar.advance(note="loss 2.1")
    assert "3/3" in terminal.getvalue()
    assert "loss 2.1" in terminal.getvalue()
    assert caplog.messages == []
