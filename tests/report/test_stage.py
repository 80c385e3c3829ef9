"""Records of benchmarks, wherever they are, on one page."""

import json

import pytest

from pipeline.errors import PipelineError
from pipeline.report import stage
from pipeline.report.records import read_records
from pipeline.tracking.run import RunInfo, open_run
from tests.pages.test_pages import RECORD, SLOWER
from tests.support.configuration import composed
from tests.support.recorder import Recorder


def write(root, name, record):
    path = root / "bench" / "tiny" / name / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    return path


def test_all_benchmarks_of_an_output_directory_are_compared_on_a_page(tmp_path, capsys):
    write(
        tmp_path, "1", {key: value for key, value in RECORD.items() if key != "record_format"}
    )  # an earlier version's
    write(tmp_path, "2", RECORD)
    write(tmp_path, "3", SLOWER)
    tracker = Recorder()
    path = stage.run(composed(f"output_dir={tmp_path}", "stage=report"), tracker)
    assert "b-dflash: speedup -20.0% worse" in capsys.readouterr().out
    page = path.read_text()
    assert page == tracker.documents[path.name]
    assert "a-dflash" in page


def test_records_are_named_by_file_directory_pattern_and_run(tmp_path):
    first, second = write(tmp_path, "1", RECORD), write(tmp_path, "2", SLOWER)
    info = RunInfo(name="bench", config={}, params={})
    with open_run(info, uri=None, experiment="dflash", output_dir=tmp_path) as run:
        run.log_json("results.json", SLOWER)
    wanted = [str(second), str(first.parent), f"runs:/{run.run_id}", str(tmp_path / "bench" / "tiny" / "[2]")]
    found = read_records(wanted, tmp_path, uri=None)
    assert list(found) == ["b-dflash", "a-dflash", f"run {run.run_id[:8]}", "b-dflash, 2"]
    assert [one["speedup"] for one in found.values()] == [1.2, 1.5, 1.2, 1.2]


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        (["nothing.json"], "which does not exist"),
        ([], "there is no record of a benchmark"),
        (["runs:/0000"], "has no results.json"),
    ],
)
def test_what_is_no_record_is_one_clear_error(tmp_path, wanted, problem):
    with pytest.raises(PipelineError, match=problem):
        read_records(wanted, tmp_path, uri=None)


def test_a_record_of_an_earlier_version_is_refused_by_name(tmp_path):
    path = write(tmp_path, "1", {"speedup": 1.0})
    with pytest.raises(PipelineError, match=r"results\.json is of an earlier version, without intervals"):
        read_records([str(path)], tmp_path, uri=None)
