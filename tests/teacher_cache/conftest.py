"""What is cached here is compared with what was cached here: programs that are compiled quickly give the same."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quickly(compiled_quickly: None) -> None:
    """All modules of this folder."""
