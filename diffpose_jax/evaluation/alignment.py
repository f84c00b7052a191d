"""Procrustes alignment of many poses at once, for the PA metrics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

_HIGHEST = jax.lax.Precision.HIGHEST  # the default lets a GPU round products to TF32
_SWEEPS = 5  # 4 reach float32's last bits in practice (3 leave 0.2 mm); one to spare


def procrustes_align(
    poses_mm: Float[Array, "*#B J 3"], targets_mm: Float[Array, "*#B J 3"]
) -> Float[Array, "*B J 3"]:
    """Moves, turns and scales each pose onto its target in the least-squares sense.

    The similarity transform of Gower (1975) and Umeyama (1991), within 1e-3 mm of float64 for poses
    of a human's size. The rotation is always a proper one: a mirrored pose is not reflected back.
    Where several rotations are optimal (a pose or a target on a line), one of them is taken. A pose
    without extent ends on the target's mean.
    """
    pose, _, _ = _standardise(poses_mm)
    target, target_mean, target_norm = _standardise(targets_mm)
    covariance = jnp.einsum("...jk,...jl->kl...", target, pose, precision=_HIGHEST)
    rotation = _nearest_rotation(covariance)
    scale = target_norm * jnp.sum(rotation * covariance, axis=(0, 1))[..., None, None]
    turned = jnp.einsum("kl...,...jl->...jk", rotation, pose, precision=_HIGHEST)
    return scale * turned + target_mean


def _standardise(poses: Array) -> tuple[Array, Array, Array]:
    """Splits poses into a centred one of unit Frobenius norm, the mean and the norm."""
    mean = jnp.mean(poses, axis=-2, keepdims=True)
    centred = poses - mean
    norm = jnp.sqrt(jnp.sum(centred**2, axis=(-2, -1), keepdims=True))
    return centred / jnp.where(norm > 0, norm, 1), mean, norm


def _nearest_rotation(matrix: Float[Array, "3 3 *B"]) -> Float[Array, "3 3 *B"]:
    """The rotation R that maximises trace(R^T A) for each 3 x 3 matrix A.

    Hestenes' one-sided Jacobi method: rotations V of the columns of A until those of A V are
    orthogonal and sorted by length. Only the two longer columns are used; the third of U and V is
    the cross product of the others, so that neither a reflection nor a vanishing third singular
    value needs a case of its own. It is elementwise over the batch: 64 x 200 poses are aligned in
    11 ms on two cores of a CPU; with `jnp.linalg.svd`, which loops over LAPACK, in 30 to 38 ms.
    """
    identity = jnp.eye(3, dtype=matrix.dtype).reshape((3, 3) + (1,) * (matrix.ndim - 2))
    identity = jnp.broadcast_to(identity, matrix.shape)

    def sweep(_: Array, columns: list[Array]) -> list[Array]:
        for p, q in ((0, 1), (0, 2), (1, 2)):
            a, b = columns[p], columns[q]
            # A quarter turn first where the later column is the longer one.
            swap = _dot(b[:3], b[:3]) > _dot(a[:3], a[:3])
            a, b = jnp.where(swap, b, a), jnp.where(swap, -a, b)
            excess = _dot(a[:3], a[:3]) - _dot(b[:3], b[:3])
            inner = 2 * _dot(a[:3], b[:3])
            divisor = excess + jnp.sqrt(excess**2 + inner**2)
            tangent = inner / jnp.where(divisor > 0, divisor, 1)
            cosine = 1 / jnp.sqrt(1 + tangent**2)
            sine = cosine * tangent
            columns[p], columns[q] = cosine * a + sine * b, cosine * b - sine * a
        return columns

    # Each column of A V with that of V below it: they turn together.
    start = [jnp.concatenate([matrix[:, k], identity[:, k]]) for k in range(3)]
    first, second, _ = jax.lax.fori_loop(0, _SWEEPS, sweep, start)

    u1 = _unit(first[:3], identity[:, 0])
    # A second column that is all rounding error need not be orthogonal to the first.
    u2 = _unit(second[:3] - _dot(second[:3], u1) * u1, _perpendicular(u1))
    u3 = jnp.cross(u1, u2, axis=0)
    v1, v2 = first[3:], second[3:]
    v3 = jnp.cross(v1, v2, axis=0)
    return u1[:, None] * v1[None] + u2[:, None] * v2[None] + u3[:, None] * v3[None]


def _dot(a: Array, b: Array) -> Array:
    """Inner products along the leading axis, which is kept."""
    return jnp.sum(a * b, axis=0, keepdims=True)


def _unit(vector: Array, fallback: Array) -> Array:
    """(3, ...) vectors scaled to length 1; `fallback` where there is no length."""
    length = jnp.sqrt(_dot(vector, vector))
    return jnp.where(length > 0, vector / jnp.where(length > 0, length, 1), fallback)


def _perpendicular(unit: Array) -> Array:
    """For each (3, ...) unit vector, some unit vector at a right angle to it."""
    smallest = jax.nn.one_hot(jnp.argmin(jnp.abs(unit), axis=0), 3, dtype=unit.dtype, axis=0)
    return _unit(jnp.cross(unit, smallest, axis=0), smallest)
