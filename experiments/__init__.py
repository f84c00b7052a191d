"""The programs: thin mains over the library."""

from __future__ import annotations

import logging as std_logging
import os
import sys
from collections.abc import Callable

from absl import app, logging

from diffpose_jax.config import RENAMED, ConfigError
from diffpose_jax.distributed import ProcessError
from diffpose_jax.interop.torch_weights import WeightsError
from diffpose_jax.io.extras import MissingExtraError
from diffpose_jax.io.files import FileError
from diffpose_jax.io.locks import LockedError
from diffpose_jax.io.pictures import PictureError
from diffpose_jax.io.trees import CheckpointError
from diffpose_jax.prediction.finder import PredictionError
from diffpose_jax.training import runs
from diffpose_jax.training.loop import NonFiniteLossError

_USERS_ERRORS = (
    CheckpointError,
    ConfigError,
    FileError,
    LockedError,
    MissingExtraError,
    NonFiniteLossError,
    OSError,  # a full disk, a folder that cannot be written
    PictureError,
    PredictionError,
    ProcessError,
    WeightsError,
)

# Orbax has an info for every file that it touches. `--verbosity=0` brings them back.
logging.set_verbosity(logging.WARNING)


def _is_no_trace_of_orbax(record: std_logging.LogRecord) -> bool:
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


def without_echoes() -> None:
    """Keeps the traces of an error that is raised from being printed, too, which Orbax does.

    It also gives up the other arrays at the first error of one, and these complain later.
    """
    logging.get_absl_handler().addFilter(_is_no_trace_of_orbax)
    usual = sys.unraisablehook
    echoes = ("Event loop is closed", "Encountered error while reading array")

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not str(unraisable.exc_value).startswith(echoes):
            usual(unraisable)

    sys.unraisablehook = hook


def _printable(message: str) -> str:
    """A message without what a terminal takes for a command: it may hold names out of a file."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a program; errors that are the user's to mend end it with their message alone.

    Stopped by a signal, it ends with 128 + the signal's number, as a shell has it.
    """

    def wrapped(arguments: list[str]) -> None:
        runs.raise_when_stopped()
        without_echoes()
        try:
            main(arguments)
        except _USERS_ERRORS as error:
            sys.exit(_printable("; ".join([f"error: {error}", *getattr(error, "__notes__", [])])))
        except runs.Stopped as stop:
            print(f"\nstopped by {stop}; the same command goes on from here", file=sys.stderr)
            sys.exit(128 + stop.signal)

    def parse(arguments: list[str]) -> list[str]:
        try:
            return app.parse_flags_with_usage(arguments)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            overrides = [a for a in arguments if a.startswith(("--config.", "-config."))]
            renamed = [
                f"config.{old} is called config.{new} now"
                for old, new in RENAMED.items()
                if any(override.lstrip("-").startswith(f"config.{old}") for override in overrides)
            ]
            sys.exit(
                f"error: {' '.join(overrides) or '--config'} does not fit the configuration"
                f" ({str(error).strip(chr(34) + chr(39))}); "
                + ("; ".join(renamed) or "configs/h36m.py has all fields")
            )

    app.run(wrapped, flags_parser=parse)
