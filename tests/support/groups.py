"""Pytest plugin: how pytest-xdist shares out the tests among processes.

The tests of a file stay together and in order, for most expensive fixtures are a module's. The most expensive files
begin first, so that no process is left with one of them at the end.
"""

from typing import Any

import pytest

from tests.support.paths import TESTS

# CPU seconds of the expensive files, from `python -m tests.support.timing`; the order of the others matters little
SECONDS = {
    "model/gpt_oss/test_forward.py": 133,
    "test_flipped_bytes.py": 196,
    "teacher_cache/test_row_answers.py": 81,
    "target/test_shipped.py": 37,
    "target/test_o200k.py": 32,
    "test_canaries.py": 115,
    "engine/test_engine.py": 92,
    "model/test_sharding.py": 89,
    "train/easydel/test_hosts.py": 65,
    "test_mesh_stages.py": 61,
    "model/hf/test_mxfp4_checkpoints.py": 55,
    "conformance/test_documented_rules.py": 52,
    "teacher_cache/test_stage.py": 50,
    "target/test_pretrain.py": 90,
    "train/test_stage.py": 45,
    "test_main.py": 45,
    "train/data/test_packing.py": 42,
    "teacher_cache/test_generators.py": 40,
    "model/gpt_oss/test_experts.py": 38,
    "train/easydel/test_devices.py": 33,
    "export/test_write.py": 33,
    "smoke/test_stage.py": 32,
    "engine/test_capture.py": 32,
    "train_peer/test_stage.py": 31,
    "engine/test_multihost.py": 30,
    "engine/test_dflash_parity.py": 28,
    "train/loss/test_objective.py": 27,
    "train/data/test_live_target.py": 26,
    "roofline/test_passes.py": 25,
    "train/loss/test_loss_parity.py": 25,
    "teacher_cache/test_buckets_and_writers.py": 25,
    "model/hf/test_directory.py": 23,
    "export/test_easydel_checkpoint.py": 21,
    "model/layers/test_sampling.py": 21,
    "teacher_cache/test_check.py": 21,
    "export/test_engine_check.py": 20,
    "export/test_stage.py": 20,
    "engine/test_sampled_engine.py": 19,
    "model/layers/test_attention.py": 17,
    "peer/test_decoding.py": 16,
    "export/test_import.py": 15,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the tests by what their files cost, as far as they run in several processes."""
    if items and hasattr(items[0].config, "workerinput"):
        items.sort(key=lambda item: -SECONDS.get(item.path.relative_to(TESTS).as_posix(), 0))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """A scheduler that hands out whole files, in the order of the tests."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # which would be by the number of tests
    return LoadFileScheduling(config, log)
