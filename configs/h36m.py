"""The paper's DiffPose on Human3.6M (Holmquist and Wandt, ICCV 2023).

    python -m experiments.train --config configs/h36m.py

Published: best of 200 hypotheses, MPJPE 42.9 mm, PA-MPJPE 30.8 mm (mean of five seeds);
700,000 steps, about 7 hours on one NVIDIA A40. Needs the data set `human36m`, prepared from
the user's own copy.

Every field of every configuration stands here once; the others import this one and change
lines. Where the paper does not say, the value is the published program's and marked (program).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration."""
    config = ml_collections.ConfigDict()
    config.seed = 42  # the first of the published seeds: 42, 2967, 6173, 5478, 989

    model = config.model = ml_collections.ConfigDict()
    # Candidates, Sec. 3.1.
    model.num_samples = 32  # S per joint, the argmax counted in
    model.include_argmax = True  # Table 4 has the ablation
    model.candidates = "per_image"  # or "per_hypothesis": new ones for each (program)
    # "image": heatmap coordinates in [-1, 1) (program). "standardised", mean-centred and divided
    # by the standard deviation, is what Sec. 4.2 says, but leaves the channel embedding's range.
    model.coordinates = "image"
    # Joint embedding, Eq. 5 and 6.
    model.likelihood_scaling = True
    model.num_kernels = 64  # K per axis
    model.cross_spatial = True  # the linear layer over both axes' channels
    model.joint_dropout = 0.01  # Sec. 4.2; 0.1 in the program
    # Transformer, Sec. 3.2. Its width is 2 K = 128.
    model.encoder_layers = 4
    model.encoder_heads = 4
    model.encoder_feed_forward = 512
    model.encoder_dropout = 0.1  # (program)
    model.condition_size = 2048
    # Denoiser, Sec. 3.3.
    model.denoiser_width = 1024
    model.denoiser_blocks = 2
    # Diffusion, Sec. 3.3 and 4.2.
    model.diffusion_steps = 25  # T
    model.schedule_offset = 0.008  # s of the cosine schedule
    model.max_beta = 0.999
    model.pose_scale = 10.0  # units of the pose vector per metre: decimetres
    model.clip = 30.0  # bound of x_0 in the reverse process, 3 x pose_scale (program)
    model.matmul_dtype = "float32"  # or "bfloat16" for the matrix products

    training = config.training = ml_collections.ConfigDict()
    training.num_steps = 700_000  # Sec. 4.2
    training.batch_size = 64  # over all devices; Sec. 4.2, 32 in the program
    training.draws_per_image = 1  # times and noises drawn under each condition
    training.learning_rate = 1e-4  # Adam, Sec. 4.2
    training.warmup_steps = 0
    training.decay = "constant"  # or "cosine": to 0 at the last step
    training.ema_decay = 0.0  # exponential moving average of the parameters; 0: none
    training.ema_every = 1  # steps between its updates
    training.steps_per_dispatch = 100  # optimizer steps per call of the devices
    training.checkpoint_every = 10_000  # steps, a multiple of steps_per_dispatch
    training.keep_checkpoints = 3

    data = config.data = ml_collections.ConfigDict()
    data.name = "human36m"
    # Candidates drawn ahead per joint, of which each step takes a random part: 0 draws anew
    # from the heatmap in every step.
    data.predrawn_candidates = 0

    evaluation = config.evaluation = ml_collections.ConfigDict()
    evaluation.num_hypotheses = 200  # M
    evaluation.weights = "raw"  # or "ema"
    evaluation.batch_size = 64
    evaluation.ambiguous_sigma_px = 5.0  # a frame is ambiguous if a joint's fitted sigma is larger
    # The controls: the residual network of Martinez et al. on the argmax joints.
    evaluation.regression_width = 1024
    evaluation.regression_steps = 100_000
    evaluation.regression_batch_size = 64
    evaluation.regression_learning_rate = 1e-3
    evaluation.report_frames = 8  # frames drawn in the report
    return config
