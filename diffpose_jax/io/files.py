"""Writes files so that a kill leaves the old content or the new one, and reads JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class FileError(ValueError):
    """A file is damaged or holds something else than it should; the message names it."""


def write_atomic(path: str | os.PathLike[str], content: bytes) -> Path:
    """Writes a file beside its place, then renames it; its folders are made.

    An OSError, for a full disk or a folder that cannot be written, names the file.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        sync(path.parent)
    except OSError as error:  # that of a write does not say of which file
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error
    return path


def sync(path: str | os.PathLike[str]) -> None:
    """Waits until a file, or a folder's list of names, is on the disk.

    A rename outlives a power failure when the file was synced before and its folder after it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file; raises FileError if it is none, FileNotFoundError if it is not there."""
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:  # the latter if it is nested too deep
        raise FileError(f"{path} is no JSON file, or damaged: {error}") from error


def write_json(path: str | os.PathLike[str], content: Any) -> Path:
    """Writes content as JSON, see `write_atomic`."""
    return write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())
