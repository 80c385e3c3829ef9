"""Another program beside ours: what it is given, what is made of its answer, and how it may fail."""

import sys

import jax
import pytest

from pipeline.config.schema import PeerConfig, PipelineConfig, PromptsConfig, TargetConfig
from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import Request
from pipeline.errors import PipelineError
from pipeline.model.gpt_oss.config import GptOssConfig
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import random_weights
from pipeline.model.hf.directory import save_target
from pipeline.peer import decoding, stage
from pipeline.peer.decoding import DecodingComparison
from pipeline.prompts import corpus
from pipeline.prompts.tokenizer import train_tokenizer
from pipeline.tracking.run import SilentRun
from tests.support import models as tiny_models

ECHO = """
import json, sys
given = json.load(open(sys.argv[1]))
answers = json.load(open(given["model"]))
outputs = [{"tokens": tokens, "decode_seconds": 0.5} for tokens in answers]
json.dump({"outputs": outputs}, open(sys.argv[2], "w"))
"""


def test_both_decode_the_same_prompts_and_equal_answers_are_counted(tmp_path):
    config = GptOssConfig.from_hf(tiny_models.TARGET)
    target = TargetModel(config, random_weights(config, jax.random.key(0)))
    engine = Engine(target, None, EngineConfig(num_slots=1, max_length=24, prefill_chunk=8))
    requests = [Request(request_id=str(i), prompt_ids=(1, 2, 3 + i), max_new_tokens=6) for i in range(2)]
    answers = [list(one.token_ids) for one in sorted(engine.generate(requests), key=lambda one: one.request_id)]
    answers[1] = [(answers[1][0] + 1) % config.vocab_size, *answers[1][1:]]
    file = tmp_path / "answers.json"
    file.write_text(str(answers))
    found = decoding.compare_decoding(engine, requests, [sys.executable, "-c", ECHO], {"model": str(file)}, 2)
    assert found.theirs == (10.0, 10.0)  # five tokens of each behind the first, half a second each
    assert (found.num_equal, found.num_answers) == (1, 2)
    assert all(speed > 0 for speed in found.ours)


def test_the_ratio_is_the_median_of_neighbouring_passes():
    found = DecodingComparison(ours=(10.0, 30.0, 20.0), theirs=(5.0, 10.0, 2.0), num_equal=3, num_answers=4)
    measured = found.metrics()
    assert [measured[f"peer/ratio{name}"] for name in ("", "_min", "_max")] == [3.0, 2.0, 10.0]
    assert measured["peer/equal_answers"] == 3


def test_a_peer_that_fails_is_named_with_its_last_words():
    with pytest.raises(PipelineError, match=r"peer\.command .* ended with 3:\n  no such model"):
        decoding.run_peer_decoder(
            [sys.executable, "-c", "import sys; print('no such model', file=sys.stderr); sys.exit(3)"], {}
        )
    with pytest.raises(PipelineError, match=r"peer\.command cannot be run"):
        decoding.run_peer_decoder(["/no/such/program"], {})


ZEROS = """
import json, sys
given = json.load(open(sys.argv[1]))
outputs = [{"tokens": [0] * given["max_new_tokens"], "decode_seconds": 1.0} for _ in given["prompts"]]
json.dump({"outputs": outputs}, open(sys.argv[2], "w"))
"""


def test_the_stage_reads_the_target_and_renders_held_out_prompts(tmp_path, capsys):
    sizes = GptOssConfig.from_hf({**tiny_models.TARGET, "vocab_size": 300})
    save_target(tmp_path, TargetModel(sizes, random_weights(sizes, jax.random.key(0))), {})
    texts = [corpus.conversation(0, index, "low").prompt for index in range(200)]
    train_tokenizer(texts, 300).save_pretrained(tmp_path)
    config = PipelineConfig(
        output_dir=str(tmp_path),
        target=TargetConfig(name="random", path=str(tmp_path)),
        prompts=PromptsConfig(count=200),
        peer=PeerConfig(command=[sys.executable, "-c", ZEROS], num_prompts=2, max_new_tokens=5, repeats=1),
    )
    measured = stage.run(config, SilentRun())
    assert measured["peer/theirs_tokens_per_second"] == 4.0
    assert measured["peer/ours_tokens_per_second"] > 0
    assert "random, float32, batch 1, 2 prompts of 5 tokens" in capsys.readouterr().out


def test_the_stage_needs_a_command():
    with pytest.raises(PipelineError, match=r"peer\.command is empty"):
        stage.run(PipelineConfig(peer=PeerConfig(command=[])), SilentRun())
