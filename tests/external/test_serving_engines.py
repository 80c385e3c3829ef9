"""The commands of other programs, and the table that docs/runtimes.md has of them."""

import json
import shlex

import pytest

from pipeline.external.serving_engines import ASPECTS, ENGINES, Service, table
from tests.support.paths import ROOT

SERVICE = Service(target="/t", draft="/d", block_size=8, slots=32, max_length=4096, host="127.0.0.1", port=3000)
PLAIN = Service(target="/t", slots=32, max_length=4096, host="127.0.0.1", port=3000)


def options(command):
    """What stands behind each flag."""
    return {flag: value for flag, value in zip(command, [*command[1:], ""], strict=True) if flag.startswith("--")}


def test_sglang_jax_counts_the_anchor_and_needs_its_two_ones():
    found = options(ENGINES["sglang_jax"].command("/e/bin/python", SERVICE))
    assert found["--speculative-algorithm"] == "DFLASH"
    assert found["--speculative-num-draft-tokens"] == "8"
    assert found["--speculative-eagle-topk"] == found["--speculative-num-steps"] == "1"
    assert found["--context-length"] == "4097"  # its requests must be shorter than its context
    assert found["--max-running-requests"] == "32"


def test_both_arms_of_sglang_jax_schedule_alike():
    commands = [ENGINES["sglang_jax"].command("python", one) for one in (SERVICE, PLAIN)]
    assert all("--disable-overlap-schedule" in command for command in commands)
    assert "--speculative-algorithm" not in commands[1]


def test_vllm_leaves_the_anchor_out_and_is_beside_its_python():
    command = ENGINES["vllm"].command("/e/bin/python", SERVICE)
    assert command[:3] == ["/e/bin/vllm", "serve", "/t"]
    drafted = json.loads(options(command)["--speculative-config"])
    assert drafted == {"method": "dflash", "model": "/d", "num_speculative_tokens": 7}


@pytest.mark.parametrize("name", ENGINES)
def test_what_a_user_adds_comes_last(name):
    service = Service(target="/t", draft="/d", block_size=8, extra=["--page-size", "128"])
    assert ENGINES[name].command("python", service)[-2:] == ["--page-size", "128"]


@pytest.mark.parametrize("name", ENGINES)
def test_every_aspect_is_known_with_its_basis(name):
    findings = ENGINES[name].findings
    assert tuple(findings) == ASPECTS
    assert {one.basis for one in findings.values()} <= {"ran", "read"}


def test_the_table_of_the_documentation_is_this_one():
    assert table() in (ROOT / "docs" / "runtimes.md").read_text()


def test_commands_can_be_typed_into_a_shell():
    command = ENGINES["vllm"].command("python", SERVICE)
    assert shlex.split(shlex.join(command)) == command
