"""A trained model, ready to sample: `load` and `Model`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Key

from diffpose_jax import distributed
from diffpose_jax.config import Config
from diffpose_jax.method import sampling
from diffpose_jax.method.heatmaps import MAPS_SHAPE
from diffpose_jax.method.network import DiffPose, Draw, Params
from diffpose_jax.skeleton import NUM_JOINTS
from diffpose_jax.training import checkpoints

MAX_IMAGES = 64
"""Images that `Model.draw` works on at a time, on each device."""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A trained model, ready to sample: what `diffpose_jax.load` returns.

    Attributes:
      network: the networks and the diffusion process.
      params: their parameters.
      config: the whole configuration that the model was trained with.
      data_fingerprint: of the data set that it was trained on, empty if that is not known.
      errors: what was measured of its predictions, for solvers that need it; None if nothing was.
      default_solver: parsed; by default the configuration's, see `sampling.parse_solver`.
    """

    network: DiffPose
    params: Params
    config: Config
    data_fingerprint: str = ""
    errors: sampling.PredictionErrors | None = None
    default_solver: sampling.Steps | None = None

    @functools.cached_property
    def solver(self) -> sampling.Steps:
        """The solver of a draw that does not name one."""
        return self.default_solver or self.parse_solver(self.config.evaluation.solver)

    def parse_solver(self, solver: str) -> sampling.Steps:
        """The steps of a solver such as "ddpm:8" or "ddpm:4@24+cov".

        Raises:
          ConfigError: for an unknown one, or one that needs `errors` where there are none.
        """
        return sampling.parse_solver(self.network.schedule, solver, self.errors)

    def draw(
        self,
        key: Key[Array, ""],
        heatmaps: Array | np.ndarray,
        num_hypotheses: int = 200,
        solver: str | sampling.Steps | None = None,
    ) -> Draw:
        """Draws poses from the distribution that the heatmaps imply, on all local devices.

        The hypotheses of an image depend on the key and its heatmaps, not on the rest of the
        batch; the same key gives the same hypotheses, and more of them keep the first ones.

        Args:
          key: a random key (`jax.random.key(seed)`).
          heatmaps: (B, 16, 64, 64), MPII joint order, as the detector gives them. A map
            without a positive cell counts as unknown: uniform, with likelihood 0.
          num_hypotheses: M.
          solver: of the reverse process: "ddpm", the paper's 25 steps, or one with fewer steps
            such as "ddpm:8", see `sampling.parse_solver`; by default the model's.

        Raises:
          ValueError: for heatmaps of another shape or type or with NaN, for M < 1, and for an
            unknown solver.
        """
        return self._spread(_draw, key, heatmaps, num_hypotheses, solver)

    def sample(
        self,
        key: Key[Array, ""],
        heatmaps: Array | np.ndarray,
        num_hypotheses: int = 200,
        solver: str | sampling.Steps | None = None,
    ) -> Float[Array, "B M 17 3"]:
        """The poses of `draw`, without candidates, which may take 20 times as much memory."""
        return self._spread(_draw_poses, key, heatmaps, num_hypotheses, solver)

    def log_prob(
        self,
        key: Key[Array, ""],
        heatmaps: Array | np.ndarray,
        poses_mm: Array | np.ndarray,
        num_candidate_sets: int = 1,
    ) -> Float[Array, "B M"]:
        """Log-density of poses given the heatmaps, in nats, on all local devices.

        That of the 16 joints without the hip, centred on their mean, in decimetres and an
        orthonormal basis of the 45 dimensions that they have; of poses blurred by 7 mm, and of the
        probability-flow ODE (`method.likelihood`). It ranks poses, and tells one that does not fit.

        Args:
          key: a random key, for the candidates.
          heatmaps: (B, 16, 64, 64), as in `draw`.
          poses_mm: (B, M, 17, 3), M poses of each image.
          num_candidate_sets: the density is the mean of those under so many sets of candidates.

        Raises:
          ValueError: for heatmaps as in `draw`, poses of another shape or with NaN, or no set.
        """
        checked, poses_mm = check_heatmaps(heatmaps), np.asarray(poses_mm, np.float32)
        if poses_mm.ndim != 4 or poses_mm.shape[2:] != (NUM_JOINTS, 3):
            raise ValueError(f"poses_mm must be (B, M, {NUM_JOINTS}, 3), not {poses_mm.shape}")
        if len(poses_mm) != len(checked):
            raise ValueError(f"{len(checked)} heatmaps, but poses of {len(poses_mm)} images")
        if not np.isfinite(poses_mm).all():
            raise ValueError("poses_mm holds numbers that are not finite")
        if num_candidate_sets < 1:
            raise ValueError(f"num_candidate_sets must be at least 1, not {num_candidate_sets}")
        if 0 in poses_mm.shape:
            return jnp.zeros(poses_mm.shape[:2])
        static, shared = (self.network, num_candidate_sets), (self._replicated_params, key)
        return distributed.spread(_log_prob, static, shared, (checked, poses_mm), most=MAX_IMAGES)

    def _spread(
        self,
        function: Callable[..., Any],
        key: Array,
        heatmaps: Array | np.ndarray,
        num_hypotheses: int,
        solver: str | sampling.Steps | None,
    ) -> Any:
        """Checks what `draw` takes and runs the function on all local devices."""
        checked = check_heatmaps(heatmaps)
        if num_hypotheses < 1:
            raise ValueError(f"num_hypotheses must be at least 1, not {num_hypotheses}")
        steps = self.parse_solver(solver) if isinstance(solver, str) else solver or self.solver
        static, shared = (self.network, num_hypotheses), (self._replicated_params, key, steps)
        if len(checked) == 0:
            one = np.zeros((1, *checked.shape[1:]), np.float32)
            shape = jax.eval_shape(functools.partial(function, *static), *shared, one, 1)
            return jax.tree.map(lambda x: jnp.zeros((0, *x.shape[1:]), x.dtype), shape)
        return distributed.spread(function, static, shared, checked, most=MAX_IMAGES)

    @functools.cached_property
    def _replicated_params(self) -> Params:
        """The parameters where `pmap` wants them, or each call would copy them."""
        return distributed.replicate(self.params, jax.local_devices())


def check_heatmaps(heatmaps: Array | np.ndarray) -> Float[np.ndarray, "B J H W"]:
    """Checks a user's heatmaps and gives them as float32 on the host.

    Args:
      heatmaps: (B, 16, 64, 64), MPII joint order.

    Raises:
      ValueError: for another shape, a type that is not a real number's, or NaN and infinity;
        the message names the first bad image and joint.
    """
    heatmaps = np.asarray(heatmaps)
    if heatmaps.ndim != 4 or heatmaps.shape[1:] != MAPS_SHAPE:
        hint = " (one image? add a leading axis: heatmaps[None])" * (heatmaps.shape == MAPS_SHAPE)
        raise ValueError(f"heatmaps must be (B, 16, 64, 64), not {heatmaps.shape}{hint}")
    # jnp.issubdtype knows bfloat16 and its like, np.issubdtype does not.
    if not any(jnp.issubdtype(heatmaps.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise ValueError(f"heatmaps must be real numbers, not {heatmaps.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):  # overflow is found below
        heatmaps = heatmaps.astype(np.float32)
    finite = np.isfinite(heatmaps).all(axis=(2, 3))
    if not finite.all():
        image, joint = np.argwhere(~finite)[0]
        raise ValueError(
            f"heatmaps must be finite: image {image}, joint {joint} holds NaN or infinity"
        )
    return heatmaps


# Of the module, not methods of `network`: see `distributed.spread`.
def _draw(
    network: DiffPose,
    num_hypotheses: int,
    params: Params,
    key: Array,
    steps: sampling.Steps,
    heatmaps: Array,
    num_images: Array,
) -> Draw:
    return network.draw(params, key, steps, heatmaps, num_hypotheses, num_images)


def _draw_poses(*arguments: Any) -> Array:
    return _draw(*arguments).poses_mm


def _log_prob(
    network: DiffPose,
    num_candidate_sets: int,
    params: Params,
    key: Array,
    batch: tuple[Array, Array],
    num_images: Array,
) -> Array:
    return network.log_prob(params, key, *batch, num_candidate_sets, num_images)


def load(checkpoint: str | Path, weights: str | None = None) -> Model:
    """Reads a model, ready to sample.

    Args:
      checkpoint: a run's folder, its `checkpoints` or one step in it, or an export.
      weights: "raw" or "ema"; by default what `config.evaluation.weights` says. An export
        holds the one set that it was made from.

    Raises:
      CheckpointError: if there is no checkpoint, or not one of this package or version, or it is
        damaged, or for other joints or units of the poses.
    """
    return Model(*checkpoints.load(checkpoint, weights))


def export(model: Model, directory: str | Path, half: bool = False) -> None:
    """Writes parameters, configuration and errors as a small checkpoint that `load` reads.

    Args:
      model: the model.
      directory: a new folder.
      half: whether to keep the parameters as float16, half the bytes; they are read as float32.

    Raises:
      CheckpointError: if the folder is there already.
    """
    checkpoints.export(
        directory, model.params, model.config, model.data_fingerprint, model.errors, half
    )
