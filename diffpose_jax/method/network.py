"""DiffPose as a whole: from a configuration to its networks, and from heatmaps to hypotheses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Integer, Key, Real

from diffpose_jax import distributed
from diffpose_jax.config import ModelConfig
from diffpose_jax.method import diffusion, likelihood, sampling
from diffpose_jax.method.ablation_encoders import CandidateVector, HeatmapResNet
from diffpose_jax.method.denoiser import Denoiser
from diffpose_jax.method.embedding_transformer import EmbeddingTransformer
from diffpose_jax.method.heatmaps import MAPS_SHAPE, AnyArray, Candidates, CandidateSampler
from diffpose_jax.method.pose_vector import POSE_SIZE, moments, pose_to_vector, vector_to_pose
from diffpose_jax.skeleton import NUM_JOINTS

Params = Mapping[str, Any]

Encoder = EmbeddingTransformer | CandidateVector | HeatmapResNet
EncoderInput = Candidates | Array | np.ndarray
"""What an encoder reads: candidates (..., S, 16), or the heatmaps (..., 16, 64, 64) themselves."""

PER_PASS_ON_CPU, PER_PASS = 200, 64 * 200
"""Hypotheses that are denoised together: the activations of 200 fit a CPU's cache and those of many
do not; other devices want work for all of their cores."""
_POSES_PER_PASS = 64  # whose densities are computed together


@flax.struct.dataclass
class Draw:
    """Hypotheses, with the candidates that they were drawn under.

    Attributes:
      poses_mm: hip-centred camera axes with y up, Human3.6M joint order.
      candidates: those of each image, (B, S, J), or (B, M, S, J) where hypotheses have different
        ones; None if the encoder reads the heatmaps themselves.
    """

    poses_mm: Float[AnyArray, "*B M 17 3"]
    candidates: Candidates | None


@dataclasses.dataclass(frozen=True)
class DiffPose:
    """The networks and the diffusion process, without parameters: pure functions of arrays.

    Two that are built alike are equal: what JAX compiled for one serves the other, and a long
    session that builds many does not keep a program for each.

    Attributes:
      encoder: candidates -> condition, or heatmaps -> condition.
      denoiser: F(x_t, time, condition), what `target` says.
      schedule: the noise schedule.
      pose_scale: units of the pose vector per metre.
      clip: bound of the predicted x_0, in these units.
      sampler: makes the candidates; None if the encoder reads the heatmaps themselves.
      target: what the denoiser predicts, "noise" or "edm".
      data_std: deviation of the pose vectors for "edm"; 0 if it is to be measured.
      candidates_per_hypothesis: whether each hypothesis draws candidates of its own, and so
        has a condition of its own, or the hypotheses of an image share some.
      candidate_sets: how many sets of candidates they share, each one in turn.
    """

    encoder: Encoder
    denoiser: Denoiser
    schedule: diffusion.Schedule
    pose_scale: float
    clip: float
    sampler: CandidateSampler | None
    target: str
    data_std: float
    candidates_per_hypothesis: bool
    candidate_sets: int

    @property
    def matmul_dtype(self) -> DTypeLike:
        """Type of the matrix products."""
        return self.denoiser.dtype

    @functools.partial(jax.jit, static_argnames="self")
    def init(self, key: Key[Array, ""]) -> Params:
        """Draws parameters: {"encoder": .., "denoiser": ..}, float32.

        For the target "edm" also {"moments": {"mean": .., "std": ..}} (48,) of the data, which are
        not trained.
        """
        encoder_key, denoiser_key = jax.random.split(key)
        read = self.encoder_input(encoder_key, jnp.zeros(MAPS_SHAPE))
        condition, encoder = self.encoder.init_with_output(encoder_key, read)

        def both(denoiser: Denoiser, condition: Array) -> Array:
            x_t, t = jnp.zeros(POSE_SIZE), jnp.zeros((), jnp.int32)
            return denoiser(x_t, t, denoiser.project_condition(condition))

        denoiser = self.denoiser.init(denoiser_key, condition, method=both)
        params = {"encoder": encoder.get("params", {}), "denoiser": denoiser["params"]}
        if self.target == "edm":
            mean, std = jnp.zeros(POSE_SIZE), jnp.full(POSE_SIZE, self.data_std or 1.0)
            params["moments"] = {"mean": mean, "std": std}
        return params

    def with_moments(self, params: Params, poses_mm: Float[np.ndarray, "N 17 3"]) -> Params:
        """Parameters with the moments of the training poses, if the target needs them measured."""
        if self.target != "edm" or self.data_std:
            return params
        mean, std = moments(poses_mm, self.pose_scale)
        return {**params, "moments": {"mean": jnp.asarray(mean), "std": jnp.asarray(std)}}

    def encoder_input(
        self, key: Key[Array, ""], heatmaps: Float[Array, "J H W"]
    ) -> Candidates | Float[Array, "J H W"]:
        """What the encoder reads of one image: candidates drawn now, or the heatmaps."""
        return heatmaps if self.sampler is None else self.sampler.draw(key, heatmaps)

    def condition(
        self, params: Params, read: EncoderInput, dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "*batch C"]:
        """The condition c (Sec. 3.2); with a key, as in training."""
        condition = self.encoder.apply(
            {"params": params["encoder"]},
            read,
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
        )
        return cast(Array, condition)

    def project_condition(
        self, params: Params, condition: Float[Array, "*batch C"]
    ) -> Float[Array, "*batch W"]:
        """What the denoiser makes of a condition, once for all steps."""
        projected = self.denoiser.apply(
            {"params": params["denoiser"]}, condition, method=Denoiser.project_condition
        )
        return cast(Array, projected)

    def predict(
        self,
        params: Params,
        x_t: Float[Array, "*batch 48"],
        time: Real[Array, "*batch"],
        projected: Float[Array, "*#batch W"],
    ) -> Float[Array, "*batch 48"]:
        """The denoiser's output F(x_t, time, c) from the projected condition, see `time_input`."""
        variables = {"params": params["denoiser"]}
        return cast(Array, self.denoiser.apply(variables, x_t, time, projected))

    def time_input(
        self, t: Real[Array, "*batch"], level: diffusion.NoiseLevel
    ) -> Real[Array, "*batch"]:
        """What the denoiser sees of the time: t, or for "edm" their c_noise, ln(sigma) scaled."""
        return t if self.target == "noise" else 0.5 * jnp.log(level.noise / level.signal)[..., 0]

    def target_at(
        self, params: Params, level: diffusion.NoiseLevel
    ) -> tuple[diffusion.Target, Float[Array, "*centre"]]:
        """What F is at a noise level, and the mean that is taken off the data before."""
        if "moments" not in params:
            return diffusion.noise_target(level), jnp.zeros(())
        batch_axes = range(level.signal.ndim - 1)
        mean, std = (
            jnp.expand_dims(jax.lax.stop_gradient(params["moments"][name]), batch_axes)
            for name in ("mean", "std")
        )
        return diffusion.edm_target(level, std), mean

    def loss(
        self,
        params: Params,
        key: Key[Array, ""],
        read: EncoderInput,
        x_0: Float[Array, 48],
        num_draws: int = 1,
    ) -> Float[Array, ""]:
        """Training loss of one image: the mean squared error of F (for the noise Ho et al. Eq. 14).

        Args:
          params: parameters.
          key: a random key, for dropout, times and noise.
          read: what the encoder reads.
          x_0: the pose vector.
          num_draws: how many times and noises to draw under the one condition.
        """
        dropout_key, noise_key = jax.random.split(key)
        condition = self.condition(params, read, dropout_key)
        projected = self.project_condition(params, condition)[None]
        t, noise = diffusion.draw_time_and_noise(noise_key, self.schedule, (num_draws, POSE_SIZE))
        return self.loss_at(params, projected, x_0[None], t, noise)

    def loss_at(
        self,
        params: Params,
        projected: Float[Array, "*#batch W"],
        x_0: Float[Array, "*#batch 48"],
        t: Integer[Array, "*batch"],
        noise: Float[Array, "*batch 48"],
    ) -> Float[Array, ""]:
        """The loss at given times and noises, over all axes."""
        level = self.schedule.level(t)
        target, mean = self.target_at(params, level)
        time = self.time_input(t, level)
        found = self.predict(params, level.noised(x_0, noise), time, projected)
        wanted = target.of_x_0 * (x_0 - mean) + target.of_noise * noise
        return jnp.mean(jnp.square(found - wanted))

    def predict_x_0(
        self,
        params: Params,
        x_t: Float[Array, "*batch 48"],
        t: Real[Array, "*batch"],
        level: diffusion.NoiseLevel,
        projected: Float[Array, "*#batch W"],
    ) -> Float[Array, "*batch 48"]:
        """The x_0 that F implies at a time and its noise level."""
        target, mean = self.target_at(params, level)
        found = self.predict(params, x_t, self.time_input(t, level), projected)
        return mean + target.skip * (x_t - level.signal * mean) + target.out * found

    def denoise(self, params: Params, projected: Float[Array, " W"]) -> sampling.Denoise:
        """The prediction of x_0 under a condition, within the clip, for `sampling.sample`."""

        def x_0(x_t: Array, t: Array) -> Array:
            found = self.predict_x_0(params, x_t, t, self.schedule.level(t), projected)
            return jnp.clip(found, -self.clip, self.clip)

        return x_0

    def _draw_condition(
        self, params: Params, key: Array, heatmaps: Array
    ) -> tuple[Array, Candidates | None]:
        """A projected condition of one image, with the candidates that it is of."""
        read = self.encoder_input(key, heatmaps)
        projected = self.project_condition(params, self.condition(params, read))
        return projected, read if isinstance(read, Candidates) else None

    @functools.partial(jax.jit, static_argnames=("self", "num_candidate_sets"))
    def log_prob(
        self,
        params: Params,
        key: Key[Array, ""],
        heatmaps: Float[Array, "B J H W"],
        poses_mm: Float[Array, "B M 17 3"],
        num_candidate_sets: int,
        num_images: Array | int,
    ) -> Float[Array, "B M"]:
        """Log-densities of poses, on one device; see `inference.Model.log_prob` and `draw`."""
        batch, number, sets = *poses_mm.shape[:2], num_candidate_sets
        basis = likelihood.centred_basis(NUM_JOINTS - 1)
        vectors = pose_to_vector(poses_mm, self.pose_scale).reshape(-1, POSE_SIZE)
        coordinates = vectors @ jnp.asarray(basis, vectors.dtype)
        keys = jax.vmap(jax.random.split)(sampling.image_keys(key, heatmaps))[:, 0]

        of_sets = jax.vmap(jax.vmap(functools.partial(self._draw_condition, params), (0, None)))
        conditions, _ = of_sets(_keys_of_sets(keys, sets), heatmaps)

        def log_density(index: Array) -> Array:
            pose, candidate_set = index // sets, index % sets
            projected = conditions[pose // number, candidate_set]

            def predict(x_t: Array, t: Array, level: diffusion.NoiseLevel) -> Array:
                return self.predict_x_0(params, x_t, t, level, projected)

            return likelihood.log_density(predict, self.schedule, coordinates[pose], basis)

        of_image = number * sets
        found = distributed.in_passes(
            jax.vmap(log_density), batch * of_image, num_images * of_image, _POSES_PER_PASS
        )
        per_pose = jax.nn.logsumexp(found.reshape(batch, number, sets), axis=-1) - np.log(sets)
        return per_pose + basis.shape[1] * np.log(self.pose_scale / 10.0)

    @functools.partial(jax.jit, static_argnames=("self", "num_hypotheses"))
    def draw(
        self,
        params: Params,
        key: Key[Array, ""],
        steps: sampling.Steps,
        heatmaps: Float[Array, "B J H W"],
        num_hypotheses: int,
        num_images: Array | int | None = None,
    ) -> Draw:
        """Draws hypotheses, on one device.

        Hypothesis m of an image depends on the key, its heatmaps and m alone: more hypotheses
        keep the first ones.

        Args:
          params: parameters.
          key: a random key.
          steps: the solver.
          heatmaps: finite, float32.
          num_hypotheses: M.
          num_images: how many images count, the first ones; it may be traced. The rest costs
            next to nothing, so that a batch can be padded to a shape that is compiled already.
        """
        batch = heatmaps.shape[0]  # a symbol in an export, which `len` does not take
        num_images = batch if num_images is None else num_images
        keys = sampling.image_keys(key, heatmaps)
        candidate_keys, noise_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)

        condition = functools.partial(self._draw_condition, params)
        sets = min(self.candidate_sets, num_hypotheses)
        if not self.candidates_per_hypothesis:
            # A single set has the image's own key.
            is_one = self.candidate_sets == 1
            set_keys = candidate_keys[:, None] if is_one else _keys_of_sets(candidate_keys, sets)
            of_sets, candidates = jax.vmap(jax.vmap(condition, (0, None)))(set_keys, heatmaps)
            which = 0 if is_one else jnp.arange(num_hypotheses) % sets
            candidates = jax.tree.map(lambda x: x[:, which], candidates)

        def hypothesis(index: Array) -> tuple[Array, Candidates | None]:
            image, m = index // num_hypotheses, index % num_hypotheses
            if self.candidates_per_hypothesis:
                own_key = jax.random.fold_in(candidate_keys[image], m)
                projected, own = condition(own_key, heatmaps[image])
            else:
                projected, own = of_sets[image, m % sets], None
            noise_key = jax.random.fold_in(noise_keys[image], m)
            return sampling.sample(self.denoise(params, projected), steps, noise_key), own

        draw = functools.partial(
            distributed.in_passes,
            jax.vmap(hypothesis),
            batch * num_hypotheses,
            num_images * num_hypotheses,
        )
        # For the conditions of very many hypotheses a device may have no memory.
        per_pass = PER_PASS // 8 if self.candidates_per_hypothesis else PER_PASS
        # Which platform it will be, only the lowering knows.
        made = jax.lax.platform_dependent(
            cpu=functools.partial(draw, per_pass=PER_PASS_ON_CPU),
            default=functools.partial(draw, per_pass=per_pass),
        )
        vectors, own = jax.tree.map(lambda x: x.reshape(batch, num_hypotheses, *x.shape[1:]), made)
        poses_mm = vector_to_pose(vectors, self.pose_scale)
        return Draw(poses_mm, own if self.candidates_per_hypothesis else candidates)


def _keys_of_sets(keys: Key[Array, " B"], number: int) -> Key[Array, "B K"]:
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, jnp.arange(number))


def build(config: ModelConfig) -> DiffPose:
    """Makes the modules that a configuration describes (`configs/h36m.py` documents the fields)."""
    dtype = jnp.dtype(config.matmul_dtype)
    encoder: Encoder
    if config.encoder == "embedding":
        encoder = EmbeddingTransformer(
            num_kernels=config.num_kernels,
            condition_size=config.condition_size,
            num_layers=config.encoder_layers,
            num_heads=config.encoder_heads,
            feed_forward=config.encoder_feed_forward,
            dropout=config.encoder_dropout,
            joint_dropout=config.joint_dropout,
            likelihood_scaling=config.likelihood_scaling,
            cross_spatial=config.cross_spatial,
            standardise=config.coordinates == "standardised",
            dtype=dtype,
        )
    elif config.encoder == "candidates":
        encoder = CandidateVector(likelihood_scaling=config.likelihood_scaling)
    else:
        encoder = HeatmapResNet(width=config.resnet_width, dtype=dtype)
    sampler = CandidateSampler(
        num_candidates=config.num_candidates,
        include_argmax=config.include_argmax,
        normalised=config.likelihood == "probability",
    )
    return DiffPose(
        encoder=encoder,
        denoiser=Denoiser(
            width=config.denoiser_width, num_blocks=config.denoiser_blocks, dtype=dtype
        ),
        schedule=diffusion.cosine_schedule(
            config.diffusion_steps, config.schedule_offset, config.max_beta
        ),
        pose_scale=config.pose_scale,
        clip=config.clip,
        sampler=None if config.encoder == "heatmaps" else sampler,
        target=config.target,
        data_std=config.data_std,
        candidates_per_hypothesis=config.candidates == "per_hypothesis",
        candidate_sets=1 if config.encoder == "heatmaps" else config.candidate_sets,
    )
