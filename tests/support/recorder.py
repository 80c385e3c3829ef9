"""A tracker that remembers what a stage reports."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.tracking.run import SilentRun


class Recorder(SilentRun):
    """Keeps the last value of each metric, every value by (name, step), every document and every tag.

    With `stop_at` it prints "stopped" at that step and sleeps, waiting to be killed.
    """

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.stop_at = stop_at
        self.metrics: dict[str, float] = {}
        self.by_step: dict[tuple[str, int | None], float] = {}
        self.documents: dict[str, Any] = {}
        self.tags: dict[str, str] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Remember each value, and stop where that was asked for."""
        self.metrics |= metrics
        self.by_step |= {(name, step): value for name, value in metrics.items()}
        if step is not None and step == self.stop_at:
            print("stopped", flush=True)
            time.sleep(3600)

    def log_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Remember a document."""
        self.documents[name] = value

    def log_artifact(self, path: Path) -> None:
        """Remember a file's text, or its bytes."""
        data = path.read_bytes()
        self.documents[path.name] = data if path.suffix == ".png" else data.decode()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Remember the parameters as a document."""
        self.documents["params"] = params

    def set_tag(self, key: str, value: str) -> None:
        """Remember a tag."""
        self.tags[key] = value
