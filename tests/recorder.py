"""A tracker that remembers what it is told."""

from pipeline.tracking import SilentRun


class Recorder(SilentRun):
    """Keeps the last value of each metric, and every document."""

    def __init__(self):
        super().__init__()
        self.metrics, self.documents = {}, {}

    def log_metrics(self, metrics, step=None):
        self.metrics |= metrics

    def log_json(self, name, value):
        self.documents[name] = value
