"""A draft that is replaced while requests run: none is dropped, and those that come later have the new one."""

import threading

import pytest

from pipeline.engine.request import Request
from pipeline.errors import PipelineError
from pipeline.serve.draft_watch import DraftWatch
from pipeline.serve.replaceable_engine import ReplaceableEngine
from pipeline.serve.served_engine import ServedEngine
from tests.support.fake_engine import FakeEngine

STOP = 2


def engine(token, block_size=8):
    """Answers nine times its token."""
    return FakeEngine(lambda request: [*[token] * 9, STOP], [STOP], block_size=block_size)


def request(name):
    return Request(request_id=name, prompt_ids=(5, 6), max_new_tokens=20)


def drained(served):
    tokens = {}
    while served.has_work:
        for update in served.step():
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
    return tokens


def test_what_runs_ends_with_the_old_draft_and_what_comes_has_the_new_one():
    old, new = engine(11), engine(22, block_size=4)
    served = ReplaceableEngine(old, old)
    assert isinstance(served, ServedEngine)
    served.add_all([request("a")])
    first = [token for update in served.step() for token in update.token_ids]
    served.replace(new)
    served.add_all([request("b")])
    assert (served.num_running + served.num_waiting, served.block_size, served.num_replaced) == (2, 4, 1)
    tokens = drained(served)
    assert first + tokens["a"] == [11] * 9 + [STOP]
    assert tokens["b"] == [22] * 9 + [STOP]
    assert not served.has_work
    assert served._ending == []


def test_a_request_is_cancelled_wherever_it_runs():
    old = engine(11)
    served = ReplaceableEngine(old, old)
    served.add_all([request("a")])
    served.step()
    served.replace(engine(22))
    served.add_all([request("b")])
    served.step()
    served.cancel("a")
    served.cancel("b")
    assert drained(served) == {}


def test_an_engine_without_requests_is_replaced_at_the_next_step():
    old, new = engine(11), engine(22)
    served = ReplaceableEngine(old, old)
    served.replace(new)
    assert served.has_work  # so that the thread that owns it takes the new one
    assert served.step() == []
    assert not served.has_work


def watched(found, load, poll_seconds=None):
    old = engine(11)
    served = ReplaceableEngine(old, old)
    return served, DraftWatch(served, "one", lambda: (found(), load), poll_seconds)


def test_the_draft_is_loaded_when_its_address_leads_elsewhere():
    present = ["one"]
    served, watch = watched(lambda: present[0], lambda: engine(22))
    assert not watch.look()
    present[0] = "two"
    assert watch.look()
    assert not watch.look()
    served.add_all([request("a")])
    assert drained(served)["a"][0] == 22


def test_a_draft_that_cannot_be_loaded_is_said_and_the_old_one_stays(caplog):
    def load():
        raise PipelineError("it does not fit the target")

    served, watch = watched(lambda: "two", load)
    assert not watch.look()
    assert "the draft stays as it is: it does not fit the target" in caplog.text
    served.add_all([request("a")])
    assert drained(served)["a"][0] == 11


def test_it_looks_again_and_again_where_it_polls():
    asked = threading.Event()

    def found():
        asked.set()
        return "one"

    _, watch = watched(found, lambda: pytest.fail("nothing is to be loaded"), poll_seconds=0.01)
    watch._thread.start()  # as `start` does, which takes the signal too
    assert asked.wait(5)
    watch.stop()
    watch._thread.join(5)
    assert not watch._thread.is_alive()
