"""A sweep (`--multirun`): one run in MLflow for all, members of which one that fails does not end the others, a table.

Members run in this process, or in others that a launcher of Hydra starts (joblib, submitit); those find the sweep's run
by an environment variable and tell what became of them through MLflow.
"""

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pipeline.cli.composed import typed
from pipeline.cli.mistakes import INTERRUPTED
from pipeline.cli.run_info import sweep_info
from pipeline.config.schema import PipelineConfig
from pipeline.errors import PipelineError
from pipeline.tracking import sweeps
from pipeline.tracking.run import Run, open_run
from pipeline.tracking.store import StoreLost, ui_command

log = logging.getLogger("pipeline")

SWEEP_RUN_ID, SWEPT_KEYS = "PIPELINE_SWEEP_RUN_ID", "PIPELINE_SWEPT_KEYS"  # environment variables of the members
STORE_KEYS = ("output_dir", "tracking")  # members that differ in them write to several stores: no run holds them all

_ended: list[tuple[str, int]] = []  # of this process: the overrides of each member and its exit code
_open = contextlib.ExitStack()  # what ends with the sweep
_sweep_runs: list[tuple[PipelineConfig, Run]] = []  # the one of this process, when it is a sweep's


class MemberFailed(Exception):
    """Reports that a member of a sweep ended with a mistake, which it has printed; Hydra goes on to the next one."""


class SweepRun(Callback):
    """Is called by Hydra (conf/config.yaml): opens the sweep's run in MLflow, which `swept` ends."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Opens it, unless the members are not tracked together; their mistakes are theirs to report."""
        overrides = list(config.hydra.overrides.task)
        with contextlib.suppress(HydraException, OmegaConfBaseException, PipelineError):
            values = _swept_values(overrides)
            os.environ[SWEPT_KEYS] = json.dumps(list(values))
            settings = typed(DictConfig({key: config[key] for key in config if key != "hydra"}))
            tracking = settings.tracking
            if not tracking.enabled or (settings.stage is None and "stage" not in values):
                return
            if any(key.split(".")[0] in STORE_KEYS for key in values):
                return
            info, output_dir = sweep_info(settings, values), Path(settings.output_dir)
            opened = open_run(info, uri=tracking.uri, experiment=tracking.experiment, output_dir=output_dir)
            run = _open.enter_context(opened)
            _sweep_runs.append((settings, run))
            os.environ[SWEEP_RUN_ID] = run.run_id


def _swept_values(overrides: Sequence[str]) -> dict[str, str]:
    """Returns the values of each setting that members differ in, as they were written."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {one.get_key_element(): one.get_value_string() for one in parsed if one.is_sweep_override()}


@contextlib.contextmanager
def member() -> Iterator[None]:
    """Runs a command, or a member of a sweep; an interrupt ends them all."""
    if not _is_member():
        yield
        return
    name = _overrides()
    try:
        yield
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        if code == INTERRUPTED:
            raise
        _ended.append((name, code))
        raise MemberFailed(f"{name}: exit code {code}") from None
    _ended.append((name, 0))


def member_tags() -> dict[str, str]:
    """Returns the tags of a member's run, by which the sweep's table names it."""
    return {sweeps.MEMBER: _overrides()} if _is_member() else {}


def _is_member() -> bool:
    return HydraConfig.get().mode is RunMode.MULTIRUN


def _overrides() -> str:
    """Returns the overrides in which this member differs from others."""
    everything = list(HydraConfig.get().overrides.task)
    keys = json.loads(os.environ.get(SWEPT_KEYS, "[]"))
    return " ".join([one for one in everything if one.split("=")[0].lstrip("+") in keys] or everything)


@contextlib.contextmanager
def swept() -> Iterator[None]:
    """Ends a sweep: prints the table of its members and names the best; SystemExit when a member failed."""
    code, has_reported = 0, False
    try:
        with _open:
            failed = None
            try:
                yield
            except MemberFailed as error:
                failed = error
            except SystemExit as error:
                has_reported = error.code == INTERRUPTED
                if has_reported:
                    raise KeyboardInterrupt from None  # MLflow calls the run killed
                raise
            code = _end(failed)
            if code:
                raise MemberFailed(f"{sum(1 for _, one in _ended if one) or 'some'} of the members failed")
    except MemberFailed:
        raise SystemExit(code) from None
    except KeyboardInterrupt:
        if not has_reported:
            raise
        raise SystemExit(INTERRUPTED) from None


def _end(failed: MemberFailed | None) -> int:
    """Prints what became of the members; returns the sweep's exit code."""
    ended = [(name, f"exit code {code}" if code else "done") for name, code in _ended]
    worst = max((code for _, code in _ended), default=0)
    for config, run in _sweep_runs:
        uri, output_dir = config.tracking.uri, Path(config.output_dir)
        try:
            members = sweeps.members_of(run.run_id, uri=uri, output_dir=output_dir)
        except StoreLost as lost:  # the members' own runs are complete, or are sent later
            log.warning("the sweep's best member is not known: %s", lost)
            members = []
        if not _ended:  # members ran in other processes
            ended = [(one.overrides, "done" if one.status == sweeps.FINISHED else "failed") for one in members]
        _print_table(ended)
        ranked = sweeps.ranking(members)
        run.set_tag("mlflow.note.content", sweeps.description(members, ranked, run.experiment_id))
        run.log_json("members.json", {"members": [dataclasses.asdict(one) for one in members]})
        if ranked is not None:
            run.set_tag("sweep.best", ranked.best.overrides)
            run.set_tag("sweep.best_run_id", ranked.best.run_id)
            value = ranked.best.metrics[ranked.metric]
            run.log_metrics({f"best/{ranked.metric}": value})
            others = f"; {ranked.equal - 1} more may be as good" if ranked.equal > 1 else ""
            print(f"the best by {ranked.metric}: {ranked.best.overrides} ({value:.3f}){others}")
        print(f"runs side by side in MLflow: {ui_command(uri, output_dir)}", flush=True)
    if not _sweep_runs:
        _print_table(ended)
    if failed is not None and not worst:  # in another process
        print(f"error: a member of the sweep failed: {failed}", file=sys.stderr)
        return 1
    return worst


def _print_table(ended: Sequence[tuple[str, str]]) -> None:
    if len(ended) > 1:
        width = max(len(name) for name, _ in ended)
        print("\n".join(f"{name:<{width}}  {what}" for name, what in ended), flush=True)
