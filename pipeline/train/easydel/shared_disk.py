"""Checkpoints of several hosts on a disk that they share: each host writes its parts of arrays, the first the rest.

EasyDeL does so in buckets. On what it takes for a local disk every host writes every file, and a shared one then holds
files that two have written at once.
"""

import contextlib
from collections.abc import Iterator

from easydel.infra import base_state
from easydel.infra.mixins import bridge
from easydel.trainers import base_trainer
from eformer.serialization import fsspec_utils

from pipeline import distributed

ASKING = (base_state, bridge, base_trainer, fsspec_utils)  # modules of theirs that ask whether a path is remote


@contextlib.contextmanager
def one_writer() -> Iterator[None]:
    """While several hosts save, every path is as good as remote."""
    if not distributed.is_multihost():
        yield
        return
    before = [module.is_remote_path for module in ASKING]
    try:
        for module in ASKING:
            module.is_remote_path = lambda path: True
        yield
    finally:
        for module, asked in zip(ASKING, before, strict=True):
            module.is_remote_path = asked
