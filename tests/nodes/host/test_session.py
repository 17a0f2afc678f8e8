"""Is the memory of a block returned, and only what it left behind looked for?"""

import contextlib
import gc
import weakref

import pytest

from personalize.nodes.host.session import memory_returned, training_session

pytestmark = pytest.mark.comfy


class Cycle:
    """Garbage that only a collection finds."""

    def __init__(self):
        self.itself = self


@pytest.fixture
def nothing_set_aside():
    """As in a host, where nobody has done so; tests/conftest.py does it for the tests."""
    gc.unfreeze()
    gc.disable()  # no collection but those that are asked for
    yield
    gc.enable()


def garbage():
    return weakref.ref(Cycle())


@pytest.mark.parametrize("block", [memory_returned, training_session])
@pytest.mark.parametrize("fails", [False, True])
def test_what_a_block_leaves_behind_is_free_and_the_rest_is_not_looked_at(nothing_set_aside, block, fails):
    gc.collect()
    with contextlib.suppress(ZeroDivisionError), block():
        left = garbage()
        if fails:
            1 / 0  # noqa: B018
    assert left() is None and not gc.get_freeze_count()


def test_garbage_from_before_waits_for_the_next_collection(nothing_set_aside):
    earlier = garbage()
    with memory_returned():
        pass
    assert earlier() is not None
    gc.collect()
    assert earlier() is None


def test_blocks_within_blocks_return_their_own_memory(nothing_set_aside):
    with memory_returned():
        outer = garbage()
        with memory_returned():
            inner = garbage()
        assert inner() is None and outer() is None and gc.get_freeze_count()
    assert not gc.get_freeze_count()


def test_what_others_set_aside_stays_so(nothing_set_aside):
    gc.freeze()
    with memory_returned():
        left = garbage()
    assert left() is None and gc.get_freeze_count()
