import contextlib
import getpass
import logging
import math
import os
import shlex
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import mlflow
import pytest
import yaml

from pipeline.errors import PipelineError
from pipeline.tracking.run import open_run
from pipeline.tracking.store import ui_command

TOKEN = "hf_aSecretThatNobodyMayRead"
CONFIG = {"stage": "bench", "train": {"steps": 3, "loss_decay": None}, "draft": {"tapped_layers": [1, 3]}}


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory):
    """One store for this file: making its tables costs seconds."""
    return tmp_path_factory.mktemp("outputs")


@contextlib.contextmanager
def a_run(output_dir, name="bench", config=CONFIG, **options):
    with open_run(name, uri=None, experiment="dflash", output_dir=output_dir, config=config, **options) as run:
        yield run


@pytest.fixture(scope="module")
def stored(output_dir):
    """A run as MLflow's own client reads it."""
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{output_dir}/mlflow.db")
    return client.get_run


def artifacts_of(output_dir, run):
    return output_dir / "mlartifacts" / run.run_id / "artifacts"


def test_a_run_holds_its_config_as_parameters_and_as_yaml(output_dir, stored):
    with a_run(output_dir, git_commit="abc123") as run:
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
        open_run("train", uri="http://127.0.0.1:9", experiment="dflash", output_dir=tmp_path, config={}),
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
            open_run("train", uri=uri, experiment="dflash", output_dir=tmp_path, config={}),
        ):
            pass
        server.shutdown()


def test_a_password_in_the_address_is_refused_and_not_repeated(tmp_path):
    with (
        pytest.raises(PipelineError, match="MLFLOW_TRACKING_PASSWORD") as raised,
        open_run("train", uri="http://me:secret@host", experiment="x", output_dir=tmp_path, config={}),
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
