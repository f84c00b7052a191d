"""The reverse process where the answer is known: a two-component mixture of Gaussians.

Given the condition, vectors come from one of two modes with known weights, means and a
covariance in common. Of such data the exact noise E[eps | x_t] is known in closed form, so the
chain can be tested without training; then a denoiser is trained on draws and must do as well.

The 25-step chain has an error of its own: its steps' noise has the posterior variance for a
known x_0, which is too small where x_0 is uncertain. Even with the exact noise its samples'
standard deviation is 0.80 to 0.89 of that of the data here. For Gaussian data the chain is
linear and the factor follows from a recursion, `chain_std`; it goes to 1 with the number of steps,
and with the measured errors of the prediction.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import x_0_of

from diffpose_jax.method import diffusion, sampling
from diffpose_jax.method.denoiser import Denoiser

# As tight as the data allows. An error e of the noise at t = 24 moves x_23 by up to 31.6 e, or
# as far as the clip lets it, and so shifts the weights of the modes: with a clip of 30 the
# trained denoiser's are off by 0.07.
CLIP = 5.0
WEIGHTS = np.array([[0.3, 0.7], [0.8, 0.2]])  # [condition, mode]


class Mixture:
    """Modes `means` (2, N) with the covariance axes diag(stds^2) axes^T."""

    def __init__(self, seed, size):
        rng = np.random.default_rng(seed)
        self.size = size
        self.axes = np.linalg.qr(rng.normal(size=(size, size)))[0]
        self.stds = np.geomspace(0.2, 0.6, size)
        direction = self.axes @ (rng.choice([-1, 1], size) * self.stds / np.sqrt(size))
        # The modes are eight standard deviations apart: it is always clear which one it is.
        self.means = 0.3 * rng.normal(size=(1, size)) + np.array([[-4.0], [4.0]]) * direction[None]

    def draw(self, key, weights, number):
        mode_key, noise_key = jax.random.split(key)
        mode = (jax.random.uniform(mode_key, (number,)) < weights[1]).astype(int)
        spread = jnp.asarray(self.axes * self.stds[None], jnp.float32)
        noise = jax.random.normal(noise_key, (number, self.size))
        return jnp.asarray(self.means, jnp.float32)[mode] + noise @ spread.T

    def noise(self, schedule, x_t, t, weights):
        """E[eps | x_t]: each mode's linear answer, weighed by the mode's probability."""
        share = jnp.asarray(schedule.alphas_cumprod, jnp.float32)[t]
        axes, means = (jnp.asarray(x, jnp.float32) for x in (self.axes, self.means))
        variance = share * jnp.asarray(self.stds**2, jnp.float32) + 1 - share
        whole = (x_t[None] - jnp.sqrt(share) * means) @ axes
        logits = jnp.log(weights) - 0.5 * jnp.sum(whole**2 / variance[None], axis=1)
        of_modes = jnp.sqrt(1 - share) * (whole / variance[None]) @ axes.T
        return jax.nn.softmax(logits) @ of_modes


def chain_std(schedule, std):
    """Standard deviation of the exact chain's samples of N(m, std^2), by its linear recursion."""
    variance, alpha_bar = np.ones_like(std), schedule.alphas_cumprod
    of_x_t, of_x_0, noise = diffusion.posterior(alpha_bar, np.append(1.0, alpha_bar[:-1]))
    for t in range(schedule.num_steps - 1, -1, -1):
        share = alpha_bar[t]
        x_0_of_x_t = np.sqrt(share) * std**2 / (share * std**2 + 1 - share)
        slope = of_x_0[t] * x_0_of_x_t + of_x_t[t]
        variance = slope**2 * variance + noise[t]
    return np.sqrt(variance)


def check_samples(samples, mixture, weights, stds, weight_error, mean_error, std_error):
    """Compares samples (M, N) with the truth, in the axes of the covariance.

    Tolerances are five standard errors of what M draws measure plus a model error: of weights
    absolute, of means in standard deviations, of standard deviations relative.
    """
    samples = np.asarray(samples, np.float64)
    between = (mixture.means[1] - mixture.means[0]) @ mixture.axes / mixture.stds**2
    middle = mixture.means.mean(0) @ mixture.axes
    mode = ((samples @ mixture.axes - middle) @ between > 0).astype(int)
    standard_error = np.sqrt(weights[0] * weights[1] / len(samples))
    assert abs(mode.mean() - weights[1]) < 5 * standard_error + weight_error
    for k in range(2):
        draws = (samples[mode == k] - mixture.means[k]) @ mixture.axes / stds
        standard_error = 1 / np.sqrt(len(draws))
        assert np.abs(draws.mean(0)).max() < 5 * standard_error + mean_error
        # The covariance of n standard normal draws: the variance of an entry is 2 / n on the
        # diagonal, 1 / n off it. A relative error e of a deviation is one of 2 e of its square.
        deviation = np.abs(np.cov(draws.T) - np.eye(mixture.size))
        assert deviation.max() < 5 * np.sqrt(2) * standard_error + 2 * std_error


def sample(key, x_0, schedule, size, number, solver="ddpm", errors=None):
    """As the model samples: 2,000 hypotheses at a time; `x_0` predicts x_0."""
    steps = sampling.parse_solver(schedule, solver, errors)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def draw(key, index):
        return sampling.sample(x_0, steps, jax.random.fold_in(key, index), size)

    keys = jax.random.split(key, number // 2000)
    return np.concatenate([draw(key, jnp.arange(2000)) for key in keys])


def measured(key, x_0, schedule, draws):
    """The errors of a prediction of x_0 on draws of the data (n, N)."""

    @jax.jit
    def moments(key, t):
        level = schedule.level(t[None])  # (1, 1), for all draws
        x_t = level.noised(draws, jax.random.normal(key, draws.shape))
        predicted = jax.vmap(x_0, in_axes=(0, None))(x_t, t)
        e, r = draws - predicted, x_t - level.signal * predicted
        return [a.T @ b / len(draws) for a, b in ((e, e), (e, r), (r, r))]

    keys = jax.random.split(key, schedule.num_steps)
    found = [moments(key, jnp.int32(t)) for t, key in enumerate(keys)]
    mean, variance = jnp.mean(draws, axis=0), jnp.var(draws, axis=0)
    return sampling.PredictionErrors(
        *jax.device_get((mean, variance)), *map(np.stack, zip(*found, strict=True))
    )


@pytest.mark.parametrize("condition", [0, 1])
@pytest.mark.parametrize(
    ("num_steps", "model_errors"), [(25, (0.02, 0.05, 0.02)), (400, (0.0, 0.0, 0.0))]
)
def test_chain_with_the_exact_noise(condition, num_steps, model_errors):
    mixture, schedule = Mixture(seed=1, size=6), diffusion.cosine_schedule(num_steps)
    weights = WEIGHTS[condition]
    x_0 = exact_x_0(mixture, schedule, weights)
    samples = sample(jax.random.key(condition), x_0, schedule, mixture.size, 10_000)
    stds = chain_std(schedule, mixture.stds)
    check_samples(samples, mixture, weights, stds, *model_errors)


def exact_x_0(mixture, schedule, weights):
    weights = jnp.asarray(weights, jnp.float32)
    return x_0_of(schedule, lambda x_t, t: mixture.noise(schedule, x_t, t, weights), CLIP)


@pytest.mark.parametrize("condition", [0, 1])
@pytest.mark.parametrize(
    ("solver", "model_errors"),
    [("ddpm+cov", (0.005, 0.02, 0.02)), ("ddpm:4@20+cov", (0.01, 0.2, 0.1))],
)
def test_measured_errors_give_the_modes_their_width(condition, solver, model_errors):
    """In 25 steps and nearly in 4, whose noise is Gaussian while it is open which mode it is."""
    mixture, schedule = Mixture(seed=1, size=6), diffusion.cosine_schedule()
    weights = WEIGHTS[condition]
    x_0 = exact_x_0(mixture, schedule, weights)
    draws = mixture.draw(jax.random.key(7), jnp.asarray(weights), 20_000)
    errors = measured(jax.random.key(8), x_0, schedule, draws)
    key = jax.random.key(condition)
    samples = sample(key, x_0, schedule, mixture.size, 10_000, solver, errors)
    check_samples(samples, mixture, weights, mixture.stds, *model_errors)


def edm_target(level):
    return diffusion.edm_target(
        level, jnp.ones_like(level.signal)
    )  # about the deviation of the data


@pytest.mark.slow
@pytest.mark.parametrize("target", [diffusion.noise_target, edm_target])
def test_trained_denoiser(target):
    mixture, schedule = Mixture(seed=2, size=6), diffusion.cosine_schedule()
    denoiser = Denoiser(pose_size=mixture.size, width=128, num_blocks=2)
    conditions = jnp.eye(2)
    num_steps, batch_size = 10_000, 512

    def denoise(params, x_t, t, projected):
        return denoiser.apply({"params": params}, x_t, t, projected)

    def project(params, condition):
        return denoiser.apply({"params": params}, condition, method=Denoiser.project_condition)

    def init(denoiser, condition):
        t = jnp.zeros((), jnp.int32)
        return denoiser(jnp.zeros(mixture.size), t, denoiser.project_condition(condition))

    def loss(params, key):
        """Half of the batch under each condition."""
        *data_keys, noise_key = jax.random.split(key, 3)
        draws = [
            mixture.draw(data_key, weights, batch_size // 2)
            for data_key, weights in zip(data_keys, WEIGHTS, strict=True)
        ]
        x_0 = jnp.concatenate(draws)
        projected = jnp.repeat(project(params, conditions), batch_size // 2, axis=0)
        t, noise = diffusion.draw_time_and_noise(noise_key, schedule, x_0.shape)
        level = schedule.level(t)
        weights = target(level)
        wanted = weights.of_x_0 * x_0 + weights.of_noise * noise
        return jnp.mean((denoise(params, level.noised(x_0, noise), t, projected) - wanted) ** 2)

    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, num_steps))

    def step(state, key):
        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss)(params, key), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    params = denoiser.init(jax.random.key(3), conditions[0], method=init)["params"]
    keys = jax.random.split(jax.random.key(4), num_steps)
    train = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys))
    (params, _), _ = train((params, optimizer.init(params)), keys)

    for condition, weights in enumerate(WEIGHTS):
        projected = project(params, conditions[condition])
        x_0 = x_0_of(schedule, lambda x_t, t, c=projected: denoise(params, x_t, t, c), CLIP, target)
        draws = mixture.draw(jax.random.key(6), jnp.asarray(weights), 20_000)
        errors = measured(jax.random.key(8), x_0, schedule, draws)
        for solver, stds in (
            ("ddpm", chain_std(schedule, mixture.stds)),
            ("ddpm+cov", mixture.stds),
        ):
            key = jax.random.key(5 + condition)
            samples = sample(key, x_0, schedule, mixture.size, 20_000, solver, errors)
            check_samples(samples, mixture, weights, stds, 0.03, 0.1, 0.05)
