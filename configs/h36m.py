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
    # Table 3 compares with "candidates", one vector of them all, and "heatmaps", a ResNet-18.
    model.encoder = "embedding"
    # Candidates, Sec. 3.1.
    model.num_candidates = 32  # S per joint, the argmax counted in
    model.include_argmax = True  # Table 4 has the ablation
    model.candidates = "per_image"  # or "per_hypothesis": new ones for each (program)
    model.candidate_sets = 1  # of each image, which its hypotheses take in turn
    # "image": heatmap coordinates in [-1, 1) (program). "standardised", mean-centred and divided
    # by the standard deviation, is what Sec. 4.2 says, but leaves the channel embedding's range.
    model.coordinates = "image"
    # Joint embedding, Eq. 5 and 6.
    # "height": the raw height of the heatmap (program). "probability": the height over the sum of
    # the map's positive cells, another reading of Eq. 6's "likelihood of the joint sample".
    model.likelihood = "height"
    model.likelihood_scaling = True  # Table 4 has the ablation
    model.num_kernels = 64  # K per axis
    model.cross_spatial = True  # the linear layer over both axes' channels; Table 4
    model.joint_dropout = 0.01  # Sec. 4.2; 0.1 in the program
    # Transformer, Sec. 3.2. Its width is 2 K = 128.
    model.encoder_layers = 4  # 0: without transformer, Table 4
    model.encoder_heads = 4
    model.encoder_feed_forward = 512
    model.encoder_dropout = 0.1  # (program)
    model.condition_size = 2048
    model.resnet_width = 64  # channels of the first stage of the encoder "heatmaps"
    # Denoiser, Sec. 3.3.
    model.denoiser_width = 1024
    model.denoiser_blocks = 2
    # Diffusion, Sec. 3.3 and 4.2.
    model.diffusion_steps = 25  # T
    model.schedule_offset = 0.008  # s of the cosine schedule
    model.max_beta = 0.999
    # What the denoiser predicts: the "noise", or the target of Karras et al. (2022), "edm", whose
    # deviation of the data (in units of the pose vector) is measured on the training poses if 0.
    model.target = "noise"
    model.data_std = 0.0
    model.pose_scale = 10.0  # units of the pose vector per metre: decimetres
    model.clip = 30.0  # bound of x_0 in the reverse process, 3 x pose_scale (program)
    # Of the matrix products: or "bfloat16", or "float16" with dynamic loss scaling (program).
    model.matmul_dtype = "float32"

    training = config.training = ml_collections.ConfigDict()
    training.num_steps = 700_000  # Sec. 4.2
    training.batch_size = 64  # over all devices; Sec. 4.2, 32 in the program
    training.draws_per_image = 1  # times and noises drawn under each condition
    training.learning_rate = 1e-4  # Adam, Sec. 4.2
    training.warmup_steps = 0
    training.decay = "constant"  # or "cosine": to 0 at the last step
    training.ema_decay = 0.0  # exponential moving average of the parameters; 0: none
    training.ema_every = 1  # steps between its updates
    # Optimizer steps per call of the devices. Heatmaps of 20 steps take 340 MB on their way there.
    training.steps_per_dispatch = 20
    training.checkpoint_every = 10_000  # steps, a multiple of steps_per_dispatch
    training.keep_checkpoints = 3
    # A run or an export whose weights the training starts from, of an equal `model`; "": new ones.
    training.init_from = ""

    data = config.data = ml_collections.ConfigDict()
    data.name = "human36m"
    # Which of the prepared data sets, by the fields that `experiments.prepare` made it with.
    data.prepared = ml_collections.ConfigDict({"split": "standard", "input_px": 256})
    # The test frames that count: "every_64th_frame" of each video, "every_16th_row" of the table
    # of every fourth frame (program), or "all".
    data.test_frames = "every_64th_frame"
    # The axes of the poses: those of the "camera" that took the picture (paper), or "crop": of one
    # that looks at the crop's centre, since a crop does not tell where in the picture it lay
    # (`cameras.turns_to`; the data set "motion" alone).
    data.axes = "camera"
    # Candidates drawn ahead per joint, of which each step takes a random part: 0 draws anew
    # from the heatmap in every step.
    data.predrawn_candidates = 0
    # Share of the training split, whole recordings, kept out of the training to calibrate the
    # radius of the single pose on and to measure the prediction's errors, for the solvers that use
    # them; 0 trains on all of it, and there is neither.
    data.calibration_share = 0.0
    # Whether the training split lies on the devices, as all heatmaps in float16 (51 GB) or as the
    # candidates drawn ahead (2 KB an image for 32), or is read as it is needed.
    data.on_device = False

    evaluation = config.evaluation = ml_collections.ConfigDict()
    evaluation.num_hypotheses = 200  # M
    # Of the reverse process: "ddpm" is the paper's, with all steps; "ddpm:8", "ddim:8" and
    # "dpm++:8" take fewer, "ddpm+cov" and "ddpm:4@24+cov" make use of the prediction's errors,
    # measured on `data.calibration_share`: see `sampling.parse_solver`.
    evaluation.solver = "ddpm"
    evaluation.weights = "raw"  # or "ema"
    evaluation.batch_size = 64  # images at a time, on each device
    # Ambiguous frames, of all test frames: by the "rule" that a joint's fitted sigma is larger than
    # the bound, as "stored" in a file of the published preprocessing, or a file of names.
    evaluation.ambiguous = "rule"
    evaluation.ambiguous_sigma_px = 5.0
    # Results are told apart by these; the mean over the actions is the program's "average".
    evaluation.group_by = ("action",)
    evaluation.group_metrics = ("mpjpe_best", "pa_mpjpe_best")  # protocols 1 and 2
    # The single pose made from the hypotheses, see `aggregation.METHODS`.
    evaluation.pose = "heatmap_agreement"
    evaluation.radius_level = 0.9  # how often a joint shall lie within its radius around that pose
    evaluation.baselines = True  # whether the baselines are fitted and measured beside the model
    # The baselines: the residual network of Martinez et al. on the argmax joints.
    evaluation.regression_width = 1024
    evaluation.regression_steps = 100_000
    evaluation.regression_batch_size = 64
    evaluation.regression_learning_rate = 1e-3
    evaluation.report_frames = 8  # frames drawn in the report
    return config
