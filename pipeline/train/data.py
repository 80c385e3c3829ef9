"""What a draft was trained on, in numbers: what an exported draft's card tells of it."""

from collections.abc import Mapping
from typing import Any

from pipeline.teacher_cache.store import CacheSplit

PROMPTS = ("source", "dataset", "dataset_split", "effort")
ANSWERS = ("generator", "temperature", "top_p")


def told(splits: Mapping[str, CacheSplit], settings: Mapping[str, Any]) -> dict[str, Any]:
    """As data.json has it: counts of each split, and of the teacher cache's settings those that say how it was made."""
    counts = {
        name: {
            "num_sequences": split.num_sequences,
            "num_tokens": int(split.num_tokens.sum()),
            "generated_tokens": int((split.num_tokens - split.prompt_tokens).sum()),
        }
        for name, split in splits.items()
    }
    made = {key: settings["prompts"].get(key) for key in PROMPTS}
    made |= {key: settings["teacher_cache"].get(key) for key in ANSWERS}
    return {
        "splits": counts,
        "longest_tokens": max(int(split.num_tokens.max()) for split in splits.values()),
        "made": {key: value for key, value in made.items() if value is not None},
    }
