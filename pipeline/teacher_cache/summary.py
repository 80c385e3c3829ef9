"""Summarises a teacher cache: what became of every prompt, and what the shards hold.

A summary has no times, so that equal runs have equal bytes.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.artifacts.storage import StoragePath
from pipeline.prompts.channels import Channel
from pipeline.prompts.sources import PromptSet
from pipeline.store.layout import CacheLayout
from pipeline.teacher_cache.origin import Divergence
from pipeline.teacher_cache.render import RenderedPrompt
from pipeline.teacher_cache.shards import ShardPlan

SUMMARY, PROMPTS = "summary.json", "prompts.jsonl"


def failures(reports: Mapping[StoragePath, dict[str, Any]]) -> dict[str, str]:
    """Returns the reasons of the prompts that got no answer, by prompt id."""
    return {row["prompt_id"]: row["reason"] for report in reports.values() for row in report.get("failed", ())}


def answered(rows: Sequence[RenderedPrompt], unused: Mapping[str, str]) -> list[RenderedPrompt]:
    """Returns the rows that have a sequence in the cache; `unused` has the reasons of others, by prompt id."""
    return [row for row in rows if row.skipped is None and row.prompt.prompt_id not in unused]


def summarise(
    rows: Mapping[str, Sequence[RenderedPrompt]],
    found: PromptSet,
    plans: Sequence[ShardPlan],
    reports: Mapping[StoragePath, dict[str, Any]],
    *,
    tapped_layers: Sequence[int],
    layout: CacheLayout,
) -> dict[str, Any]:
    """Returns the content of summary.json, from the prompts and the shards' reports."""
    splits = {}
    for split, split_rows in rows.items():
        split_reports = [reports[plan.path] for plan in plans if plan.split == split]
        gaps = [item["gap"] for report in split_reports for item in report["disagreements"]]
        splits[split] = {
            "num_prompts": len(split_rows),
            "num_skipped": sum(row.skipped is not None for row in split_rows),
            "num_failed": sum(len(report.get("failed", ())) for report in split_reports),
            "num_disagreements": len(gaps),
            "largest_gap": max(gaps, default=0.0),
            "num_tokens_by_channel": {
                channel.name: sum(report["num_tokens_by_channel"][channel.name] for report in split_reports)
                for channel in Channel
            },
            **{
                key: sum(report[key] for report in split_reports)
                for key in ("num_sequences", "num_tokens", "num_generated_tokens", "num_stopped")
            },
        }
        divergence = sum(
            (Divergence(**report["divergence"]) for report in split_reports if "divergence" in report), Divergence()
        )
        if divergence.num_tokens:
            splits[split]["divergence"] = divergence.mean
        counted = (splits[split][f"num_{kind}"] for kind in ("sequences", "failed", "skipped"))
        assert sum(counted) == len(split_rows), splits[split]
    return {
        "splits": splits,
        "num_duplicates": found.num_duplicates,
        "num_over_count": found.num_over,
        "num_sequences": sum(split["num_sequences"] for split in splits.values()),
        "num_tokens": sum(split["num_tokens"] for split in splits.values()),
        "num_skipped": sum(split["num_skipped"] for split in splits.values()),
        "num_failed": sum(split["num_failed"] for split in splits.values()),
        "bytes": sum(reports[plan.path]["bytes"] for plan in plans),
        "features": layout.stored,
        "token_bytes": layout.token_bytes,
        "tapped_layers": list(tapped_layers),
    }


def prompt_lines(rows: Mapping[str, Sequence[RenderedPrompt]], failed: Mapping[str, str]) -> bytes:
    """Returns the content of prompts.jsonl: a line for every prompt, used or not."""
    lines = [
        {
            "prompt_id": row.prompt.prompt_id,
            "split": split,
            "effort": row.prompt.effort,
            "messages": [message.as_dict() for message in row.prompt.messages],
            **({"tools": [tool.as_dict() for tool in row.prompt.tools]} if row.prompt.tools else {}),
            "num_tokens": len(row.token_ids),
            "skipped": row.skipped,
            "failed": failed.get(row.prompt.prompt_id),
        }
        for split, split_rows in rows.items()
        for row in split_rows
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def unused_of(root: StoragePath) -> dict[str, str]:
    """Returns why prompts of a complete cache have no sequence in it, skipped or failed, by prompt id.

    An older version of this program may have skipped prompts that are rendered now.
    """
    lines = [json.loads(line) for line in (root / PROMPTS).read_text().split("\n") if line]
    reasons = {line["prompt_id"]: line["skipped"] or line["failed"] for line in lines}
    return {prompt_id: reason for prompt_id, reason in reasons.items() if reason}
