"""Pytest plugin: how pytest-xdist shares out the tests among processes.

The tests of a file stay together and in order, for most expensive fixtures are a module's. The most expensive files
begin first, so that no process is left with one of them at the end.
"""

from typing import Any

import pytest

from tests.support.paths import TESTS

# CPU seconds of the expensive files, from `python -m tests.support.timing`; the order of the others matters little
SECONDS: dict[str, int] = {}


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
