"""JSON files in a job's private directory that are looked at again and again, and read once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class JsonFiles:
    """What files in JSON say. Each is replaced as a whole, never changed, and so read again only if it was replaced."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[tuple[int, int, int], Any]] = {}

    def read(self, path: Path) -> Any:
        """What one says; None if it cannot be read, or is not JSON."""
        try:
            status = path.stat()
            # The number of the file as well: two may be written within one tick of the clock.
            version = (status.st_ino, status.st_mtime_ns, status.st_size)
            seen, said = self._seen.get(path, (None, None))
            if seen != version:
                said = _parsed(path.read_bytes())
                self._seen[path] = (version, said)
        except OSError:
            return None
        return said


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None
