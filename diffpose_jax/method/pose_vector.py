"""Poses in millimetres and the vectors that the diffusion works on (Sec. 4.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from diffpose_jax.skeleton import H36M_JOINTS, NUM_JOINTS

POSE_SIZE = 3 * (NUM_JOINTS - 1)
"""Length of a pose vector: 16 joints, without the hip."""

_RIGHT_HIP, _LEFT_HIP = H36M_JOINTS.index("RHip") - 1, H36M_JOINTS.index("LHip") - 1


def pose_to_vector(
    pose_mm: Float[Array, "*batch 17 3"], pose_scale: float = 10.0
) -> Float[Array, "*batch 48"]:
    """Drops the hip, centres the joints on their mean and lists them axis by axis [x.., y.., z..].

    Args:
      pose_mm: camera axes with y up.
      pose_scale: units of the vector per metre.
    """
    joints = pose_mm[..., 1:, :] * (pose_scale / 1000.0)
    centred = joints - jnp.mean(joints, axis=-2, keepdims=True)
    return jnp.swapaxes(centred, -1, -2).reshape(*pose_mm.shape[:-2], POSE_SIZE)


def vector_to_pose(
    vector: Float[Array, "*batch 48"], pose_scale: float = 10.0
) -> Float[Array, "*batch 17 3"]:
    """The inverse, hip-centred: the hip is the midpoint of the two hip joints."""
    joints = jnp.swapaxes(vector.reshape(*vector.shape[:-1], 3, NUM_JOINTS - 1), -1, -2)
    hip = 0.5 * (joints[..., [_RIGHT_HIP], :] + joints[..., [_LEFT_HIP], :])
    return (1000.0 / pose_scale) * jnp.concatenate([jnp.zeros_like(hip), joints - hip], axis=-2)


def moments(
    poses_mm: Float[np.ndarray, "N 17 3"], pose_scale: float
) -> tuple[Float[np.ndarray, " 48"], Float[np.ndarray, " 48"]]:
    """Mean and standard deviation of the vectors of many poses, by coordinate."""
    vectors = np.asarray(jax.jit(pose_to_vector, static_argnums=1)(poses_mm, pose_scale))
    mean, std = (np.asarray(f(vectors, axis=0, dtype=np.float64)) for f in (np.mean, np.std))
    # Nothing varies in the poses of a single frame.
    return mean.astype(np.float32), np.maximum(std, 1e-3).astype(np.float32)
