"""Models by name: a directory as it is, or the hub's files of an `owner/name`, pinned to the commit they are of."""

import re
from pathlib import Path

from pipeline.artifacts import PipelineError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# what a model is read from; OpenAI's repositories hold the weights in two other layouts too
FILES = ["*.json", "*.safetensors", "*.jinja"]
OTHER_LAYOUTS = ["original/*", "metal/*"]


def directory_of(name: str, revision: str | None, *, key: str) -> tuple[Path, str | None]:
    """The directory of a model and the commit its files are of; None for a local directory.

    A hub id is downloaded unless the hub's cache has it; without a network the cache's copy is used. Raises
    PipelineError, which names the setting `key`, when there is neither.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise PipelineError(f"{key} is the directory {name}; a revision ({revision}) goes with a hub id")
        return Path(name), None
    if not HUB_ID.fullmatch(name):
        raise PipelineError(
            f"{key} is {name}, which is no directory; give a local HF checkpoint or a hub id owner/name"
        )
    import huggingface_hub  # here: it takes most of a second to import and most runs do without it
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
        at = "" if revision is None else f" at revision {revision}"
        raise PipelineError(
            f"{key}: no directory {name} is here, the hub's cache does not have it{at}, and the hub cannot be reached "
            f"({_first_line(error)}); connect, or copy the model here and set {key} to its directory"
        ) from error
    return Path(found), Path(found).name


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
