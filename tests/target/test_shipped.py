"""The package's trained target: it answers, its bytes are those that the configuration names, others are refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.artifacts import artifact
from pipeline.artifacts.hashing import file_sha256
from pipeline.config.fields import TARGET
from pipeline.config.schema import PipelineConfig
from pipeline.errors import PipelineError
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_target
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.target import answers, questions, shipped, stage
from pipeline.workspace import settings
from pipeline.workspace.workspace import Workspace
from tests.support.configuration import composed
from tests.support.recorder import Recorder


@pytest.fixture
def config(tmp_path):
    return composed("target=tiny", f"output_dir={tmp_path}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    config, tracker = composed("target=tiny", f"output_dir={tmp_path_factory.mktemp('made')}"), Recorder()
    stage.run(config, tracker)
    return config, tracker


def test_the_target_answers_held_out_questions_of_every_family(made):
    _, tracker = made
    shares = {name: share for name, share in tracker.metrics.items() if name.startswith("target/answers_right")}
    assert shares.pop("target/answers_right") >= 0.95
    assert len(shares) == 20
    assert min(shares.values()) >= 0.85, shares


def test_an_answer_is_right_when_its_text_is(made):
    config, _ = made
    path = Workspace(config).target.path
    target, tokenizer = read_target(path, WeightFormat()), load_tokenizer(path)
    asked = questions.held_out_conversations(1, 1)
    spoiled = [dataclasses.replace(each, final=each.final + "!") for each in asked]
    right, wrong = (answers.answers_right(target, tokenizer, each) for each in (asked, spoiled))
    assert sum(right.values()) >= 17
    assert sum(wrong.values()) == 0
    assert right.keys() == wrong.keys() == {each.family for each in asked}


def test_the_artifact_is_the_packages_files_and_bfloat16_has_the_same_weights(made):
    config, tracker = made
    sealed = artifact.read(Workspace(config).address(TARGET), TARGET, make_with="the test", verify=True)
    assert file_sha256(sealed.path / "model.safetensors") == config.target.pretrain.sha256
    exact, rounded = (read_target(sealed.path, WeightFormat(dtype=dtype)) for dtype in ("float32", "bfloat16"))
    embedding = np.asarray(exact.weights.embedding)
    assert embedding.dtype == np.float32
    assert (embedding == np.asarray(rounded.weights.embedding).astype(np.float32)).all()
    assert tracker.tags["artifact"] == str(sealed.path)


def test_the_record_holds_the_settings_of_the_configuration(config):
    record = json.loads((shipped.DIRECTORY / shipped.RECORD).read_text())
    found = settings.pretrain_settings(config)
    assert record["settings"] == {name: value for name, value in found.items() if name != "seed"}


def test_the_key_is_the_weights_alone_until_the_target_is_trained_again(config):
    def key(config: PipelineConfig) -> str:
        return Workspace(config).key(TARGET)

    other_seed = dataclasses.replace(config, seed=7)
    assert key(other_seed) == key(config)
    again = composed("target=tiny", "target.pretrain.from_scratch=true")
    assert key(again) != key(config)
    assert key(dataclasses.replace(again, seed=7)) != key(again)
    assert settings.target_settings(again).keys() >= {"target.pretrain.steps", "target.architecture.hidden_size"}


@pytest.mark.parametrize(
    "override", ["target.pretrain.steps=7", "target.architecture.hidden_size=96", "target.pretrain.learning_rate=1"]
)
def test_other_settings_are_refused_with_what_trains_them(tmp_path, override):
    config = composed("target=tiny", f"output_dir={tmp_path}", override)
    name, wanted = override.split("=")
    with pytest.raises(PipelineError, match=rf"from_scratch=true(.|\n)*{name}: [\d.]+, wanted {wanted}"):
        stage.run(config, Recorder())
    assert not artifact.exists(Workspace(config).address(TARGET))


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A copy of the package's target, which a test may damage."""
    directory = tmp_path / "package"
    shutil.copytree(shipped.DIRECTORY, directory)
    monkeypatch.setattr(shipped, "DIRECTORY", directory)
    return directory


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"])
def test_a_damaged_file_of_the_package_is_named(config, package, name):
    content = bytearray((package / name).read_bytes())
    content[len(content) // 2] ^= 1
    (package / name).write_bytes(content)
    with pytest.raises(PipelineError, match=f"{name} has sha256 .* the package is damaged"):
        stage.run(config, Recorder())


def test_a_missing_file_and_a_missing_target_are_named(config, package):
    (package / "model.safetensors").unlink()
    with pytest.raises(PipelineError, match="model.safetensors has sha256 missing"):
        stage.run(config, Recorder())
    shutil.rmtree(package)
    with pytest.raises(PipelineError, match="the package is incomplete"):
        stage.run(config, Recorder())
