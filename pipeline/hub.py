"""Uses the Hugging Face hub: models and datasets by name, pinned to a commit, and the metadata of a model card."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.errors import PipelineError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT = re.compile("[0-9a-f]{40}")
# the files of a model; OpenAI's repositories hold the weights in two other layouts too
FILES = ["*.json", "*.safetensors", "*.jinja"]
OTHER_LAYOUTS = ["original/*", "metal/*"]


def directory_of(name: str, revision: str | None, *, key: str) -> tuple[Path, str | None]:
    """Returns the directory of a model and the commit of its files; None for a local directory.

    A hub id is downloaded unless the hub's cache has it; without a network the cache's copy is used. Raises
    PipelineError that names the setting `key` when there is neither.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise PipelineError(f"{key} is the directory {name}; a revision ({revision}) goes with a hub id")
        return Path(name), None
    if not HUB_ID.fullmatch(name):
        raise PipelineError(
            f"{key} is {name}, which is no directory; give a local HF checkpoint or a hub id owner/name"
        )
    import huggingface_hub  # imported late: it takes most of a second and most runs do without it
    from huggingface_hub import errors

    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=FILES, ignore_patterns=OTHER_LAYOUTS
        )
    except errors.GatedRepoError as error:
        raise PipelineError(f"{key}: {name} wants its licence accepted; do so on the hub and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise PipelineError(f"{key}: {name} has no revision {revision}; give a commit, tag or branch of it") from error
    except errors.RepositoryNotFoundError as error:
        raise PipelineError(
            f"{key}: there is no directory {name} here and no such model on the hub (or HF_TOKEN may not see it)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        at_revision = "" if revision is None else f" at revision {revision}"
        raise PipelineError(
            f"{key}: no directory {name} is here, the hub's cache does not have it{at_revision}, and the hub cannot be "
            f"reached ({_first_line(error)}); connect, or copy the model here and set {key} to its directory"
        ) from error
    return Path(found), Path(found).name


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def dataset_commit(name: str, revision: str | None) -> str:
    """Returns the commit to which a revision (None: the default branch) of a dataset on the hub points now.

    A dataset can be revised in place: prompts are identified by this commit, and loaded at it. Without a network it
    is the commit in the hub's cache. Raises PipelineError when there is neither and `revision` is no commit itself.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return str(huggingface_hub.HfApi().dataset_info(name, revision=revision).sha)
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, errors.HFValidationError, OSError) as error:
        cached = _cached_dataset_commit(name, revision or "main")
        if cached is not None:
            return cached
        raise PipelineError(
            f"prompts.dataset: the commit of {name} at {revision or 'its default branch'} is not known: the hub cannot "
            f"be asked ({_first_line(error)}) and its cache does not have it; give a local directory or file, or set "
            "prompts.dataset_revision to a commit of 40 hex digits"
        ) from error


def _cached_dataset_commit(name: str, revision: str) -> str | None:
    from huggingface_hub import constants

    refs = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs" / revision
    return refs.read_text().strip() if refs.is_file() else None


def card_metadata(*, base_model: str | None, tags: Sequence[str], name: str, measured: Mapping[str, float]) -> str:
    """Returns the metadata of a draft's model card as YAML: what it is for, and what it scored on held-out prompts."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out-prompts",
            dataset_name="Held-out prompts, answered by the target",
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in measured.items()
    ]
    card = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(tags),
        model_name=name if results else None,
        eval_results=results or None,
    )
    return card.to_yaml()
