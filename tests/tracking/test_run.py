import contextlib
import getpass
import logging
import math
import os
import shlex
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import mlflow
import pytest
import yaml

from pipeline.errors import PipelineError
from pipeline.tracking.run import RunInfo, open_run
from pipeline.tracking.store import ui_command

TOKEN = "hf_aSecretThatNobodyMayRead"
TRAIN = RunInfo(name="train", config={}, params={})
CONFIG = {"stage": "bench", "train": {"steps": 3, "loss_decay": None}, "draft": {"tapped_layers": [1, 3]}}


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory):
    """One store for this file: making its tables costs seconds."""
    return tmp_path_factory.mktemp("outputs")


@contextlib.contextmanager
def a_run(output_dir, name="bench", config=CONFIG, **options):
    info = RunInfo(name=name, config=config, params=config, **options)
    with open_run(info, uri=None, experiment="dflash", output_dir=output_dir) as run:
        yield run


@pytest.fixture(scope="module")
def stored(output_dir):
    """A run as MLflow's own client reads it."""
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{output_dir}/mlflow.db")
    return client.get_run


def artifacts_of(output_dir, run):
    return output_dir / "mlartifacts" / run.run_id / "artifacts"


def test_a_run_holds_its_parameters_and_its_config_as_yaml(output_dir, stored):
    with a_run(output_dir, tags={"mlflow.source.git.commit": "abc123"}) as run:
        pass
    found = stored(run.run_id)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "bench")
    assert found.data.params == {
        "stage": "bench",
        "train.steps": "3",
        "train.loss_decay": "None",
        "draft.tapped_layers": "[1, 3]",
    }
    assert found.data.tags["mlflow.source.git.commit"] == "abc123"
    assert yaml.safe_load((artifacts_of(output_dir, run) / "config.yaml").read_text()) == CONFIG


@pytest.mark.parametrize(
    "error", [OSError("No username set"), KeyError("uid not found: 4711")], ids=["OSError", "KeyError"]
)
def test_a_user_without_a_name_is_recorded_by_number(output_dir, stored, monkeypatch, error):
    def getuser():
        raise error

    monkeypatch.setattr(getpass, "getuser", getuser)
    with a_run(output_dir) as run:
        pass
    assert stored(run.run_id).data.tags["mlflow.user"] == str(os.getuid())


def test_the_metrics_that_checkpoints_are_compared_by_keep_their_names(output_dir, stored):
    values = {"accept_rate": 0.5, "accept_length": 4.5, "speedup": 2.25, "bench/plain_tokens_per_second": 100.0}
    with a_run(output_dir) as run:
        run.log_metrics(values)
    assert stored(run.run_id).data.metrics == values


def test_metrics_keep_their_steps(output_dir):
    with a_run(output_dir) as run:
        for step in (0, 10, 20):
            run.log_metrics({"train/loss_nats": 3.0 - step / 10}, step=step)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{output_dir}/mlflow.db")
    history = client.get_metric_history(run.run_id, "train/loss_nats")
    assert [(entry.step, entry.value) for entry in history] == [(0, 3.0), (10, 2.0), (20, 1.0)]


def test_names_that_mlflow_does_not_take_are_mended(output_dir, stored):
    with a_run(output_dir) as run:
        run.log_metrics({"accept_rate@3": 0.1, "bench//ttft(p50)": 0.2})
    assert stored(run.run_id).data.metrics == {"accept_rate_3": 0.1, "bench/ttft_p50_": 0.2}


def test_metrics_that_would_become_one_are_refused(output_dir):
    with a_run(output_dir) as run, pytest.raises(ValueError, match="cannot tell apart"):
        run.log_metrics({"rate@1": 0.1, "rate#1": 0.2})


def test_values_that_are_not_finite_are_told_and_stored_as_nan(output_dir, stored, caplog):
    with caplog.at_level(logging.WARNING, "pipeline"), a_run(output_dir) as run:
        run.log_metrics({"train/loss_nats": math.inf, "train/grad_norm": math.nan, "accept_rate": 1.0}, step=7)
    metrics = stored(run.run_id).data.metrics
    assert math.isnan(metrics["train/loss_nats"])
    assert math.isnan(metrics["train/grad_norm"])
    assert metrics["accept_rate"] == 1.0
    assert "train/loss_nats is inf at step 7" in caplog.text


def test_long_and_many_parameters_are_cut_and_split(output_dir, stored):
    with a_run(output_dir) as run:
        run.log_params({"long": "x" * 10_000, "many": {str(number): number for number in range(250)}})
    params = stored(run.run_id).data.params
    assert params["long"] == "x" * 6000
    assert params["many.249"] == "249"


def test_files_directories_and_json_become_artifacts(output_dir, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "table.txt").write_text("speedup 2.0")
    with a_run(output_dir) as run:
        run.log_artifact(tmp_path / "report")
        run.log_artifact(tmp_path / "report" / "table.txt")
        run.log_json("contract.json", {"block_size": 8})
    directory = artifacts_of(output_dir, run)
    assert (directory / "report" / "table.txt").read_text() == (directory / "table.txt").read_text() == "speedup 2.0"
    assert yaml.safe_load((directory / "contract.json").read_text()) == {"block_size": 8}


def test_children_nest_under_their_parent(output_dir, stored):
    with (
        a_run(output_dir, name="all") as parent,
        a_run(output_dir, name="train", parent_run_id=parent.run_id) as child,
    ):
        pass
    assert stored(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
    assert stored(child.run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("shapes differ"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_how_a_run_ended_is_kept(output_dir, stored, error, status):
    with pytest.raises(type(error)), a_run(output_dir, name="train") as run:
        raise error
    assert stored(run.run_id).info.status == status
    assert ("error" in stored(run.run_id).data.tags) == (status == "FAILED")


def test_the_token_is_refused_wherever_it_is_written(output_dir, stored, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with a_run(output_dir) as run:
        for write in (
            lambda: run.log_params({"hub": {"token": TOKEN}}),
            lambda: run.log_json("contract.json", {"config": {"hub": f"Bearer {TOKEN}"}}),
            lambda: run.set_tag("note", TOKEN),
        ):
            with pytest.raises(PipelineError, match="the value of HF_TOKEN is in") as raised:
                write()
            assert TOKEN not in str(raised.value)
    with (
        pytest.raises(PipelineError, match=r"HF_TOKEN is in prompts\.dataset"),
        a_run(output_dir, config={"prompts": {"dataset": TOKEN}}),
    ):
        pass
    with pytest.raises(ValueError, match="hf_"), a_run(output_dir) as failed:
        raise ValueError(f"401 with {TOKEN}")
    assert stored(failed.run_id).data.tags["error"] == "ValueError: 401 with HF_TOKEN"
    files = [path for path in output_dir.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_a_server_that_does_not_answer_is_told_at_once(tmp_path):
    started = time.monotonic()
    with (
        pytest.raises(PipelineError, match=r"no MLflow server answers at http://127\.0\.0\.1:9 .*refused"),
        open_run(TRAIN, uri="http://127.0.0.1:9", experiment="dflash", output_dir=tmp_path),
    ):
        pass
    assert time.monotonic() - started < 10


def test_a_server_that_is_not_mlflow_is_told(tmp_path):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        with (
            pytest.raises(PipelineError, match=f"MLflow at {uri}"),
            open_run(TRAIN, uri=uri, experiment="dflash", output_dir=tmp_path),
        ):
            pass
        server.shutdown()


def test_a_password_in_the_address_is_refused_and_not_repeated(tmp_path):
    with (
        pytest.raises(PipelineError, match="MLFLOW_TRACKING_PASSWORD") as raised,
        open_run(TRAIN, uri="http://me:secret@host", experiment="x", output_dir=tmp_path),
    ):
        pass
    assert "secret" not in str(raised.value)


def test_an_output_dir_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match="it cannot be created"), a_run(tmp_path / "file" / "outputs"):
        pass


def test_the_line_that_opens_the_ui_names_the_store(tmp_path):
    assert f" ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db" in ui_command(None, tmp_path)
    assert ui_command("http://host:5000", tmp_path) == "open http://host:5000"


def test_the_line_that_opens_the_ui_can_be_pasted_into_a_shell(tmp_path):
    folder = tmp_path / "it's $HOME; a (b)"
    assert shlex.split(ui_command(None, folder))[1:] == ["ui", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]


def commands_at_once(folder, count, program, *more):
    """The outputs of as many commands, which begin together; each one must end well."""
    commands = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(folder), str(index), *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]
    outputs = [command.communicate(timeout=240)[0] for command in commands]
    assert [command.returncode for command in commands] == [0] * count, outputs
    return outputs


WRITER = """
import sys
from pathlib import Path
from pipeline.tracking.run import RunInfo, open_run

folder, index, uri = Path(sys.argv[1]), int(sys.argv[2]), (sys.argv[3:] or [None])[0]
info = RunInfo(name=f"writer {index}", config={}, params={"index": index})
with open_run(info, uri=uri, experiment="dflash", output_dir=folder) as run:
    for step in range(25):
        run.log_metrics({"loss": 100 * index + step}, step=step)
"""


def require_nothing_lost(uri, count):
    """What as many writers wrote is all there."""
    client = mlflow.MlflowClient(tracking_uri=uri)
    (experiment,) = [one for one in client.search_experiments() if one.name == "dflash"]
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == [f"writer {index}" for index in range(count)]
    for run in runs:
        index = int(run.data.params["index"])
        history = client.get_metric_history(run.info.run_id, "loss")
        assert sorted(entry.value for entry in history) == [100 * index + step for step in range(25)]


@pytest.mark.parametrize("count", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_first_commands_at_once_lose_nothing(tmp_path, count):
    commands_at_once(tmp_path, count, WRITER)
    require_nothing_lost(f"sqlite:///{tmp_path}/mlflow.db", count)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".mlflow")] == []


FULL = """
import logging, os, resource, signal, sys
from pathlib import Path
from pipeline.errors import PipelineError
from pipeline.tracking.run import RunInfo, open_run

logging.basicConfig(format="%(message)s")
folder = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write that is too far out is an error then
try:
    with open_run(RunInfo(name="full", config={}, params={}), uri=None, experiment="dflash", output_dir=folder) as run:
        size = (folder / "mlflow.db").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        for index in range(500):
            run.set_tag(f"tag {index}", "x" * 4000)
except PipelineError as error:
    print(f"error: {error}", file=sys.stderr)
"""


def test_a_disk_that_fills_up_is_said_without_pages_of_a_database(tmp_path):
    ended = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in ended.stderr
    lines = ended.stderr.splitlines()
    assert len(lines) <= 2, lines  # the error, and that the run could not be ended
    assert lines[-1].startswith("error: MLflow at sqlite:///")


def test_a_creation_that_was_killed_does_not_end_later_commands(tmp_path):
    """MLflow's own would leave tables without a version, which ends every later command."""
    program = "import sys; from pathlib import Path; from pipeline.tracking.store import connect; "
    killed = subprocess.Popen([sys.executable, "-c", program + "connect(None, 'dflash', Path(sys.argv[1]))", tmp_path])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".mlflow-*/mlflow.db")) and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "mlflow.db").exists()
    with a_run(tmp_path) as run:
        run.log_metrics({"loss": 1.0})
    assert mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db").get_run(run.run_id).data.metrics


def test_a_deleted_experiment_is_one_clear_error(tmp_path):
    with a_run(tmp_path) as run:
        pass
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    client.delete_experiment(client.get_run(run.run_id).info.experiment_id)
    with pytest.raises(PipelineError, match=r"'dflash', which was deleted in MLflow; restore it"), a_run(tmp_path):
        pass


def test_runs_of_one_draft_share_a_model_with_the_numbers_of_all(output_dir, stored):
    numbers = {"train": {"loss": 1.0}, "bench": {"speedup": 2.0}}
    for stage, values in numbers.items():
        with a_run(output_dir, name=stage) as run:
            run.link_model("draft", "f" * 64, is_output=stage == "train", tags={"stage": stage})
            run.log_metrics(values)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{output_dir}/mlflow.db")
    experiment = stored(run.run_id).info.experiment_id
    (model,) = client.search_logged_models([experiment], filter_string=f"tags.fingerprint = '{'f' * 64}'")
    assert {one.key: one.value for one in model.metrics} == {"loss": 1.0, "speedup": 2.0}
    assert model.tags["stage"] == "bench"
    assert [one.model_id for one in stored(run.run_id).inputs.model_inputs] == [model.model_id]


def test_a_data_set_is_recorded_with_what_it_was_for(output_dir, stored):
    with a_run(output_dir) as run:
        run.log_dataset("held-out prompts", "0" * 64, source="p.jsonl", context="evaluation", profile={"prompts": 50})
    (found,) = stored(run.run_id).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("held-out prompts", "0" * 36)
    assert found.tags[0].value == "evaluation"


def test_an_experiment_opens_as_one_of_models(output_dir, stored):
    with a_run(output_dir) as run:
        pass
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{output_dir}/mlflow.db")
    tags = client.get_experiment(stored(run.run_id).info.experiment_id).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert "speedup" in tags["mlflow.note.content"]


def test_artifacts_follow_an_output_directory_that_was_moved(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    with a_run(first) as before:
        pass
    first.rename(second)
    with a_run(second) as after:
        after.log_json("late.json", {"a": 1})
    assert not first.exists()
    assert (artifacts_of(second, after) / "late.json").is_file()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{second}/mlflow.db")
    assert [one.path for one in client.list_artifacts(before.run_id)] == ["config.yaml"]  # the old ones too


@pytest.mark.parametrize("name", ["what?", "a#b", "50%25"])
def test_a_path_that_has_no_address_is_refused(tmp_path, name):
    with pytest.raises(PipelineError, match=r"output_dir is .*name another directory"), a_run(tmp_path / name):
        pass
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("127.0.0.1:5000", r"it must begin with one of http://.*http://127\.0\.0\.1:5000 for a server"),
        ("mysql+nothing://host/db", r"its driver cannot be loaded .*install it"),
    ],
)
def test_an_address_that_mlflow_would_misread_is_one_clear_error(tmp_path, uri, problem):
    with (
        pytest.raises(PipelineError, match=problem),
        open_run(TRAIN, uri=uri, experiment="dflash", output_dir=tmp_path),
    ):
        pass


def test_a_read_only_output_directory_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(PipelineError, match=r"which is read-only; set tracking\.uri"), a_run(tmp_path):
        pass
