"""Rotary embedding: what is read from a config, and what is refused."""

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.model.layers.rope import Rope, frequencies
from tests.support import models as tiny_models


def test_both_spellings_of_a_config_read_alike():
    legacy = Rope.from_hf(tiny_models.LEGACY_TARGET)
    assert legacy == Rope.from_hf(tiny_models.TARGET)
    assert Rope.from_hf({"rope_parameters": legacy.to_hf()}) == legacy


def test_disagreeing_thetas_are_refused():
    config = {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    with pytest.raises(PipelineError, match="must agree"):
        Rope.from_hf(config)


@pytest.mark.parametrize("scaling", [{"rope_type": "llama3", "factor": 8.0}, {"rope_type": "yarn", "mscale": 1.0}])
def test_an_unknown_kind_or_key_is_refused(scaling):
    with pytest.raises(PipelineError, match="known are default and yarn"):
        Rope.from_hf({"rope_theta": 1e4, "rope_scaling": scaling})


def test_truncation_changes_gpt_oss_frequencies():
    exact = Rope(theta=150000.0, factor=32.0, truncate=False)
    rounded = Rope(theta=150000.0, factor=32.0, truncate=True)
    ours, theirs = frequencies(exact, 64)[0], frequencies(rounded, 64)[0]
    assert np.abs(ours / theirs - 1).max() > 0.1
    assert frequencies(exact, 64)[1] == pytest.approx(1.3465735902799727)
