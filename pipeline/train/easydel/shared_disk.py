"""Saves checkpoints of several hosts on a disk that they share: each writes its parts of arrays, the primary the rest.

EasyDeL does so in buckets. On a path that it considers local every host writes every file, and on a shared disk two
hosts then write one file at once.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from easydel.infra import base_state
from easydel.infra.mixins import bridge
from easydel.trainers import base_trainer
from eformer.serialization import fsspec_utils

from pipeline import distributed

# modules of EasyDeL's that ask whether a path is remote; Any, for their type does not list the name
ASKING: tuple[Any, ...] = (base_state, bridge, base_trainer, fsspec_utils)


@contextlib.contextmanager
def one_writer() -> Iterator[None]:
    """Makes EasyDeL treat every path as remote for the block; changes nothing when there is one host."""
    if not distributed.is_multihost():
        yield
        return
    before = [module.is_remote_path for module in ASKING]
    try:
        for module in ASKING:
            module.is_remote_path = lambda path: True
        yield
    finally:
        for module, function in zip(ASKING, before, strict=True):
            module.is_remote_path = function
