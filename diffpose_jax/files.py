"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: str | os.PathLike[str], content: bytes) -> Path:
    """Writes a file beside its place, then renames it: whole or not at all.

    Args:
      path: where to; its folders are made.
      content: the bytes.

    Returns:
      The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def write_json(path: str | os.PathLike[str], content: Any) -> Path:
    """Writes content as JSON, see `write_whole`."""
    return write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
