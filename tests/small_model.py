"""The paper's network with every size cut down, so that a test takes a second."""

import functools

import jax
import numpy as np

from configs import h36m
from diffpose_jax import config as config_lib
from diffpose_jax import model


def small_config(**changes):
    config = h36m.get_config()
    config.model.update(
        num_samples=6,
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
    return config_lib.call(model.build, small_config(**changes).model, "config.model")


@functools.cache
def small_model(**changes):
    """With parameters drawn so that every layer's outputs are of the size of its inputs."""
    network = small_network(**changes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: np.float32(rng.normal(0, p.shape[0] ** -0.5, p.shape)),
        jax.eval_shape(network.init, jax.random.key(0)),
    )
    return model.Model(network=network, params=params, config=small_config(**changes))


def random_heatmaps(seed, num_images):
    """Blobs of varied place, width and height on noise around 0: (B, 16, 64, 64) float32."""
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(5, 59, (2, num_images, 16, 1, 1))
    width = rng.uniform(1, 6, (num_images, 16, 1, 1))
    height = rng.uniform(0.2, 1, (num_images, 16, 1, 1))
    cell = np.arange(64)
    blobs = height * np.exp(-((cell - x) ** 2 + (cell[:, None] - y) ** 2) / (2 * width**2))
    return np.float32(blobs + rng.normal(0, 0.01, blobs.shape))
