"""The programs: thin mains over the library."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import app, logging

from diffpose_jax.checkpoints import CheckpointError
from diffpose_jax.config import ConfigError
from diffpose_jax.extras import MissingExtraError
from diffpose_jax.pictures import PictureError
from diffpose_jax.prediction import PredictionError
from diffpose_jax.torch_weights import WeightsError
from diffpose_jax.training import NonFiniteLossError

_USERS_ERRORS = (
    CheckpointError,
    ConfigError,
    MissingExtraError,
    NonFiniteLossError,
    PictureError,
    PredictionError,
    WeightsError,
)

# Orbax has an info for every file that it touches. `--verbosity=0` brings them back.
logging.set_verbosity(logging.WARNING)


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a program; errors that are the user's to mend end it with their message alone."""

    def wrapped(arguments: list[str]) -> None:
        try:
            main(arguments)
        except _USERS_ERRORS as error:
            sys.exit(f"error: {error}")

    def parse(arguments: list[str]) -> list[str]:
        try:
            return app.parse_flags_with_usage(arguments)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            overrides = [a for a in arguments if a.startswith(("--config.", "-config."))]
            sys.exit(
                f"error: {' '.join(overrides) or '--config'} does not fit the configuration"
                f" ({str(error).strip(chr(34) + chr(39))}); configs/h36m.py has all fields"
            )

    app.run(wrapped, flags_parser=parse)
