"""Names the files that one stage writes into an artifact and another reads."""

DRAFT_CONFIG = "draft_config.json"  # in a checkpoint: the draft's config.json
DATA = "data.json"  # in a checkpoint: counts of what the draft was trained on
EVALUATION = "evaluation.json"  # in a checkpoint and in an exported draft
