"""The scalars of a run: a file of one JSON object a line, whole after any interruption."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: str | Path, content: Any) -> None:
    """Writes a JSON file beside, then renames it: it is there whole or not at all."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(beside, path)


def read_scalars(path: str | Path) -> list[dict[str, float]]:
    """The lines of a scalars file; none if it does not exist. A torn last line is left out."""
    path = Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


class ScalarWriter:
    """Appends scalars to a file, a context manager.

    A run that resumes does the steps after its last checkpoint again, so their lines, and a
    line that was torn when the run was killed, are removed first.

    Args:
      path: the file.
      last_step: the step that the run resumes from; later lines are removed.
    """

    def __init__(self, path: str | Path, last_step: int) -> None:
        path = Path(path)
        kept = [line for line in read_scalars(path) if line["step"] <= last_step]
        beside = path.with_name(f".{path.name}.partial")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(beside, path)
        self._file = path.open("a", buffering=1)

    def __enter__(self) -> ScalarWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, step: int, **scalars: float) -> None:
        """Writes one line."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
