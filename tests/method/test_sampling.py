"""Solvers and their tables of steps, the keys of images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_heatmaps, x_0_of

from diffpose_jax.method import diffusion, sampling

SCHEDULE = diffusion.cosine_schedule()


@pytest.mark.parametrize("solver", ["ddpm", "ddim:1", "ddim:5", "dpm++:2", "dpm++:24"])
def test_data_of_one_point_are_found_exactly(solver):
    a = jnp.asarray(SCHEDULE.alphas_cumprod, jnp.float32)
    point = jnp.asarray([3.0, -7.0, 0.5])
    denoise = x_0_of(SCHEDULE, lambda x_t, t: (x_t - jnp.sqrt(a[t]) * point) / jnp.sqrt(1 - a[t]))
    steps = sampling.parse_solver(SCHEDULE, solver)
    x_0 = sampling.sample(denoise, steps, jax.random.key(1), size=3)
    np.testing.assert_allclose(x_0, point, atol=1e-4)


def test_the_paper_s_steps_are_the_posterior():
    steps = sampling.parse_solver(SCHEDULE)
    assert steps.times.tolist() == list(range(25))[::-1]
    alpha_bar = SCHEDULE.alphas_cumprod
    x_t, x_0, variance = diffusion.posterior(alpha_bar, np.append(1.0, alpha_bar[:-1]))
    expected = {"x_t": x_t, "x_0": x_0, "noise": np.sqrt(variance), "last_x_0": np.zeros(25)}
    for name, weights in expected.items():
        found = getattr(steps, name)[::-1]
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, weights, rtol=1e-9, atol=1e-12, err_msg=name)


FEW = [f"{name}:{number}" for name in ("ddpm", "ddim", "dpm++") for number in (1, 2, 3, 8, 24)]


@pytest.mark.parametrize("solver", FEW)
def test_few_steps_begin_where_the_gain_is_sane_and_land_on_x_0(solver):
    steps = sampling.parse_solver(SCHEDULE, solver)
    assert len(steps) == int(solver.split(":")[1])
    assert steps.times[0] == 23
    # Evenly spread: as many times are left below the last one as between two.
    gaps = -np.diff(np.append(steps.times, -1))
    assert gaps.sum() == 24
    assert np.ptp(gaps) <= 1
    last = [getattr(steps, name)[-1] for name in ("x_t", "x_0", "last_x_0")]
    np.testing.assert_allclose(last, [0, 1, 0], atol=1e-12)
    assert (steps.noise is None) == (not solver.startswith("ddpm"))
    assert steps.name == solver


@pytest.mark.parametrize("solver", ["ddim:8", "dpm++:8"])
def test_deterministic_steps_keep_the_noise(solver):
    """Of one data point and one noise each solver goes from x_t to x_s of the same two."""
    x_0, eps = 1.7, -0.6
    steps = sampling.parse_solver(SCHEDULE, solver)
    alpha_bar = np.append(SCHEDULE.alphas_cumprod[steps.times], 1.0)
    x = np.sqrt(alpha_bar) * x_0 + np.sqrt(1 - alpha_bar) * eps
    found = steps.x_t * x[:-1] + (steps.x_0 + steps.last_x_0) * x_0
    np.testing.assert_allclose(found, x[1:], rtol=1e-9)


def gaussian_flow_error(solver, schedule, mean=0.8, variance=0.3):
    """Error at t = 0 on data N(mean, variance), where the probability flow is known.

    It scales the distance from the mean as the standard deviation: in float64, by the table alone.
    """
    steps = sampling.parse_solver(schedule, solver)
    z, last_x_0 = 1.3, 0.0
    a = schedule.alphas_cumprod[steps.times]
    marginal = a * variance + 1 - a
    x = np.sqrt(a[0]) * mean + np.sqrt(marginal[0]) * z
    for i in range(len(steps)):
        shift = x - np.sqrt(a[i]) * mean
        x_0 = mean + np.sqrt(a[i]) * variance / marginal[i] * shift
        x = steps.x_t[i] * x + steps.x_0[i] * x_0 + steps.last_x_0[i] * last_x_0
        last_x_0 = x_0
    return abs(x - (mean + np.sqrt(variance) * z))


def test_dpm_solver_is_of_second_order_and_ddim_of_first():
    schedule, numbers = diffusion.cosine_schedule(20_000), np.array([10, 20, 40, 80, 160])
    ddim, dpm = (
        np.array([gaussian_flow_error(f"{name}:{n}", schedule) for n in numbers])
        for name in ("ddim", "dpm++")
    )
    np.testing.assert_allclose(ddim * numbers, 1.0, atol=0.06)
    # Its error changes sign: of second order is what bounds it.
    assert (dpm * numbers**2 < 3.5).all(), dpm
    assert (dpm < ddim / 3).all()


@pytest.mark.parametrize(
    "solver", ["", "euler", "ddpm:0", "ddpm:25", "ddim", "dpm++", "ddim:-3", "ddim:8.0", "ddim:x:3"]
)
def test_unknown_solvers_are_errors(solver):
    with pytest.raises(ValueError, match="ddpm, ddim or dpm") as error:
        sampling.parse_solver(SCHEDULE, solver)
    assert repr(solver) in str(error.value)
    assert "1 to 24 steps" in str(error.value)


def key_bits(seed, heatmaps):
    keys = sampling.image_keys(jax.random.key(seed), jnp.asarray(heatmaps))
    return [tuple(bits) for bits in np.asarray(jax.random.key_data(keys)).tolist()]


def test_keys_belong_to_the_images_and_not_to_their_places():
    heatmaps = random_heatmaps(7, 5)
    keys = key_bits(0, heatmaps)
    for places in ([2], [3, 1, 0, 4, 2, 1]):
        assert key_bits(0, heatmaps[places]) == [keys[i] for i in places]
    assert len(set(keys)) == 5
    assert not set(keys) & set(key_bits(1, heatmaps))


def test_the_smallest_difference_gives_another_key():
    """A last bit, two cells exchanged, maps exchanged, mirrored, a constant elsewhere."""
    image = random_heatmaps(10, 1)[0]
    variants = [image]
    for place in ((0, 0, 0), (15, 63, 63)):
        variants.append(image.copy())
        variants[-1][place] = np.nextafter(image[place], np.float32(1))
    variants.append(image.copy())
    variants[-1][3, 5, [7, 8]] = image[3, 5, [8, 7]]
    variants += [image[::-1], image[..., ::-1]]
    variants += [np.float32([np.full((64, 64), c)] * 16) for c in (0, 0.5, 1, 2)]
    one_hot = np.zeros((64, *image.shape), np.float32)
    one_hot[range(64), 0, 0, range(64)] = 1
    keys = key_bits(0, np.concatenate([variants, one_hot]))
    assert len(set(keys)) == len(keys)


SOLVER_TIMES = {
    "ddpm@23": list(range(24))[::-1],
    "ddpm:4@24": [24, 18, 12, 6],
    "ddpm:2@9+var": [9, 4],
    "ddim:3@23": [23, 15, 7],
    "ddpm+cov": list(range(25))[::-1],
    "ddpm:4+cov": [23, 17, 11, 5],
}


@pytest.mark.parametrize(("solver", "times"), SOLVER_TIMES.items())
def test_a_solver_says_where_it_begins(solver, times):
    assert sampling.needs_errors(SCHEDULE, solver)
    steps = sampling.parse_solver(SCHEDULE, solver, prediction_errors(gaussian(0, 3), 1.0))
    assert steps.times.tolist() == times
    assert (steps.start is None) == ("@" not in solver)
    with pytest.raises(ValueError, match=r"prediction_errors\.npz.*experiments\.evaluate"):
        sampling.parse_solver(SCHEDULE, solver)


@pytest.mark.parametrize("solver", ["ddpm@25", "ddpm:11@9", "ddim@23", "ddim:3+cov", "ddpm+all"])
def test_what_no_solver_can_do(solver):
    with pytest.raises(ValueError, match=r"ddpm:4@24\+cov"):
        sampling.needs_errors(SCHEDULE, solver)


def gaussian(seed, size):
    """A mean and a covariance with correlations of 0.9 and more."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(size, 1)) + 0.3 * rng.normal(size=(size, size))
    return rng.normal(size=size), factor @ factor.T


def linear_prediction(a, covariance, trust):
    """P of the prediction x_0 = mean + P (x_t - a mean); the best one if `trust` is 1."""
    size = len(covariance)
    return trust * a * covariance @ np.linalg.inv(a**2 * covariance + (1 - a**2) * np.eye(size))


def prediction_errors(data, trust):
    """What a measurement on very many draws would find for it."""
    mean, covariance = data
    moments = []
    for a in np.sqrt(SCHEDULE.alphas_cumprod):
        P, identity = linear_prediction(a, covariance, trust), np.eye(len(mean))
        # Both are linear in x_0 - mean and the noise.
        of_x_0, of_noise = identity - a * P, -np.sqrt(1 - a**2) * P
        r_x_0, r_noise = a * (identity - a * P), np.sqrt(1 - a**2) * (identity - a * P)
        moments.append([
            of_x_0 @ covariance @ of_x_0.T + of_noise @ of_noise.T,
            of_x_0 @ covariance @ r_x_0.T + of_noise @ r_noise.T,
            r_x_0 @ covariance @ r_x_0.T + r_noise @ r_noise.T,
        ])  # fmt: skip
    return sampling.PredictionErrors(mean, np.diag(covariance), *np.swapaxes(moments, 0, 1))


def largest_covariance_error(solver, trust=1.0, size=6):
    """Of the chain's result on Gaussian data, over the largest variance: in float64."""
    data = gaussian(1, size)
    covariance = data[1]
    steps = sampling.parse_solver(SCHEDULE, solver, prediction_errors(data, trust))
    identity = np.eye(size)

    def matrix(weight):
        return weight if weight.ndim == 2 else weight * identity

    found = np.diag(steps.start[1] ** 2) if steps.start else identity
    for i, t in enumerate(steps.times):
        P = linear_prediction(np.sqrt(SCHEDULE.alphas_cumprod[t]), covariance, trust)
        slope, noise = matrix(steps.x_t[i]) + matrix(steps.x_0[i]) @ P, matrix(steps.noise[i])
        found = slope @ found @ slope.T + noise @ noise.T
    return np.abs(found - covariance).max() / covariance.max()


@pytest.fixture
def exact_moments(monkeypatch):
    monkeypatch.setattr(sampling, "_RIDGE", 0.0)
    monkeypatch.setattr(sampling, "_SHRINKAGE", 0.0)


@pytest.mark.parametrize("trust", [1.0, 0.7, 1.2])
@pytest.mark.parametrize("steps", ["", ":4@24", ":2@24"])
def test_measured_errors_make_any_number_of_steps_exact(exact_moments, steps, trust):
    """For Gaussian data, also where the prediction trusts x_t too little or too much."""
    assert largest_covariance_error(f"ddpm{steps}+cov", trust) < 1e-4
    assert largest_covariance_error(f"ddpm{steps}" if steps == "" else "ddpm:4", trust) > 0.2


def test_guards_against_few_frames_cost_little():
    assert largest_covariance_error("ddpm:4@24+cov") < 0.05
    assert largest_covariance_error("ddpm:4@24+cov", 0.7) < 0.05


def test_variances_without_correlations_are_exact_for_independent_coordinates():
    mean, covariance = gaussian(2, 5)
    errors = prediction_errors((mean, np.diag(np.diag(covariance))), 0.8)
    by_coordinate, whole = (
        sampling.parse_solver(SCHEDULE, f"ddpm:3@24+{kind}", errors) for kind in ("var", "cov")
    )
    for name in ("x_t", "x_0", "noise"):
        np.testing.assert_allclose(
            getattr(by_coordinate, name), getattr(whole, name), atol=1e-6, err_msg=name
        )
    correlated = sampling.parse_solver(
        SCHEDULE, "ddpm:3@24+var", prediction_errors(gaussian(2, 5), 0.8)
    )
    assert not (correlated.noise * (1 - np.eye(5))).any()


def test_the_factor_of_the_noise_is_of_what_the_errors_add():
    solver, errors = "ddpm:3@24+cov", prediction_errors(gaussian(2, 5), 0.8)
    factors = ({solver: 0.0}, {solver: 0.5, "ddpm+cov": 3.0}, {})
    none, half, whole = (
        sampling.parse_solver(SCHEDULE, solver, errors.replace(noise=noise)) for noise in factors
    )
    variances = [steps.noise @ steps.noise.swapaxes(1, 2) for steps in (none, half, whole)]
    np.testing.assert_allclose(variances[1], (variances[0] + variances[2]) / 2, atol=1e-12)
    assert np.abs(variances[0][-1]).max() < 1e-12  # the last step has no noise of its own
    np.testing.assert_array_equal(half.x_0, whole.x_0)


def test_the_chain_does_what_its_table_says():
    """Matrices, a start and noise in the last step: against the recursion written out."""
    data = gaussian(3, 4)
    steps = sampling.parse_solver(SCHEDULE, "ddpm:3@20+cov", prediction_errors(data, 0.8))
    noise = np.random.default_rng(4).normal(size=(4, 4))

    def denoise(x_t, t):
        return 0.5 * x_t + t

    x = np.sqrt(SCHEDULE.alphas_cumprod[20]) * data[0] + steps.start[1] * noise[0]
    for i, t in enumerate(steps.times):
        x = steps.x_t[i] @ x + steps.x_0[i] @ (0.5 * x + t) + steps.noise[i] @ noise[i + 1]
    found = sampling.reverse_chain(denoise, steps, jnp.asarray(noise, jnp.float32))
    np.testing.assert_allclose(found, x, rtol=1e-4)
