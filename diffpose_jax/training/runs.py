"""Signals that stop a run, and the record of how it began."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from diffpose_jax._version import __version__
from diffpose_jax.config import Config, ConfigError
from diffpose_jax.io.files import read_json, write_json

CONFIG = "config.json"
"""The file in a run's folder with its configuration and a record of each of its starts."""

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")
_REPOSITORY = Path(__file__).parents[2]


class Stopped(KeyboardInterrupt):
    """A signal asked the process to stop; `signal` says which."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


def raise_when_stopped() -> None:
    """Makes SIGINT and SIGTERM raise `Stopped`, so that what is half done is cleaned up."""
    others = sys.unraisablehook

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        raise Stopped(number)

    def again(unraisable: Any) -> None:
        # The handler ran in a callback of the garbage collector, or another from which nothing can
        # be raised: the signal would be lost.
        if isinstance(unraisable.exc_value, Stopped):
            send = functools.partial(os.kill, os.getpid(), unraisable.exc_value.signal)
            threading.Timer(0.01, send).start()
        else:
            others(unraisable)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    sys.unraisablehook = again


@contextlib.contextmanager
def deferred_stop() -> Iterator[list[int]]:
    """Lets what runs in it finish its piece of work at SIGINT and SIGTERM.

    Gives the signals that came, none at first, and raises `Stopped` at the end if one came. A
    second SIGINT ends the process at once.
    """
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        signals.append(number)
        # Left to the kernel, as the interpreter might be waiting for a device.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        name = signal.Signals(number).name
        # Not by `print`, which might be interrupted in the middle of another one.
        os.write(2, f"\n{name}: stopping after the running steps; Ctrl-C: at once\n".encode())

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signals:
        raise Stopped(signals[0])


def write_config(folder: Path, config: Config, start: dict[str, Any] | None = None) -> None:
    """Writes config.json: the configuration's fields, and `started` with a record of each start.

    Args:
      folder: the run's.
      config: its configuration.
      start: what `start_record` gives; None if nothing starts, to leave the records as they are.

    Raises:
      ConfigError: if the file that is there is damaged.
    """
    path = folder / CONFIG
    try:
        started = list(read_json(path).get("started", [])) if path.exists() else []
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); remove it") from error
    records = [start] if start else []
    write_json(path, dataclasses.asdict(config) | {"started": [*started, *records]})


def start_record(*, seed: int, step: int, data_fingerprint: str) -> dict[str, Any]:
    """What a run depends on besides its configuration, for `write_config`."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "seed": seed,
        "data_fingerprint": data_fingerprint,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
            "diffpose_jax": __version__,
        },
        "commit": _commit(),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "platform": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _commit() -> str | None:
    """The commit of a checkout, with "+dirty" if files were changed; None for an installation."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", os.fspath(_REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    if not (_REPOSITORY / ".git").exists():
        return None
    try:
        return git("rev-parse", "HEAD") + "+dirty" * bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None
