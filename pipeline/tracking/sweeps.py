"""A sweep in MLflow: a run for the whole, its members below it, and which of them is the best."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.tracking.store import client_of, store_errors

MEMBER = "sweep.member"  # a run's tag: the overrides of a member
RANKED_BY = (
    "speedup",
    "export/accept_length",
    "eval/accept_length",
    "target/heldout_accuracy",
)  # the first one measured
FINISHED = "FINISHED"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """Is a member of a sweep: its overrides, its run's id and status, and the last value of each metric.

    The metrics of the stages that it started (`stage=all`) are its own.
    """

    overrides: str
    run_id: str
    status: str
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """Holds the finished members that have the metric, best first; `equal` is how many of them may be the best.

    Of speedups that is decided by their 95% intervals: a member whose interval reaches the best one's may be as good.
    """

    metric: str
    members: Sequence[Member]
    equal: int

    @property
    def best(self) -> Member:
        """The member with the highest value."""
        return self.members[0]


def members_of(run_id: str, *, uri: str | None, output_dir: Path) -> list[Member]:
    """Returns the members of a sweep in the order in which they began; several runs of one member are its last."""
    client, store = client_of(uri, output_dir)
    with store_errors(store):
        experiments = [one.experiment_id for one in client.search_experiments()]
        found = {}
        for run in _children(client, experiments, run_id):
            metrics = dict(run.data.metrics)
            for stage in _children(client, experiments, run.info.run_id):
                metrics |= stage.data.metrics
            overrides = run.data.tags.get(MEMBER, run.info.run_name)
            found[overrides] = Member(
                overrides=overrides, run_id=run.info.run_id, status=run.info.status, metrics=metrics
            )
    return list(found.values())


def _children(client: Any, experiments: Sequence[str], run_id: str) -> list[Any]:
    query = f"tags.`mlflow.parentRunId` = '{run_id}'"
    return list(client.search_runs(experiments, query, order_by=["attributes.start_time ASC"], max_results=1000))


def ranking(members: Sequence[Member]) -> Ranking | None:
    """Returns the finished members by the first metric of RANKED_BY that one of them has; None without any."""
    finished = [member for member in members if member.status == FINISHED]
    for metric in RANKED_BY:
        measured = [member for member in finished if metric in member.metrics]
        if measured:
            ordered = sorted(measured, key=lambda member: member.metrics[metric], reverse=True)
            low = ordered[0].metrics.get(f"{metric}_low", ordered[0].metrics[metric])
            reach = [one.metrics.get(f"{metric}_high", one.metrics[metric]) >= low for one in ordered]
            return Ranking(metric=metric, members=ordered, equal=sum(reach))
    return None


def description(members: Sequence[Member], ranked: Ranking | None, experiment_id: str) -> str:
    """Returns the table of a sweep in Markdown, the best member first; MLflow shows it on the run's page."""
    metric = "" if ranked is None else ranked.metric
    ordered = [] if ranked is None else list(ranked.members)
    lines = [] if ranked is None else [f"The best by **{metric}**: `{ranked.best.overrides}`.", ""]
    lines += [f"| member | {metric or 'metric'} | run |", "|---|---|---|"]
    for one in [*ordered, *(one for one in members if one not in ordered)]:
        value = f"{one.metrics[metric]:.3f}" if metric in one.metrics else ""
        link = f"[{one.status}](#/experiments/{experiment_id}/runs/{one.run_id})"
        lines.append(f"| `{one.overrides}` | {value} | {link} |")
    return "\n".join(lines)
