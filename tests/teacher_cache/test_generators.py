"""The stage with sampled answers, and with answers of an endpoint: the same cache where it must be, or none."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from serve.serving import MODEL, serving
from teacher_cache.conftest import MODEL as SIZES
from teacher_cache.conftest import Recorder, configuration
from teacher_cache.fake_endpoint import Reply, endpoint

from pipeline import artifacts, lineage
from pipeline.artifacts import Artifact, PipelineError
from pipeline.config import Generator, OpenAIApi, OpenAIConfig, PipelineConfig
from pipeline.model import checkpoints
from pipeline.model.gpt_oss_weights import WeightsForm
from pipeline.model.sampling import Sampling
from pipeline.prompts.chat_format import stop_token_ids
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.serve.engine import Engine
from pipeline.teacher_cache import capture, stage, store
from pipeline.teacher_cache.check import check
from pipeline.teacher_cache.origin import Origin

KEY = "sk-very-secret-0123456789"
SAMPLING = {"temperature": 0.8, "top_p": 0.95}


def made_by(config: PipelineConfig) -> Artifact:
    path = lineage.teacher_cache_address(config, lineage.target(config))
    return artifacts.read(path, lineage.TEACHER_CACHE, make_with="the test", verify=True)


def texts_of(cache: Artifact) -> dict[str, tuple[int, list[int]]]:
    """Every prompt's length and tokens."""
    found = {}
    for split in store.SPLITS:
        reader = store.open_split(cache.path, split)
        rows = reader.read(range(reader.num_sequences))
        found |= {
            name: (row.prompt_tokens, row.token_ids.tolist()) for name, row in zip(reader.prompt_ids, rows, strict=True)
        }
    return found


def features_of(cache: Artifact) -> np.ndarray:
    reader = store.open_split(cache.path, "heldout")
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
    config.teacher_cache = dataclasses.replace(config.teacher_cache, **SAMPLING, batch_size=3, shard_sequences=26)
    config.prompts.heldout_fraction = 0.3  # other splits, other shards, other company in the slots
    stage.run(config, tracker)
    assert texts_of(made_by(config)) == texts


def test_a_resumed_sampled_cache_has_the_same_bytes(
    sampled: tuple[PipelineConfig, Artifact], config: PipelineConfig, tracker: Recorder
) -> None:
    _, drawn = sampled
    config.teacher_cache = dataclasses.replace(config.teacher_cache, **SAMPLING)
    scratch = artifacts.scratch_of(lineage.teacher_cache_address(config, lineage.target(config)))
    shutil.copytree(drawn.path, scratch)
    for file in (stage.SUMMARY, stage.PROMPTS, store.HEADER, artifacts.CONTRACT, artifacts.MANIFEST):
        (scratch / file).unlink()
    shutil.rmtree(scratch / "train" / "00001")
    stage.run(config, tracker)
    assert made_by(config).fingerprint == drawn.fingerprint


@pytest.mark.parametrize("change", ["noise of another seed", "greedy", "a token"])
def test_a_sampled_text_that_its_noise_does_not_choose_is_caught(
    sampled: tuple[PipelineConfig, Artifact], target_directory: Path, change: str
) -> None:
    config, drawn = sampled
    sizes, weights = checkpoints.load_target(target_directory, WeightsForm())
    split = store.open_split(drawn.path, "heldout")
    rows = split.read(range(split.num_sequences))
    how = Origin(sampling=Sampling(**SAMPLING), seed=config.seed + (change == "noise of another seed"))
    if change == "greedy":
        how = Origin()
    if change == "a token":
        longest = max(rows, key=lambda row: len(row.token_ids) - row.prompt_tokens)
        assert len(longest.token_ids) - longest.prompt_tokens > 12
        longest.token_ids[longest.prompt_tokens + 2] = (longest.token_ids[longest.prompt_tokens + 2] + 1) % 200
        split.read = lambda indices: [rows[index] for index in indices]

    def retake(texts: list[list[int]], names: list[str]) -> object:
        tapped = tuple(drawn.contract["features"]["tapped_layers"])
        return capture.capture(weights, sizes, tapped, texts, drawn=how.sampling, keys=how.keys(names))

    prompts = [row.token_ids[: row.prompt_tokens].tolist() for row in rows]
    with pytest.raises(PipelineError, match="labels of training has accept_length|features of"):
        check(
            split,
            prompts,
            retake,
            block_size=4,
            vocab_size=sizes.vocab_size,
            tie_gap=1e-3,
            is_exact=True,
            seed=0,
            origin=how,
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
    sizes, weights = checkpoints.load_target(target_directory, WeightsForm())
    tokenizer = load_tokenizer(target_directory)
    engine = Engine(weights, sizes, stop_token_ids=stop_token_ids(tokenizer), slots=4, max_length=184, prefill_chunk=64)
    extra = {"return_token_ids": True} if api is OpenAIApi.chat else {}
    with serving(engine, tokenizer) as address:
        stage.run(asking(config, f"{address}/v1", monkeypatch, api=api, extra=extra), tracker)
    made = made_by(config)
    assert texts_of(made) == texts_of(cache)
    assert np.array_equal(features_of(made), features_of(cache))
    assert summary_of(made)["num_failed"] == 0
    assert summary_of(made)["splits"]["train"]["divergence"] == 0
    assert tracker.metrics["teacher_cache/gold_accept_length"] == 4.0
    assert "other tokens" not in caplog.text
    assert made.settings["teacher_cache"]["openai"] == {
        "host": address.removeprefix("http://"),
        "model": MODEL,
        "api": api.value,
        "extra": extra,
    }
    assert not list(Path(config.output_dir).rglob("*.jsonl"))[1:]  # prompts.jsonl alone: the journal is gone


def by_heart(texts: dict[str, tuple[int, list[int]]], wrong: int = 0, failing: int = 0) -> object:
    """A script that answers prompts of tokens as `texts` do, but the first so many, and so many tokens, wrongly."""
    known = {tuple(tokens[:size]): tokens[size:] for size, tokens in texts.values()}
    bad = list(known)[:failing]

    def script(_path: str, body: dict, _count: int) -> Reply:
        if tuple(body["prompt"]) in bad:
            return Reply({"error": {"message": f"no room (key {KEY})"}}, 400)
        answer = list(known[tuple(body["prompt"])])
        for place in range(min(wrong, len(answer))):
            answer[place] = (answer[place] + 7) % 200
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
    made, failed = made_by(config), list(texts)[:2]
    assert texts_of(made) == {name: text for name, text in texts.items() if name not in failed}
    lines = {line["prompt_id"]: line for line in lines_of(made)}
    assert {name for name, line in lines.items() if line["failed"]} == set(failed)
    assert all("HTTP 400: " in lines[name]["failed"] for name in failed)
    summary = summary_of(made)
    assert (summary["num_sequences"], summary["num_failed"], summary["num_skipped"]) == (24, 2, 0)
    assert tracker.metrics["teacher_cache/failed"] == 2
    assert tracker.metrics["teacher_cache/verified_sequences"] > 5
    stage.run(config, tracker)  # complete: verified again, and nobody asked
    for file in made.path.rglob("*"):
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
    target = lineage.target(config)
    found = [lineage.teacher_cache_address(config, target)]
    for values in ({"model": "a"}, {"model": "b"}, {"model": "a", "concurrency": 9, "api_key_env": "OTHER"}):
        found.append(lineage.teacher_cache_address(asking(config, "http://here:1/v1", monkeypatch, **values), target))
    found.append(lineage.teacher_cache_address(asking(config, "http://there:1/v1", monkeypatch, model="a"), target))
    assert found[1] == found[3]
    assert len(set(found)) == 4


def test_the_sizes_of_the_random_target_leave_room_for_the_prompts() -> None:
    assert SIZES.max_position_embeddings >= 184
