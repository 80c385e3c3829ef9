"""What a teacher cache says of itself: every prompt accounted for, and what was made of it.

No times, so that equal runs have equal bytes.
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
from pipeline.teacher_cache.shards import Plan

SUMMARY, PROMPTS = "summary.json", "prompts.jsonl"


def failures(reports: Mapping[StoragePath, dict[str, Any]]) -> dict[str, str]:
    """The prompts that got no answer, and why."""
    return {one["prompt_id"]: one["reason"] for report in reports.values() for one in report.get("failed", ())}


def answered(rows: Sequence[RenderedPrompt], failed: Mapping[str, str]) -> list[RenderedPrompt]:
    """The rows that have a sequence in the cache."""
    return [row for row in rows if row.skipped is None and row.prompt.prompt_id not in failed]


def summarise(
    rows: Mapping[str, Sequence[RenderedPrompt]],
    found: PromptSet,
    plans: Sequence[Plan],
    reports: Mapping[StoragePath, dict[str, Any]],
    *,
    tapped_layers: Sequence[int],
    layout: CacheLayout,
) -> dict[str, Any]:
    """What summary.json says, from the prompts and the shards' reports."""
    splits = {}
    for split, several in rows.items():
        made = [reports[one.path] for one in plans if one.split == split]
        gaps = [item["gap"] for report in made for item in report["disagreements"]]
        splits[split] = {
            "num_prompts": len(several),
            "num_skipped": sum(row.skipped is not None for row in several),
            "num_failed": sum(len(report.get("failed", ())) for report in made),
            "num_disagreements": len(gaps),
            "largest_gap": max(gaps, default=0.0),
            "num_tokens_by_channel": {
                channel.name: sum(report["num_tokens_by_channel"][channel.name] for report in made)
                for channel in Channel
            },
            **{
                key: sum(report[key] for report in made)
                for key in ("num_sequences", "num_tokens", "num_generated_tokens", "num_stopped")
            },
        }
        divergence = sum(
            (Divergence(**report["divergence"]) for report in made if "divergence" in report), Divergence()
        )
        if divergence.num_tokens:
            splits[split]["divergence"] = divergence.mean
        counted = (splits[split][f"num_{kind}"] for kind in ("sequences", "failed", "skipped"))
        assert sum(counted) == len(several), splits[split]
    return {
        "splits": splits,
        "num_duplicates": found.num_duplicates,
        "num_over_count": found.num_over,
        "num_sequences": sum(split["num_sequences"] for split in splits.values()),
        "num_tokens": sum(split["num_tokens"] for split in splits.values()),
        "num_skipped": sum(split["num_skipped"] for split in splits.values()),
        "num_failed": sum(split["num_failed"] for split in splits.values()),
        "bytes": sum(reports[one.path]["bytes"] for one in plans),
        "features": layout.stored,
        "token_bytes": layout.token_bytes,
        "tapped_layers": list(tapped_layers),
    }


def prompt_lines(rows: Mapping[str, Sequence[RenderedPrompt]], failed: Mapping[str, str]) -> bytes:
    """What prompts.jsonl says: a line for every prompt, used or not."""
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
        for split, several in rows.items()
        for row in several
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def failures_of(root: StoragePath) -> dict[str, str]:
    """The prompts of a complete cache that got no answer, and why."""
    lines = [json.loads(line) for line in (root / PROMPTS).read_text().split("\n") if line]
    return {line["prompt_id"]: line["failed"] for line in lines if line["failed"]}
