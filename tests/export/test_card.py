"""The card of an exported draft: metadata that the hub takes, and every number it was given."""

import dataclasses
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from pipeline.artifacts.contract import Contract, TargetIdentity, TextIdentity
from pipeline.dflash.acceptance import Acceptance
from pipeline.export.card import TrainingRecord, model_card
from pipeline.model.layers.rope import Rope
from tests.support import training as tiny_training

HELDOUT, TRAIN = Acceptance((5, 4, 3, 2, 6)), Acceptance((4, 4, 3, 2, 7))
DRAFT = tiny_training.DRAFT
CONTRACT = Contract(
    target=TargetIdentity(
        name="gpt_oss_20b",
        revision="6cee5e81ee83917806bbde320786a8fb61efebee",
        config_fingerprint="c" * 64,
        weights_fingerprint="d" * 64,
        weight_precision="bfloat16",
    ),
    text=TextIdentity(tokenizer_fingerprint="e" * 64, chat_template_fingerprint="f" * 64, reasoning_efforts=["low"]),
)
TRAINING = TrainingRecord(
    base_model="openai/gpt-oss-20b",
    choice="target=gpt_oss_20b",
    recipe={"steps": 1300, "learning_rate": 3e-3, "init": None},
    data={
        "splits": {
            "train": {"num_sequences": 2971, "num_tokens": 400123, "generated_tokens": 300456},
            "heldout": {"num_sequences": 101, "num_tokens": 13579, "generated_tokens": 9753},
        },
        "longest_tokens": 3072,
        "made": {"source": "everyday", "generator": "engine", "temperature": 0.0},
    },
    teacher_cache="a" * 64,
    fingerprint="b" * 64,
)


def scored(score, count, **parts):
    return {"num_sequences": count, "histogram": list(score.histogram), **score.metrics(), **parts}


EVALUATION = {
    "step": 1200,
    "heldout": scored(
        HELDOUT,
        101,
        by_effort={"low": scored(HELDOUT, 7), "high": scored(TRAIN, 3)},
        by_channel={"analysis": {"histogram": list(TRAIN.histogram), **TRAIN.metrics()}},
    ),
    "train": scored(TRAIN, 101),
}


def card(config=DRAFT, contract=CONTRACT, evaluation=EVALUATION, training=TRAINING):
    return model_card(config, contract, evaluation, training)


def test_its_metadata_is_what_the_hubs_own_reader_takes():
    read = ModelCard(card()).data
    assert read.base_model == "openai/gpt-oss-20b"
    assert read.library_name == "transformers"
    assert read.pipeline_tag == "text-generation"
    assert "dflash" in read.tags
    assert {one.metric_type: one.metric_value for one in read.eval_results} == {
        "accept_length": round(HELDOUT.accept_length, 4),
        "accept_rate": round(HELDOUT.accept_rate, 4),
    }


def test_a_target_that_is_not_on_the_hub_is_no_base_model():
    text = card(training=dataclasses.replace(TRAINING, base_model=None))
    front = yaml.safe_load(text.split("---\n")[1])
    assert "base_model" not in front
    assert "for gpt_oss_20b" in text


def test_no_round_at_all_leaves_no_number_in_the_metadata():
    nothing = {**EVALUATION, "heldout": scored(Acceptance((0, 0, 0, 0, 0)), 0)}
    assert "model-index" not in yaml.safe_load(card(evaluation=nothing).split("---\n")[1])


def test_every_number_it_was_given_is_in_it():
    text = card()
    for score in (HELDOUT, TRAIN):
        assert f"| {score.accept_length:.3f} | {score.accept_rate:.3f} | {score.num_rounds} |" in text
        assert " | ".join(f"{rate:.3f}" for rate in score.accept_rate_at_k) in text
    for words in ("held out (101 texts)", "trained on (101 texts)", "held out, effort low (7 texts)", "effort high"):
        assert words in text
    assert "channel" not in text.split("## What it scores")[1].split("accept_rate_at_k, k")[0]  # one part is the whole
    for words in (
        "2,971 texts to train on",
        "400,123 tokens",
        "101 texts held out",
        "`generator` engine",
        "3,072 tokens",
    ):
        assert words in text
    for words in ("| `steps` | `1300` |", "| `learning_rate` | `0.003` |"):
        assert words in text
    assert "init" not in re.findall(r"\| `(\w+)` \|", text)
    for digit in "abcdef":
        assert f"`{digit * 64}`" in text
    assert "openai/gpt-oss-20b, revision 6cee5e81ee83917806bbde320786a8fb61efebee" in text


def test_what_the_engine_scored_stands_beside_what_training_did():
    engine = scored(TRAIN, 12) | {"training_accept_length": HELDOUT.accept_length}
    text = card(evaluation={**EVALUATION, "engine": engine})
    both = f"scores {TRAIN.accept_length:.3f} where the training evaluation counted {HELDOUT.accept_length:.3f}"
    assert f"on 12 of the held-out texts, {both}" in text


@pytest.mark.parametrize("block_size", [5, 8, 16])
def test_each_runtime_has_its_own_way_of_counting_tokens(block_size):
    config = dataclasses.replace(DRAFT, block_size=block_size)
    scores = {
        split: scored(Acceptance((1,) * block_size), 2, by_effort={}, by_channel={}) for split in ("heldout", "train")
    }
    text = card(config, evaluation=scores)
    assert f'"num_speculative_tokens": {block_size - 1}}}' in text  # vLLM: without the anchor
    assert f"--speculative-num-draft-tokens {block_size} " in text  # SGLang: with it
    assert text.count("--speculative-algorithm DFLASH") == 2
    assert "--speculative-eagle-topk 1 --speculative-num-steps 1" in text  # sglang-jax refuses its own defaults
    assert "stage=serve target=gpt_oss_20b export.path=<this directory>" in text
    assert "DFlashDraftModel.from_pretrained" in text


def test_a_card_names_what_not_every_runtime_does():
    plain = card()
    assert "YaRN" not in plain
    assert "biases" not in plain
    yarn = Rope(theta=150000.0, factor=32.0)
    odd = card(dataclasses.replace(DRAFT, rope=yarn, attention_bias=True))
    assert "it does not know YaRN, which this draft has" in odd
    assert "biases, which tpu-inference cannot load" in odd
    assert "YaRN (factor 32)" in odd


def test_a_draft_that_memorises_says_so():
    assert "memorises" not in card()
    memorised = {**EVALUATION, "train": scored(Acceptance((0, 0, 0, 0, 9)), 101)}
    assert "**It memorises**: 5.00 tokens a round" in card(evaluation=memorised)
