"""What a draft was trained on, in numbers: what an exported draft's card tells of it."""

from typing import Any

from pipeline.artifacts import Artifact
from pipeline.teacher_cache.store import open_split

PROMPTS = ("source", "dataset", "dataset_split", "effort")
ANSWERS = ("generator", "temperature", "top_p")


def told(cache: Artifact) -> dict[str, Any]:
    """As data.json has it: counts of each split of a teacher cache, and how its texts were made."""
    splits = {name: open_split(cache.path, name) for name in ("train", "heldout")}
    counts = {
        name: {
            "num_sequences": split.num_sequences,
            "num_tokens": int(split.num_tokens.sum()),
            "generated_tokens": int((split.num_tokens - split.prompt_tokens).sum()),
        }
        for name, split in splits.items()
    }
    made = {key: cache.settings["prompts"].get(key) for key in PROMPTS}
    made |= {key: cache.settings["teacher_cache"].get(key) for key in ANSWERS}
    return {
        "splits": counts,
        "longest_tokens": max(int(split.num_tokens.max()) for split in splits.values()),
        "made": {key: value for key, value in made.items() if value is not None},
    }
