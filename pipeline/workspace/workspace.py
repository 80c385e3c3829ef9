"""Finds the artifacts of a configuration: where they are, what made them and whether they fit.

A stage makes one `Workspace` in its first line. Keys are computed from settings and from parents' keys, so that an
artifact is found whether its parents still exist or not; contracts are compared when an artifact is opened.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import hub
from pipeline.artifacts import artifact, provenance, storage
from pipeline.artifacts.artifact import Artifact, Parent
from pipeline.artifacts.contract import Contract, FeatureIdentity, require_match
from pipeline.artifacts.hashing import fingerprint_of
from pipeline.artifacts.storage import StoragePath
from pipeline.config.fields import CHECKPOINT, DRAFT, TARGET, TEACHER_CACHE
from pipeline.config.schema import PipelineConfig
from pipeline.engine.config import EngineConfig
from pipeline.errors import PipelineError
from pipeline.model.dflash.config import DFlashConfig
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.hf import dflash as hf_dflash
from pipeline.model.hf.directory import read_draft_config, read_target_config, weights_fingerprint
from pipeline.prompts.sources import PromptSet
from pipeline.prompts.tokenizer import Tokenizer, load_tokenizer
from pipeline.store.checkpoint_files import DRAFT_CONFIG
from pipeline.workspace import contracts, settings, specs

REMEMBERED = "sha256.json"  # of large files, under output_dir
STAGE_OF = {TARGET: "target", TEACHER_CACHE: "teacher_cache", CHECKPOINT: "train", DRAFT: "export"}


@dataclasses.dataclass(frozen=True)
class TargetArtifact:
    """Describes a target on disk: its HF directory, its contract, its key, and the fingerprint of its very files."""

    path: Path
    contract: Contract
    key: str
    fingerprint: str


class Workspace:
    """Finds the artifacts of one configuration. Results are cached: a command hashes and asks the hub once."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config
        self.root = Path(config.output_dir)
        self.memory = None if config.verify else self.root / REMEMBERED
        self._settings: dict[str, dict[str, Any]] = {}

    @functools.cached_property
    def target(self) -> TargetArtifact:
        """The target: the directory or hub model of `target.path`, or the one that `stage=target` makes."""
        wanted = self.config.target
        if wanted.path is None:
            trained = self._read(self.address(TARGET), TARGET)
            if wanted.gguf is not None:
                self._require_architecture(Path(str(trained.path)))
            contract = Contract.from_json(trained.contract)
            served = dataclasses.replace(contract.target, weight_precision=wanted.precision.value)
            return TargetArtifact(
                Path(str(trained.path)),
                dataclasses.replace(contract, target=served),
                self.key(TARGET),
                trained.fingerprint,
            )
        directory, revision = hub.directory_of(wanted.path, wanted.revision, key="target.path")
        read_target_config(directory)  # what is wrong with a model is said before what is wrong with its tokenizer
        self._require_architecture(directory)
        contract = contracts.target_contract(
            directory, wanted, load_tokenizer(directory), revision=revision, memory=self.memory
        )
        content = {**dataclasses.asdict(contract.target), **dataclasses.asdict(contract.text)}
        for name in ("name", "revision", "weight_precision", "reasoning_efforts"):  # what it is called and how it runs
            del content[name]
        key = artifact.key_of(TARGET, settings.GIVEN_TARGET_VERSION, content, {})
        return TargetArtifact(directory, contract, key, fingerprint_of(content))

    def _require_architecture(self, directory: Path) -> None:
        sizes = self.config.target.architecture
        if sizes is not None:
            specs.require_architecture(read_target_config(directory), sizes, directory)

    @functools.cached_property
    def model(self) -> GptOssConfig:
        """The target's sizes."""
        return read_target_config(self.target.path)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The target's tokenizer."""
        return load_tokenizer(self.target.path)

    @functools.cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end one of the target's answers."""
        return specs.stop_token_ids(self.target.path, self.tokenizer)

    @property
    def serving_engine(self) -> EngineConfig:
        """The engine of `stage=serve`; export and smoke run a draft in the same one."""
        return specs.serving_engine(self.config.engine, self.config.serve.slots, self.stop_token_ids)

    @functools.cached_property
    def prompts(self) -> PromptSet:
        """The prompts of this configuration; those of a hub's data set at the commit that the key counts."""
        pinned = self._prompt_content.get("prompts.dataset_revision", self.config.prompts.dataset_revision)
        return specs.prompt_set(
            dataclasses.replace(self.config.prompts, dataset_revision=pinned),
            self.config.seed,
            takes_answers=settings.answer_rows(self.config) is not None,
        )

    @functools.cached_property
    def draft_config(self) -> DFlashConfig:
        """The draft of this configuration for its target.

        With `train.init` it is that draft, whatever `draft` says: biases, RoPE and block size belong to its weights.
        """
        if self.initial_draft is not None:
            found = read_draft_config(self.initial_draft)
            return specs.require_fitting(found, self.model, self.initial_draft, key="train.init")
        wanted = self.config.draft
        token_id = specs.mask_token_id(self.target.path, wanted.mask_token, self.model.vocab_size)
        return specs.draft_sizes(wanted, self.model, token_id)

    @functools.cached_property
    def initial_draft(self) -> Path | None:
        """The directory of the draft that `train.init` names."""
        train = self.config.train
        return None if train.init is None else hub.directory_of(train.init, train.init_revision, key="train.init")[0]

    @functools.cached_property
    def answering_draft(self) -> Path | None:
        """The directory of the draft that `teacher_cache.draft` names."""
        name = self.config.teacher_cache.draft
        return None if name is None else hub.directory_of(name, None, key="teacher_cache.draft")[0]

    @functools.cached_property
    def _prompt_content(self) -> dict[str, Any]:
        return settings.prompt_content(self.config.prompts, self.memory)

    def settings(self, kind: str) -> dict[str, Any]:
        """Returns the settings that decide the bytes of this configuration's artifact of `kind`, by dotted name."""
        if kind not in self._settings:
            self._settings[kind] = self._decide(kind)
        return self._settings[kind]

    def _decide(self, kind: str) -> dict[str, Any]:
        if kind == TARGET:
            return settings.target_settings(self.config, self.memory)
        if kind == TEACHER_CACHE:
            tapped = self.draft_config.tapped_layers
            answering = self.answering_draft
            weights = None if answering is None else weights_fingerprint(answering, self.memory)
            return settings.teacher_cache_settings(self.config, tapped, self._prompt_content, weights)
        if kind == CHECKPOINT:
            initial = self.initial_draft
            weights = None if initial is None else weights_fingerprint(initial, self.memory)
            return settings.checkpoint_settings(self.config, contracts.draft_identity(self.draft_config), weights)
        return settings.draft_settings(self.config)

    def require_unchanged_gguf(self) -> None:
        """Raises PipelineError when the file of `target.gguf` is not the one any more that the target's key counts."""
        if settings.target_settings(self.config, self.memory) != self.settings(TARGET):
            raise PipelineError(
                f"{self.config.target.gguf} (target.gguf) was changed while it was read; run the same command again"
            )

    def key(self, kind: str) -> str:
        """Returns the key of this configuration's artifact of `kind`; its parents need not exist."""
        if kind == TARGET and self.config.target.path is not None:
            return self.target.key
        parent = settings.PARENT.get(kind)
        parents = {} if parent is None else {parent: self._parent_key(parent)}
        return artifact.key_of(kind, settings.VERSIONS[kind], self.settings(kind), parents)

    def _parent_key(self, kind: str) -> str:
        """Returns the key of what would be opened as a parent: where a path is configured, its manifest's."""
        path = self._configured_path(kind)
        if path is None or not artifact.exists(path):
            return self.key(kind)
        manifest = artifact.read_manifest(path)
        return manifest.get("key") or f"fingerprint {manifest['fingerprint']}"  # manifests of format 1 have no key

    def address(self, kind: str) -> StoragePath:
        """Returns where this configuration's artifact of `kind` is or will be: a configured path, or its address.

        `dflash` in the name of an exported draft is how vLLM knows the method.
        """
        path = self._configured_path(kind)
        if path is not None:
            return path
        name = f"{self.config.target.name}-dflash" if kind == DRAFT else self.config.target.name
        return artifact.address(self.root, kind, name, self.key(kind))

    def _configured_path(self, kind: str) -> StoragePath | None:
        stage = STAGE_OF[kind]
        text = None if kind == TARGET else getattr(self.config, stage).path
        return None if text is None else storage.parse_path(text)

    def exists(self, kind: str) -> bool:
        """Returns whether this configuration's artifact of `kind` is complete."""
        return artifact.exists(self.address(kind))

    def open(self, kind: str) -> Artifact:
        """Opens a teacher cache, a checkpoint or a draft, with all that has to hold before it is read.

        Files that its readers do not check themselves are as they were written; the contract is the one wanted; at an
        address that was computed, so are settings and parents. With `export.path` any exported draft may be served:
        then only what it shares with the target (weights, tokenizer, template) is compared.
        """
        found = self._read(self.address(kind), kind)
        is_configured = self._configured_path(kind) is not None
        wanted = self.target.contract if is_configured and kind == DRAFT else self.contract(kind)
        require_match(
            Contract.from_json(found.contract),
            wanted,
            what=f"{kind} at {found.path}",
            mend=f"use the settings it was made with, or make one that fits: {command(STAGE_OF[kind])}",
        )
        if not is_configured:
            self._require_key_and_parent(found)
        if kind in (CHECKPOINT, DRAFT):
            own_draft_config(found)
        return found

    def _read(self, path: StoragePath, kind: str) -> Artifact:
        make_with = command(STAGE_OF[kind])
        found = artifact.read(path, kind, make_with=make_with)
        names: list[str] = []  # what a cache holds is compared by those who read it, part by part
        if kind != TEACHER_CACHE:  # and so are the weights in a checkpoint's run directory
            names = [name for name in found.files if kind != CHECKPOINT or "/" not in name]
        artifact.require_intact(found, names, make_with=make_with, memory=self.memory)
        return found

    def _require_key_and_parent(self, child: Artifact) -> None:
        """Raises PipelineError when an artifact at a computed address is not the one of this configuration."""
        if child.key != self.key(child.kind):
            raise PipelineError(
                f"{child.path} was renamed: its manifest has the key {child.key}, its address is that of "
                f"{self.key(child.kind)}; give {STAGE_OF[child.kind]}.path to use it anyway"
            )
        parent = settings.PARENT[child.kind]
        path = None if parent == TARGET else self.address(parent)
        if path is not None and not artifact.exists(path):
            return  # a child stands without its parent
        found = self.target.fingerprint if path is None else artifact.read_manifest(path)["fingerprint"]
        if child.parents[parent].fingerprint != found:
            raise PipelineError(
                f"{child.path} was made from another making of the same {parent}: it recorded the fingerprint "
                f"{child.parents[parent].fingerprint[:12]}, the {parent} that is here has {found[:12]}; give "
                f"{STAGE_OF[child.kind]}.path to use it anyway, or delete it and run: {command(STAGE_OF[child.kind])}"
            )

    def ancestor(self, child: Artifact, kind: str) -> Artifact | None:
        """Returns the very artifact of `kind` that `child` was made from, however far back; None where it is gone."""
        if child.kind == kind:
            return child
        for parent, recorded in child.parents.items():
            for path in sorted((self.root / parent).glob("*")):
                if artifact.exists(path) and artifact.read_manifest(path)["fingerprint"] == recorded.fingerprint:
                    found = artifact.read(path, parent, make_with=command(STAGE_OF[parent]))
                    return self.ancestor(found, kind)
        return None

    def contract(self, kind: str, provenance: Mapping[str, Any] | None = None) -> Contract:
        """Returns what the contract of this configuration's artifact of `kind` says."""
        found = self.target.contract
        if kind != TARGET:
            found = contracts.cache_contract(found, self.config.prompts, self.draft_config.tapped_layers)
        if kind in (CHECKPOINT, DRAFT):
            found = contracts.draft_contract(found, self.draft_config)
        return dataclasses.replace(found, provenance=dict(provenance or {}))

    def provenance(self, kind: str, parents: Mapping[str, str]) -> dict[str, Any]:
        """Returns what makes this configuration's artifact of `kind`, from parents with these fingerprints."""
        return provenance.provenance(STAGE_OF[kind], self.settings(kind), parents)

    def seal(
        self,
        kind: str,
        contract: Contract,
        parents: Mapping[str, Artifact | TargetArtifact],
        *,
        listed: Sequence[str] | None = None,
    ) -> Artifact:
        """Completes this configuration's artifact of `kind`, which is built in the scratch directory of its address."""
        return artifact.seal(
            self.address(kind),
            kind=kind,
            key=self.key(kind),
            settings=self.settings(kind),
            parents={
                name: Parent(key=self._parent_key(name), fingerprint=parent.fingerprint)
                for name, parent in parents.items()
            },
            contract=contract.to_json(),
            listed=listed,
        )


def own_draft_config(found: Artifact) -> DFlashConfig:
    """Returns the draft of a checkpoint or of an exported draft, as the artifact's own config file describes it.

    Raises PipelineError when the artifact's contract describes another one: runtimes read the file alone.
    """
    name, stage = (DRAFT_CONFIG, "train") if found.kind == CHECKPOINT else ("config.json", "export")
    if name not in found.files:
        raise PipelineError(f"{found.path} holds no {name}; delete it and run: {command(stage)}")
    draft = hf_dflash.config_from_hf(json.loads((found.path / name).read_text()))
    contract = Contract.from_json(found.contract)
    features = FeatureIdentity(tapped_layers=list(draft.tapped_layers))
    require_match(
        dataclasses.replace(contract, features=features, draft=contracts.draft_identity(draft)),
        contract,
        what=f"{found.path / name}",
        mend=f"the file was changed after it was made; delete {found.path} and run: {command(stage)}",
    )
    return draft


def command(stage: str) -> str:
    """Returns the command that makes a stage's artifact."""
    return f"python -m pipeline stage={stage} (with the same overrides)"
