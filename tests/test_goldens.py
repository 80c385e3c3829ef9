"""What version 0.1 wrote opens by its path, and what this version writes of the same numbers has the same bytes."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.artifacts import artifact, storage
from pipeline.artifacts.artifact import Artifact
from pipeline.config.fields import CHECKPOINT, DRAFT, TARGET, TEACHER_CACHE
from pipeline.config.schema import (
    DraftConfig,
    EngineSettings,
    ExportConfig,
    PipelineConfig,
    PromptsConfig,
    TargetConfig,
    TeacherCacheConfig,
    TrainConfig,
)
from pipeline.errors import PipelineError
from pipeline.export import stage as export
from pipeline.export.easydel_checkpoint import read_checkpoint
from pipeline.export.write import write_draft
from pipeline.model.dflash.model import DraftModel
from pipeline.store import heldout_rounds
from pipeline.store.layout import SPLITS, ShardRows, shard_path
from pipeline.store.reader import open_split
from pipeline.store.writer import ShardContents, write_header, write_shard
from pipeline.workspace.workspace import Workspace, own_draft_config
from tests.support.damage import flip
from tests.support.paths import TESTS
from tests.support.recorder import Recorder

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directories that version 0.1 wrote, by kind; read only."""
    root = tmp_path_factory.mktemp("golden")
    with tarfile.open(TESTS / "goldens" / "version_0_1.tar.xz") as opened:
        opened.extractall(root, filter="data")
    return {kind: next((root / kind).iterdir()) for kind in (TARGET, TEACHER_CACHE, CHECKPOINT, DRAFT)}


@pytest.fixture
def config(golden: dict[str, Path], tmp_path: Path) -> PipelineConfig:
    """The configuration that made them, which finds them by their paths."""
    return PipelineConfig(
        output_dir=str(tmp_path),
        target=TargetConfig(name="golden", path=str(golden[TARGET])),
        prompts=PromptsConfig(count=24, heldout_fraction=0.3),
        teacher_cache=TeacherCacheConfig(path=str(golden[TEACHER_CACHE])),
        draft=DraftConfig(
            block_size=4,
            num_hidden_layers=1,
            num_tapped_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            intermediate_size=36,
        ),
        train=TrainConfig(path=str(golden[CHECKPOINT])),
        export=ExportConfig(path=str(golden[DRAFT]), num_prompts=6),
        engine=EngineSettings(max_length=200, prefill_chunk=32),
    )


@pytest.mark.parametrize("kind", [TEACHER_CACHE, CHECKPOINT, DRAFT])
def test_an_artifact_of_version_0_1_opens_by_its_path(config: PipelineConfig, golden: dict[str, Path], kind: str):
    opened = Workspace(config).open(kind)
    assert opened.path == golden[kind]
    assert (opened.key, opened.parents) == (None, {})
    assert artifact.read(golden[kind], kind, make_with="the test", verify=True) == opened


def test_the_key_of_a_target_from_outside_stays(config: PipelineConfig):
    assert Workspace(config).key(TARGET) == "c6d49336b71d"


def test_a_damaged_artifact_of_version_0_1_is_refused(config: PipelineConfig, golden: dict[str, Path], tmp_path: Path):
    copy = Path(shutil.copytree(golden[DRAFT], tmp_path / "dflash"))
    flip(copy / "model.safetensors", -1)
    config.export.path = str(copy)
    with pytest.raises(PipelineError, match="model.safetensors: sha256 differs"):
        Workspace(config).open(DRAFT)


def test_a_cache_read_and_written_again_has_the_same_bytes(golden: dict[str, Path], tmp_path: Path):
    cache, num_shards = golden[TEACHER_CACHE], {}
    for split in SPLITS:
        reader, first = open_split(cache, split), 0
        num_shards[split] = len(list((cache / split).iterdir()))
        for index in range(num_shards[split]):
            path = shard_path(cache, split, index)
            header = json.loads((path / "shard.json").read_text())
            rows = ShardRows(**json.loads((path / "rows.json").read_text()))
            sequences = reader.read(range(first, first + len(rows.num_tokens)))
            first += len(sequences)
            contents = ShardContents(
                rows=rows,
                token_ids=np.concatenate([one.token_ids for one in sequences]),
                channels=np.concatenate([one.channels for one in sequences]),
                features=np.concatenate([one.features for one in sequences]),
            )
            report = {name: value for name, value in header["report"].items() if name != "bytes"}
            written = shard_path(tmp_path, split, index)
            written.parent.mkdir(exist_ok=True)
            write_shard(written, contents, layout=reader.layout, fingerprint=header["fingerprint"], report=report)
            assert_same_files(path, written)
    write_header(tmp_path, reader.layout, num_shards)
    assert (tmp_path / "store.json").read_bytes() == (cache / "store.json").read_bytes()


def assert_same_files(left: Path, right: Path) -> None:
    names = storage.list_files(left)
    assert names == storage.list_files(right)
    assert [name for name in names if (left / name).read_bytes() != (right / name).read_bytes()] == []


def checkpoint_of(golden: dict[str, Path]) -> tuple[Artifact, DraftModel]:
    opened = artifact.read(golden[CHECKPOINT], CHECKPOINT, make_with="the test")
    draft = own_draft_config(opened)
    (run,) = golden[CHECKPOINT].glob("run-*")
    return opened, DraftModel(draft, read_checkpoint(run, draft))


def test_a_checkpoint_is_exported_to_the_same_bytes(golden: dict[str, Path], tmp_path: Path):
    _, draft = checkpoint_of(golden)
    config = json.loads((golden[DRAFT] / "config.json").read_text())
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    write_draft(tmp_path, draft, ids)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (golden[DRAFT] / name).read_bytes(), name


def test_the_rounds_of_a_checkpoint_are_read_and_written_under_their_new_name(golden: dict[str, Path]):
    file = golden[CHECKPOINT] / heldout_rounds.FILE
    old = [json.loads(line) for line in file.read_text().splitlines()]
    new = [json.loads(line) for line in heldout_rounds.to_lines(heldout_rounds.read_texts(file)).splitlines()]
    assert [row.pop("accepted_per_round") for row in new] == [row.pop("kept") for row in old]
    assert new == old


def test_the_whole_stage_exports_a_checkpoint_of_version_0_1(config: PipelineConfig, tmp_path: Path, golden):
    config.export.path = str(tmp_path / "dflash")
    export.run(config, Recorder())
    made = Workspace(config).open(DRAFT)
    assert made.key is not None
    assert (made.path / "model.safetensors").read_bytes() == (golden[DRAFT] / "model.safetensors").read_bytes()
    contract = made.contract
    old = json.loads((golden[DRAFT] / "contract.json").read_text())
    assert contract["text"].pop("stop_token_ids")
    assert {**contract, "provenance": None} == {**old, "provenance": None}
