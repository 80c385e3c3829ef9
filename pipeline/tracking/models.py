"""A draft as MLflow's logged model: training, export and benchmarks of the same weights link to one."""

import json
from collections.abc import Mapping
from typing import Any

FINGERPRINT = "fingerprint"  # the tag that identifies a model
MODEL_TYPE = "dflash"


def find_or_create(
    client: Any, experiment_id: str, name: str, fingerprint: str, *, run_id: str, tags: Mapping[str, str]
) -> str:
    """Returns the id of the experiment's model of this fingerprint; where there is none, the run makes it."""
    found = client.search_logged_models(
        experiment_ids=[experiment_id], filter_string=f"tags.{FINGERPRINT} = '{fingerprint}'", max_results=1
    )
    if found:
        client.set_logged_model_tags(found[0].model_id, dict(tags))
        return str(found[0].model_id)
    created = client.create_logged_model(
        experiment_id,
        name=name,
        source_run_id=run_id,
        tags={FINGERPRINT: fingerprint, **tags},
        model_type=MODEL_TYPE,
    )
    client.finalize_logged_model(created.model_id, "READY")
    return str(created.model_id)


def as_json(value: Mapping[str, Any]) -> str:
    """Returns a mapping as the text that MLflow's pages show."""
    return json.dumps(dict(value), sort_keys=True)
