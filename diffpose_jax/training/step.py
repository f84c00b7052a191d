"""Training: the state, the pure step, and the loop that runs it on all devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax.training.dynamic_scale import DynamicScale
from jax import Array

from diffpose_jax import config as config_lib
from diffpose_jax import distributed as devices_lib
from diffpose_jax.method import network as model_lib


@flax.struct.dataclass
class Batch:
    """Examples for one or several steps; leading axes are D devices, steps, B images.

    Attributes:
      evidence: what the candidates come from: heatmaps (..., 16, 64, 64), to draw anew, or
        `Candidates` (..., S, 16) that were drawn before.
      pose_mm: (..., 17, 3), millimetres.
    """

    evidence: model_lib.Evidence
    pose_mm: Array


@flax.struct.dataclass
class TrainState:
    """All that a run needs to go on.

    Attributes:
      step: scalar, optimizer steps done.
      params: parameters.
      ema: their exponential moving average, None without one.
      opt_state: the optimizer's state.
      loss_scale: factor of the loss that keeps float16 gradients from vanishing, None for the
        other types; it halves, and the step is left out, when a gradient overflows.
    """

    step: Array
    params: model_lib.Params
    ema: model_lib.Params | None
    opt_state: optax.OptState
    loss_scale: DynamicScale | None


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """What stays the same over a run; built from `config.training` by `build`.

    Attributes:
      network: the model.
      optimizer: Adam with its learning rate schedule.
      learning_rate: step -> learning rate.
      num_steps: optimizer steps of the whole run.
      batch_size: images a step, over all devices.
      draws_per_image: times and noises drawn under each condition.
      ema_decay: decay of the moving average of the parameters, 0 for none; of update n it is at
        most (1 + n) / (10 + n).
      ema_every: steps between its updates.
      steps_per_dispatch: optimizer steps per call of the devices.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: how many are kept.
    """

    network: model_lib.DiffPose
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    num_steps: int
    batch_size: int
    draws_per_image: int
    ema_decay: float
    ema_every: int
    steps_per_dispatch: int
    checkpoint_every: int
    keep_checkpoints: int

    def init(self, key: Array) -> TrainState:
        """The state before the first step."""
        params = self.network.init(key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            # A copy: the state is donated, and one buffer cannot be given away twice.
            ema=jax.tree.map(jnp.copy, params) if self.ema_decay else None,
            opt_state=self.optimizer.init(params),
            loss_scale=_initial_scale() if self.network.matmul_dtype == jnp.float16 else None,
        )


@flax.struct.dataclass
class StepScalars:
    """What each optimizer step tells of itself; scalars, or (steps,) of a dispatch.

    Attributes:
      loss: the loss, over all devices.
      grad_norm: Euclidean norm of its gradient, 0 if a loss scale left the step out.
    """

    loss: Array | np.ndarray
    grad_norm: Array | np.ndarray


def _initial_scale() -> DynamicScale:
    """Flax's defaults, which are also PyTorch's, as arrays: a state is donated and saved."""
    scale = DynamicScale()
    # Of the types that a step gives, or the second dispatch would be compiled anew.
    return scale.replace(fin_steps=jnp.int32(scale.fin_steps), scale=jnp.float32(scale.scale))


def from_config(network: model_lib.DiffPose, config: ml_collections.ConfigDict) -> Trainer:
    """Builds a `Trainer` from `config.training`, whose fields are the arguments of `build`.

    Raises:
      ValueError: for fields that are unknown, missing or do not fit together.
    """
    return config_lib.call(functools.partial(build, network), config, "config.training")


@functools.cache
def build(
    network: model_lib.DiffPose,
    *,
    num_steps: int,
    batch_size: int,
    draws_per_image: int,
    learning_rate: float,
    warmup_steps: int,
    decay: str,
    ema_decay: float,
    ema_every: int,
    steps_per_dispatch: int,
    checkpoint_every: int,
    keep_checkpoints: int,
) -> Trainer:
    """Builds a `Trainer`; the arguments are documented in `configs/h36m.py`.

    The same arguments give the same one: JAX never forgets what it compiled for a trainer.

    Raises:
      ValueError: for fields that do not fit together.
    """
    positive = {
        "num_steps": num_steps,
        "batch_size": batch_size,
        "draws_per_image": draws_per_image,
        "learning_rate": learning_rate,
        "ema_every": ema_every,
        "steps_per_dispatch": steps_per_dispatch,
        "checkpoint_every": checkpoint_every,
        "keep_checkpoints": keep_checkpoints,
    }
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"config.training.{name} must be positive, not {value}")
    if num_steps >= 1 << 31:
        raise ValueError(
            f"config.training.num_steps must be less than 2^31 = {1 << 31}, not {num_steps}: steps"
            " are counted in 32 bits"
        )
    for name in ("num_steps", "checkpoint_every"):
        value = positive[name]
        if value % steps_per_dispatch:
            raise ValueError(
                f"config.training.{name} = {value} must be a multiple of"
                f" steps_per_dispatch = {steps_per_dispatch}"
            )
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(
            f"config.training.warmup_steps = {warmup_steps} must be less than"
            f" num_steps = {num_steps}"
        )
    if not 0 <= ema_decay < 1:
        raise ValueError(f"config.training.ema_decay must be in [0, 1), not {ema_decay}")
    if decay == "constant":
        schedule = optax.constant_schedule(learning_rate)
    elif decay == "cosine":
        schedule = optax.cosine_decay_schedule(learning_rate, num_steps - warmup_steps)
    else:
        raise ValueError(f"config.training.decay must be constant or cosine, not {decay!r}")
    if warmup_steps:
        warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
        schedule = optax.join_schedules([warmup, schedule], [warmup_steps])
    return Trainer(
        network=network,
        optimizer=optax.adam(schedule),
        learning_rate=schedule,
        num_steps=num_steps,
        batch_size=batch_size,
        draws_per_image=draws_per_image,
        ema_decay=ema_decay,
        ema_every=ema_every,
        steps_per_dispatch=steps_per_dispatch,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep_checkpoints,
    )


def train_step(
    trainer: Trainer, state: TrainState, key: Array, batch: Batch, axis_name: str | None = None
) -> tuple[TrainState, StepScalars]:
    """One optimizer step.

    Every image has a key of its own, from the step and its index in the whole batch: the result
    is the same, to rounding, over however many devices the batch is spread.

    Args:
      trainer: model and optimizer.
      state: the state before.
      key: the run's training key.
      batch: this device's images, leading axis B.
      axis_name: axis of the devices, None outside of pmap.

    Returns:
      The state after, and the loss over all devices and the Euclidean norm of its gradient.
    """
    num_images = batch.pose_mm.shape[0]
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * num_images
    step_key = jax.random.fold_in(key, state.step)
    keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(first + jnp.arange(num_images))
    network = trainer.network

    def image_loss(params: model_lib.Params, key: Array, image: Batch) -> Array:
        candidate_key, loss_key = jax.random.split(key)
        return network.loss(
            params,
            loss_key,
            _evidence(network, candidate_key, image.evidence),
            model_lib.pose_to_vector(image.pose_mm, network.pose_scale),
            trainer.draws_per_image,
        )

    def batch_loss(params: model_lib.Params) -> Array:
        return jnp.mean(jax.vmap(image_loss, in_axes=(None, 0, 0))(params, keys, batch))

    loss_scale = state.loss_scale
    if loss_scale is None:
        loss, grads = jax.value_and_grad(batch_loss)(state.params)
        if axis_name is not None:
            grads = jax.lax.pmean(grads, axis_name)
    else:
        loss_scale, finite, loss, grads = loss_scale.value_and_grad(
            batch_loss, axis_name=axis_name
        )(state.params)
    if axis_name is not None:
        loss = jax.lax.pmean(loss, axis_name)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = trainer.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if loss_scale is not None:
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        grad_norm = jnp.where(finite, grad_norm, 0.0)
    step = state.step + 1
    ema = state.ema
    if ema is not None:
        # Young averages forget faster, or the random first weights would stay in them for long.
        num_updates = (step // trainer.ema_every).astype(jnp.float32)
        decay = jnp.minimum(trainer.ema_decay, (1.0 + num_updates) / (10.0 + num_updates))
        rate = jnp.where(step % trainer.ema_every == 0, 1.0 - decay, 0.0)
        ema = jax.tree.map(lambda average, new: average + rate * (new - average), ema, params)
    new_state = TrainState(
        step=step, params=params, ema=ema, opt_state=opt_state, loss_scale=loss_scale
    )
    return new_state, StepScalars(loss=loss, grad_norm=grad_norm)


def _evidence(
    network: model_lib.DiffPose, key: Array, evidence: model_lib.Evidence
) -> model_lib.Evidence:
    """What the encoder reads, drawn from heatmaps now unless that was done before."""
    return network.draw_evidence(key, evidence) if isinstance(evidence, Array) else evidence


class Held(Protocol):
    """A data set that lies on the devices: a pytree of arrays, the same on each."""

    def batch(self, selection: Any) -> Batch:
        """The examples of a selection with leading axis B."""
        ...


Dispatch = Callable[[TrainState, Array, Any, Held | None], tuple[TrainState, StepScalars]]


def make_dispatch(trainer: Trainer, devices: list[jax.Device] | None = None) -> Dispatch:
    """Compiles several steps into one call, pmapped over devices.

    Args:
      trainer: model and optimizer.
      devices: the devices, all of all processes by default.

    Returns:
      (state, key, batch, held) -> (state, scalars): batch has leading axes (D, steps, B / D) of
      the D devices of this process, scalars are (steps,). With `held`, None without, the batch
      says which of its examples to take. The state is donated.
    """
    dispatch = jax.pmap(
        _dispatch,
        axis_name=devices_lib.AXIS,
        in_axes=(None, None, None, 0, None),
        out_axes=(None, None),
        static_broadcasted_argnums=0,
        donate_argnums=1,
        devices=devices,
    )
    return functools.partial(dispatch, trainer)


def _dispatch(
    trainer: Trainer, state: TrainState, key: Array, batch: Any, held: Held | None
) -> tuple[TrainState, StepScalars]:
    """Several steps on one device."""

    def step(state: TrainState, batch: Any) -> tuple[TrainState, StepScalars]:
        batch = batch if held is None else held.batch(batch)
        return train_step(trainer, state, key, batch, devices_lib.AXIS)

    if jax.tree.leaves(batch)[0].shape[0] > 1:
        return jax.lax.scan(step, state, batch)
    # A loop of one step is still a loop to XLA, whose convolutions on a CPU are 25 times slower
    # in it.
    state, scalars = step(state, jax.tree.map(lambda x: x[0], batch))
    return state, jax.tree.map(lambda x: x[None], scalars)


_T = TypeVar("_T")


def shard(batch: _T, num_devices: int) -> _T:
    """Splits images over devices: (steps, B, ..) -> (D, steps, B / D, ..), image i on i // (B / D).

    Args:
      batch: a pytree of arrays (steps, B, ..).
      num_devices: D.

    Raises:
      ValueError: if the devices do not divide the batch.
    """
    steps, batch_size = jax.tree.leaves(batch)[0].shape[:2]
    if batch_size % num_devices:
        raise ValueError(
            f"config.training.batch_size = {batch_size} cannot be split over {num_devices} devices"
        )

    def split(x: np.ndarray) -> np.ndarray:
        parts = x.reshape(steps, num_devices, batch_size // num_devices, *x.shape[2:])
        return np.moveaxis(parts, 1, 0)

    return jax.tree.map(split, batch)


def run(
    trainer: Trainer,
    state: TrainState,
    key: Array,
    batches: Iterable[Any],
    devices: list[jax.Device] | None = None,
    held: Held | None = None,
) -> Iterator[tuple[TrainState, StepScalars]]:
    """Trains on all devices, one dispatch of several steps at a time.

    Args:
      trainer: model and optimizer.
      state: where to begin; it is donated.
      key: the run's training key.
      batches: one `Batch` a dispatch, leading axes (steps, B), of the B images that go to the
        devices of this process, see `devices.images_of_process`; with `held`, selections of it.
      devices: the devices, all of all processes by default.
      held: a data set that is to lie on the devices, so that no batch has to travel there.

    Yields:
      The state after each dispatch, to be used before the next is asked for, and the scalars
      (steps,) of its steps, on the host.

    Raises:
      NonFiniteLossError: at the first loss or gradient that is not finite.
    """
    dispatch = make_dispatch(trainer, devices)
    num_devices = len(devices or jax.local_devices())
    step = int(state.step)
    state, key, held = devices_lib.replicate((state, key, held), devices)
    for batch in batches:
        state, scalars = dispatch(state, key, shard(batch, num_devices), held)
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

    Args:
      first_step: steps done before.
      scalars: of the steps.

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
