"""How many pages and prefill rows an engine's arrays have."""

import dataclasses

from pipeline.engine.config import EngineConfig
from pipeline.errors import PipelineError
from pipeline.model.layers.kv_pages import pages_for

PREFILL_ROWS = 8  # prompts that a prefill step runs side by side, at most
ROW_COUNTS = (1, 8, 32)  # of a server's steps, where fewer slots than it has decode
BLOCK_SIZES = (1, 4, 8, 16)  # that a server chooses from, up to the draft's own
USUAL_LENGTH = 1024  # tokens that a request has, as far as memory is set aside for it without being asked


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """Holds the sizes of one shard's pages.

    `window` is the sliding layers', None where there are none. `num_pages` are those of layers that see everything and
    of the draft, `num_sliding_pages` those of the sliding ones.
    """

    page_size: int
    pages_of_row: int
    window: int | None
    num_pages: int
    num_sliding_pages: int


def page_layout(config: EngineConfig, window: int | None, block_size: int, num_shards: int) -> PageLayout:
    """Returns the pages of each of `num_shards` shards, for a target with this window and blocks of `block_size`.

    Every slot always finds the sliding pages that it needs: twice as many are there, so that those of earlier requests
    last for a while and can be reused. Raises PipelineError when the longest request does not fit.
    """
    size = config.page_size
    of_row = pages_for(config.max_length, size)
    num_pages = pages_for(cache_tokens(config), size) // num_shards
    if num_pages < of_row:
        raise PipelineError(
            f"the engine's key/value cache holds {cache_tokens(config)} tokens over mesh.data={num_shards}; a request "
            f"may have {config.max_length}: raise cache_tokens to {of_row * size * num_shards}, or lower max_length"
        )
    sliding = 0
    if window is not None:
        ahead = max(config.prefill_chunk, 3 * block_size)  # rounds that are under way, and the next one
        of_slot = min(pages_for(window + ahead, size) + 2, of_row)
        sliding = 2 * of_slot * config.num_slots // num_shards
    return PageLayout(size, of_row, window, num_pages, sliding)


def cache_tokens(config: EngineConfig) -> int:
    """Returns for how many tokens there are pages: as set, or for one longest request and usual ones in other slots."""
    if config.cache_tokens is not None:
        return config.cache_tokens
    usual = min(config.max_length, USUAL_LENGTH)
    pages = pages_for(config.max_length, config.page_size) + (config.num_slots - 1) * pages_for(usual, config.page_size)
    return pages * config.page_size


def rows_of_shard(num_slots: int, config: EngineConfig) -> int:
    """Returns how many prompts a shard of `num_slots` slots prefills side by side, at most."""
    within = PREFILL_ROWS if config.step_tokens is None else config.step_tokens // config.prefill_chunk
    return max(1, min(num_slots, within))
