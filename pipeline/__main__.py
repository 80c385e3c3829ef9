"""Runs the command line: composes and types the configuration, opens the tracker and runs one stage or `all`."""

import contextlib
import importlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import dotenv
import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from pipeline.artifacts import provenance
from pipeline.cli.composed import typed
from pipeline.cli.mistakes import report_mistakes
from pipeline.cli.run_all import PARENT_RUN_ID, live_and_die_with_parent, run_all
from pipeline.cli.run_info import run_info
from pipeline.cli.stages import CONF, STAGES, stage_module, stage_table
from pipeline.cli.sweep import SWEEP_RUN_ID, member, member_tags, swept
from pipeline.config.choices import PromptSource, Stage
from pipeline.config.schema import MeshConfig, PipelineConfig, uses_hosts
from pipeline.config.validation import validate
from pipeline.prompts.files import STANDARD_INPUT, kept_standard_input
from pipeline.tracking.run import Run, SilentRun, open_run
from pipeline.tracking.store import is_read_only, ui_command

log = logging.getLogger("pipeline")


def main() -> None:
    """Runs the command line. Mistakes end with one `error:` line and exit code 2, an interrupt with 130."""
    if "--version" in sys.argv[1:]:  # before Hydra, which would print its own
        print(f"{provenance.DISTRIBUTION} {provenance.version()} (commit {provenance.git_commit()})")
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's errors come to us, instead of an excerpt of a traceback and exit 1
    signal.signal(signal.SIGTERM, _interrupt)
    if PARENT_RUN_ID in os.environ:
        live_and_die_with_parent()
    ConfigStore.instance().store(name="schema", node=PipelineConfig)
    with report_mistakes(), swept():
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_run)()


def _run(composed: DictConfig) -> None:
    with member(), report_mistakes():  # inside Hydra's job: above an exception Hydra would print a line of its own
        config = typed(composed)
        if config.stage is None:
            print(stage_table())
            return
        validate(config)
        _export_hf_token()
        if uses_hosts(config.mesh) and not _is_primary_host(config.mesh):
            logging.getLogger().setLevel(logging.WARNING)
            with contextlib.redirect_stdout(None):  # the primary prints for all
                _run_stage(config, SilentRun())
            return
        parent = os.environ.get(PARENT_RUN_ID) or os.environ.get(SWEEP_RUN_ID)
        with _tracker(config, parent) as tracker:
            if config.stage is Stage.all:
                prompts = config.prompts  # the stages get a pipe of ours instead of the standard input
                is_piped = prompts.source is PromptSource.jsonl and prompts.path == str(STANDARD_INPUT)
                with kept_standard_input() if is_piped else contextlib.nullcontext():
                    run_all(tracker)
            else:
                _run_stage(config, tracker)
        if parent is None and config.tracking.enabled:
            show = print if config.stage is Stage.all else log.info
            pages = sorted((Path(config.output_dir) / "bench" / config.target.name).glob("*/report.html"))
            if pages and config.stage in (Stage.all, Stage.bench, Stage.ask):
                show(f"the benchmark's page, for a browser: {pages[-1]}")
            show(f"runs side by side in MLflow: {ui_command(config.tracking.uri, Path(config.output_dir))}")


def _tracker(config: PipelineConfig, parent: str | None) -> contextlib.AbstractContextManager[Run]:
    assert config.stage is not None, "a command without a stage lists the stages"
    output_dir, uri = Path(config.output_dir), config.tracking.uri
    if not config.tracking.enabled:
        return contextlib.nullcontext(SilentRun())
    if config.stage is Stage.serve and uri is None and is_read_only(output_dir):  # as a serving container mounts it
        log.warning("output_dir is %s, which is read-only: this run is not tracked", output_dir)
        return contextlib.nullcontext(SilentRun())
    return open_run(
        run_info(config, parent, member_tags()), uri=uri, experiment=config.tracking.experiment, output_dir=output_dir
    )


def _is_primary_host(config: MeshConfig) -> bool:
    from pipeline import distributed  # imports JAX, which most commands do later

    distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    return distributed.is_primary()


def _run_stage(config: PipelineConfig, tracker: Run) -> None:
    assert config.stage is not None, "a command without a stage lists the stages"
    started = time.monotonic()
    log.info("stage=%s", config.stage.value)
    if STAGES[config.stage].stores_programs:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA would warn of every program that it reads
        from pipeline.workspace.compiled_programs import use_persistent_cache  # late: it imports JAX

        use_persistent_cache(Path(config.output_dir))
    importlib.import_module(stage_module(config.stage)).run(config, tracker)  # late: a stage pays for its own imports
    log.info("stage=%s: done in %.1f s", config.stage.value, time.monotonic() - started)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _export_hf_token() -> None:
    token = os.environ.get("HF_TOKEN") or dotenv.dotenv_values(".env").get("HF_TOKEN")
    if token:
        os.environ["HF_TOKEN"] = token


if __name__ == "__main__":
    main()
