"""Configurations as they come in: from files, flags and checkpoints."""

from __future__ import annotations

import inspect
import math
import types
import typing
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
        value is of another type than in the signature, or was refused by the function.
    """
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"{where} must hold fields, not {str(config)[:100]!r}")
    parameters = inspect.signature(function, eval_str=True).parameters
    required = {name for name, p in parameters.items() if p.default is p.empty}
    unknown, missing = sorted(set(config) - set(parameters)), sorted(required - set(config))
    if unknown or missing:
        parts = [f"unknown field {name[:60]}" for name in unknown[:20]]
        parts += [f"missing field {name}" for name in missing]
        raise ConfigError(f"{where}: {', '.join(parts)}; the fields are {', '.join(parameters)}")
    for name, value in config.items():
        if not _is_a(value, wanted := parameters[name].annotation):
            wanted = getattr(wanted, "__name__", wanted)
            raise ConfigError(f"{where}.{name} must be of type {wanted}, not {str(value)[:100]!r}")
    try:
        return function(**config)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value of a field is of the type that stands in the signature, and finite."""
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, one) for one in typing.get_args(kind))
    if kind in (int, float):
        kinds = int if kind is int else int | float
        return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < math.inf
    return kind is inspect.Parameter.empty or isinstance(value, typing.get_origin(kind) or kind)
