"""How MLflow's pages show the experiment: as one of models, with a view that compares drafts by speedup."""

import json

VIEW = "drafts"  # the name of a view that MLflow's pages read from a tag of the experiment: columns, order, filter
VIEW_COLUMNS = ("speedup", "speedup_low", "speedup_high", "accept_length", "accept_rate", "plain_tokens_per_second")
VIEW_STATE = {
    "selectedColumns": [*(f"metrics.`{name}`" for name in VIEW_COLUMNS)],
    "searchFilter": "tags.stage = 'bench'",
    "orderByKey": "metrics.`speedup`",
    "orderByAsc": False,
}
VIEW_LINK = "LINK"  # in the description, whose experiment has no number yet
TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # else the page opens as one of traces and prompts
    "mlflow.experiment.primaryMetric.name": "speedup",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "true",
    f"mlflow.sharedViewState.{VIEW}": json.dumps(VIEW_STATE),
    "mlflow.note.content": (
        f"**[All drafts by speedup]({VIEW_LINK})**. Drafts for speculative decoding. A run is a stage; `bench` runs "
        "have **speedup** (with its 95% interval `speedup_low`, `speedup_high`), **accept_length** and "
        "**accept_rate**, and the page `report.html` among their artifacts. Under *Models*, training, export and "
        "benchmarks of the same draft are one line. `python -m pipeline stage=report` compares drafts on one page."
    ),
}


def tags_of(experiment_id: str) -> dict[str, str]:
    """Returns the tags of an experiment that MLflow's pages read."""
    return {key: value.replace(VIEW_LINK, view_link(experiment_id)) for key, value in TAGS.items()}


def view_link(experiment_id: str) -> str:
    """Returns what stands behind the address of MLflow's server for the page that compares drafts."""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}&workflowType=machine_learning"
