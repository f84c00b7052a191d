"""Libraries that only a part of the users need, imported when they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A library of an extra is not installed; the message says how to install it."""


def load(module: str, extra: str) -> ModuleType:
    """Imports a library such as "h5py" that an extra of the package installs (see setup.cfg)."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"this needs {module}: pip install 'diffpose_jax[{extra}]'"
        ) from error
