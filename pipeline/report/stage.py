"""`stage=report`: compares benchmarks on one page that people decide by."""

import logging
import time
from pathlib import Path

from pipeline.artifacts.files import disk_errors, write_bytes
from pipeline.config.schema import PipelineConfig
from pipeline.pages import comparison_page
from pipeline.report.records import read_records
from pipeline.tracking.run import Run

log = logging.getLogger("pipeline")

FOLDER = "reports"


def run(config: PipelineConfig, tracker: Run) -> Path:
    """Prints what is better, writes the page and logs it; returns its path."""
    root = Path(config.output_dir)
    records = read_records(config.report.records, root, uri=config.tracking.uri)
    block_size = max(
        1 + sum(name.startswith("accept_rate_at_") and name[-1].isdigit() for name in one) for one in records.values()
    )
    print("\n".join([*comparison_page.findings(records), *comparison_page.cautions(records)]), flush=True)
    path = root / FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}.html"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, comparison_page.comparison_page(records, block_size).encode())
    tracker.log_artifact(path)
    log.info("report: the page is %s", path)
    return path
