"""What would be found and made, before anything is."""

import pytest

from pipeline.plan import stage
from pipeline.tracking import reading
from pipeline.tracking.run import RunInfo, open_run
from tests.support.configuration import composed
from tests.support.recorder import Recorder


def planned(tmp_path, *overrides):
    config = composed(f"output_dir={tmp_path}", "stage=plan", *overrides)
    return {one.stage: one for one in stage.run(config, Recorder())}


def test_without_a_target_the_others_have_no_names_yet(tmp_path, capsys):
    found = planned(tmp_path)
    assert {one.state for one in found.values()} == {"to be made"}
    assert str(tmp_path / "target") in found["target"].where
    assert found["train"].where == "named when the target is there"
    assert capsys.readouterr().out.count("to be made") == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (4500, "4 kB"), (2.5e9, "2 GB"), (7.2e12, "7.2 TB"), (9e15, "9000.0 TB")]
)
def test_sizes_are_for_people(count, text):
    assert stage._bytes(float(count)) == text


def test_the_time_is_that_of_the_run_which_made_something(tmp_path):
    assert reading.last_seconds("train", "tiny", uri=None, output_dir=tmp_path) is None
    for target in ("tiny", "other"):
        info = RunInfo(name="train", config={}, params={}, tags={"stage": "train", "target": target})
        with open_run(info, uri=None, experiment="dflash", output_dir=tmp_path):
            pass
    seconds = reading.last_seconds("train", "tiny", uri=None, output_dir=tmp_path)
    assert seconds is not None
    assert 0 <= seconds < 60
    assert reading.last_seconds("bench", "tiny", uri=None, output_dir=tmp_path) is None
