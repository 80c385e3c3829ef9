"""Counts the texts that a draft was trained on, for its model card."""

from typing import Any

from pipeline.artifacts.artifact import Artifact
from pipeline.store.reader import open_split

PROMPTS = ("source", "dataset", "dataset_split", "effort")
ANSWERS = ("generator", "temperature", "top_p")


def summarize(cache: Artifact) -> dict[str, Any]:
    """Returns what data.json holds: counts of each split of a teacher cache, and how its texts were made."""
    splits = {name: open_split(cache.path, name) for name in ("train", "heldout")}
    counts = {
        name: {
            "num_sequences": split.num_sequences,
            "num_tokens": int(split.num_tokens.sum()),
            "generated_tokens": int((split.num_tokens - split.prompt_tokens).sum()),
        }
        for name, split in splits.items()
    }
    origin = {key: cache.settings.get(f"prompts.{key}") for key in PROMPTS}
    origin |= {key: cache.settings.get(f"teacher_cache.{key}") for key in ANSWERS}
    return {
        "splits": counts,
        "longest_tokens": max(int(split.num_tokens.max()) for split in splits.values()),
        "made": {key: value for key, value in origin.items() if value is not None},
    }
