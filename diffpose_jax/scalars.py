"""The scalars of a run: a file of one JSON object a line, whole after any interruption."""

from __future__ import annotations

import json
from pathlib import Path

from diffpose_jax.files import write_whole


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
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a", buffering=1)

    def __enter__(self) -> ScalarWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, step: int, **scalars: float) -> None:
        """Writes one line."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
