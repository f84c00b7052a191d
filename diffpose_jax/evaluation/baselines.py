"""The three controls that the model's numbers are compared with.

* the mean pose of the training set;
* a deterministic regression from the argmax joints, the network of Martinez et al. (A simple
  yet effective baseline for 3d human pose estimation, ICCV 2017, arXiv 1705.03098);
* that regression plus Gaussian draws with the full covariance of its residuals.

A model of the pose distribution is worth its cost where it beats the third.
"""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import serialization, struct, traverse_util
from jax.typing import ArrayLike
from tqdm import tqdm

from diffpose_jax.io import arrays as numpy_files
from diffpose_jax.io.files import write_atomic
from diffpose_jax.io.trees import CheckpointError
from diffpose_jax.skeleton import NUM_HEATMAPS, NUM_JOINTS

_STEPS_PER_DISPATCH = 100
_FITTED_ON = "fitted_on"


class RegressionNetwork(nn.Module):
    """Standardised joints -> standardised pose (Martinez et al. 2017, Fig. 2).

    A linear layer, two residual blocks of two, and a linear layer out; batch normalisation,
    ReLU and dropout after each but the last. The paper's max-norm on the weights is left out.

    Attributes:
        width: Units of the hidden layers, 1024 in the paper.
        num_outputs: Length of the output.
        dropout: Probability of dropping a unit in training.
    """

    width: int
    num_outputs: int = (NUM_JOINTS - 1) * 3
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Applies the network.

        Args:
            x: (B, inputs) standardised inputs.
            train: Whether to drop units and normalise by the batch's statistics; needs the
                random stream `dropout` and a mutable `batch_stats`.

        Returns:
            (B, num_outputs).
        """

        def layer(x: jax.Array) -> jax.Array:
            x = nn.Dense(self.width, kernel_init=nn.initializers.he_normal())(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            return nn.Dropout(self.dropout, deterministic=not train)(x)

        x = layer(x)
        for _ in range(2):
            x = x + layer(layer(x))
        return nn.Dense(self.num_outputs)(x)


@struct.dataclass
class RegressionParams:
    """A fitted regression; a pytree of arrays.

    Attributes:
        variables: Parameters and batch statistics of `RegressionNetwork`.
        input_mean: (16, 3) of the training inputs.
        input_std: (16, 3) of the training inputs.
        pose_mean_mm: (16, 3) of the training poses without the hip, millimetres.
        pose_std_mm: (16, 3) of the training poses without the hip, millimetres.
    """

    variables: Any
    input_mean: jax.Array
    input_std: jax.Array
    pose_mean_mm: jax.Array
    pose_std_mm: jax.Array


@struct.dataclass
class GaussianParams:
    """A Gaussian around the regression's pose; a pytree of arrays.

    Attributes:
        factor_mm: (48, 48) F with F F^T the covariance of the residuals of the 16 joints
            without the hip, joint-major, millimetres.
    """

    factor_mm: jax.Array


@struct.dataclass
class Controls:
    """The three controls, fitted; a pytree of arrays.

    Attributes:
        mean_pose_mm: (17, 3) mean of the training poses, millimetres.
        regression: The deterministic regression.
        gaussian: The distribution of its residuals.
    """

    mean_pose_mm: jax.Array
    regression: RegressionParams
    gaussian: GaussianParams


def fit_controls(
    key: jax.Array, inputs: ArrayLike, poses_mm: ArrayLike, **settings: Any
) -> Controls:
    """Fits all three controls on a training set.

    Args:
        key: Random key.
        inputs: (N, 16, 3) argmax joints and likelihoods, see `fit_regression`.
        poses_mm: (N, 17, 3) training poses, millimetres, hip-centred.
        **settings: Further arguments of `fit_regression`.

    Returns:
        The fitted controls.
    """
    inputs, poses_mm = np.asarray(inputs, np.float32), np.asarray(poses_mm, np.float32)
    regression = fit_regression(key, inputs, poses_mm, **settings)
    residuals_mm = poses_mm - np.asarray(jax.jit(predict)(regression, inputs))
    return Controls(
        mean_pose_mm=jnp.asarray(np.mean(poses_mm, axis=0, dtype=np.float64), jnp.float32),
        regression=regression,
        gaussian=fit_gaussian(residuals_mm),
    )


def fit_regression(
    key: jax.Array,
    inputs: ArrayLike,
    poses_mm: ArrayLike,
    *,
    steps: int = 20_000,
    batch_size: int = 64,
    width: int = 1024,
    learning_rate: float = 1e-3,
) -> RegressionParams:
    """Fits the regression by Adam on the mean squared error of standardised poses.

    Unlike the paper's, its input has a third channel a joint, the likelihood of the argmax,
    so that it knows what the detector is unsure of, as the model does. Batches are drawn with
    replacement; the learning rate falls to 0 along a cosine. The same key and data give the
    same parameters.

    Args:
        key: Random key.
        inputs: (N, 16, 3) of each MPII joint the argmax coordinates x and y in [-1, 1) and the
            heatmap's height there.
        poses_mm: (N, 17, 3) poses, millimetres, hip-centred.
        steps: Number of optimizer steps.
        batch_size: Frames a step.
        width: Units of the hidden layers.
        learning_rate: Adam's, at the start.

    Returns:
        The fitted regression.

    Raises:
        ValueError: if a shape is not as above or there are no frames.
    """
    inputs, poses_mm = np.asarray(inputs, np.float32), np.asarray(poses_mm, np.float32)
    N = len(inputs)
    if N == 0 or inputs.shape != (N, NUM_HEATMAPS, 3) or poses_mm.shape != (N, NUM_JOINTS, 3):
        raise ValueError(
            f"fit_regression: inputs {inputs.shape} and poses {poses_mm.shape} must be"
            f" (N, {NUM_HEATMAPS}, 3) and (N, {NUM_JOINTS}, 3) with N at least 1."
        )
    input_mean, input_std = _mean_and_std(inputs)
    pose_mean_mm, pose_std_mm = _mean_and_std(poses_mm[:, 1:])
    x = jnp.asarray((inputs - input_mean) / input_std).reshape(N, -1)
    y = jnp.asarray((poses_mm[:, 1:] - pose_mean_mm) / pose_std_mm).reshape(N, -1)

    init_key, *step_keys = jax.random.split(key, 3)
    variables = RegressionNetwork(width).init(init_key, x[:1], train=False)
    params, batch_stats = variables["params"], variables["batch_stats"]
    state = (params, batch_stats, _optimizer(learning_rate, steps).init(params), jnp.zeros(()))
    settings = {"num_steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    with tqdm(total=steps, desc="regression control", unit="step") as progress:
        for first in range(0, steps, _STEPS_PER_DISPATCH):
            last = min(first + _STEPS_PER_DISPATCH, steps)
            state = _train(first, last, state, x, y, *step_keys, width=width, **settings)
            progress.set_postfix(loss=f"{float(state[3]):.4f}", refresh=False)
            progress.update(last - first)

    return RegressionParams(
        variables={"params": state[0], "batch_stats": state[1]},
        input_mean=jnp.asarray(input_mean),
        input_std=jnp.asarray(input_std),
        pose_mean_mm=jnp.asarray(pose_mean_mm),
        pose_std_mm=jnp.asarray(pose_std_mm),
    )


@functools.partial(jax.jit, static_argnames=("width", "num_steps", "batch_size", "learning_rate"))
def _train(
    first: int,
    last: int,
    state: tuple[Any, ...],
    x: jax.Array,
    y: jax.Array,
    batch_key: jax.Array,
    dropout_key: jax.Array,
    *,
    width: int,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
) -> tuple[Any, ...]:
    """Steps `first` to `last` of `num_steps` on (params, batch_stats, optimizer state, loss)."""
    network = RegressionNetwork(width)
    optimizer = _optimizer(learning_rate, num_steps)

    def step(i: jax.Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        params, batch_stats, optimizer_state, _ = state
        rows = jax.random.randint(jax.random.fold_in(batch_key, i), (batch_size,), 0, len(x))

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            prediction, updates = network.apply(
                {"params": params, "batch_stats": batch_stats},
                x[rows],
                train=True,
                rngs={"dropout": jax.random.fold_in(dropout_key, i)},
                mutable=["batch_stats"],
            )
            return jnp.mean((prediction - y[rows]) ** 2), updates["batch_stats"]

        (loss, batch_stats), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return optax.apply_updates(params, updates), batch_stats, optimizer_state, loss

    return jax.lax.fori_loop(first, last, step, state)


def _optimizer(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Adam with a rate that falls to 0 along a cosine."""
    return optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))


def _mean_and_std(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the frames; 1 where nothing varies."""
    mean = np.asarray(np.mean(values, axis=0, dtype=np.float64))
    std = np.std(values, axis=0, dtype=np.float64)
    return mean.astype(np.float32), np.where(std > 1e-6, std, 1).astype(np.float32)


def predict(regression: RegressionParams, inputs: jax.Array) -> jax.Array:
    """The regression's pose of each frame; jittable.

    Args:
        regression: A fitted regression.
        inputs: (B, 16, 3) argmax joints and likelihoods, see `fit_regression`.

    Returns:
        (B, 17, 3) poses, millimetres, with the hip at 0.
    """
    B = inputs.shape[0]
    width = regression.variables["params"]["Dense_0"]["kernel"].shape[1]
    x = (inputs - regression.input_mean[None]) / regression.input_std[None]
    network = RegressionNetwork(width)
    y = cast(jax.Array, network.apply(regression.variables, x.reshape(B, -1), train=False))
    joints = y.reshape(B, NUM_JOINTS - 1, 3) * regression.pose_std_mm[None]
    return _with_hip(joints + regression.pose_mean_mm[None])


def fit_gaussian(residuals_mm: ArrayLike) -> GaussianParams:
    """Fits the covariance of the residuals, of all joints and axes jointly.

    The maximum-likelihood covariance of a Gaussian whose mean is the prediction: the second
    moment about 0, not about the residuals' mean.

    Args:
        residuals_mm: (N, 17, 3) truth minus prediction, millimetres.

    Returns:
        The fitted Gaussian. With fewer than 48 frames the covariance is singular and the
        draws stay in the span of the residuals.

    Raises:
        ValueError: if the shape is not as above or there are no frames.
    """
    residuals_mm = np.asarray(residuals_mm, np.float64)
    N = len(residuals_mm)
    if N == 0 or residuals_mm.shape != (N, NUM_JOINTS, 3):
        raise ValueError(
            f"fit_gaussian: residuals {residuals_mm.shape} must be (N, {NUM_JOINTS}, 3) with N"
            " at least 1."
        )
    rows = residuals_mm[:, 1:].reshape(N, -1)
    # A square root by eigenvalues: Cholesky's would need jitter where the matrix is singular.
    values, vectors = np.linalg.eigh(rows.T @ rows / N)
    return GaussianParams(jnp.asarray(vectors * np.sqrt(np.maximum(values, 0)), jnp.float32))


def draw(
    key: jax.Array, gaussian: GaussianParams, mean_poses_mm: jax.Array, num_hypotheses: int
) -> jax.Array:
    """Draws hypotheses around the regression's poses; jittable.

    Args:
        key: Random key.
        gaussian: A fitted Gaussian.
        mean_poses_mm: (B, 17, 3) the regression's poses, millimetres, with the hip at 0.
        num_hypotheses: M, the number of hypotheses a frame.

    Returns:
        (B, M, 17, 3) hypotheses, millimetres, with the hip at 0.
    """
    B, M = mean_poses_mm.shape[0], num_hypotheses
    normal = jax.random.normal(key, (B, M, gaussian.factor_mm.shape[0]))
    residuals = jnp.einsum(
        "bmk,jk->bmj", normal, gaussian.factor_mm, precision=jax.lax.Precision.HIGHEST
    )
    return mean_poses_mm[:, None] + _with_hip(residuals.reshape(B, M, NUM_JOINTS - 1, 3))


def _with_hip(joints: jax.Array) -> jax.Array:
    """(..., 16, 3) -> (..., 17, 3), the hip at 0 in front."""
    return jnp.concatenate([jnp.zeros_like(joints[..., :1, :]), joints], axis=-2)


def save(path: str | Path, controls: Controls, fitted_on: dict[str, Any]) -> None:
    """Writes controls as a file of arrays (.npz), whose check sums `load` sees to.

    Args:
        path: where to.
        controls: the controls.
        fitted_on: plain values that they depend on.
    """
    contents: dict[str, Any] = {_FITTED_ON: json.dumps(fitted_on)}
    contents |= traverse_util.flatten_dict(serialization.to_state_dict(controls), sep="/")
    file = io.BytesIO()
    np.savez(file, **contents)
    write_atomic(path, file.getvalue())


def load(path: str | Path) -> tuple[Controls, dict[str, Any]]:
    """Reads what `save` wrote: the controls, and what they were fitted on.

    Raises:
        CheckpointError: if the file is damaged.
    """
    try:
        arrays = dict(numpy_files.read(path))
        fitted_on = dict(json.loads(str(arrays.pop(_FITTED_ON))))
        tree = traverse_util.unflatten_dict(arrays, sep="/")
        fitted = Controls(
            mean_pose_mm=tree["mean_pose_mm"],
            regression=RegressionParams(**tree["regression"]),
            gaussian=GaussianParams(**tree["gaussian"]),
        )
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it") from error
    return fitted, fitted_on
