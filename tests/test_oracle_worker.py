"""An oracle run in a fork of the worker does what it does in a process of its own."""

import json
import sys

import numpy as np
import pytest

from tests.support import models as tiny_models
from tests.support import oracles
from tests.support.oracles import run_oracle


def test_an_oracle_writes_the_same_bytes_both_ways(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(tiny_models.LEGACY_TARGET))
    run_oracle("make_gpt_oss", config=tmp_path / "config.json", seed=9, out=tmp_path / "target")
    np.savez(tmp_path / "in.npz", input_ids=np.arange(24, dtype=np.int32).reshape(2, 12))
    given = {"model": tmp_path / "target", "inputs": tmp_path / "in.npz"}
    run_oracle("gpt_oss_forward", **given, outputs=tmp_path / "forked.npz")
    monkeypatch.setenv("ORACLE_WORKER", "0")
    run_oracle("gpt_oss_forward", **given, outputs=tmp_path / "alone.npz")
    forked, alone = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("forked", "alone"))
    assert forked.keys() == alone.keys()
    assert {name: array.tobytes() for name, array in forked.items()} == {
        name: array.tobytes() for name, array in alone.items()
    }


def test_a_run_that_fails_says_why_and_the_next_one_runs(tmp_path):
    with pytest.raises(AssertionError, match=r"oracle make_gpt_oss ended with 2: (.|\n)*required: --config"):
        run_oracle("make_gpt_oss", seed=1, out=tmp_path / "target")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AssertionError, match=r"oracle make_gpt_oss ended with 1: (.|\n)*ValueError: model_type"):
        run_oracle("make_gpt_oss", config=tmp_path / "config.json", seed=1, out=tmp_path / "target")
    (tmp_path / "config.json").write_text(json.dumps(tiny_models.LEGACY_TARGET))
    run_oracle("make_gpt_oss", config=tmp_path / "config.json", seed=1, out=tmp_path / "target")
    assert (tmp_path / "target" / "config.json").is_file()


@pytest.mark.parametrize("program", ["input()", "import time; time.sleep(600)"], ids=["dies", "hangs"])
def test_a_worker_that_says_nothing_is_ended_and_fails_the_run(tmp_path, monkeypatch, program):
    worker = oracles._Worker([sys.executable, "-c", program])
    monkeypatch.setattr(oracles, "_worker", (found := lambda: worker))
    found.cache_clear = lambda: None
    monkeypatch.setattr(oracles, "TIMEOUT_SECONDS", 1 if "sleep" in program else 60)
    with pytest.raises(AssertionError, match="oracle make_draft did not end in"):
        run_oracle("make_draft", out=tmp_path)
    assert worker.process.returncode is not None
