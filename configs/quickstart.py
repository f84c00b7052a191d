"""A small DiffPose on the embedded motion capture.

    python -m experiments.train --config configs/quickstart.py

9 minutes on two CPU cores; best of 200 hypotheses 66 mm MPJPE, energy score 63 mm. It needs no
download, and the model is small so that it is good within its time. The embedded data set is
small and correlated (`diffpose_jax/data/motion/README.md`): its numbers compare methods with each
other, not with those published for Human3.6M.
"""

import ml_collections

from configs import h36m
from diffpose_jax.data import motion


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration."""
    config = h36m.get_config()
    config.seed = 0

    model = config.model
    model.candidate_sets = 32
    model.target = "edm"
    model.joint_dropout = 0.03
    model.encoder_layers = 1
    model.encoder_feed_forward = 256
    model.condition_size = 256
    model.resnet_width = 16
    model.denoiser_width = 256

    training = config.training
    training.num_steps = 20_000
    training.draws_per_image = 4
    training.steps_per_dispatch = 100
    training.learning_rate = 4e-3
    training.warmup_steps = 200
    training.decay = "cosine"
    training.ema_decay = 0.999
    training.checkpoint_every = 1_000

    data = config.data
    data.name = "motion"
    del data.prepared, data.test_frames
    data.predrawn_candidates = 96
    data.calibration_share = 0.1
    data.builder = motion.default_config()
    data.builder.train_views_per_frame = 16
    data.builder.test_views_per_frame = 3

    evaluation = config.evaluation
    evaluation.weights = "ema"
    evaluation.solver = "ddpm+cov"
    evaluation.group_by = ()
    evaluation.regression_width = 512
    evaluation.regression_steps = 6_000
    return config
