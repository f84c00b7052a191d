"""The scalars of a run: a file of one JSON object a line, whole after any interruption."""

from __future__ import annotations

import json
import os
from pathlib import Path

from diffpose_jax.io.files import FileError, write_atomic


def read_scalars(path: str | Path) -> list[dict[str, float]]:
    """The lines of a file, none if it does not exist, without a torn last line.

    Raises:
      FileError: if another line is damaged.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            scalars = json.loads(line)
            is_whole = type(scalars["step"]) is int and all(
                type(value) in (int, float) for value in scalars.values()
            )
        except (ValueError, LookupError, TypeError, RecursionError):
            is_whole = False
        if not is_whole:
            raise FileError(f"{path}, line {number} is damaged: it must hold numbers, and the step")
        found.append(scalars)
    return found


class ScalarWriter:
    """Appends scalars to a file, a context manager.

    A run that resumes does the steps after its last checkpoint again: lines after `last_step`, and
    a line that was torn when the run was killed, are removed first.
    """

    def __init__(self, path: str | Path, last_step: int) -> None:
        kept = [line for line in read_scalars(path) if line["step"] <= last_step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        # Without a buffer: a line is there when `write` returns, and a full disk fails there.
        self._path = Path(path)
        self._file = self._path.open("ab", buffering=0)

    def __enter__(self) -> ScalarWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, step: int, **scalars: float) -> None:
        """Writes one line; raises an OSError that names the file if the disk is full."""
        line = (json.dumps({"step": step, **scalars}) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise type(error)(error.errno, error.strerror, os.fspath(self._path)) from error

    def sync(self) -> None:
        """Waits until all lines are on the disk, for a checkpoint must not outlive its lines."""
        os.fsync(self._file.fileno())
