"""Pytest plugin: how pytest-xdist shares out the tests among processes.

The tests of a file stay together and in order, for most expensive fixtures are a module's. The most expensive files
begin first, so that no process is left with one of them at the end.
"""

from typing import Any

import pytest

from tests.support.paths import TESTS

# CPU seconds of the expensive files, from `python -m tests.support.timing`; the order of the others matters little
SECONDS = {
    "test_flipped_bytes.py": 177,
    "engine/test_grammars.py": 168,
    "test_canaries.py": 161,
    "engine/test_sampled_engine.py": 155,
    "model/gpt_oss/test_forward.py": 130,
    "engine/test_engine.py": 113,
    "train/easydel/test_hosts.py": 113,
    "engine/test_multihost.py": 111,
    "target/test_pretrain.py": 105,
    "model/test_sharding.py": 101,
    "test_mesh_stages.py": 101,
    "teacher_cache/test_stage.py": 96,
    "test_main.py": 93,
    "teacher_cache/test_generators.py": 92,
    "engine/test_paged_engine.py": 79,
    "teacher_cache/test_row_answers.py": 76,
    "train/test_stage.py": 60,
    "tracking/test_run.py": 57,
    "serve/test_stage.py": 53,
    "cli/test_sweep.py": 53,
    "export/test_write.py": 51,
    "smoke/test_stage.py": 50,
    "train/data/test_packing.py": 50,
    "model/hf/test_mxfp4_checkpoints.py": 47,
    "train_peer/test_stage.py": 44,
    "target/test_shipped.py": 39,
    "engine/test_block_choice.py": 38,
    "model/gpt_oss/test_experts.py": 37,
    "train/easydel/test_devices.py": 37,
    "train/data/test_live_target.py": 36,
    "teacher_cache/test_buckets_and_writers.py": 34,
    "ask/test_stage.py": 33,
    "serve/test_formats.py": 32,
    "roofline/test_passes.py": 32,
    "engine/test_dflash_parity.py": 31,
    "model/layers/test_drafted_texts.py": 30,
    "feasibility/test_step_times.py": 25,
    "train/loss/test_objective.py": 25,
    "target/test_o200k.py": 24,
    "tracking/test_server_away.py": 23,
    "feasibility/test_expert_traffic.py": 23,
    "export/test_easydel_checkpoint.py": 23,
    "model/layers/test_sampling.py": 22,
    "train/loss/test_loss_parity.py": 22,
    "engine/test_capture.py": 21,
    "export/test_engine_check.py": 21,
    "target/test_gpt_oss_gguf.py": 21,
    "export/test_stage.py": 20,
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
