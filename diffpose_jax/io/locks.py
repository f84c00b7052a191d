"""Locks on folders. A lock ends with its process, even if that is killed."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import filelock

from diffpose_jax.io.files import read_json, write_json

LOCK, HOLDER = ".lock", ".lock.json"
"""The file in a folder that is locked, which filelock empties, and one that says by whom."""


class LockedError(RuntimeError):
    """Another process has a folder's lock; the message says which."""


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other processes out of it; raises LockedError if one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    holder, lock = folder / HOLDER, filelock.FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        who = _describe(holder)
        raise LockedError(
            f"{folder} is in use by {who}: wait for it or stop it, or choose another folder"
        ) from None
    try:
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def waiting(folder: Path) -> Iterator[None]:
    """Makes a folder and waits until no other process is in this context with it."""
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / LOCK):
        yield


def _describe(holder: Path) -> str:
    try:
        found = read_json(holder)
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, TypeError, KeyError):  # it has the lock and has not said so yet
        return "another process"
