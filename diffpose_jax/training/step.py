"""Training: the state and the pure optimizer step."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.dynamic_scale import DynamicScale
from jax import Array
from jaxtyping import Float, Integer, Key

from diffpose_jax.config import TrainingConfig
from diffpose_jax.method.heatmaps import AnyArray, Candidates
from diffpose_jax.method.network import DiffPose, EncoderInput, Params
from diffpose_jax.method.pose_vector import pose_to_vector


@flax.struct.dataclass
class Batch:
    """Examples for one or several steps; leading axes are D devices, steps, B images.

    Attributes:
      inputs: heatmaps (..., 16, 64, 64) to draw candidates from in the step, or `Candidates`
        (..., S, 16) that were drawn before.
      pose_mm: the true poses.
    """

    inputs: EncoderInput
    pose_mm: Float[AnyArray, "*batch 17 3"]


@flax.struct.dataclass
class TrainState:
    """All that a run needs to go on.

    Attributes:
      step: optimizer steps done.
      params: parameters.
      ema: their exponential moving average, None without one.
      opt_state: the optimizer's state.
      loss_scale: factor of the loss that keeps float16 gradients from vanishing, None for the
        other types; it halves, and the step is left out, when a gradient overflows.
    """

    step: Integer[AnyArray, ""]
    params: Params
    ema: Params | None
    opt_state: optax.OptState
    loss_scale: DynamicScale | None


@flax.struct.dataclass
class StepScalars:
    """What is logged of optimizer steps: scalars, or (steps,).

    Attributes:
      loss: the loss, over all devices.
      grad_norm: Euclidean norm of its gradient, 0 if a loss scale left the step out.
    """

    loss: Float[AnyArray, "*steps"]
    grad_norm: Float[AnyArray, "*steps"]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A network and how it is trained; equal ones share what JAX compiled for them."""

    network: DiffPose
    config: TrainingConfig

    @property
    def learning_rate(self) -> optax.Schedule:
        """Step -> learning rate: a linear warm-up, then constant or along a cosine to 0."""
        config = self.config
        schedule = optax.constant_schedule(config.learning_rate)
        if config.decay == "cosine":
            decay_steps = config.num_steps - config.warmup_steps
            schedule = optax.cosine_decay_schedule(config.learning_rate, decay_steps)
        if not config.warmup_steps:
            return schedule
        warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
        return optax.join_schedules([warmup, schedule], [config.warmup_steps])

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam."""
        return optax.adam(self.learning_rate)

    def init(
        self, key: Key[Array, ""], poses_mm: Float[np.ndarray, "N 17 3"] | None = None
    ) -> TrainState:
        """The state before the first step; a network that needs their moments takes the poses."""
        params = self.network.init(key)
        if poses_mm is not None:
            params = self.network.with_moments(params, poses_mm)
        return self.start(params)

    def start(self, params: Params) -> TrainState:
        """The state before the first step from given parameters."""
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            # A copy: the state is donated, and one buffer cannot be given away twice.
            ema=jax.tree.map(jnp.copy, params) if self.config.ema_decay else None,
            opt_state=self.optimizer.init(params),
            loss_scale=_initial_scale() if self.network.matmul_dtype == jnp.float16 else None,
        )


def _initial_scale() -> DynamicScale:
    """Flax's defaults, which are also PyTorch's, as arrays: a state is donated and saved."""
    scale = DynamicScale()
    # Of the types that a step gives, or the second dispatch would be compiled anew.
    return scale.replace(fin_steps=jnp.int32(scale.fin_steps), scale=jnp.float32(scale.scale))


def train_step(
    trainer: Trainer,
    state: TrainState,
    key: Key[Array, ""],
    batch: Batch,
    axis_name: str | None = None,
) -> tuple[TrainState, StepScalars]:
    """One optimizer step.

    Every image has a key of its own, from the step and its index in the whole batch: the result
    is the same, to rounding, over however many devices the batch is spread.

    Args:
      trainer: the network and how it is trained.
      state: the state before.
      key: the run's training key.
      batch: this device's images, leading axis B.
      axis_name: axis of the devices, None outside of pmap.
    """
    network, config = trainer.network, trainer.config
    num_images = batch.pose_mm.shape[0]
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * num_images
    step_key = jax.random.fold_in(key, state.step)
    keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(first + jnp.arange(num_images))

    def image_loss(params: Params, key: Array, image: Batch) -> Array:
        candidate_key, loss_key = jax.random.split(key)
        read = image.inputs
        if not isinstance(read, Candidates):
            read = network.encoder_input(candidate_key, jnp.asarray(read))
        x_0 = pose_to_vector(image.pose_mm, network.pose_scale)
        return network.loss(params, loss_key, read, x_0, config.draws_per_image)

    def batch_loss(params: Params) -> Array:
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
    new_state = TrainState(
        step=step,
        params=params,
        ema=None if state.ema is None else _updated_ema(config, state.ema, params, step),
        opt_state=opt_state,
        loss_scale=loss_scale,
    )
    return new_state, StepScalars(loss=loss, grad_norm=grad_norm)


def _updated_ema(config: TrainingConfig, ema: Params, params: Params, step: Array) -> Params:
    """The moving average after a step; the decay of update n is at most (1 + n) / (10 + n).

    With a full decay from the start, the random first weights would stay in it for long.
    """
    num_updates = (step // config.ema_every).astype(jnp.float32)
    decay = jnp.minimum(config.ema_decay, (1.0 + num_updates) / (10.0 + num_updates))
    rate = jnp.where(step % config.ema_every == 0, 1.0 - decay, 0.0)
    return jax.tree.map(lambda average, new: average + rate * (new - average), ema, params)
