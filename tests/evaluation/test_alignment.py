"""Alignment against a float64 SVD, on poses of every conditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import GOLDEN

from diffpose_jax.evaluation.alignment import procrustes_align

TRUTH = np.load(GOLDEN / "metrics_case.npz")["gt_mm"]
align = jax.jit(procrustes_align)


def align_by_svd(poses, targets):
    """Umeyama's solution in float64, for poses of shape (N, J, 3)."""
    poses, targets = np.float64(poses), np.float64(targets)
    mean, target_mean = poses.mean(1, keepdims=True), targets.mean(1, keepdims=True)
    pose, target = poses - mean, targets - target_mean
    u, s, vt = np.linalg.svd(target.transpose(0, 2, 1) @ pose)
    signs = np.ones_like(s)
    signs[:, 2] = np.sign(np.linalg.det(u @ vt))
    rotation = (u * signs[:, None]) @ vt
    scale = (s * signs).sum(1) / (pose**2).sum((1, 2))
    return scale[:, None, None] * pose @ rotation.transpose(0, 2, 1) + target_mean


def random_rotations(rng, n):
    q = np.linalg.qr(rng.normal(size=(n, 3, 3)))[0]
    return q * np.sign(np.linalg.det(q))[:, None, None]


def test_agrees_with_float64_svd():
    rng = np.random.default_rng(10)
    truth = np.tile(TRUTH, (50, 1, 1))
    noisy = truth + rng.normal(size=truth.shape) * 60
    moved = truth @ random_rotations(rng, 300) + rng.normal(size=(300, 1, 3)) * 1000
    cases = {
        "exact": truth,
        "noisy": noisy,
        "similar": 1.3 * moved,
        "unrelated": rng.normal(size=truth.shape) * 300,
        "mirrored": noisy * [-1, 1, 1],
        "nearly planar": noisy * [1, 1, 1e-3],
        "planar": noisy * [1, 1, 0],
        "nearly collinear": noisy * [1e-3, 1, 1e-3],
        "tiny": noisy * 1e-6,
        "huge": noisy * 1e6,
    }
    for name, poses in cases.items():
        aligned = align(jnp.float32(poses), truth)
        expected = align_by_svd(np.float32(poses), truth)
        np.testing.assert_allclose(aligned, expected, rtol=0, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("axes", [[0, 1, 0], [0, 0, 0], [0.3, -0.5, 0.8]])
def test_rotation_stays_a_rotation_when_it_is_not_unique(axes):
    """On a line or in a point many rotations are optimal: the angles must survive anyway."""
    line = TRUTH[..., 1:2] * np.float32(axes)
    for pose, target in ((TRUTH, line), (line, TRUTH), (line, line)):
        aligned = np.asarray(align(pose, target))
        np.testing.assert_allclose(aligned.mean(1), target.mean(1), atol=1e-3)
        before, after = (p - p.mean(1, keepdims=True) for p in (np.float64(pose), aligned))
        gram, turned = (p @ p.transpose(0, 2, 1) for p in (before, after))
        scale = np.trace(turned, axis1=1, axis2=2) / np.maximum(
            np.trace(gram, axis1=1, axis2=2), 1e-9
        )
        np.testing.assert_allclose(turned, scale[:, None, None] * gram, atol=2)
        # Least squares: the residual is what float64 leaves.
        if np.any(axes) or pose is TRUTH:
            squares = ((np.stack([aligned, align_by_svd(pose, target)]) - target) ** 2).sum((2, 3))
            np.testing.assert_allclose(*squares, rtol=1e-4, atol=1e-3)
