"""What the readers of users' own copies have in common: messages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffpose_jax.io.files import FileError


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Whatever goes wrong within the context is told of the file, which should be `what`.

    The libraries for these formats have errors of another kind for each damage.
    """
    try:
        yield
    except FileError:
        raise
    except Exception as error:
        raise FileError(f"{path} cannot be read as {what}: {str(error)[:500]}") from error


def listed(names: Sequence[Any], most: int = 10) -> str:
    """The first of many names, for messages."""
    named = ", ".join(map(str, names[:most]))
    return named + (f" and {len(names) - most} more" if len(names) > most else "")
