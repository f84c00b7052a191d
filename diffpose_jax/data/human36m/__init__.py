"""Human3.6M (Ionescu et al., 2014), from a user's own copy: readers and a TFDS builder."""

from diffpose_jax.data.human36m.human36m_dataset_builder import Human36m, Human36mConfig
from diffpose_jax.data.human36m.sequences import ACTIONS, every_16th_row, every_64th_frame

__all__ = ["ACTIONS", "Human36m", "Human36mConfig", "every_16th_row", "every_64th_frame"]
