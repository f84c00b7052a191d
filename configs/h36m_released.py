"""The published program's DiffPose on Human3.6M, where it leaves the paper.

    python -m experiments.train --config configs/h36m_released.py

For comparisons with numbers obtained by running that program or its checkpoints; to train for
the paper's numbers take `configs/h36m.py`. The program also keeps a moving average of the
weights that it never evaluates, and runs its products in 16 bits.
"""

import ml_collections

from configs import h36m


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration."""
    config = h36m.get_config()
    config.model.joint_dropout = 0.1
    config.model.candidates = "per_hypothesis"
    config.model.matmul_dtype = "float16"
    config.data.prepared.input_px = 255
    config.data.test_frames = "every_16th_row"
    config.training.batch_size = 32
    config.training.ema_decay = 0.995
    config.training.ema_every = 10
    return config
