"""The batched Gaussian fit against scipy's, map by map."""

import jax.numpy as jnp
import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit

from diffpose_jax.evaluation.ambiguity import MAX_SIGMA_PX, fit_gaussians

Y, X = np.mgrid[:64, :64].astype(float)


def gaussian(amplitude, x0, y0, sigma_1, sigma_2, angle):
    """A rotated Gaussian (64, 64); sigma_1 along the direction of `angle`."""
    cos, sin = np.cos(angle), np.sin(angle)
    along = cos * (X - x0) + sin * (Y - y0)
    across = -sin * (X - x0) + cos * (Y - y0)
    return amplitude * np.exp(-(along**2) / 2 / sigma_1**2 - across**2 / 2 / sigma_2**2)


def scipy_fit(heatmap):
    """The published definition: curve_fit from the argmax with 2 px; None if it gives up."""
    row, column = np.unravel_index(heatmap.argmax(), heatmap.shape)
    # Unequal widths: at equal ones the angle has no gradient.
    start = (heatmap.max(), column, row, 2.1, 1.9, 0.1)
    try:
        return curve_fit(
            lambda _, *p: gaussian(*p).ravel(), np.arange(4096), heatmap.ravel(), p0=start
        )[0]
    except (RuntimeError, OptimizeWarning):
        return None


def random_maps(number, seed):
    """Two peaks, wide and narrow, rotated, cut off by the border, with noise."""
    rng = np.random.default_rng(seed)

    def peak(height):
        centre, widths = rng.uniform(0, 63, 2), rng.uniform(1.5, 6, 2)
        return gaussian(height, *centre, *widths, rng.uniform(-1.5, 1.5))

    peaks = np.stack([peak(0.8) + peak(rng.uniform(0, 0.5)) for _ in range(number)])
    return peaks + 0.004 * rng.standard_normal(peaks.shape)


def test_finds_exact_gaussians():
    rng, N = np.random.default_rng(0), 64  # one size for all tests: each is compiled
    large, small = rng.uniform(4, 9, N), rng.uniform(1.2, 3.5, N)
    centre, angle = rng.uniform(10, 54, (N, 2)), rng.uniform(-1.5, 1.5, N)
    height = 10.0 ** rng.uniform(-3, 3, N)
    parameters = zip(height, *centre.T, large, small, angle, strict=True)
    fit = fit_gaussians(np.stack([gaussian(*p) for p in parameters]))
    np.testing.assert_allclose(fit.amplitude, height, rtol=1e-3)
    np.testing.assert_allclose(fit.centre_xy, centre, atol=1e-2)
    np.testing.assert_allclose(fit.sigma_px, np.stack([large, small], -1), rtol=1e-3)
    np.testing.assert_allclose(fit.angle, angle, atol=1e-3)


def test_equals_scipy():
    maps = random_maps(64, seed=1)
    sigma = np.asarray(fit_gaussians(maps).sigma_px)
    compared = 0
    for heatmap, mine in zip(maps, sigma, strict=True):
        theirs = scipy_fit(heatmap)
        if theirs is not None:
            compared += 1
            np.testing.assert_allclose(mine, np.sort(np.abs(theirs[3:5]))[::-1], rtol=1e-2)
    assert compared > 50
    # Fits do not depend on the maps beside them.
    np.testing.assert_allclose(fit_gaussians(maps[::-1]).sigma_px[::-1], sigma, rtol=1e-4)


def test_degenerate_maps_are_finite_and_wide():
    maps = np.zeros((64, 64, 64), np.float32)
    maps[1] -= 0.01
    maps[2] += 0.3
    maps[3] = 1e-3 * np.random.default_rng(4).standard_normal((64, 64))
    maps[4, 20, 30] = 1.0
    fit = fit_gaussians(maps)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in fit)
    np.testing.assert_array_equal(fit.sigma_px[:2], MAX_SIGMA_PX)
    np.testing.assert_array_equal(fit.amplitude[:2], 0.0)
    assert float(fit.sigma_px[2, 0]) > 60.0
    assert float(fit.sigma_px[4, 0]) < 1.0
