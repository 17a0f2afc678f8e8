"""Is the memory of a block returned, without a look at all that was in use before?"""

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
    gc.freeze()  # as before, for the tests that follow


def garbage():
    return weakref.ref(Cycle())


@pytest.mark.parametrize("block", [memory_returned, training_session])
@pytest.mark.parametrize("fails", [False, True])
def test_what_a_block_leaves_behind_is_free_and_what_was_in_use_is_set_aside(nothing_set_aside, block, fails):
    with contextlib.suppress(ZeroDivisionError), block():
        left, aside = garbage(), gc.get_freeze_count()
        if fails:
            1 / 0  # noqa: B018
    assert left() is None and aside > 10_000 and not gc.get_freeze_count()


@pytest.mark.parametrize("block", [memory_returned, training_session])
def test_the_host_need_not_wait_for_garbage_of_before(nothing_set_aside, block):
    """It looks for models that nobody uses any more, and would not find them among what is set aside."""
    earlier = garbage()
    with block():
        assert earlier() is None


def test_blocks_within_blocks_return_their_own_memory(nothing_set_aside):
    with memory_returned():
        with memory_returned():
            inner = garbage()
        assert inner() is None and gc.get_freeze_count()
    assert not gc.get_freeze_count()


def test_what_others_set_aside_stays_so(nothing_set_aside):
    gc.freeze()
    with memory_returned():
        left = garbage()
    assert left() is None and gc.get_freeze_count()
