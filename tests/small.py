"""A model, examples and a configuration small enough for tests."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import h36m
from diffpose_jax import config as config_lib
from diffpose_jax.data import motion, pipeline
from diffpose_jax.inference import Model
from diffpose_jax.method import diffusion, sampling
from diffpose_jax.method import network as network_lib


def small_config(**training) -> ml_collections.ConfigDict:
    """The paper's configuration with everything small, on the data set "motion"."""
    config = h36m.get_config()
    config.model.update(
        num_candidates=4,
        num_kernels=8,
        joint_dropout=0.1,
        encoder_layers=1,
        encoder_heads=2,
        encoder_feed_forward=16,
        condition_size=16,
        denoiser_width=16,
        denoiser_blocks=1,
    )
    config.training.update(
        num_steps=20,
        batch_size=16,
        learning_rate=1e-3,
        steps_per_dispatch=5,
        checkpoint_every=10,
        keep_checkpoints=2,
    )
    config.training.update(training)
    config.data.name = "motion"
    del config.data.prepared, config.data.test_frames
    config.data.builder = motion.default_config()
    config.evaluation.update(
        num_hypotheses=20,
        batch_size=8,
        group_by=(),
        regression_width=8,
        regression_steps=10,
        report_frames=2,
    )
    return config


def parsed(config):
    return config_lib.from_dict(config)


def network(config):
    return network_lib.build(parsed(config).model)


def model_of(config, key):
    net = network(config)
    return Model(network=net, params=net.init(key), config=parsed(config))


def distinct_config(**changes):
    """The paper's configuration with small sizes, no two of them equal: a wrong axis shows."""
    config = h36m.get_config()
    config.model.update(
        num_candidates=6,
        num_kernels=8,
        encoder_layers=1,
        encoder_feed_forward=24,
        condition_size=20,
        denoiser_width=32,
        denoiser_blocks=1,
        diffusion_steps=5,
    )
    config.model.update(changes)
    return config


def small_network(**changes):
    return network(distinct_config(**changes))


@functools.cache
def small_model(**changes):
    """With parameters drawn so that every layer's outputs are of the size of its inputs."""
    network = small_network(**changes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: np.float32(rng.normal(0, p.shape[0] ** -0.5, p.shape)),
        jax.eval_shape(network.init, jax.random.key(0)),
    )
    if "moments" in params:
        mean, std = rng.normal(0, 2, 48), rng.uniform(1, 3, 48)
        params["moments"] = {"mean": np.float32(mean), "std": np.float32(std)}
    return Model(network=network, params=params, config=parsed(distinct_config(**changes)))


def random_errors(seed, num_steps=5):
    """Of predictions that are off by some decimetres, with correlations."""
    e, r = np.random.default_rng(seed).normal(0, 2, (2, num_steps, 60, 48))
    r += e / 2
    products = [np.float32(x.swapaxes(1, 2) @ y / 60) for x, y in ((e, e), (e, r), (r, r))]
    return sampling.PredictionErrors(np.zeros(48, np.float32), np.ones(48, np.float32), *products)


def x_0_of(schedule, predict, clip=30.0, target=diffusion.noise_target):
    """The prediction of x_0 that one of the noise or another target implies, for `sample`."""

    def x_0(x_t, t):
        weights = target(schedule.level(t))
        return jnp.clip(weights.skip * x_t + weights.out * predict(x_t, t), -clip, clip)

    return x_0


def examples(seed, number, wide=()):
    """Poses at random and one mode for each joint at random; wide ones in the rows `wide`."""
    rng = np.random.default_rng(seed)
    pose_mm = rng.normal(size=(number, 17, 3)).astype(np.float32) * 300
    pose_mm[:, 0] = 0
    centre = rng.uniform(16, 48, (number, 16, 2))
    sigma = np.where(np.isin(np.arange(number), wide), 8.0, 2.0)
    factors = np.exp(-0.5 * ((np.arange(64) - centre[..., None]) / sigma[:, None, None, None]) ** 2)
    maps = (factors[..., 1, :, None] * factors[..., 0, None, :]).astype(np.float32)
    return pipeline.Examples(
        pose_mm=pose_mm,
        clips=np.repeat("clip", number),
        names=np.array([f"clip {row}" for row in range(number)]),
        heatmaps=lambda rows: maps[rows],
    )


def random_heatmaps(seed, num_images):
    """Blobs of varied place, width and height on noise around 0: (B, 16, 64, 64) float32."""
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(5, 59, (2, num_images, 16, 1, 1))
    width = rng.uniform(1, 6, (num_images, 16, 1, 1))
    height = rng.uniform(0.2, 1, (num_images, 16, 1, 1))
    cell = np.arange(64)
    blobs = height * np.exp(-((cell - x) ** 2 + (cell[:, None] - y) ** 2) / (2 * width**2))
    return np.float32(blobs + rng.normal(0, 0.01, blobs.shape))


def write_motion(folder):
    """A few frames of the embedded motion as a user's folder: 24 for training, 8 for testing."""
    lengths = {"a": 12, "b": 12, "test/c": 8}
    for clip, (name, length) in zip(motion.load_embedded(), lengths.items(), strict=False):
        path = folder / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, positions_mm=clip.positions_mm[:length], fps=clip.fps)
    return folder
