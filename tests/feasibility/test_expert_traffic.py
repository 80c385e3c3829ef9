"""Experts counted on texts, and what a roofline makes of them."""

import dataclasses
import itertools

import numpy as np
import pytest

from pipeline.config.schema import FeasibilityConfig
from pipeline.errors import PipelineError
from pipeline.feasibility import stage
from pipeline.feasibility.expert_traffic import ExpertTraffic
from tests.feasibility.test_step_times import gpt_oss
from tests.support import cached

MODEL, DRAFT = gpt_oss("20b", 8)  # 32 experts, of which a token chooses four


def traffic(*answers):
    return ExpertTraffic(MODEL, tuple(np.array(one, np.int16) for one in answers))


def cycling(length, period, layers=2):
    """Tokens that choose four experts of their own, again after `period` tokens."""
    return [[[4 * (at % period) + one for one in range(4)]] * layers for at in range(length)]


def test_tokens_that_choose_the_same_experts_hit_four_and_others_four_each():
    same, others = traffic(cycling(20, 1)), traffic(cycling(20, 8))
    assert [same.distinct(1, block) for block in (1, 4, 8)] == [4, 4, 4]
    assert [others.distinct(1, block) for block in (1, 4, 8)] == [4, 16, 32]
    assert same.distinct(5, 8) == 4
    assert same.agreement(8) == pytest.approx(1.0)
    assert others.agreement(4) < 0  # fewer meet than by chance


def test_where_every_token_chooses_all_experts_no_token_adds_one():
    dense = dataclasses.replace(MODEL, num_local_experts=4, num_experts_per_tok=4)
    assert ExpertTraffic(dense, (np.array(cycling(20, 1), np.int16),)).agreement(8) == 1.0


def test_random_choices_hit_what_is_modelled_of_them():
    random = np.random.default_rng(0)
    found = traffic(*(np.argsort(random.random((300, 3, 32)), axis=-1)[..., :4] for _ in range(40)))
    for count, block in itertools.product((1, 8), (1, 4, 8)):
        assert found.distinct(count, block) == pytest.approx(32 * (1 - (1 - 1 / 8) ** (count * block)), rel=0.02)
    assert found.agreement(8) == pytest.approx(0, abs=0.05)


def test_several_at_once_come_from_several_answers_and_layers_are_averaged():
    of_its_own = [[[[4 * index + one for one in range(4)], [0, 1, 2, 3]]] * 9 for index in range(8)]
    found = traffic(*of_its_own)
    assert found.distinct(8, 4) == (32 + 4) / 2
    assert found.distinct(1, 4) == 4


def test_answers_that_are_too_short_are_left_out_and_refused_when_all_are():
    assert traffic(cycling(3, 8), cycling(9, 1)).distinct(1, 8) == 4
    with pytest.raises(PipelineError, match="the longest answer of the teacher cache has 3 tokens, and a block 8"):
        traffic(cycling(3, 8)).distinct(1, 8)


def test_the_stage_counts_the_experts_of_the_caches_answers(config, cache, tracker, capsys):
    config.teacher_cache.path = str(cache.path)
    config.feasibility = FeasibilityConfig(
        chips=["v6e"], num_devices=1, block_sizes=[8], concurrencies=[1, 4], traffic=True
    )
    found = stage.run(config, tracker)
    table = {(one["concurrency"], one["block_size"]): one for one in found["experts"]}
    assert table.keys() == {(1, 1), (1, 4), (1, 8), (4, 1), (4, 4), (4, 8)}
    assert config.target.architecture is None  # the sizes are those of the target's own files
    chosen, of = cached.MODEL.num_experts_per_tok, cached.MODEL.num_local_experts
    assert table[1, 1]["counted"] == chosen
    assert chosen < table[1, 4]["counted"] <= table[1, 8]["counted"] <= table[4, 8]["counted"] <= of
    assert table[1, 8]["counted"] != table[1, 8]["at_random"] != table[1, 8]["modelled"]
    assert f"{table[4, 8]['counted']:.1f}" in capsys.readouterr().out
    config.feasibility.traffic = False
    assert "counted" not in stage.run(config, tracker)["experts"][0]
