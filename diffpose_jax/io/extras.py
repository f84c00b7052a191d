"""Libraries that only a part of the users need: extras of the package, imported when called for."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A library of an extra is not installed; the message says how to install it."""


def load(module: str, extra: str) -> ModuleType:
    """Imports a library of an extra.

    Args:
      module: its name, such as "h5py".
      extra: the extra of the package that installs it, see `setup.cfg`.

    Raises:
      MissingExtraError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"this needs {module}: pip install 'diffpose_jax[{extra}]'"
        ) from error
