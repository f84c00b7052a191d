"""The model: configuration to modules, and from heatmaps to poses in millimetres."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from diffpose_jax import distributed as devices
from diffpose_jax.method import diffusion, sampling
from diffpose_jax.method import heatmaps as heatmaps_lib
from diffpose_jax.method.denoiser import Denoiser
from diffpose_jax.method.embedding_transformer import EmbeddingTransformer
from diffpose_jax.method.heatmaps import Candidates
from diffpose_jax.method.plain_encoders import CandidateVector, HeatmapResNet
from diffpose_jax.skeleton import H36M_JOINTS, HEATMAP_SIZE, NUM_HEATMAPS, NUM_JOINTS

Params = Mapping[str, Any]

Encoder = EmbeddingTransformer | CandidateVector | HeatmapResNet
Evidence = Candidates | Array
"""What an encoder reads: candidates (..., S, 16), or the heatmaps (..., 16, 64, 64) themselves."""

MAX_IMAGES = 64
"""Images that `Model.sample` works on at a time, on each device."""

PER_PASS_ON_CPU, PER_PASS = 200, 64 * 200
"""Hypotheses that are denoised together: the activations of 200 fit a CPU's cache and those of many
do not; other devices want work for all of their cores."""

POSE_SIZE = 3 * (NUM_JOINTS - 1)
"""Length of a pose vector: 16 joints, without the hip."""

_RIGHT_HIP, _LEFT_HIP = H36M_JOINTS.index("RHip") - 1, H36M_JOINTS.index("LHip") - 1


def pose_to_vector(pose_mm: Array, pose_scale: float = 10.0) -> Array:
    """Poses to the vectors that the diffusion works on.

    Args:
      pose_mm: (..., 17, 3), millimetres, camera axes with y up.
      pose_scale: units of the vector per metre.

    Returns:
      (..., 48): 16 joints without the hip, centred on their mean, axis by axis [x.., y.., z..].
    """
    joints = pose_mm[..., 1:, :] * (pose_scale / 1000.0)
    centred = joints - jnp.mean(joints, axis=-2, keepdims=True)
    return jnp.swapaxes(centred, -1, -2).reshape(*pose_mm.shape[:-2], POSE_SIZE)


def vector_to_pose(vector: Array, pose_scale: float = 10.0) -> Array:
    """The inverse of `pose_to_vector` for poses whose hip is the midpoint of the two hips.

    Args:
      vector: (..., 48).
      pose_scale: units of the vector per metre.

    Returns:
      (..., 17, 3), millimetres, hip-centred.
    """
    joints = jnp.swapaxes(vector.reshape(*vector.shape[:-1], 3, NUM_JOINTS - 1), -1, -2)
    hip = 0.5 * (joints[..., [_RIGHT_HIP], :] + joints[..., [_LEFT_HIP], :])
    return (1000.0 / pose_scale) * jnp.concatenate([jnp.zeros_like(hip), joints - hip], axis=-2)


@dataclasses.dataclass(frozen=True)
class DiffPose:
    """The networks and the diffusion process, without parameters: pure functions of arrays.

    Two that are built alike are equal: what JAX compiled for one serves the other, and a long
    session that builds many does not keep a program for each.

    Attributes:
      encoder: candidates -> condition, or heatmaps -> condition.
      denoiser: eps(x_t, t, condition).
      schedule: the noise schedule.
      pose_scale: units of the pose vector per metre.
      clip: bound of the predicted x_0, in these units.
      num_candidates: S, candidates per joint.
      include_argmax: whether the first candidate is the heatmap's argmax.
      normalised_likelihood: whether a candidate's likelihood is its probability, or the raw
        height of the heatmap.
      candidates_per_hypothesis: whether each hypothesis draws candidates of its own, and so
        has a condition of its own, or the hypotheses of an image share one.
    """

    encoder: Encoder
    denoiser: Denoiser
    schedule: diffusion.Schedule
    pose_scale: float
    clip: float
    num_candidates: int
    include_argmax: bool
    normalised_likelihood: bool
    candidates_per_hypothesis: bool

    @property
    def reads_heatmaps(self) -> bool:
        """Whether the condition comes from the heatmaps themselves, without candidates."""
        return isinstance(self.encoder, HeatmapResNet)

    @property
    def matmul_dtype(self) -> DTypeLike:
        """Type of the matrix products."""
        return self.denoiser.dtype

    @functools.partial(jax.jit, static_argnames="self")
    def init(self, key: Array) -> Params:
        """Draws parameters: {"encoder": .., "denoiser": ..}, float32."""
        encoder_key, denoiser_key = jax.random.split(key)
        maps = jnp.zeros((NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE))
        evidence = self.draw_evidence(encoder_key, maps)
        condition, encoder = self.encoder.init_with_output(encoder_key, evidence)

        def both(denoiser: Denoiser, condition: Array) -> Array:
            x_t, t = jnp.zeros(POSE_SIZE), jnp.zeros((), jnp.int32)
            return denoiser(x_t, t, denoiser.project_condition(condition))

        denoiser = self.denoiser.init(denoiser_key, condition, method=both)
        return {"encoder": encoder.get("params", {}), "denoiser": denoiser["params"]}

    def draw_candidates(self, key: Array, heatmaps: Array) -> Candidates:
        """Draws the candidates of one image: heatmaps (16, 64, 64) -> S x 16 candidates."""
        if self.normalised_likelihood:
            heatmaps = heatmaps_lib.normalise(heatmaps)
        return heatmaps_lib.sample(
            key, heatmaps, self.num_candidates, include_argmax=self.include_argmax
        )

    def draw_evidence(self, key: Array, heatmaps: Array) -> Evidence:
        """What the encoder reads of one image's heatmaps (16, 64, 64): candidates, mostly."""
        return heatmaps if self.reads_heatmaps else self.draw_candidates(key, heatmaps)

    def condition(
        self, params: Params, evidence: Evidence, dropout_key: Array | None = None
    ) -> Array:
        """Candidates (..., S, 16) to conditions (..., C); with a key, as in training."""
        condition = self.encoder.apply(
            {"params": params["encoder"]},
            evidence,
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
        )
        return cast(Array, condition)

    def project_condition(self, params: Params, condition: Array) -> Array:
        """What the denoiser makes of a condition, once for all steps: (..., C) -> (..., W)."""
        projected = self.denoiser.apply(
            {"params": params["denoiser"]}, condition, method=Denoiser.project_condition
        )
        return cast(Array, projected)

    def denoise(self, params: Params, x_t: Array, t: Array, projected: Array) -> Array:
        """Predicts the noise: x_t (..., 48), t (...), projected (..., W) -> (..., 48)."""
        return cast(Array, self.denoiser.apply({"params": params["denoiser"]}, x_t, t, projected))

    def loss(
        self, params: Params, key: Array, evidence: Evidence, x_0: Array, num_draws: int = 1
    ) -> Array:
        """Training loss of one image.

        Args:
          params: parameters.
          key: a random key, for dropout, times and noise.
          evidence: candidates, (S, 16), or what else the encoder reads.
          x_0: (48,), the pose vector.
          num_draws: how many times and noises to draw under the one condition.

        Returns:
          The mean squared error of the predicted noise, a scalar.
        """
        dropout_key, noise_key = jax.random.split(key)
        condition = self.condition(params, evidence, dropout_key)
        projected = self.project_condition(params, condition)[None]
        t, noise = diffusion.draw_time_and_noise(noise_key, self.schedule, (num_draws, POSE_SIZE))
        return diffusion.noise_prediction_loss(
            lambda x_t, t: self.denoise(params, x_t, t, projected),
            self.schedule,
            jnp.tile(x_0, (num_draws, 1)),
            t,
            noise,
        )

    @functools.partial(jax.jit, static_argnames=("self", "num_hypotheses", "solver"))
    def sample(
        self,
        params: Params,
        key: Array,
        heatmaps: Array,
        num_hypotheses: int,
        num_images: Array | int | None = None,
        solver: str = "ddpm",
    ) -> Array:
        """Draws hypotheses, on one device.

        Args:
          params: parameters.
          key: a random key.
          heatmaps: (B, 16, 64, 64) float32.
          num_hypotheses: M.
          num_images: how many images count, the first ones; it may be traced. The rest costs
            next to nothing, so that a batch can be padded to a shape that is compiled already.
          solver: of the reverse process, see `diffusion.reverse_steps`.

        Returns:
          (B, M, 17, 3) millimetres.
        """
        batch = heatmaps.shape[0]  # a symbol in an export, which `len` does not take
        num_images = batch if num_images is None else num_images
        steps = diffusion.reverse_steps(self.schedule, solver)
        keys = sampling.image_keys(key, heatmaps)
        candidate_keys, noise_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)

        def projected_condition(key: Array, heatmaps: Array) -> Array:
            evidence = self.draw_evidence(key, heatmaps)
            return self.project_condition(params, self.condition(params, evidence))

        if not self.candidates_per_hypothesis:
            projected = jax.vmap(projected_condition)(candidate_keys, heatmaps)

        def hypothesis(index: Array) -> Array:
            image, m = index // num_hypotheses, index % num_hypotheses
            if self.candidates_per_hypothesis:
                own_key = jax.random.fold_in(candidate_keys[image], m)
                condition = projected_condition(own_key, heatmaps[image])
            else:
                condition = projected[image]
            return sampling.sample_hypothesis(
                noise_keys[image],
                m,
                lambda x_t, t: self.denoise(params, x_t, t, condition),
                self.schedule,
                steps,
                size=POSE_SIZE,
                clip=self.clip,
            )

        draw = functools.partial(
            sampling.in_passes,
            jax.vmap(hypothesis),
            batch * num_hypotheses,
            num_images * num_hypotheses,
        )
        # For the conditions of very many hypotheses a device may have no memory.
        per_pass = PER_PASS // 8 if self.candidates_per_hypothesis else PER_PASS
        # Which platform it will be, only the lowering knows.
        vectors = jax.lax.platform_dependent(
            cpu=functools.partial(draw, per_pass=PER_PASS_ON_CPU),
            default=functools.partial(draw, per_pass=per_pass),
        )
        vectors = vectors.reshape(batch, num_hypotheses, POSE_SIZE)
        return vector_to_pose(vectors, self.pose_scale)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A trained model, ready to sample: what `diffpose_jax.load` returns.

    Attributes:
      network: the networks and the diffusion process.
      params: their parameters.
      config: the whole configuration that the model was trained with.
      data_fingerprint: of the data set that it was trained on, empty if that is not known.
      solver: of the reverse process, see `diffusion.reverse_steps`.
    """

    network: DiffPose
    params: Params
    config: ml_collections.ConfigDict
    data_fingerprint: str = ""
    solver: str = "ddpm"

    def sample(
        self,
        key: Array,
        heatmaps: Array | np.ndarray,
        num_hypotheses: int = 200,
        solver: str | None = None,
    ) -> Array:
        """Draws poses from the distribution that the heatmaps imply, on all local devices.

        The hypotheses of an image depend on the key and its heatmaps, not on the rest of the
        batch; the same key gives the same hypotheses, and more of them keep the first ones.

        Args:
          key: a random key (`jax.random.key(seed)`).
          heatmaps: (B, 16, 64, 64), MPII joint order, as the detector gives them. A map
            without a positive cell counts as unknown: uniform, with likelihood 0.
          num_hypotheses: M.
          solver: of the reverse process: "ddpm", the paper's 25 steps, or one with fewer steps
            such as "ddpm:8", see `diffusion.reverse_steps`; by default the model's.

        Returns:
          (B, M, 17, 3), millimetres, Human3.6M joint order, hip-centred camera axes with y up.

        Raises:
          ValueError: for heatmaps of another shape or type or with NaN, for M < 1, and for an
            unknown solver.
        """
        checked = heatmaps_lib.check(heatmaps)
        if num_hypotheses < 1:
            raise ValueError(f"num_hypotheses must be at least 1, not {num_hypotheses}")
        solver = self.solver if solver is None else solver
        diffusion.reverse_steps(self.network.schedule, solver)  # an error before any work
        if len(checked) == 0:
            return jnp.zeros((0, num_hypotheses, NUM_JOINTS, 3))
        per_call = MAX_IMAGES * jax.local_device_count()
        poses_mm = [
            self._sample_on_devices(key, part, num_hypotheses, solver)
            for part in np.split(checked, range(per_call, len(checked), per_call))
        ]
        return jnp.concatenate(poses_mm)

    def _sample_on_devices(
        self, key: Array, heatmaps: np.ndarray, num_hypotheses: int, solver: str
    ) -> Array:
        """Splits at most `MAX_IMAGES` a device, evenly."""
        num_devices = jax.local_device_count()
        share = -(-len(heatmaps) // num_devices)
        # Shapes are powers of two, so that few are compiled; only real images cost time.
        padded = 1 << (share - 1).bit_length()
        counts = np.clip(len(heatmaps) - share * np.arange(num_devices), 0, share)
        parts = np.zeros((num_devices, padded, *heatmaps.shape[1:]), np.float32)
        for device, count in enumerate(counts):
            parts[device, :count] = heatmaps[device * share :][:count]
        sample = jax.pmap(
            DiffPose.sample,  # not a method of `self.network`, which JAX would never forget
            axis_name=devices.AXIS,
            in_axes=(None, None, None, 0, None, 0, None),
            static_broadcasted_argnums=(0, 4, 6),
            devices=jax.local_devices(),
        )
        poses_mm = sample(
            self.network, self._replicated_params, key, parts, num_hypotheses, counts, solver
        )
        return poses_mm.reshape(-1, *poses_mm.shape[2:])[
            np.flatnonzero(np.arange(padded)[None] < counts[:, None])
        ]

    @functools.cached_property
    def _replicated_params(self) -> Params:
        """The parameters where `pmap` wants them, or each call would copy them."""
        return devices.replicate(self.params, jax.local_devices())


def build(
    *,
    encoder: str,
    num_candidates: int,
    include_argmax: bool,
    candidates: str,
    coordinates: str,
    likelihood: str,
    likelihood_scaling: bool,
    num_kernels: int,
    cross_spatial: bool,
    joint_dropout: float,
    encoder_layers: int,
    encoder_heads: int,
    encoder_feed_forward: int,
    encoder_dropout: float,
    condition_size: int,
    resnet_width: int,
    denoiser_width: int,
    denoiser_blocks: int,
    diffusion_steps: int,
    schedule_offset: float,
    max_beta: float,
    pose_scale: float,
    clip: float,
    matmul_dtype: str,
) -> DiffPose:
    """Builds the modules from the fields of `config.model`, documented in `configs/h36m.py`.

    Raises:
      ValueError: for a value out of range.
    """
    if num_candidates < 1:
        raise ValueError(f"config.model.num_candidates must be at least 1, not {num_candidates}")
    if resnet_width < 4 or resnet_width % 4:
        raise ValueError(
            f"config.model.resnet_width must be a positive multiple of 4, not {resnet_width}"
        )
    if num_kernels < 2:
        raise ValueError(f"config.model.num_kernels must be at least 2, not {num_kernels}")
    if encoder_heads < 1 or 2 * num_kernels % encoder_heads:
        raise ValueError(
            f"config.model: {encoder_heads} encoder_heads do not divide 2 num_kernels"
            f" = {2 * num_kernels}"
        )
    _check_ranges(locals())
    dtype = _choice(
        "matmul_dtype",
        matmul_dtype,
        {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16},
    )
    encoders = {
        "embedding": EmbeddingTransformer(
            num_kernels=num_kernels,
            condition_size=condition_size,
            num_layers=encoder_layers,
            num_heads=encoder_heads,
            feed_forward=encoder_feed_forward,
            dropout=encoder_dropout,
            joint_dropout=joint_dropout,
            likelihood_scaling=likelihood_scaling,
            cross_spatial=cross_spatial,
            standardise=_choice("coordinates", coordinates, {"image": False, "standardised": True}),
            dtype=dtype,
        ),
        "candidates": CandidateVector(likelihood_scaling=likelihood_scaling),
        "heatmaps": HeatmapResNet(width=resnet_width, dtype=dtype),
    }
    return DiffPose(
        encoder=_choice("encoder", encoder, encoders),
        denoiser=Denoiser(
            pose_size=POSE_SIZE, width=denoiser_width, num_blocks=denoiser_blocks, dtype=dtype
        ),
        schedule=diffusion.cosine_schedule(diffusion_steps, schedule_offset, max_beta),
        pose_scale=pose_scale,
        clip=clip,
        num_candidates=num_candidates,
        include_argmax=include_argmax,
        normalised_likelihood=_choice(
            "likelihood", likelihood, {"height": False, "probability": True}
        ),
        candidates_per_hypothesis=_choice(
            "candidates", candidates, {"per_image": False, "per_hypothesis": True}
        ),
    )


_RANGES = {
    "num_candidates": (1, 4096),
    "num_kernels": (2, 4096),
    "joint_dropout": (0, 0.99),
    "encoder_layers": (0, 100),
    "encoder_feed_forward": (1, 65_536),
    "encoder_dropout": (0, 0.99),
    "condition_size": (1, 65_536),
    "resnet_width": (4, 4096),
    "denoiser_width": (1, 65_536),
    "denoiser_blocks": (0, 100),
    "diffusion_steps": (2, 10_000),
    "schedule_offset": (0, 1),
    "max_beta": (0, 1),
    "pose_scale": (1e-3, 1e6),
    "clip": (1e-3, 1e9),
}


def _check_ranges(fields: dict[str, Any]) -> None:
    """Refuses, before anything is built, what nobody means: a checkpoint may come from anyone."""
    for field, (least, most) in _RANGES.items():
        if not least <= fields[field] <= most:
            raise ValueError(f"config.model.{field} must be {least} to {most}, not {fields[field]}")


def _choice(field: str, word: str, choices: dict[str, Any]) -> Any:
    """What the word in a field stands for."""
    if word not in choices:
        raise ValueError(f"config.model.{field} must be one of {', '.join(choices)}, not {word!r}")
    return choices[word]
