"""Devices of one or several processes: how processes connect, share work and agree.

Every process runs the same program on its own devices, with its own part of each batch, and the
first one alone writes files: they share a file system. What one process needs of another goes
through the functions here, which all of them must call in the same order.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array
from jax.experimental import multihost_utils
from jaxtyping import Integer, PyTree, Shaped

from diffpose_jax.config import ConfigError

AXIS = "devices"
"""Name of the axis of every `pmap`: an array that comes from one with another name is copied, and
the function that takes it compiled again."""

_FIND_S = 300
# A dead process is noticed after the first of these at most, or one that failed and waits to end
# together with the others after the second.
_HEARTBEAT_S, _SHUTDOWN_S = 30, 30
_A_WEEK_MS = 7 * 24 * 3600 * 1000

_T = TypeVar("_T")


class ProcessError(RuntimeError):
    """JAX gave up in one of several processes, mostly because another one had died."""


@contextlib.contextmanager
def connected(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    detect: bool = False,
) -> Iterator[None]:
    """Makes this process one of several, before any other use of JAX; without arguments, of one.

    When a process dies or fails, JAX ends the others within a minute. At the end of the context
    each waits for the others.

    Args:
      coordinator: "HOST:PORT" of the first process, by which the others find it.
      num_processes: P.
      process_id: which of them this is, 0 to P - 1.
      detect: take all that from the environment of a cluster (SLURM, Open MPI, ...) instead.

    Raises:
      ConfigError: for arguments that do not fit together, no such environment, or processes with
        different numbers of devices.
      ProcessError: if JAX gives up.
    """
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    if not detect and all(value is None for value in given.values()):
        yield
        return
    _check(given, detect)
    # JAX's own handler of SIGTERM would keep the signal from stopping the program.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if detect else "deactivate",
            initialization_timeout=_FIND_S,
            heartbeat_timeout_seconds=_HEARTBEAT_S,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except ValueError as error:
        raise ConfigError(
            f"--distributed found no cluster in the environment ({error}); give {', '.join(given)}"
        ) from error
    me = f"process {jax.process_index()} of {jax.process_count()}"
    if jax.device_count() != jax.process_count() * jax.local_device_count():
        raise ConfigError(
            f"all processes must have as many devices: {me} has {jax.local_device_count()} of"
            f" {jax.device_count()}"
        )
    if not is_first():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        _meet()
        yield
        barrier("the end")
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(
            f"{str(error).partition(chr(10))[0]}. Perhaps another process than {me} has ended; its"
            " output says why. The last checkpoint is kept: the same command, with any number of"
            " processes, goes on from there"
        ) from error


def _check(given: dict[str, Any], detect: bool) -> None:
    missing = [name for name, value in given.items() if value is None]
    if detect and len(missing) < len(given):
        raise ConfigError(f"--distributed stands for {', '.join(given)}: leave those out, or it")
    if detect:
        return
    if missing:
        raise ConfigError(f"{', '.join(given)} belong together: {', '.join(missing)} is missing")
    coordinator, num_processes, process_id = given.values()
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--coordinator must be HOST:PORT, not {coordinator!r}")
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process_id must be 0 to --num_processes - 1 = {num_processes - 1}, not {process_id}"
        )


def _meet() -> None:
    """Lets all devices, and all processes, exchange something for the first time.

    On CPUs, JAX gives up if the first time comes more than 30 s later in one process than in
    another; later on a process may take its time, to compile or to write.
    """
    barrier("the start")
    jax.pmap(lambda x: jax.lax.psum(x, "all"), "all")(np.zeros(jax.local_device_count()))
    max_over_processes(0)


def is_first() -> bool:
    """Whether this is the process that writes; true of an only one."""
    return jax.process_index() == 0


_barriers = itertools.count()


def barrier(name: str) -> None:
    """Waits until all processes have come here, however long one of them takes."""
    if jax.process_count() > 1:
        wait = ocp.multihost.get_barrier_sync_fn()
        wait(key=f"{name} ({next(_barriers)})", timeout_ms=_A_WEEK_MS)


@contextlib.contextmanager
def first_process_first(name: str) -> Iterator[None]:
    """Lets the first process through before the others, who find the files that it wrote."""
    if not is_first():
        barrier(name)
    yield
    if is_first():
        barrier(name)


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """The folder that a process writes to: for all but the first one a temporary one."""
    if is_first():
        yield folder
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)


def images_of_process(size: int, name: str) -> slice:
    """Which of the images of a batch go to the devices of this process.

    Args:
      size: images of the whole batch, B. Image i lies on device i // (B / D) of all D, and a
        process has those that follow each other, in `pmap`'s order.
      name: what the size is called in the message.

    Raises:
      ConfigError: if the devices do not divide the batch.
    """
    if size % jax.device_count():
        raise ConfigError(
            f"{name} = {size} cannot be split over {jax.device_count()} devices, of"
            f" {jax.process_count()} processes"
        )
    share = size // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def replicate(tree: _T, devices: Sequence[jax.Device] | None = None) -> _T:
    """Puts arrays where `pmap` wants an argument with `in_axes=None`; others it copies every time.

    Args:
      tree: a pytree of arrays, the same in all processes.
      devices: the devices, all of all processes by default.
    """
    put = jax.pmap(_second, axis_name=AXIS, in_axes=(0, None), out_axes=None, devices=devices)
    return put(np.zeros(len(devices or jax.local_devices())), tree)


# Not within `replicate`: JAX never forgets a function that it has pmapped (0.10), nor what it
# compiled for it.
def _second(_: Any, tree: _T) -> _T:
    return tree


def spread(
    function: Callable[..., PyTree[Array]],
    static: tuple[Any, ...],
    shared: tuple[Any, ...],
    batch: PyTree[Shaped[np.ndarray, "B ..."]],
    *,
    most: int,
    padded: int | None = None,
    to_host: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> PyTree[Shaped[Array | np.ndarray, "B ..."]]:
    """Computes a function of a batch of images on the devices of this process.

    The batch is split evenly and padded to few shapes, so that few programs are compiled.

    Args:
      function: (*static, *shared, batch, num_images) -> pytree of arrays with a leading axis of
        images: on one device, where the first `num_images` of the batch count and the rest, 0, is
        padding. A function of a module: JAX never forgets one that it has pmapped.
      static: hashable values.
      shared: pytrees that are the same for all images; large ones should be replicated.
      batch: pytree of arrays (B, ...) on the host.
      most: the most images that a device takes at a time.
      padded: images that a device's share is padded to; by default the next power of two.
      to_host: whether to give NumPy's arrays.
      devices: the devices, all local ones by default.
    """
    chex.assert_equal_shape_prefix(jax.tree.leaves(batch), 1)
    devices = tuple(devices or jax.local_devices())
    at_a_time, size = most * len(devices), len(jax.tree.leaves(batch)[0])
    parts = []
    for start in range(0, size, at_a_time):
        share = -(-min(size - start, at_a_time) // len(devices))
        first = start + share * np.arange(len(devices))
        counts = np.clip(min(size, start + at_a_time) - first, 0, share)
        shape = (len(devices), padded or 1 << (share - 1).bit_length())
        split = functools.partial(_split, first, counts, shape)
        made = _pmapped(devices)(function, static, shared, jax.tree.map(split, batch), counts)
        made = jax.device_get(made) if to_host else made
        kept = np.flatnonzero(np.arange(shape[1])[None] < counts[:, None])
        parts.append(jax.tree.map(lambda x, k=kept: x.reshape(-1, *x.shape[2:])[k], made))
    concatenate = np.concatenate if to_host else jnp.concatenate
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: concatenate(x), *parts)


def _split(
    first: np.ndarray, counts: np.ndarray, shape: tuple[int, int], x: np.ndarray
) -> np.ndarray:
    """Parts of x (B, ...) that begin at `first` (D,) and have `counts` (D,) images, padded."""
    out = np.zeros((*shape, *x.shape[1:]), x.dtype)
    for device, (begin, count) in enumerate(zip(first, counts, strict=True)):
        out[device, :count] = x[begin : begin + count]
    return out


@functools.cache
def _pmapped(devices: tuple[jax.Device, ...]) -> Callable[..., Any]:
    return jax.pmap(
        _call,
        axis_name=AXIS,
        in_axes=(None, None, None, 0, 0),
        static_broadcasted_argnums=(0, 1),
        devices=devices,
    )


def _call(function: Any, static: Any, shared: Any, batch: Any, num_images: Any) -> Any:
    return function(*static, *shared, batch, num_images)


def in_passes(
    function: Callable[[Integer[Array, " P"]], Any], size: Any, count: Any, per_pass: int
) -> Any:
    """Computes a function of many indices in passes of equally many, in bounded memory.

    Args:
      function: indices (P,) -> pytree of rows (P, ...), each a function of its index alone.
      size: R, how many rows there are; in an export it may be a symbol.
      count: how many are wanted: the first ones. It may be traced, passes beyond it are not run.
      per_pass: P.

    Returns:
      The rows (R, ...); what lies beyond the last pass is 0.
    """
    per_pass = jax.core.min_dim(per_pass, size)
    rows = jax.eval_shape(function, jax.ShapeDtypeStruct((per_pass,), jnp.int32))

    def one_pass(i: Array, out: Any) -> Any:
        # The last pass begins early instead of running over: it computes some rows again.
        start = jnp.minimum(i * per_pass, size - per_pass)
        made = function(start + jnp.arange(per_pass, dtype=jnp.int32))
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice(x, new, (start, *[0] * (x.ndim - 1))),
            out,
            made,
        )

    out = jax.tree.map(lambda row: jnp.zeros((size, *row.shape[1:]), row.dtype), rows)
    return jax.lax.fori_loop(0, -(-count // per_pass), one_pass, out)


def max_over_processes(number: int) -> int:
    """The largest of the numbers (of 31 bits) that the processes give."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def sum_over_processes(tree: _T) -> _T:
    """The sum over the processes of each float64 array of a pytree."""

    def summed(sent: np.ndarray) -> np.ndarray:
        total = multihost_utils.process_allgather(sent).view(np.float64).sum(axis=0)
        return np.asarray(total).view(np.uint8)

    return _exchanged(tree, summed)


def broadcast_from_first(tree: _T) -> _T:
    """The first process's pytree, to the bit; the others give one of the same shapes and types."""
    return _exchanged(tree, multihost_utils.broadcast_one_to_all)


def _exchanged(tree: _T, exchange: Callable[[np.ndarray], np.ndarray]) -> _T:
    """A pytree whose arrays went through a function of their bytes; with one process unchanged.

    As bytes, since JAX has no float64.
    """
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(jax.device_get(tree))
    leaves = [np.asarray(leaf) for leaf in leaves]
    received = exchange(np.concatenate([leaf.reshape(-1).view(np.uint8) for leaf in leaves]))
    parts = np.split(received, np.cumsum([leaf.nbytes for leaf in leaves])[:-1])
    shaped = [
        part.copy().view(leaf.dtype).reshape(leaf.shape)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, shaped)
