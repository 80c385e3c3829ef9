"""Batches are a function of the step number."""

import itertools
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest

from pipeline.dflash.blocks import anchor_candidates
from pipeline.errors import PipelineError
from pipeline.store.reader import open_split
from pipeline.train.data.padded import PaddedBatches
from pipeline.train.data.prefetch import prefetch
from pipeline.train.data.rows import padded_row_length
from tests.support import training as tiny_training
from tests.support.paths import ROOT

FEATURE_SIZE, NUM_TRAIN = 6, 11


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    return open_split(tiny_training.write_store(root, FEATURE_SIZE, num_train=NUM_TRAIN), "train")


def batches_of(split, **changes):
    options = {"num_sequences": 4, "num_anchors": 7, "seed": 3}
    return PaddedBatches(split, **{**options, **changes})


def text_of(row):
    """Which sequence a row of features holds, padding aside."""
    return row[row.any(axis=1)].tobytes()


def rows_of(batch):
    return [text_of(row) for row in batch["features"]]


def test_a_step_can_be_made_alone(split):
    one, other = batches_of(split), batches_of(split)
    for step in range(6):
        one.at(step)
    for name, array in one.at(6).items():
        np.testing.assert_array_equal(array, other.at(6)[name], err_msg=name)


def test_each_epoch_shows_every_sequence_in_another_order(split):
    batches = batches_of(split)
    assert batches.steps_per_epoch == 3
    steps = [[text_of(row) for row in batches.at(step)["features"]] for step in range(12)]
    epochs = [list(itertools.chain(*steps[start : start + 3])) for start in range(0, 12, 3)]
    assert all(len(epoch) == 12 and len(set(epoch)) == NUM_TRAIN for epoch in epochs)  # one is shown twice
    assert all(set(epoch) == set(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_split_smaller_than_a_batch_fills_it(split):
    batch = batches_of(split, num_sequences=3 * NUM_TRAIN).at(5)
    counts = Counter(text_of(row) for row in batch["features"])
    assert len(counts) == NUM_TRAIN
    assert set(counts.values()) == {3}


def test_short_sequences_share_batches_that_are_padded_less(split):
    batches = batches_of(split, num_sequences=2)
    assert batches.lengths == (32, 64)
    shapes = Counter(batches.at(step)["token_ids"].shape[1] for step in range(batches.steps_per_epoch))
    num_long = int((split.num_tokens > 32).sum())
    assert 0 < num_long < NUM_TRAIN
    num_padded_less = (NUM_TRAIN - num_long) // 2
    assert shapes == {32: num_padded_less, 64: batches.steps_per_epoch - num_padded_less}


def test_anchors_are_drawn_anew_each_epoch_from_generated_tokens(split):
    batches = batches_of(split, num_sequences=NUM_TRAIN)
    first, second = batches.at(0), batches.at(1)
    anchors_of = [dict(zip(rows_of(batch), batch["anchors"].tolist(), strict=True)) for batch in (first, second)]
    assert all(anchors_of[0][text] != anchors_of[1][text] for text in anchors_of[0])
    for generated, anchors, taken in zip(first["generated"], first["anchors"], first["anchor_taken"], strict=True):
        assert set(anchors[taken]) <= set(anchor_candidates(generated))
        assert len(set(anchors[taken])) == taken.sum()


def test_the_seed_decides(split):
    assert rows_of(batches_of(split).at(0)) != rows_of(batches_of(split, seed=4).at(0))


def test_rows_hold_the_sequence_and_zeros_behind_it(split):
    length = padded_row_length(split.num_tokens)
    assert length % 32 == 0
    assert 0 <= length - split.num_tokens.max() < 32
    batch = batches_of(split, num_sequences=NUM_TRAIN).at(0)
    assert batch["token_ids"].shape == (NUM_TRAIN, length)
    by_text = {one.features.tobytes(): one for one in split.read(range(NUM_TRAIN))}
    for row in range(NUM_TRAIN):
        end = int(np.flatnonzero(batch["generated"][row])[-1]) + 1
        sequence = by_text[batch["features"][row, :end].tobytes()]
        np.testing.assert_array_equal(batch["token_ids"][row, :end], sequence.token_ids)
        assert not batch["token_ids"][row, end:].any()
        assert not batch["features"][row, end:].any()
        assert np.flatnonzero(batch["generated"][row])[0] == sequence.prompt_tokens


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_read_their_rows_of_the_same_batch(split, count):
    whole = batches_of(split)
    hosts = [batches_of(split, host=(index, count)) for index in range(count)]
    for step in range(whole.steps_per_epoch):
        parts = [host.at(step) for host in hosts]
        for name, array in whole.at(step).items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array, err_msg=name)


def test_a_host_reads_no_other_rows(split, monkeypatch):
    read, asked = split.read, []
    monkeypatch.setattr(split, "read", lambda indices: asked.append(len(indices)) or read(indices))
    batches_of(split, host=(1, 2)).at(0)
    assert asked == [2]


def test_hosts_that_cannot_share_a_batch_evenly_are_refused(split):
    with pytest.raises(PipelineError, match="train.batch_sequences is 4; 3 hosts read equal parts"):
        batches_of(split, host=(0, 3))


def test_prefetching_begins_at_the_given_step_and_passes_errors_on():
    def make(step):
        if step == 9:
            raise ValueError("nine")
        return step * step

    made = prefetch(make, 6)
    assert [next(made) for _ in range(3)] == [36, 49, 64]
    with pytest.raises(ValueError, match="nine"):
        next(made)


def test_several_batches_are_made_at_once_while_one_is_used():
    together = threading.Barrier(4, timeout=20)  # breaks unless four reads wait here at the same time

    def make(step):
        together.wait()
        return step

    made = prefetch(make, 0, ahead=4)
    assert [next(made) for _ in range(5)] == [0, 1, 2, 3, 4]
    together.abort()  # those that wait for steps nobody asks for
    made.close()


def test_no_more_batches_are_held_than_asked_for():
    begun = []
    made = prefetch(lambda step: begun.append(step) or step, 10, ahead=3)
    for used in range(10, 16):
        assert next(made) == used
        deadline = time.monotonic() + 20
        while len(begun) < used - 10 + 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert max(begun) == used + 3  # the one that is used, and three ahead of it
    made.close()


def test_an_interrupted_trainer_does_not_wait_for_reads_that_have_not_begun():
    release, begun = threading.Event(), []

    def make(step):
        begun.append(step)
        if step:
            release.wait(20)
        return step

    made = prefetch(make, 0, ahead=2)
    next(made)
    closed = time.monotonic()
    made.close()
    assert time.monotonic() - closed < 10  # the reads under way last until they are let go
    release.set()
    with pytest.raises(StopIteration):
        next(made)
    assert set(begun) <= {0, 1, 2}


def test_ctrl_c_ends_a_process_that_reads_ahead(tmp_path):
    script = """
import time
from pipeline.train.data.prefetch import prefetch
def make(step):
    if step > 2:
        time.sleep(0.2)
    return step
for batch in prefetch(make, 0):
    print(batch, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "0\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
