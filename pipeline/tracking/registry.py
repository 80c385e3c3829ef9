"""Versions of registered models in MLflow, the one that is the champion, and who may move it."""

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.tracking.store import StoreLost, client_of, store_errors

CHAMPION, PREVIOUS = "champion", "previous"  # aliases
ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/]+)|/(?P<version>\d+))$")
FINGERPRINT, RECORD = "fingerprint", "record"  # tags of a version
CLAIM, CLAIMANT = "-promotion", "claimant"  # end of a claim's name; its tag
ABSENT = "RESOURCE_DOES_NOT_EXIST"  # an error code of MLflow
ALREADY_THERE = ("RESOURCE_ALREADY_EXISTS", ABSENT)  # the second where another one's is deleted at that moment
CLAIM_SECONDS, SETTLE_SECONDS = 60.0, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Version:
    """Holds a version of a registered model: where its draft is, its fingerprint, and its benchmark's values."""

    number: str
    source: str
    fingerprint: str
    record: Mapping[str, Any]


class Registry:
    """Reads and writes one registered model. Raises PipelineError when MLflow's store fails."""

    def __init__(self, name: str, *, uri: str | None, output_dir: Path) -> None:
        self.name = name
        self._client, self._store = client_of(uri, output_dir)

    def register(self, source: Path, fingerprint: str, *, run_id: str | None, record: Mapping[str, Any]) -> Version:
        """Returns the version of this fingerprint, with this record; makes it, and the model, where there is none."""
        with store_errors(self._store):
            if self._model(self.name) is None:
                self._client.create_registered_model(self.name, description="DFlash drafts of one target.")
            found = [one for one in self._versions() if one.tags.get(FINGERPRINT) == fingerprint]
            if not found:
                tags = {FINGERPRINT: fingerprint}
                card = source / "README.md"
                found = [
                    self._client.create_model_version(
                        self.name,
                        str(source.resolve()),
                        run_id=run_id or None,
                        tags=tags,
                        description=card.read_text(encoding="utf-8")[:5000] if card.is_file() else None,
                    )
                ]
            number = str(found[0].version)
            self._client.set_model_version_tag(self.name, number, RECORD, json.dumps(dict(record)))
            return self._version(number)

    def of_alias(self, alias: str) -> Version | None:
        """Returns the version with an alias; None where there is none."""
        with store_errors(self._store):
            found = self._model(self.name)
            number = None if found is None else found.aliases.get(alias)
            return None if number is None else self._version(str(number))

    def of_number(self, number: str) -> Version:
        """Returns a version by its number."""
        with store_errors(self._store):
            return self._version(number)

    def move(self, alias: str, number: str) -> None:
        """Gives an alias to a version."""
        with store_errors(self._store):
            self._client.set_registered_model_alias(self.name, alias, number)

    @contextlib.contextmanager
    def claimed(self, claimant: str) -> Iterator[None]:
        """Lets one command at a time add versions and move aliases; raises PipelineError for another, wherever it runs.

        The claim is a registered model of its own, because MLflow creates a name once, also for two that ask at the
        same moment. A claim that is a minute old is that of a command that was killed.
        """
        name = f"{self.name}{CLAIM}"
        with store_errors(self._store):
            stale = self._model(name)
            broken_off = stale is not None and time.time() - stale.creation_timestamp / 1000 > CLAIM_SECONDS
            if broken_off:
                self._client.delete_registered_model(name)
            self._create_claim(name, claimant)
            if broken_off:
                time.sleep(SETTLE_SECONDS)  # another one may have found the old claim too, and deleted this one for it
                now = self._model(name)
                if now is None or now.tags.get(CLAIMANT) != claimant:
                    raise self._claimed_already(now)
        try:
            yield
        finally:
            with store_errors(self._store):
                self._client.delete_registered_model(name)

    def _create_claim(self, name: str, claimant: str) -> None:
        from mlflow.exceptions import MlflowException

        description = f"{claimant} moves the champion of {self.name}; this entry goes when it has done so."
        try:
            self._client.create_registered_model(name, tags={CLAIMANT: claimant}, description=description)
        except MlflowException as error:
            if error.error_code not in ALREADY_THERE:
                raise
            raise self._claimed_already(self._model(name)) from None

    def _claimed_already(self, claim: Any) -> PipelineError:
        holder = "another command" if claim is None else claim.tags.get(CLAIMANT, "another command")
        return PipelineError(f"{holder} moves the champion of {self.name} at this moment; try again in a minute")

    def _model(self, name: str) -> Any:
        """Returns a registered model; None where there is none."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != ABSENT:
                raise
            return None

    def _versions(self) -> list[Any]:
        return list(self._client.search_model_versions(f"name = '{self.name}'"))

    def _version(self, number: str) -> Version:
        found = self._client.get_model_version(self.name, number)
        return Version(
            number=str(found.version),
            source=found.source,
            fingerprint=found.tags.get(FINGERPRINT, ""),
            record=json.loads(found.tags.get(RECORD, "{}")),
        )


def resolve(address: str, *, uri: str | None, output_dir: Path) -> Version:
    """Returns the version of an address, `models:/NAME@ALIAS` or `models:/NAME/NUMBER`.

    Raises PipelineError when there is none, or when its draft is not on this machine.
    """
    parts = ADDRESS.match(address)
    if parts is None:
        raise PipelineError(
            f"{address} is no address of a model; it must be as models:/tiny-dflash@champion (the directory of a "
            "draft is export.path)"
        )
    registry = Registry(parts["name"], uri=uri, output_dir=output_dir)
    try:
        found = registry.of_alias(parts["alias"]) if parts["alias"] else registry.of_number(parts["version"])
    except StoreLost as error:
        raise PipelineError(f"{address}: {error}") from error
    if found is None:
        raise PipelineError(f"{address}: the model has no such alias; run stage=promote")
    if not Path(found.source).is_dir():
        raise PipelineError(f"{address} is the draft at {found.source}, which is not on this machine: copy it there")
    return found
