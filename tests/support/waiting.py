"""Waiting in tests: for what must come to be, never for a while. No test in here."""

import time

LIMIT = 900  # seconds that nothing takes on a machine with ten times the work it can do; only a fault meets it


def until(ready, alive=lambda: None, limit=LIMIT):
    """What `ready()` says as soon as it is true; `alive` may raise when it can no longer be.

    Raises:
        AssertionError: it did not come to that within the limit.
    """
    end = time.monotonic() + limit
    while not (found := ready()):
        alive()
        assert time.monotonic() < end, f"it did not come to that in {limit} seconds"
        time.sleep(0.02)
    return found
