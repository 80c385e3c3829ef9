import dataclasses
import enum
import json

import pytest
from omegaconf import OmegaConf

from pipeline.config.choices import Effort, FeatureSource, Generator, Precision, PromptSource, Stage
from pipeline.config.schema import DraftConfig, PipelineConfig, PretrainConfig, PretrainedConfig, plain
from pipeline.config.validation import validate
from pipeline.errors import PipelineError

PRETRAIN = PretrainConfig(
    num_conversations=1, steps=1, batch_tokens=1, sequence_length=1, learning_rate=1.0, checkpoint_steps=1
)


def valid_config(**changes):
    config = PipelineConfig(stage=Stage.train)
    config.target.name, config.target.path = "tiny", "models/tiny"
    for key, value in changes.items():
        *path, last = key.split("__")
        node = config
        for name in path:
            node = getattr(node, name)
        setattr(node, last, value)
    return config


def test_defaults_are_valid():
    validate(valid_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"train__learning_rate": -1.0}, "train.learning_rate is -1.0; it must be positive", id="negative"),
        pytest.param({"output_dir": ""}, "output_dir is ''; it must be a path; . is the directory", id="no output"),
        pytest.param({"output_dir": "  "}, "output_dir is '  '; it must be a path", id="blank output"),
        pytest.param({"target__name": "../../esc"}, "target.name is '../../esc'; it must be a plain name", id="escape"),
        pytest.param({"target__path": None}, "target.path is null; give a GPT-OSS model", id="no target"),
        pytest.param(
            {"target__gguf": "x.gguf"},
            "target.gguf is x.gguf and target.path is models/tiny; give one: target.path=null",
            id="file beside a directory",
        ),
        pytest.param(
            {"target__path": None, "target__gguf": "x.gguf", "target__pretrain": PRETRAIN},
            "target.gguf is x.gguf, and target.pretrain trains a model; choose target=local",
            id="file beside a recipe",
        ),
        pytest.param(
            {"target__path": "models/x.GGUF"},
            "target.path is models/x.GGUF, a GGUF file; write target.gguf=models/x.GGUF",
            id="file as a directory",
        ),
        pytest.param(
            {"target__path": None, "target__adapter": "lora"},
            "target.adapter is lora; it goes with the model",
            id="stray adapter",
        ),
        pytest.param(
            {"target__pretrained": PretrainedConfig(wheel="w", file="f", sha256="abc")},
            "target.pretrained.sha256 is 'abc'; it must be 64 hex digits",
            id="no sha256",
        ),
        pytest.param({"draft__head_dim": 7}, "draft.head_dim is 7; it must be even", id="odd head"),
        pytest.param({"train__warmup_ratio": 1.0}, "train.warmup_ratio is 1.0", id="nothing but warm-up"),
        pytest.param({"train__weight_decay": -0.1}, "train.weight_decay is -0.1", id="negative decay"),
        pytest.param(
            {"train__distillation": 0.5}, "train.distillation is 0.5; the target's distribution", id="distils"
        ),
        pytest.param({"train__accumulation": 3}, "train.accumulation is 3; it must divide", id="uneven parts"),
        pytest.param(
            {"train__pack_tokens": 512, "train__features": FeatureSource.live},
            "train.pack_tokens is 512; the target reads one sequence a row",
            id="packed and live",
        ),
        pytest.param(
            {"mesh__hosts": True, "train__features": FeatureSource.live},
            "train.features is live; several hosts train on cached features",
            id="live on several hosts",
        ),
        pytest.param(
            {"bench__max_new_tokens": 1},
            "bench.max_new_tokens is 1; it must be at least 2: the first token",
            id="no decoding",
        ),
        pytest.param(
            {"bench__max_repeats": 2}, "bench.max_repeats is 2; it must be at least bench.repeats", id="repeats"
        ),
        pytest.param({"bench__request_rates": [0.0]}, "bench.request_rates is [0.0]; it must be a list", id="no rate"),
        pytest.param(
            {"mesh__hosts": True, "bench__interval": 0.1}, "bench.interval and bench.request_rates follow", id="clocks"
        ),
        pytest.param(
            {"bench__plain_url": "a", "bench__dflash_url": "b", "bench__adaptive": True},
            "bench.adaptive is for this process's own engines",
            id="arms of servers",
        ),
        pytest.param(
            {"serve__gateway": True, "serve__dry_run": True},
            "serve.gateway, serve.dry_run is set, but serve.engine is own, which starts no other program",
            id="no other engine",
        ),
        pytest.param(
            {"serve__plain_url": "http://here"},
            "serve.plain_url is http://here; only serve.gateway=true",
            id="no gateway",
        ),
        pytest.param({"ask__questions": []}, "ask.questions is []; it must be a list of texts", id="no question"),
        pytest.param(
            {"ask__questions": ["Hi", " "]}, "ask.questions is ['Hi', ' ']; it must be", id="an empty question"
        ),
        pytest.param({"bench__dflash_log": "a.log"}, "bench.dflash_log is a.log; it is the log of", id="log alone"),
        pytest.param(
            {"serve__draft": "models:/a@b", "export__path": "c"}, "serve.draft is models:/a@b and", id="two drafts"
        ),
        pytest.param({"train__loss_decay": 2.0}, "train.loss_decay is 2.0; train.loss_weights=dpace", id="decay"),
        pytest.param({"bench__repeats": 0}, "bench.repeats is 0; it must be positive", id="zero"),
        pytest.param({"bench__prompt_tokens": 0}, "bench.prompt_tokens is 0; it must be positive", id="optional zero"),
        pytest.param({"prompts__heldout_fraction": 1.0}, "prompts.heldout_fraction is 1.0", id="all held out"),
        pytest.param({"prompts__source": PromptSource.jsonl}, "prompts.path is null", id="jsonl without a file"),
        pytest.param({"prompts__source": PromptSource.dataset}, "prompts.dataset is null", id="dataset without a name"),
        pytest.param({"prompts__date": "5 August"}, "prompts.date is '5 August'; it must be a day", id="date"),
        pytest.param({"serve__date": "2025-02-30"}, "serve.date is '2025-02-30'; it must be a day", id="date served"),
        pytest.param({"prompts__effort_mix": {"max": 1.0}}, "prompts.effort_mix is {'max': 1.0}", id="effort"),
        pytest.param({"prompts__effort_mix": {"low": -0.5}}, "shares of at least 0", id="negative share"),
        pytest.param({"prompts__effort_mix": {"low": float("nan")}}, "shares of at least 0", id="share that is none"),
        pytest.param(
            {"prompts__effort": Effort.mixed, "prompts__effort_mix": {"low": 0.0}}, "one above it", id="no share"
        ),
        pytest.param(
            {"prompts__dataset_revision": "abc"},
            "prompts.dataset_revision is abc, but prompts.source is generated, which does not read it; set "
            "prompts.source=dataset",
            id="stray revision",
        ),
        pytest.param(
            {"prompts__path": "rows.jsonl"},
            "prompts.path is rows.jsonl, but prompts.source is generated, which does not read it; set "
            "prompts.source=jsonl",
            id="stray file",
        ),
        pytest.param(
            {"prompts__dataset": "a/b"}, "prompts.dataset is a/b, but prompts.source is generated", id="stray dataset"
        ),
        pytest.param(
            {"teacher_cache__openai__url": "http://here/v1"},
            "teacher_cache.openai names an endpoint, but teacher_cache.generator is engine, which asks none",
            id="stray endpoint",
        ),
        pytest.param({"teacher_cache__temperature": -1.0}, "teacher_cache.temperature is -1.0", id="temperature"),
        pytest.param({"teacher_cache__top_p": 0.0}, "teacher_cache.top_p is 0.0; it must be above 0", id="no nucleus"),
        pytest.param(
            {"teacher_cache__generator": Generator.given},
            "prompts.source is generated; teacher_cache.generator=given takes the answers at the end of rows",
            id="answers of a source without rows",
        ),
        pytest.param(
            {"teacher_cache__generator": Generator.openai, "teacher_cache__openai__url": "http://here/v1"},
            "teacher_cache.openai: url is http://here/v1, model is None",
            id="endpoint without a model",
        ),
        *(
            pytest.param({"teacher_cache__openai__url": url}, "teacher_cache.openai.url is no plain address", id=url)
            for url in (
                "localhost:8000",
                "ftp://here/v1",
                "http:///v1",
                "https://me:pw@here/v1",
                "https://here/v1?key=1",
            )
        ),
        pytest.param({"draft__block_size": 1}, "draft.block_size is 1", id="a block of the anchor alone"),
        pytest.param(
            {"draft__num_attention_heads": 4, "draft__num_key_value_heads": 3},
            "draft.num_attention_heads is 4",
            id="heads not grouped",
        ),
        pytest.param({"draft__tapped_layers": [3, 1]}, "draft.tapped_layers is [3, 1]", id="descending layers"),
        pytest.param({"draft__tapped_layers": [1, 1]}, "draft.tapped_layers is [1, 1]", id="a layer twice"),
        pytest.param({"serve__port": 65536}, "serve.port is 65536", id="port out of range"),
        pytest.param(
            {"export__path": "gs://bucket/dflash"}, "export.path is gs://bucket/dflash", id="draft in a bucket"
        ),
        pytest.param(
            {"stage": Stage.export, "export__path": "drafts/mine"},
            "export.path is drafts/mine",
            id="a name without dflash",
        ),
    ],
)
def test_a_broken_rule_is_named_with_its_key_and_value(changes, message):
    with pytest.raises(PipelineError) as raised:
        validate(valid_config(**changes))
    assert message in str(raised.value)


def test_a_url_that_holds_a_password_is_not_repeated():
    with pytest.raises(PipelineError) as raised:
        validate(valid_config(teacher_cache__openai__url="https://me:secret@here/v1"))
    assert "secret" not in str(raised.value)


def test_all_broken_rules_are_named_at_once():
    with pytest.raises(PipelineError) as raised:
        validate(valid_config(train__steps=0, bench__slots=-1, serve__port=-1))
    assert all(key in str(raised.value) for key in ("train.steps", "bench.slots", "serve.port"))


def test_values_that_may_be_null_are_not_rules_broken():
    validate(valid_config(bench__prompt_tokens=None, train__loss_decay=None))


def test_plain_gives_json_values_for_enums_dataclasses_and_lists():
    config = valid_config(draft__tapped_layers=[1, 3])
    values = json.loads(json.dumps(plain(config)))
    assert values["stage"] == "train"
    assert values["target"] == {
        "name": "tiny",
        "path": "models/tiny",
        "precision": Precision.float32.value,
        "revision": None,
        "weights": None,
        "architecture": None,
        "pretrain": None,
        "pretrained": None,
        "gguf": None,
        "adapter": None,
    }
    assert values["draft"] == dataclasses.asdict(DraftConfig()) | {"tapped_layers": [1, 3]}


def test_the_schema_survives_omegaconf():
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PipelineConfig), plain(valid_config())))
    assert isinstance(config, PipelineConfig)
    assert config == valid_config()


def test_stages_are_named_by_their_values():
    for choice in (Stage, Precision, PromptSource):
        assert issubclass(choice, enum.Enum)
        assert [member.name for member in choice] == [member.value for member in choice]
