"""steps.jsonl while a run trains: the lines in memory are those on the disk."""

import json

from .folder import RunFolder


class StepLog:
    """The log of a run, open for more."""

    def __init__(self, folder: RunFolder, entries: list[dict]):
        self.folder = folder
        self._write(entries)

    def __len__(self) -> int:
        return len(self.entries)

    def append(self, entry: dict) -> None:
        self.entries.append(entry)
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def rewind(self, steps: int) -> None:
        """Forget what came after `steps`."""
        self.close()
        self._write(self.entries[:steps])

    def _write(self, entries: list[dict]) -> None:
        self.entries, self.file = entries, self.folder.log(entries)

    def close(self) -> None:
        self.file.close()
