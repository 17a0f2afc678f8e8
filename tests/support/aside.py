"""What modules hold, set aside: half a million objects take a collection half a second. No test in here."""

import gc
import sys


class ModulesAside:
    """Has later collections, which the host and each training ask for, pass over new objects alone."""

    def __init__(self, many: int):
        self.many, self.known = many, 0

    def __call__(self):
        """Collect, and set everything aside once more, where at least so many modules are new."""
        if len(sys.modules) >= self.known + self.many:
            gc.unfreeze()
            gc.collect()
            gc.freeze()
            self.known = len(sys.modules)
