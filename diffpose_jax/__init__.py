"""DiffPose in JAX: distributions of 3D human poses from the heatmaps of a 2D detector.

model = diffpose_jax.load("runs/quickstart")
poses_mm = model.sample(jax.random.key(0), heatmaps)  # (B, 16, 64, 64) -> (B, 200, 17, 3)
"""

from diffpose_jax._version import __version__
from diffpose_jax.inference import Model, export, load
from diffpose_jax.io.trees import CheckpointError
from diffpose_jax.method.network import Draw

__all__ = ["CheckpointError", "Draw", "Model", "__version__", "export", "load"]
