"""What a run has to say to a server that may be away: everything in order, now, later, or with the next command.

A server that goes away must not end a training. What it does not take waits; it is tried again every half minute, once
more when the run ends, and what is left then is written under the output directory, from where the next command that
reaches the server sends it.
"""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.tracking.store import StoreLost, is_server, store_errors

log = logging.getLogger("pipeline")

UNSENT = ".mlflow-unsent"  # under the output directory
RETRY_SECONDS = 30.0
LAST_SECONDS = 20.0  # that a run waits for the server when it ends
ITEMS = "items.json"

Item = dict[str, Any]  # of "kind" metrics, params, tags, json, file, inputs, outputs or end, and what it carries


class Outbox:
    """Sends what a run writes. Raises StoreLost at once for a store that is no server, or that refuses a write."""

    def __init__(self, client: Any, run_id: str, store: str, output_dir: Path) -> None:
        self._client, self._run_id, self._store = client, run_id, store
        self._folder = output_dir / UNSENT / run_id
        self._waiting: list[Item] = []
        self._next_try = 0.0

    def send(self, item: Item) -> None:
        """Sends an item, or lets it wait behind others while the server is away."""
        self._waiting.append(item)
        if self._next_try and item["kind"] == "file":
            item["path"] = str(_copied(Path(item["path"]), self._folder))  # its maker may delete it meanwhile
        if time.monotonic() >= self._next_try:
            self._flush()

    def close(self, item: Item) -> None:
        """Sends the last item; what the server does not take until LAST_SECONDS are over is written for later."""
        self._waiting.append(item)
        deadline = time.monotonic() + LAST_SECONDS
        while not self._flush() and time.monotonic() < deadline:
            time.sleep(1)
        if self._waiting:
            self._folder.mkdir(parents=True, exist_ok=True)
            content = {"store": self._store, "items": self._waiting}
            (self._folder / ITEMS).write_text(json.dumps(content), encoding="utf-8")
            log.warning(
                "MLflow at %s is still away; what the run wrote is in %s, and the next command that reaches the server "
                "sends it",
                self._store,
                self._folder,
            )
        else:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _flush(self) -> bool:
        """Sends what waits, in order; returns whether all of it was sent."""
        count = len(self._waiting)
        while self._waiting:
            try:
                with store_errors(self._store):
                    apply(self._client, self._run_id, self._waiting[0])
            except StoreLost as lost:
                if not is_away(self._store, lost):
                    raise
                if not self._next_try:
                    log.warning("%s; the stage goes on, and what it writes is sent later", lost)
                self._next_try = time.monotonic() + RETRY_SECONDS
                return False
            del self._waiting[0]
        if self._next_try:
            log.info("MLflow at %s is back; %d writes that had waited were sent", self._store, count)
            self._next_try = 0.0
        return True


def is_away(store: str, lost: StoreLost) -> bool:
    """Returns whether a server cannot be reached or fails, rather than refuses what it is sent."""
    if not is_server(store):
        return False
    cause = lost.__cause__
    status = getattr(cause, "get_http_status_code", lambda: 500)()
    return isinstance(cause, OSError) or status >= 500


def send_unsent(client: Any, store: str, output_dir: Path) -> None:
    """Sends what earlier runs left for this server; what it does not take stays for the next command."""
    for file in sorted((output_dir / UNSENT).glob(f"*/{ITEMS}")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["store"] != store:
            continue
        try:
            with store_errors(store):
                for item in content["items"]:
                    apply(client, file.parent.name, item)
        except StoreLost as lost:
            log.warning("what an earlier run wrote is still in %s: %s", file.parent, lost)
            return
        shutil.rmtree(file.parent)
        log.info("MLflow: %d writes of an earlier run were sent", len(content["items"]))


def apply(client: Any, run_id: str, item: Item) -> None:
    """Makes one write to the store."""
    kinds: dict[str, Callable[[], Any]] = {
        "metrics": lambda: client.log_batch(run_id, metrics=[_metric(one) for one in item["metrics"]]),
        "params": lambda: client.log_batch(run_id, params=_params(item["params"])),
        "tags": lambda: [client.set_tag(run_id, key, value) for key, value in item["tags"].items()],
        "json": lambda: client.log_dict(run_id, item["value"], item["name"]),
        "file": lambda: _log_file(client, run_id, Path(item["path"])),
        "dataset": lambda: _log_dataset(client, run_id, item),
        "model": lambda: _log_model(client, run_id, item),
        "end": lambda: client.set_terminated(run_id, status=item["status"]),
    }
    kinds[item["kind"]]()


def _metric(one: Item) -> Any:
    from mlflow.entities import Metric

    return Metric(**one)


def _params(values: dict[str, str]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(name, value) for name, value in values.items()]


def _log_file(client: Any, run_id: str, path: Path) -> None:
    if path.is_dir():
        client.log_artifacts(run_id, str(path), artifact_path=path.name)
    else:
        client.log_artifact(run_id, str(path))


def _log_dataset(client: Any, run_id: str, item: Item) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    context = InputTag("mlflow.data.context", item["context"])
    client.log_inputs(run_id, datasets=[DatasetInput(Dataset(**item["dataset"]), [context])])


def _log_model(client: Any, run_id: str, item: Item) -> None:
    """Links a run to a logged model, as what it made (`is_output`) or measured."""
    from mlflow.entities import LoggedModelInput, LoggedModelOutput

    if item["is_output"]:
        client.log_outputs(run_id, models=[LoggedModelOutput(item["model_id"], 0)])
    else:
        client.log_inputs(run_id, models=[LoggedModelInput(item["model_id"])])


def _copied(path: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    copy = Path(tempfile.mkdtemp(dir=folder)) / path.name
    return Path(shutil.copytree(path, copy) if path.is_dir() else shutil.copyfile(path, copy))
