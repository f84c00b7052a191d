"""The three baselines that the model's numbers are compared with.

* the mean pose of the training set;
* a deterministic regression from the argmax joints, the network of Martinez et al. (A simple
  yet effective baseline for 3d human pose estimation, ICCV 2017, arXiv 1705.03098);
* that regression plus Gaussian draws with the full covariance of its residuals.

A model of the pose distribution is worth its cost where it beats the third. Poses are hip-centred,
in millimetres.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import serialization, struct
from jax import Array
from jaxtyping import Float, Key
from tqdm import tqdm

from diffpose_jax.io import arrays
from diffpose_jax.io.trees import CheckpointError
from diffpose_jax.skeleton import NUM_JOINTS

_STEPS_PER_DISPATCH = 100


class RegressionNetwork(nn.Module):
    """Standardised joints -> standardised pose without the hip (Martinez et al. 2017, Fig. 2).

    A linear layer, two residual blocks of two, and a linear layer out; batch normalisation, ReLU
    and dropout of a half after each but the last. The paper's max-norm on the weights is left out.
    `width` is that of the hidden layers, 1024 in the paper.
    """

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B F"], *, train: bool) -> Float[Array, "B 48"]:
        """Training needs the random stream `dropout` and a mutable `batch_stats`."""

        def layer(x: Array) -> Array:
            x = nn.Dense(self.width, kernel_init=nn.initializers.he_normal())(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            return nn.Dropout(0.5, deterministic=not train)(x)

        x = layer(x)
        for _ in range(2):
            x = x + layer(layer(x))
        return nn.Dense((NUM_JOINTS - 1) * 3)(x)


@struct.dataclass
class RegressionParams:
    """A fitted regression: its network, and the moments of inputs and poses (without the hip)."""

    variables: Any
    input_mean: Float[Array | np.ndarray, "16 3"]
    input_std: Float[Array | np.ndarray, "16 3"]
    pose_mean_mm: Float[Array | np.ndarray, "16 3"]
    pose_std_mm: Float[Array | np.ndarray, "16 3"]


@struct.dataclass
class GaussianParams:
    """F with F F^T the residuals' covariance (joint-major, without the hip)."""

    factor_mm: Float[Array | np.ndarray, "48 48"]


@struct.dataclass
class Baselines:
    """The three baselines, fitted."""

    mean_pose_mm: Float[Array | np.ndarray, "17 3"]
    regression: RegressionParams
    gaussian: GaussianParams


def fit_baselines(
    key: Key[Array, ""],
    inputs: Float[np.ndarray, "N 16 3"],
    poses_mm: Float[np.ndarray, "N 17 3"],
    **settings: Any,
) -> Baselines:
    """Fits all three baselines on a training set; see `fit_regression` for the arguments."""
    inputs, poses_mm = inputs.astype(np.float32), poses_mm.astype(np.float32)
    regression = fit_regression(key, inputs, poses_mm, **settings)
    residuals_mm = poses_mm - np.asarray(jax.jit(predict)(regression, inputs))
    return Baselines(
        mean_pose_mm=jnp.asarray(np.mean(poses_mm, axis=0, dtype=np.float64), jnp.float32),
        regression=regression,
        gaussian=fit_gaussian(residuals_mm),
    )


def fit_regression(
    key: Key[Array, ""],
    inputs: Float[np.ndarray, "N 16 3"],
    poses_mm: Float[np.ndarray, "N 17 3"],
    *,
    steps: int,
    batch_size: int,
    width: int,
    learning_rate: float,
) -> RegressionParams:
    """Fits the regression by Adam on the mean squared error of standardised poses.

    Unlike the paper's, its input has a third channel a joint, the likelihood of the argmax,
    so that it knows what the detector is unsure of, as the model does. Batches are drawn with
    replacement; the learning rate falls to 0 along a cosine. The same key and data give the
    same parameters.

    Args:
      key: a random key.
      inputs: of each MPII joint the argmax coordinates x and y in [-1, 1) and the heatmap's
        height there.
      poses_mm: the poses.
      steps: number of optimizer steps.
      batch_size: frames a step.
      width: units of the hidden layers.
      learning_rate: Adam's, at the start.
    """
    N = len(inputs)
    input_mean, input_std = _mean_and_std(inputs)
    pose_mean_mm, pose_std_mm = _mean_and_std(poses_mm[:, 1:])
    x = jnp.asarray((inputs - input_mean) / input_std).reshape(N, -1)
    y = jnp.asarray((poses_mm[:, 1:] - pose_mean_mm) / pose_std_mm).reshape(N, -1)

    init_key, batch_key, dropout_key = jax.random.split(key, 3)
    network = RegressionNetwork(width)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    @jax.jit  # x and y as arguments: as constants they would be compiled
    def train(
        first: Array | int, last: Array | int, state: tuple[Any, ...], x: Array, y: Array
    ) -> tuple[Any, ...]:
        def step(i: Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
            params, batch_stats, optimizer_state, _ = state
            rows = jax.random.randint(jax.random.fold_in(batch_key, i), (batch_size,), 0, len(x))

            def loss_fn(params: Any) -> tuple[Array, Any]:
                prediction, updates = network.apply(
                    {"params": params, "batch_stats": batch_stats},
                    x[rows],
                    train=True,
                    rngs={"dropout": jax.random.fold_in(dropout_key, i)},
                    mutable=["batch_stats"],
                )
                return jnp.mean((prediction - y[rows]) ** 2), updates["batch_stats"]

            (loss, updated), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
            updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
            return optax.apply_updates(params, updates), updated, optimizer_state, loss

        return jax.lax.fori_loop(first, last, step, state)

    variables = network.init(init_key, x[:1], train=False)
    params = variables["params"]
    state = (params, variables["batch_stats"], optimizer.init(params), jnp.zeros(()))
    with tqdm(total=steps, desc="regression baseline", unit="step") as progress:
        for first in range(0, steps, _STEPS_PER_DISPATCH):
            last = min(first + _STEPS_PER_DISPATCH, steps)
            state = train(first, last, state, x, y)
            progress.set_postfix(loss=f"{float(state[3]):.4f}", refresh=False)
            progress.update(last - first)

    variables = {"params": state[0], "batch_stats": state[1]}
    moments = map(jnp.asarray, (input_mean, input_std, pose_mean_mm, pose_std_mm))
    return RegressionParams(variables, *moments)


def _mean_and_std(
    values: Float[np.ndarray, "N J 3"],
) -> tuple[Float[np.ndarray, "J 3"], Float[np.ndarray, "J 3"]]:
    """Mean and standard deviation over the frames; 1 where nothing varies."""
    mean = np.asarray(np.mean(values, axis=0, dtype=np.float64))
    std = np.std(values, axis=0, dtype=np.float64)
    return mean.astype(np.float32), np.where(std > 1e-6, std, 1).astype(np.float32)


def predict(
    regression: RegressionParams, inputs: Float[Array | np.ndarray, "B 16 3"]
) -> Float[Array, "B 17 3"]:
    """The regression's pose of each frame, for inputs as in `fit_regression`; jittable."""
    B = inputs.shape[0]
    width = regression.variables["params"]["Dense_0"]["kernel"].shape[1]
    x = (inputs - regression.input_mean[None]) / regression.input_std[None]
    network = RegressionNetwork(width)
    y = cast(Array, network.apply(regression.variables, x.reshape(B, -1), train=False))
    joints_mm = y.reshape(B, NUM_JOINTS - 1, 3) * regression.pose_std_mm[None]
    return _with_hip(joints_mm + regression.pose_mean_mm[None])


def fit_gaussian(residuals_mm: Float[np.ndarray, "N 17 3"]) -> GaussianParams:
    """Fits the covariance of the residuals, of all joints and axes jointly.

    The maximum-likelihood covariance of a Gaussian whose mean is the prediction: the second
    moment about 0, not about the residuals' mean. With fewer than 48 frames it is singular, and
    the draws stay in the span of the residuals.
    """
    rows = residuals_mm[:, 1:].reshape(len(residuals_mm), -1).astype(np.float64)
    # A square root by eigenvalues: Cholesky's would need jitter where the matrix is singular.
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    return GaussianParams(jnp.asarray(vectors * np.sqrt(np.maximum(values, 0)), jnp.float32))


def draw(
    key: Key[Array, ""],
    gaussian: GaussianParams,
    mean_poses_mm: Float[Array, "B 17 3"],
    num_hypotheses: int,
) -> Float[Array, "B M 17 3"]:
    """Draws hypotheses around the regression's poses; jittable."""
    B, M = mean_poses_mm.shape[0], num_hypotheses
    normal = jax.random.normal(key, (B, M, gaussian.factor_mm.shape[0]))
    residuals = jnp.einsum("bmk,jk->bmj", normal, gaussian.factor_mm, precision="highest")
    return mean_poses_mm[:, None] + _with_hip(residuals.reshape(B, M, NUM_JOINTS - 1, 3))


def _with_hip(joints_mm: Float[Array, "*B 16 3"]) -> Float[Array, "*B 17 3"]:
    """Puts the hip at 0 in front of the other joints."""
    return jnp.concatenate([jnp.zeros_like(joints_mm[..., :1, :]), joints_mm], axis=-2)


def save(path: str | Path, baselines: Baselines, fitted_on: dict[str, Any]) -> None:
    """Writes baselines as .npz, with plain values that they depend on."""
    arrays.write_tree(path, serialization.to_state_dict(baselines), fitted_on)


def load(path: str | Path) -> tuple[Baselines, dict[str, Any]]:
    """Reads what `save` wrote: the baselines, and what they were fitted on.

    Raises:
      CheckpointError: if the file is damaged.
    """
    try:
        tree, fitted_on = arrays.read_tree(path)
        regression = RegressionParams(**tree["regression"])
        gaussian = GaussianParams(**tree["gaussian"])
        return Baselines(tree["mean_pose_mm"], regression, gaussian), fitted_on
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it") from error
