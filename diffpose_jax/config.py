"""Configurations as they come in: from files, flags and checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import ml_collections


class ConfigError(ValueError):
    """A configuration has fields that do not exist or values that do not fit."""


def call(function: Callable[..., Any], config: ml_collections.ConfigDict, where: str) -> Any:
    """Calls a function whose keyword arguments are the fields of a part of a configuration.

    The signature is the list of fields; there is no second one to keep up to date.

    Args:
      function: takes keyword arguments only.
      config: the part of the configuration.
      where: its name in messages, such as "config.model".

    Raises:
      ConfigError: names the fields that are unknown and those that are missing, or says which
        value the function refused.
    """
    parameters = inspect.signature(function).parameters
    required = {name for name, p in parameters.items() if p.default is p.empty}
    unknown, missing = sorted(set(config) - set(parameters)), sorted(required - set(config))
    if unknown or missing:
        parts = [f"unknown field {name}" for name in unknown]
        parts += [f"missing field {name}" for name in missing]
        raise ConfigError(f"{where}: {', '.join(parts)}; the fields are {', '.join(parameters)}")
    try:
        return function(**config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
