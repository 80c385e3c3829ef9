"""Pages by numbers alone: who has which, what is shared, and that none is lost."""

import numpy as np
import pytest

from pipeline.engine.config import EngineConfig
from pipeline.engine.layout import PageLayout, cache_tokens, page_layout
from pipeline.engine.page_pool import PagePool, keys_of
from pipeline.engine.row_pages import RowPages
from pipeline.errors import PipelineError
from pipeline.model.layers.kv_pages import NOWHERE

SIZE, WINDOW = 4, 6
TEXT = list(range(100, 140))


def pages_of(num_pages=20, num_sliding=20, num_slots=3, window=WINDOW, *, reuse=True):
    return RowPages(PageLayout(SIZE, 8, window, num_pages, num_sliding), num_slots, reuse=reuse)


def opened(pages, slot, tokens):
    """A slot whose row has these tokens to compute; how many positions it found."""
    keys = keys_of(tokens, SIZE)
    reusable = pages.num_reusable(keys, len(tokens))
    assert pages.can_open(reusable, keys, len(tokens))
    return pages.open(slot, reusable, keys, len(tokens))


def prefilled(pages, slot, tokens):
    found = opened(pages, slot, tokens)
    assert pages.grow(slot, len(tokens))
    pages.commit(slot, tokens, len(tokens))
    return found


def test_the_longest_unused_page_is_forgotten_first():
    pool = PagePool(3)
    pages = [pool.take() for _ in range(3)]
    assert sorted(pages) == [0, 1, 2]
    for page in pages:
        pool.name(page, bytes([page]))
    for page in (pages[1], pages[0], pages[2]):
        pool.release(page)
    assert pool.num_available == 3
    pool.share(pages[1])  # used again: now the first of the two others goes
    assert pool.take() == pages[0]
    assert [pool.find(bytes([page])) for page in pages] == [None, pages[1], pages[2]]
    assert pool.num_available == 1


def test_a_page_without_a_name_is_free_at_once_and_two_equal_ones_have_one_name():
    pool = PagePool(2)
    first, second = pool.take(), pool.take()
    pool.name(first, b"same")
    pool.name(second, b"same")
    pool.release(second)
    assert pool.find(b"same") == first
    assert pool.take() == second


def test_keys_are_those_of_all_tokens_so_far():
    assert keys_of(TEXT[:8], SIZE) == keys_of(TEXT[:11], SIZE)
    other = [1, *TEXT[1:]]
    assert not set(keys_of(other, SIZE)) & set(keys_of(TEXT, SIZE))
    assert keys_of(TEXT, SIZE, keys_of(TEXT[:9], SIZE)) == keys_of(TEXT, SIZE)


def test_a_row_finds_what_another_one_has_computed_up_to_where_they_part():
    pages = pages_of()
    assert prefilled(pages, 0, TEXT[:18]) == 0
    shared = pages.row_tables(0)[0, :2].tolist()
    assert prefilled(pages, 1, TEXT[:10] + [1] * 6) == 8
    assert pages.row_tables(1)[0, :2].tolist() == shared
    assert pages.row_tables(1)[0, 2] != pages.row_tables(0)[0, 2]


def test_one_token_at_least_is_left_to_compute():
    pages = pages_of()
    prefilled(pages, 0, TEXT[:16])
    assert pages.num_reusable(keys_of(TEXT[:16], SIZE), 16) == 3


def test_without_reuse_nothing_is_found():
    pages = pages_of(reuse=False)
    prefilled(pages, 0, TEXT[:16])
    assert opened(pages, 1, TEXT[:16]) == 0


def test_a_finished_row_is_found_again_until_its_pages_are_wanted():
    pages = pages_of(num_pages=8)
    prefilled(pages, 0, TEXT[:16])
    pages.close(0)
    assert pages.num_available == 8
    assert prefilled(pages, 1, TEXT[:16]) == 12
    pages.close(1)
    prefilled(pages, 2, [7] * 31)
    pages.close(2)
    assert pages.num_reusable(keys_of(TEXT[:16], SIZE), 16) == 0


def test_what_the_window_has_passed_must_still_be_there_where_it_is_reused():
    """A row that went on gave back its sliding pages; when others took them, only what still has them is found."""
    pages = pages_of(num_pages=40, num_sliding=7, num_slots=3)
    prefilled(pages, 0, TEXT[:13])
    for length in range(14, 30):
        assert pages.grow(0, length)
        pages.commit(0, TEXT[:length], length - 1)
    assert pages.num_reusable(keys_of(TEXT[:28], SIZE), 28) == 6
    prefilled(pages, 1, [9] * 11)  # takes pages that no window shows any more, the oldest first
    assert pages.num_reusable(keys_of(TEXT[:13], SIZE), 13) < 3
    assert pages.num_reusable(keys_of(TEXT[:28], SIZE), 28) == 6


def test_a_page_that_is_being_computed_is_waited_for():
    pages = pages_of()
    opened(pages, 0, TEXT[:12])
    keys = keys_of(TEXT[:14], SIZE)
    assert pages.is_coming(keys, pages.num_reusable(keys, 14))
    assert pages.grow(0, 12)
    pages.commit(0, TEXT[:12], 12)
    assert not pages.is_coming(keys, pages.num_reusable(keys, 14))
    assert pages.num_reusable(keys, 14) == 3


def test_what_was_coming_from_a_cancelled_row_comes_no_more():
    pages = pages_of()
    opened(pages, 0, TEXT[:12])
    pages.close(0)
    assert not pages.is_coming(keys_of(TEXT[:12], SIZE), 0)


def test_tables_that_a_step_has_do_not_change():
    pages = pages_of()
    before = pages.tables()
    held = before.copy()
    prefilled(pages, 0, TEXT[:16])
    assert (before == held).all()
    assert (pages.tables()[:, 0, :4] != NOWHERE).any()
    assert pages.tables() is pages.tables()


def test_growing_takes_all_or_nothing():
    pages = pages_of(num_pages=8)
    opened(pages, 0, TEXT[:20])
    opened(pages, 1, TEXT[20:28])
    available = pages.num_available
    assert not pages.grow(1, 20)
    assert pages.num_available == available
    assert pages.grow(1, 12)


@pytest.mark.parametrize("window", [WINDOW, None], ids=["sliding layers", "none"])
def test_whatever_comes_and_goes_no_page_is_lost_or_in_two_rows(window):
    random = np.random.default_rng(0)
    pages = pages_of(num_pages=24, num_sliding=0 if window is None else 30, num_slots=4, window=window)
    rows = {}
    for _ in range(2000):
        slot = int(random.integers(4))
        if slot not in rows:
            tokens = [
                *TEXT[: int(random.integers(0, 12))],
                *random.integers(0, 3, int(random.integers(1, 10))).tolist(),
            ]
            keys = keys_of(tokens, SIZE)
            reusable = pages.num_reusable(keys, len(tokens))
            if not pages.is_coming(keys, reusable) and pages.can_open(reusable, keys, len(tokens)):
                prefilled(pages, slot, tokens)
                rows[slot] = tokens
        elif random.random() < 0.3 or len(rows[slot]) > 26:
            pages.close(slot)
            del rows[slot]
        elif pages.grow(slot, len(rows[slot]) + 3):
            rows[slot] = rows[slot] + random.integers(0, 3, 2).tolist()
            pages.commit(slot, rows[slot], len(rows[slot]) - 1)
        used = {}
        for one, tokens in rows.items():
            keys = keys_of(tokens, SIZE)
            for index, page in enumerate(pages.row_tables(one)[0]):
                if page != NOWHERE:
                    # two rows have a page in common only where all their tokens up to its end are the same
                    used.setdefault(int(page), set()).add(keys[index] if index < len(keys) else (one, index))
        assert all(len(holders) == 1 for holders in used.values())
        assert len(used) + pages.num_available == 24
    for slot in list(rows):
        pages.close(slot)
    assert pages.num_available == 24


def config(**values):
    return EngineConfig(**{"num_slots": 64, "max_length": 16384, "prefill_chunk": 512, **values})


def test_memory_is_for_usual_requests_unless_it_is_set():
    assert cache_tokens(config()) < 64 * 16384 / 10
    assert cache_tokens(config(num_slots=8, max_length=384)) == 8 * 384
    assert cache_tokens(config(cache_tokens=20000)) == 20000


def test_a_cache_that_cannot_hold_the_longest_request_is_refused():
    with pytest.raises(PipelineError, match="holds 16000 tokens over mesh.data=1; a request may have 16384: raise"):
        page_layout(config(cache_tokens=16000), 128, 8, 1)
    with pytest.raises(PipelineError, match="raise cache_tokens to 32768"):
        page_layout(config(cache_tokens=20000), 128, 8, 2)


@pytest.mark.parametrize(("name", "value"), [("page_size", 0), ("cache_tokens", 0), ("step_tokens", -1)])
def test_sizes_that_are_none_are_refused(name, value):
    with pytest.raises(PipelineError, match=f"{name} is {value}; it must be"):
        config(**{name: value})
