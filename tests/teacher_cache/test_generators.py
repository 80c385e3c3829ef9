"""The stage with sampled answers, and with answers of an endpoint: the same cache where it must be, or none."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from pipeline.artifacts import artifact
from pipeline.artifacts.artifact import Artifact
from pipeline.artifacts.hashing import flatten
from pipeline.config.choices import Generator, OpenAIApi
from pipeline.config.fields import TEACHER_CACHE
from pipeline.config.schema import OpenAIConfig, PipelineConfig
from pipeline.engine import capture
from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import Completion, Request
from pipeline.errors import PipelineError
from pipeline.model.dflash import weights as dflash_weights
from pipeline.model.dflash.model import DraftModel
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_target, save_draft
from pipeline.model.layers.sampling import Sampling
from pipeline.prompts.chat_format import stop_token_ids
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.store.layout import HEADER, SPLITS
from pipeline.store.reader import open_split
from pipeline.teacher_cache import stage
from pipeline.teacher_cache.check import check_cache
from pipeline.teacher_cache.origin import AnswerOrigin
from pipeline.workspace.workspace import Workspace
from tests.support.cached import MODEL as SIZES
from tests.support.cached import configuration
from tests.support.corpus_tokenizer import corpus_tokenizer
from tests.support.fake_endpoint import Reply, endpoint
from tests.support.recorder import Recorder
from tests.support.served import random_pair
from tests.support.serving import MODEL, serving

KEY = "sk-very-secret-0123456789"
SAMPLING = {"temperature": 0.8, "top_p": 0.95}


def made_by(config: PipelineConfig) -> Artifact:
    path = Workspace(config).address(TEACHER_CACHE)
    return artifact.read(path, TEACHER_CACHE, make_with="the test", verify=True)


def texts_of(cache: Artifact) -> dict[str, tuple[int, list[int]]]:
    """Every prompt's length and tokens."""
    found = {}
    for split in SPLITS:
        reader = open_split(cache.path, split)
        rows = reader.read(range(reader.num_sequences))
        found |= {
            name: (row.prompt_tokens, row.token_ids.tolist()) for name, row in zip(reader.prompt_ids, rows, strict=True)
        }
    return found


def features_of(cache: Artifact) -> np.ndarray:
    reader = open_split(cache.path, "heldout")
    rows = reader.read(range(reader.num_sequences))
    return np.concatenate([row.features.astype(np.float32) for row in rows])


def summary_of(cache: Artifact) -> dict:
    return json.loads((cache.path / stage.SUMMARY).read_text())


def lines_of(cache: Artifact) -> list[dict]:
    return [json.loads(line) for line in (cache.path / stage.PROMPTS).read_text().splitlines()]


@pytest.fixture(scope="module")
def sampled(target_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PipelineConfig, Artifact]:
    """A cache of sampled answers, and how it was made."""
    config = configuration(target_directory, tmp_path_factory.mktemp("sampled"))
    config.teacher_cache = dataclasses.replace(config.teacher_cache, **SAMPLING)
    tracker = Recorder()
    stage.run(config, tracker)
    assert tracker.metrics["teacher_cache/gold_accept_length"] == 4.0  # the seed's noise chooses every token again
    assert tracker.metrics["teacher_cache/random_accept_length"] < 1.1
    return config, made_by(config)


def test_sampled_answers_are_others_and_depend_on_the_seed_alone(
    sampled: tuple[PipelineConfig, Artifact], cache: Artifact, config: PipelineConfig, tracker: Recorder
) -> None:
    _, drawn = sampled
    texts, greedy = texts_of(drawn), texts_of(cache)
    assert texts.keys() == greedy.keys()
    assert sum(texts[name] != greedy[name] for name in texts) > 0.8 * len(texts)
    config.teacher_cache = dataclasses.replace(config.teacher_cache, **SAMPLING, slots=3, shard_sequences=26)
    config.prompts.heldout_fraction = 0.3  # other splits, other shards, other company in the slots
    stage.run(config, tracker)
    assert texts_of(made_by(config)) == texts


@pytest.fixture(scope="module")
def draft_directory(target_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft of random weights for the target."""
    config = configuration(target_directory, tmp_path_factory.mktemp("draft"))
    config.draft.tapped_layers, config.draft.num_hidden_layers = [1, 2], 1
    shape = Workspace(config).draft_config
    draft = DraftModel(shape, dflash_weights.random_weights(shape, jax.random.key(6)))
    directory = Path(config.output_dir) / "draft"
    directory.mkdir(parents=True)
    save_draft(directory, draft, {})
    return directory


@pytest.mark.parametrize(
    "sampling", [pytest.param({}, id="greedy", marks=pytest.mark.slow), pytest.param(SAMPLING, id="sampled")]
)
def test_answers_that_a_draft_helps_to_decode_are_the_targets_own(
    sampled: tuple[PipelineConfig, Artifact],
    cache: Artifact,
    config: PipelineConfig,
    tracker: Recorder,
    draft_directory: Path,
    sampling: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = sampled[1] if sampling else cache
    plain_key = Workspace(config).key(TEACHER_CACHE)
    config.teacher_cache = dataclasses.replace(config.teacher_cache, **sampling, draft=str(draft_directory))
    rounds = []
    generate = Engine.generate

    def counted(engine: Engine, requests: Iterable[Request]) -> Iterator[Completion]:
        for completion in generate(engine, requests):
            rounds.append(len(completion.accepted_per_round))
            yield completion

    monkeypatch.setattr(Engine, "generate", counted)
    stage.run(config, tracker)
    assert texts_of(made_by(config)) == texts_of(alone)
    assert sum(rounds) > 50
    assert Workspace(config).key(TEACHER_CACHE) not in (plain_key, alone.key)  # in bfloat16 a tie may fall otherwise


def test_a_draft_of_another_target_is_refused(config: PipelineConfig, tracker: Recorder, tmp_path: Path) -> None:
    other = random_pair(tmp_path, corpus_tokenizer(512))
    config.teacher_cache.draft = str(other.export.path)
    with pytest.raises(PipelineError, match=r"teacher_cache.draft .* is not a draft for this target"):
        stage.run(config, tracker)


def test_a_resumed_sampled_cache_has_the_same_bytes(
    sampled: tuple[PipelineConfig, Artifact], config: PipelineConfig, tracker: Recorder
) -> None:
    _, drawn = sampled
    config.teacher_cache = dataclasses.replace(config.teacher_cache, **SAMPLING)
    scratch = artifact.scratch_of(Workspace(config).address(TEACHER_CACHE))
    shutil.copytree(drawn.path, scratch)
    for file in (stage.SUMMARY, stage.PROMPTS, HEADER, artifact.CONTRACT, artifact.MANIFEST):
        (scratch / file).unlink()
    shutil.rmtree(scratch / "train" / "00001")
    stage.run(config, tracker)
    assert made_by(config).fingerprint == drawn.fingerprint


@pytest.mark.parametrize("change", ["noise of another seed", "greedy", "a token"])
def test_a_sampled_text_that_its_noise_does_not_choose_is_caught(
    sampled: tuple[PipelineConfig, Artifact], target_directory: Path, change: str
) -> None:
    config, drawn = sampled
    target = read_target(target_directory, WeightFormat())
    split = open_split(drawn.path, "heldout")
    rows = split.read(range(split.num_sequences))
    origin = AnswerOrigin(sampling=Sampling(**SAMPLING), seed=config.seed + (change == "noise of another seed"))
    if change == "greedy":
        origin = AnswerOrigin()
    if change == "a token":
        longest = max(rows, key=lambda row: len(row.token_ids) - row.prompt_tokens)
        assert len(longest.token_ids) - longest.prompt_tokens > 12
        longest.token_ids[longest.prompt_tokens + 2] = (longest.token_ids[longest.prompt_tokens + 2] + 1) % 200
        split.read = lambda indices: [rows[index] for index in indices]

    def recapture(texts: list[list[int]], names: list[str]) -> object:
        tapped = tuple(drawn.contract["features"]["tapped_layers"])
        return capture.capture(target, tapped, texts, sampling=origin.sampling, keys=origin.keys(names))

    prompts = [row.token_ids[: row.prompt_tokens].tolist() for row in rows]
    with pytest.raises(PipelineError, match="labels of training has accept_length|features of"):
        check_cache(
            split,
            prompts,
            recapture,
            draft=Workspace(config).draft_config,
            tie_gap=1e-3,
            is_exact=True,
            seed=0,
            origin=origin,
        )


def asking(config: PipelineConfig, url: str, monkeypatch: pytest.MonkeyPatch, **values: object) -> PipelineConfig:
    """The configuration with an endpoint for a generator."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    options = {"api": OpenAIApi.completions, "model": MODEL, "concurrency": 3, "retries": 0}
    config.teacher_cache.generator = Generator.openai
    config.teacher_cache.openai = OpenAIConfig(url=url, **(options | values))
    return config


@pytest.mark.parametrize("api", OpenAIApi)
def test_our_own_server_gives_the_engines_cache(
    cache: Artifact,
    config: PipelineConfig,
    tracker: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    target_directory: Path,
    api: OpenAIApi,
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = read_target(target_directory, WeightFormat())
    tokenizer = load_tokenizer(target_directory)
    stops = tuple(stop_token_ids(tokenizer))
    engine = Engine(target, None, EngineConfig(num_slots=4, max_length=184, prefill_chunk=64, stop_token_ids=stops))
    extra = {"return_token_ids": True} if api is OpenAIApi.chat else {}
    with serving(engine, tokenizer) as address:
        stage.run(asking(config, f"{address}/v1", monkeypatch, api=api, extra=extra), tracker)
    remade = made_by(config)
    assert texts_of(remade) == texts_of(cache)
    assert np.array_equal(features_of(remade), features_of(cache))
    assert summary_of(remade)["num_failed"] == 0
    assert summary_of(remade)["splits"]["train"]["divergence"] == 0
    assert tracker.metrics["teacher_cache/gold_accept_length"] == 4.0
    assert "other tokens" not in caplog.text
    asked = {name.removeprefix("teacher_cache.openai."): value for name, value in remade.settings.items()}
    wanted = flatten({"url": address.removeprefix("http://"), "model": MODEL, "api": api.value, "extra": extra})
    assert {name: asked.get(name) for name in wanted} == wanted
    assert not list(Path(config.output_dir).rglob("*.jsonl"))[1:]  # prompts.jsonl alone: the reply log is gone


def by_heart(texts: dict[str, tuple[int, list[int]]], wrong: int = 0, failing: int = 0) -> object:
    """A script that answers prompts of tokens as `texts` do, but the first so many, and so many tokens, wrongly."""
    known = {tuple(tokens[:size]): tokens[size:] for size, tokens in texts.values()}
    bad = list(known)[:failing]

    def script(_path: str, body: dict, _count: int) -> Reply:
        if tuple(body["prompt"]) in bad:
            return Reply({"error": {"message": f"no room (key {KEY})"}}, 400)
        answer = list(known[tuple(body["prompt"])])
        for index in range(min(wrong, len(answer))):
            answer[index] = (answer[index] + 7) % 200
        return Reply({"choices": [{"text": "", "token_ids": answer, "finish_reason": "length"}]})

    return script


def test_prompts_that_fail_are_accounted_for_and_the_others_are_cached(
    cache: Artifact,
    config: PipelineConfig,
    tracker: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = texts_of(cache)
    config.teacher_cache.verify = 0.5
    config.teacher_cache.shard_sequences = 1  # the shards of the two that fail have nothing in them
    with endpoint(by_heart(texts, failing=2)) as fake, caplog.at_level(logging.DEBUG):
        stage.run(asking(config, fake.url, monkeypatch), tracker)
    remade, failed = made_by(config), list(texts)[:2]
    assert texts_of(remade) == {name: text for name, text in texts.items() if name not in failed}
    lines = {line["prompt_id"]: line for line in lines_of(remade)}
    assert {name for name, line in lines.items() if line["failed"]} == set(failed)
    assert all("HTTP 400: " in lines[name]["failed"] for name in failed)
    summary = summary_of(remade)
    assert (summary["num_sequences"], summary["num_failed"], summary["num_skipped"]) == (24, 2, 0)
    assert tracker.metrics["teacher_cache/failed"] == 2
    assert tracker.metrics["teacher_cache/verified_sequences"] > 5
    stage.run(config, tracker)  # complete: verified again, and nobody asked
    for file in remade.path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    assert KEY not in caplog.text


def test_an_endpoint_with_another_model_is_refused_and_its_answers_are_kept(
    cache: Artifact, config: PipelineConfig, tracker: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with endpoint(by_heart(texts_of(cache), wrong=5)) as fake:
        config = asking(config, fake.url, monkeypatch)
        host = fake.url.removeprefix("http://").removesuffix("/v1")
        for _ in range(2):
            with pytest.raises(PipelineError, match=rf"the text of tiny at {host} is not the target's: \d\d\.\d% of"):
                stage.run(config, tracker)
        assert len(fake.bodies) == 26


def test_sampled_answers_of_an_endpoint_are_taken_when_they_surprise_as_much_as_the_targets_own(
    sampled: tuple[PipelineConfig, Artifact],
    config: PipelineConfig,
    tracker: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = texts_of(sampled[1])
    config.teacher_cache = dataclasses.replace(config.teacher_cache, **SAMPLING)
    with endpoint(by_heart(texts)) as fake:
        stage.run(asking(config, fake.url, monkeypatch), tracker)
        bodies = list(fake.bodies)
    assert texts_of(made_by(config)) == texts
    assert tracker.metrics["teacher_cache/gold_accept_length"] == 4.0
    assert abs(summary_of(made_by(config))["splits"]["train"]["divergence"]) < 0.1
    assert len({body["seed"] for body in bodies}) == len(bodies) == 26
    assert {(body["temperature"], body["top_p"]) for body in bodies} == {(0.8, 0.95)}
    config.output_dir += "-wrong"
    with endpoint(by_heart(texts, wrong=5)) as fake, pytest.raises(PipelineError, match=r"by \d\.\d+ nats each more"):
        stage.run(asking(config, fake.url, monkeypatch), tracker)


def test_the_address_tells_host_and_model_apart_and_nothing_else(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Workspace(config).address(TEACHER_CACHE)]
    for values in ({"model": "a"}, {"model": "b"}, {"model": "a", "concurrency": 9, "api_key_env": "OTHER"}):
        asked = asking(config, "http://here:1/v1", monkeypatch, **values)
        found.append(Workspace(asked).address(TEACHER_CACHE))
    asked = asking(config, "http://there:1/v1", monkeypatch, model="a")
    found.append(Workspace(asked).address(TEACHER_CACHE))
    assert found[1] == found[3]
    assert len(set(found)) == 4


def test_the_sizes_of_the_random_target_leave_room_for_the_prompts() -> None:
    assert SIZES.max_position_embeddings >= 184
