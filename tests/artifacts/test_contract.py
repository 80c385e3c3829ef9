"""Contracts: one comparison that lists everything, and JSON that is read back whole or not at all."""

import dataclasses
import json

import pytest

from pipeline.artifacts.contract import (
    Contract,
    DraftIdentity,
    FeatureIdentity,
    TargetIdentity,
    TextIdentity,
    differences,
    require_match,
)
from pipeline.errors import PipelineError

WHOLE = Contract(
    target=TargetIdentity(
        name="tiny",
        revision=None,
        config_fingerprint="c0",
        weights_fingerprint="w0",
        weight_precision="float32",
    ),
    text=TextIdentity(tokenizer_fingerprint="t0", chat_template_fingerprint="h0", reasoning_efforts=["low", "high"]),
    features=FeatureIdentity(tapped_layers=[0, 2]),
    draft=DraftIdentity(
        block_size=8, mask_token_id=96, architecture={"hidden_size": 48, "num_hidden_layers": 2}, rope={"theta": 1e6}
    ),
    provenance={"git_commit": "abc", "config": {"seed": 0}},
)


def changed(part, **values):
    return dataclasses.replace(WHOLE, **{part: dataclasses.replace(getattr(WHOLE, part), **values)})


def test_a_contract_agrees_with_itself():
    assert differences(WHOLE, WHOLE) == []
    require_match(WHOLE, WHOLE, what="draft", mend="nothing")


CHANGES = {
    "weights": (changed("target", weights_fingerprint="w1"), "target.weights_fingerprint: found 'w1', wanted 'w0'"),
    "precision": (
        changed("target", weight_precision="mxfp4"),
        "target.weight_precision: found 'mxfp4', wanted 'float32'",
    ),
    "template": (
        changed("text", chat_template_fingerprint="h1"),
        "text.chat_template_fingerprint: found 'h1', wanted 'h0'",
    ),
    "efforts": (
        changed("text", reasoning_efforts=["low"]),
        "text.reasoning_efforts: found ['low'], wanted ['low', 'high']",
    ),
    "layers": (
        changed("features", tapped_layers=[1, 2]),
        "features.tapped_layers: found [1, 2], wanted [0, 2]",
    ),
    "convention": (
        changed("features", convention="input of layer i"),
        "features.convention: found 'input of layer i', wanted 'id i = output",
    ),
    "block size": (changed("draft", block_size=16), "draft.block_size: found 16, wanted 8"),
    "a size of the draft": (
        changed("draft", architecture={"hidden_size": 48, "num_hidden_layers": 3}),
        "draft.architecture.num_hidden_layers: found 3, wanted 2",
    ),
    "a key that one side lacks": (
        changed("draft", rope={"theta": 1e6, "factor": 32.0}),
        "draft.rope.factor: found 32.0, wanted None",
    ),
}


@pytest.mark.parametrize(("found", "words"), CHANGES.values(), ids=CHANGES.keys())
def test_every_field_is_compared(found, words):
    lines = differences(found, WHOLE)
    assert len(lines) == 1
    assert lines[0].startswith(words)


def test_all_differences_are_listed_at_once():
    found = dataclasses.replace(
        WHOLE,
        target=dataclasses.replace(WHOLE.target, name="other", config_fingerprint="c1"),
        features=FeatureIdentity(tapped_layers=[1]),
        draft=dataclasses.replace(WHOLE.draft, mask_token_id=1),
    )
    with pytest.raises(PipelineError) as error:
        require_match(found, WHOLE, what="draft at /here", mend="make it again with: this command")
    assert str(error.value).splitlines() == [
        "draft at /here does not fit: 4 field(s) of its contract differ",
        "  draft.mask_token_id: found 1, wanted 96",
        "  features.tapped_layers: found [1], wanted [0, 2]",
        "  target.config_fingerprint: found 'c1', wanted 'c0'",
        "  target.name: found 'other', wanted 'tiny'",
        "make it again with: this command",
    ]


UNDECIDED = {
    "draft": dataclasses.replace(WHOLE, draft=None),
    "features": dataclasses.replace(WHOLE, features=None),
    "both": dataclasses.replace(WHOLE, features=None, draft=None),
    "efforts": changed("text", reasoning_efforts=None),
    "a revision that one side has": changed("target", revision="main"),
}


@pytest.mark.parametrize("other", UNDECIDED.values(), ids=UNDECIDED.keys())
def test_what_a_stage_has_not_decided_agrees_with_anything_on_either_side(other):
    assert differences(other, WHOLE) == []
    assert differences(WHOLE, other) == []


def test_what_is_decided_is_compared_beside_what_is_not():
    found = dataclasses.replace(changed("target", name="other"), draft=None)
    assert differences(found, WHOLE) == ["target.name: found 'other', wanted 'tiny'"]


def test_who_made_it_does_not_matter():
    assert differences(dataclasses.replace(WHOLE, provenance={"config": {"seed": 1}}), WHOLE) == []


@pytest.mark.parametrize("contract", [WHOLE, *UNDECIDED.values()], ids=["whole", *UNDECIDED.keys()])
def test_json_and_back_keeps_every_value(contract):
    assert Contract.from_json(json.loads(json.dumps(contract.to_json()))) == contract


BROKEN = {
    "an unknown key": (lambda value: value["target"].update(colour="red"), "colour"),
    "a missing key": (lambda value: value["text"].pop("tokenizer_fingerprint"), "tokenizer_fingerprint"),
    "a missing part": (lambda value: value.pop("features"), "features"),
}


@pytest.mark.parametrize(("harm", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_json_of_another_version_is_refused(harm, words):
    value = WHOLE.to_json()
    harm(value)
    with pytest.raises(PipelineError, match=rf"not one this version writes \(.*{words}.*make the artifact again"):
        Contract.from_json(value)
