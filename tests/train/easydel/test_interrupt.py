import os
import signal
import threading

import pytest

from pipeline.train.easydel.interrupt import between_steps


@pytest.fixture(autouse=True)
def handlers():
    """The handlers as the test found them, and SIGTERM as the door sets it."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, interrupt)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_step(number):
    steps = []

    def train():
        with between_steps() as check:
            for step in range(3):
                steps.append(step)
                if step == 1:
                    os.kill(os.getpid(), number)
                    steps.append("the step goes on")
                check()

    with pytest.raises(KeyboardInterrupt):
        train()
    assert steps == [0, 1, "the step goes on"]


def test_a_second_signal_acts_at_once():
    seen = []

    def train():
        with between_steps():
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
                seen.append("goes on")

    with pytest.raises(KeyboardInterrupt):
        train()
    assert seen == ["goes on"]


def test_a_signal_after_the_last_step_is_not_lost():
    with pytest.raises(KeyboardInterrupt), between_steps():
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_as_before_afterwards_and_ignored_signals_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGTERM)
    with between_steps() as check:
        os.kill(os.getpid(), signal.SIGINT)
        check()
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_outside_the_main_thread_nothing_is_held():
    done = []

    def work():
        with between_steps() as check:
            check()
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
