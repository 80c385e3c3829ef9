"""A server that goes away during a run, and comes back during it or later: nothing is lost, and nothing ends."""

import contextlib
import subprocess
import sys
import time
import urllib.request

import mlflow
import pytest

from pipeline.tracking import outbox
from pipeline.tracking.run import RunInfo, open_run
from tests.support.ports import free_port

INFO = RunInfo(name="train", config={"steps": 3}, params={"steps": 3})


class Server:
    """MLflow's own server over a file, which can be stopped and started again at its port."""

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, free_port(), None
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        store = f"sqlite:///{self.folder}/server.db"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--port", str(self.port)]
            + ["--default-artifact-root", f"{self.folder}/artifacts", "--workers", "1"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.folder, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return
            time.sleep(0.2)
        raise TimeoutError("MLflow's server does not start")

    def stop(self):
        with contextlib.suppress(ProcessLookupError):
            subprocess.run(["pkill", "-KILL", "-s", str(self.process.pid)], check=False)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.5)
    monkeypatch.setattr(outbox, "LAST_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def history(server, run_id):
    found = mlflow.MlflowClient(tracking_uri=server.uri).get_metric_history(run_id, "loss")
    return sorted((entry.step, entry.value) for entry in found)


def test_what_a_server_misses_while_it_is_away_is_sent_when_it_is_back(server, tmp_path, caplog):
    caplog.set_level("INFO", "pipeline")
    (tmp_path / "figure.txt").write_text("drawn")
    with open_run(INFO, uri=server.uri, experiment="back", output_dir=tmp_path) as run:
        run.log_metrics({"loss": 3.0}, step=0)
        server.stop()
        run.log_metrics({"loss": 2.0}, step=1)
        run.log_artifact(tmp_path / "figure.txt")
        (tmp_path / "figure.txt").unlink()  # its maker is done with it
        server.start()
        time.sleep(0.6)
        run.log_metrics({"loss": 1.0}, step=2)
    assert history(server, run.run_id) == [(0, 3.0), (1, 2.0), (2, 1.0)]
    client = mlflow.MlflowClient(tracking_uri=server.uri)
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert "figure.txt" in [one.path for one in client.list_artifacts(run.run_id)]
    assert "the stage goes on" in caplog.text
    assert "is back; " in caplog.text
    assert not (tmp_path / outbox.UNSENT / run.run_id).exists()


def test_what_is_left_when_a_run_ends_is_sent_by_the_next_command(server, tmp_path, caplog):
    caplog.set_level("INFO", "pipeline")
    with open_run(INFO, uri=server.uri, experiment="later", output_dir=tmp_path) as run:
        run.log_metrics({"loss": 3.0}, step=0)
        server.stop()
        run.log_metrics({"loss": 2.0}, step=1)
        run.link_model("draft", "abc", is_output=True, tags={})
    assert "is still away" in caplog.text
    assert "the run has no model in MLflow" in caplog.text
    assert (tmp_path / outbox.UNSENT / run.run_id / outbox.ITEMS).is_file()
    server.start()
    with open_run(INFO, uri=server.uri, experiment="later", output_dir=tmp_path):
        pass
    assert history(server, run.run_id) == [(0, 3.0), (1, 2.0)]
    assert mlflow.MlflowClient(tracking_uri=server.uri).get_run(run.run_id).info.status == "FINISHED"
    assert not (tmp_path / outbox.UNSENT / run.run_id).exists()
