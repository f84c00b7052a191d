"""Training: the loop that runs optimizer steps on all devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jax import Array
from jaxtyping import Key

from diffpose_jax import distributed
from diffpose_jax.config import ConfigError
from diffpose_jax.training.step import Batch, StepScalars, Trainer, TrainState, train_step

_T = TypeVar("_T")


@runtime_checkable
class DeviceData(Protocol):
    """A data set that lies on the devices: a pytree of arrays, the same on each."""

    def batch(self, selection: Any) -> Batch:
        """The examples of a selection with leading axis B."""
        ...


Dispatch = Callable[[TrainState, Array, Any, DeviceData | None], tuple[TrainState, StepScalars]]


def make_dispatch(trainer: Trainer, devices: list[jax.Device] | None = None) -> Dispatch:
    """Compiles several steps into one call, pmapped over devices.

    Args:
      trainer: the network and how it is trained.
      devices: the devices, all of all processes by default.

    Returns:
      (state, key, batch, data) -> (state, scalars): batch has leading axes (D, steps, B / D) of
      the D devices of this process, scalars are (steps,). With `data`, None without, the batch
      says which of its examples to take. The state is donated.
    """
    dispatch = jax.pmap(
        _dispatch,
        axis_name=distributed.AXIS,
        in_axes=(None, None, None, 0, None),
        out_axes=(None, None),
        static_broadcasted_argnums=0,
        donate_argnums=1,
        devices=devices,
    )
    return functools.partial(dispatch, trainer)


def _dispatch(
    trainer: Trainer, state: TrainState, key: Array, batch: Any, data: DeviceData | None
) -> tuple[TrainState, StepScalars]:
    """Several steps on one device."""

    def step(state: TrainState, batch: Any) -> tuple[TrainState, StepScalars]:
        batch = batch if data is None else data.batch(batch)
        return train_step(trainer, state, key, batch, distributed.AXIS)

    if jax.tree.leaves(batch)[0].shape[0] > 1:
        return jax.lax.scan(step, state, batch)
    # A loop of one step is still a loop to XLA, whose convolutions on a CPU are 25 times slower
    # in it.
    state, scalars = step(state, jax.tree.map(lambda x: x[0], batch))
    return state, jax.tree.map(lambda x: x[None], scalars)


def shard(batch: _T, num_devices: int) -> _T:
    """Splits images over devices: (steps, B, ..) -> (D, steps, B / D, ..), image i on i // (B / D).

    Raises:
      ConfigError: if the devices do not divide the batch.
    """
    steps, batch_size = jax.tree.leaves(batch)[0].shape[:2]
    if batch_size % num_devices:
        raise ConfigError(
            f"config.training.batch_size = {batch_size} cannot be split over {num_devices} devices"
        )

    def split(x: np.ndarray) -> np.ndarray:
        parts = x.reshape(steps, num_devices, batch_size // num_devices, *x.shape[2:])
        return np.moveaxis(parts, 1, 0)

    return jax.tree.map(split, batch)


def run(
    trainer: Trainer,
    state: TrainState,
    key: Key[Array, ""],
    batches: Iterable[Any],
    devices: list[jax.Device] | None = None,
    data: DeviceData | None = None,
) -> Iterator[tuple[TrainState, StepScalars]]:
    """Trains on all devices, one dispatch of several steps at a time.

    Args:
      trainer: the network and how it is trained.
      state: where to begin; it is donated.
      key: the run's training key.
      batches: one `Batch` a dispatch, leading axes (steps, B), of the B images that go to the
        devices of this process, see `distributed.images_of_process`; with `data`, selections of it.
      devices: the devices, all of all processes by default.
      data: a data set that is to lie on the devices, so that no batch has to travel there.

    Yields:
      The state after each dispatch, to be used before the next is asked for, and the scalars
      (steps,) of its steps, on the host.

    Raises:
      NonFiniteLossError: at the first loss or gradient that is not finite.
    """
    dispatch = make_dispatch(trainer, devices)
    num_devices = len(devices or jax.local_devices())
    step = int(state.step)
    state, key, data = distributed.replicate((state, key, data), devices)
    for batch in batches:
        state, scalars = dispatch(state, key, shard(batch, num_devices), data)
        scalars = check_finite(step, scalars)
        step += len(scalars.loss)
        yield state, scalars


class NonFiniteLossError(FloatingPointError):
    """The loss of a step or its gradient is NaN or infinite; the message names the step.

    Attributes:
      step: the number of the step, from 1.
      what: "loss", "gradient" or what else is not finite.
      value: NaN, inf or -inf.
    """

    def __init__(self, step: int, what: str, value: float) -> None:
        super().__init__(
            f"the {what} of step {step} is {value}: the training stops here. The last checkpoint is"
            " from before; a lower config.training.learning_rate, or a look at the data for values"
            " out of range, may help"
        )
        self.step, self.what, self.value = step, what, value


def check_finite(first_step: int, scalars: StepScalars) -> StepScalars:
    """Scalars (steps,) of the steps after `first_step`, on the host.

    Raises:
      NonFiniteLossError: names the first step whose loss or gradient is not finite.
    """
    scalars = jax.tree.map(np.asarray, scalars)
    finite = np.isfinite(scalars.loss) & np.isfinite(scalars.grad_norm)
    if not finite.all():
        bad = int(np.argmin(finite))
        is_loss = not np.isfinite(scalars.loss[bad])
        what, values = ("loss", scalars.loss) if is_loss else ("gradient", scalars.grad_norm)
        raise NonFiniteLossError(first_step + bad + 1, what, float(values[bad]))
    return scalars
