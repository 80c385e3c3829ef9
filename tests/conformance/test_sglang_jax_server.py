"""sglang-jax's own server with this project's GPT-OSS (external/sglang_jax), on a CPU and in float32: our tokens, and
as many accepted in every round.

The demo's pair is looked for where `make demo` leaves it. Two of the engine's kernels are replaced
(sglang_jax_cpu.py); everything else is the engine as it is installed.
"""

import concurrent.futures
import contextlib
import itertools
import json
import re
import shutil
import urllib.request

import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.engine.config import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.request import Request
from pipeline.errors import PipelineError
from pipeline.external.launcher import LaunchedServer
from pipeline.external.serving_engines import ENGINES, Service
from pipeline.model.gpt_oss.model import TargetModel
from pipeline.model.gpt_oss.weights import WeightFormat
from pipeline.model.hf.directory import read_draft, read_target, save_draft, save_target
from pipeline.prompts.tokenizer import load_tokenizer
from pipeline.serve.remote_engine import RemoteEngine
from tests.support import models
from tests.support.demo import Demo
from tests.support.oracles import run_oracle
from tests.support.paths import TESTS
from tests.support.ports import free_port
from tests.support.random_draft import random_draft
from tests.support.serving import MODEL, client_of, serving

pytestmark = [pytest.mark.slow, pytest.mark.conformance]

NUM_PROMPTS, NUM_TOKENS, LONGEST, SLOTS = 64, 48, 512, 4
PYTHON = TESTS / "conformance" / "sglang_jax_python.sh"
OPTIONS = ["--device", "cpu", "--mem-fraction-static", "0.3", "--skip-server-warmup", "--disable-precompile"]
ON_CPU = {"JAX_PLATFORMS": "cpu", "SGLANG_CI_SMALL_KV_SIZE": "4096", "HF_HUB_OFFLINE": "1"}
START_SECONDS = 600.0


@pytest.fixture(scope="module")
def demo():
    found = Demo(num_generated=3000)  # of which enough are held out
    del found.prompts[NUM_PROMPTS:]
    assert len(found.prompts) == NUM_PROMPTS
    return found


def answers(target, draft, prompts, stop_token_ids):
    """Our engine's answers: their tokens, and how many drafted ones each round accepted."""
    longest = min(LONGEST, target.config.max_position_embeddings)
    config = EngineConfig(num_slots=SLOTS, max_length=longest, prefill_chunk=64, stop_token_ids=tuple(stop_token_ids))
    requests = [
        Request(request_id=str(index), prompt_ids=tuple(prompt), max_new_tokens=NUM_TOKENS)
        for index, prompt in enumerate(prompts)
    ]
    found = {one.request_id: one for one in Engine(target, draft, config).generate(requests)}
    return [found[str(index)] for index in range(len(prompts))]


@contextlib.contextmanager
def served(target, draft=None, block_size=None, *options):
    """The engine's server, through our command; gives its address and the lines of its log."""
    port, lines = free_port(), []
    service = Service(
        target=str(target),
        draft=None if draft is None else str(draft),
        block_size=block_size,
        precision="float32",
        slots=SLOTS,
        max_length=LONGEST,
        page_size=16,
        prefill_chunk=128,
        host="127.0.0.1",
        port=port,
        extra=[*OPTIONS, *options],
    )
    command = ENGINES["sglang_jax"].command(str(PYTHON), service)
    server = LaunchedServer(command, url=f"http://127.0.0.1:{port}", on_line=lines.append, env=ON_CPU)
    try:
        server.wait_until_healthy("/health", START_SECONDS, print)
        yield server.url, lines
    finally:
        server.stop()


def ask(url, prompt, stop_token_ids):
    sampling = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "stop_token_ids": list(stop_token_ids)}
    sampling |= {"ignore_eos": not stop_token_ids, "skip_special_tokens": False}
    body = {"input_ids": list(prompt), "sampling_params": sampling}
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.load(reply)["output_ids"][:NUM_TOKENS]


def without_stops(tokens, stop_token_ids):
    """The text without the token that ended it, and what may stand behind that: the engine is not exact there."""
    return list(itertools.takewhile(lambda token: token not in stop_token_ids, tokens))


def ask_all(url, prompts, stop_token_ids, at_once):
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        found = pool.map(lambda prompt: ask(url, prompt, stop_token_ids), prompts)
        return [without_stops(tokens, stop_token_ids) for tokens in found]


def rounds_of(lines):
    """The tokens that each round of a log yielded, where one request ran at a time."""
    found = (re.search(r"Decode batch.*accept-len ([\d.]+)", line) for line in lines)
    return [float(match[1]) for match in found if match]


def equal(ours, theirs, stop_token_ids):
    return sum(without_stops(one.token_ids, stop_token_ids) == two for one, two in zip(ours, theirs, strict=True))


def block_size_of(draft):
    return json.loads((draft / "config.json").read_text())["block_size"]


def test_the_plain_arm_writes_our_tokens(demo):
    ours = answers(read_target(demo.target_path, WeightFormat()), None, demo.prompts, demo.stop_token_ids)
    with served(demo.target_path) as (url, _):
        theirs = ask_all(url, demo.prompts, demo.stop_token_ids, SLOTS)
    assert equal(ours, theirs, demo.stop_token_ids) == NUM_PROMPTS


def test_the_dflash_arm_writes_our_tokens_and_accepts_as_many(demo):
    draft = read_draft(demo.draft_path, jnp.float32)
    ours = answers(read_target(demo.target_path, WeightFormat()), draft, demo.prompts, demo.stop_token_ids)
    with served(demo.target_path, demo.draft_path, block_size_of(demo.draft_path)) as (url, lines):
        accepted = []  # one request at a time, and without its last round, which they do not cut
        for one, prompt in zip(ours, demo.prompts, strict=True):
            before = len(rounds_of(lines))
            tokens = without_stops(ask(url, prompt, demo.stop_token_ids), demo.stop_token_ids)
            assert tokens == without_stops(one.token_ids, demo.stop_token_ids)
            accepted.append(rounds_of(lines)[before:][:-1])
        at_once = ask_all(url, demo.prompts, demo.stop_token_ids, SLOTS)
        assert not [line for line in lines if "No file found" in line]
    assert equal(ours, at_once, demo.stop_token_ids) == NUM_PROMPTS
    wanted = [[count + 1 for count in one.accepted_per_round[:-1]] for one in ours]
    their_mean, our_mean = (np.mean([length for rounds in each for length in rounds]) for each in (accepted, wanted))
    print(f"accept_length {their_mean:.3f} there, {our_mean:.3f} here, over {sum(map(len, wanted))} rounds")
    assert their_mean == pytest.approx(our_mean, rel=0.01)
    assert our_mean > 3


def test_a_chat_through_the_gateway_is_our_servers(demo):
    tokenizer = load_tokenizer(demo.target_path)
    config = EngineConfig(num_slots=SLOTS, max_length=256, prefill_chunk=64, stop_token_ids=tuple(demo.stop_token_ids))
    target, draft = read_target(demo.target_path, WeightFormat()), read_draft(demo.draft_path, jnp.float32)
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    replies = []
    with (
        served(demo.target_path, demo.draft_path, block_size_of(demo.draft_path)) as (url, _),
        contextlib.closing(RemoteEngine(url, config, len(tokenizer))) as remote,
    ):
        for engine in (Engine(target, draft, config), remote):
            with serving(engine, tokenizer) as address, client_of(address, timeout=600) as client:
                reply = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
                replies.append((reply.choices[0].message.model_dump(), reply.usage.completion_tokens))
    assert replies[0] == replies[1]
    assert replies[0][0]["content"] == "17 + 25 = 42"


def test_a_draft_with_other_layer_ids_accepts_less_and_is_seen_by_that(demo, tmp_path):
    draft = tmp_path / "draft"
    shutil.copytree(demo.draft_path, draft)
    config = json.loads((draft / "config.json").read_text())
    ids = config["dflash_config"]["target_layer_ids"]
    shifted = [layer - 1 for layer in ids] if ids[0] > 0 else [layer + 1 for layer in ids]
    config["dflash_config"]["target_layer_ids"] = shifted
    if "target_layer_ids" in config:
        config["target_layer_ids"] = shifted
    (draft / "config.json").write_text(json.dumps(config))
    ours = answers(
        read_target(demo.target_path, WeightFormat()),
        read_draft(demo.draft_path, jnp.float32),
        demo.prompts[:8],
        demo.stop_token_ids,
    )
    with served(demo.target_path, draft, config["block_size"]) as (url, lines):
        theirs = ask_all(url, demo.prompts[:8], demo.stop_token_ids, 1)
    assert equal(ours, theirs, demo.stop_token_ids) == 8  # a bad draft changes no token
    our_mean = np.mean([count + 1 for one in ours for count in one.accepted_per_round])
    assert np.mean(rounds_of(lines)) < 0.9 * our_mean


def test_layer_ids_that_the_target_has_not_end_the_start(demo, tmp_path):
    draft = tmp_path / "draft"
    shutil.copytree(demo.draft_path, draft)
    text = (draft / "config.json").read_text()
    config = json.loads(text)
    config["dflash_config"]["target_layer_ids"][-1] = 99
    config.pop("target_layer_ids", None)
    (draft / "config.json").write_text(json.dumps(config))
    with pytest.raises(PipelineError, match="target_layer_ids"), served(demo.target_path, draft, config["block_size"]):
        pass


@pytest.fixture(scope="module")
def random_target(tmp_path_factory):
    path = tmp_path_factory.mktemp("random") / "target"
    (path.parent / "wanted.json").write_text(json.dumps(models.PACKED_TARGET))
    run_oracle("make_gpt_oss", config=path.parent / "wanted.json", seed=5, out=path)
    return path


def random_prompts():
    """Prompts of every kind of length: within a window of 7, beyond it, and of several chunks."""
    draw = np.random.default_rng(0)
    return [draw.integers(8, 90, count).tolist() for count in (1, 6, 7, 40, 150, 200)]


def test_packed_experts_are_read(random_target, tmp_path):
    run_oracle("pack_mxfp4", model=random_target, out=tmp_path / "packed", shards=3)
    target = read_target(tmp_path / "packed", WeightFormat())
    ours = answers(target, None, random_prompts(), [])
    with served(tmp_path / "packed", None, None, "--skip-tokenizer-init") as (url, _):
        assert equal(ours, ask_all(url, random_prompts(), [], SLOTS), []) == len(ours)


def test_bfloat16_files_and_a_draft_that_knows_nothing(random_target, tmp_path):
    rounded = read_target(random_target, WeightFormat("bfloat16"))
    (tmp_path / "target").mkdir()
    save_target(tmp_path / "target", TargetModel(rounded.config, rounded.weights), {})
    target = read_target(tmp_path / "target", WeightFormat())
    draft = random_draft(target.config)
    (tmp_path / "draft").mkdir()
    save_draft(tmp_path / "draft", draft, {})
    ours = answers(target, draft, random_prompts(), [])
    with served(tmp_path / "target", tmp_path / "draft", draft.config.block_size, "--skip-tokenizer-init") as (url, _):
        assert equal(ours, ask_all(url, random_prompts(), [], SLOTS), []) == len(ours)


def test_a_draft_that_lacks_a_tensor_is_refused(demo, tmp_path):
    from safetensors.numpy import load_file, save_file

    draft = tmp_path / "draft"
    shutil.copytree(demo.draft_path, draft)
    tensors = load_file(draft / "model.safetensors")
    del tensors["fc.weight"]
    save_file(tensors, draft / "model.safetensors")
    with pytest.raises(PipelineError, match="lacks 1 tensors"), served(demo.target_path, draft, 8):
        pass
