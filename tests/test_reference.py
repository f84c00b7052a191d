"""The published program's numbers, over every case file in `--reference-dir` (tests/golden).

`pytest tests/test_reference.py -rP` prints the largest deviation of each comparison.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from seeded_weights import seeded_weights

from configs import h36m
from diffpose_jax import config as config_lib
from diffpose_jax.config import ModelConfig
from diffpose_jax.data.human36m import every_16th_row, released
from diffpose_jax.detectors import Detector, hrnet
from diffpose_jax.evaluation import metrics
from diffpose_jax.evaluation.alignment import procrustes_align
from diffpose_jax.interop import torch_weights
from diffpose_jax.method import heatmaps, sampling
from diffpose_jax.method import network as network_lib
from diffpose_jax.method.channel_embedding import channel_embedding
from diffpose_jax.method.heatmaps import Candidates
from diffpose_jax.method.pose_vector import pose_to_vector

GOLDEN = Path(__file__).parent / "golden"

ABLATIONS = {
    "without_transformer": ({"encoder_layers": 0}, "condition_emb.transformer."),
    "without_argmax": ({"include_argmax": False}, None),
    "without_likelihood_scaling": ({"likelihood_scaling": False}, None),
    "without_cross_spatial": ({"cross_spatial": False}, "condition_emb.pos_proj."),
    "argmax_only": ({"num_candidates": 1}, None),
}
"""Changes of `config.model`, and what the published program then has no tensors for."""


@pytest.fixture(scope="module")
def reference_dir(request):
    return Path(request.config.getoption("--reference-dir") or GOLDEN)


@pytest.fixture(scope="module")
def load(reference_dir):
    """Reads a case file, once; skips the test if the folder does not hold it."""
    loaded = {}

    def load(name):
        if not (reference_dir / name).exists():
            pytest.skip(f"{reference_dir} holds no {name}")
        if name not in loaded:
            with np.load(reference_dir / name) as arrays:
                loaded[name] = dict(arrays)
        return loaded[name]

    return load


@pytest.fixture(scope="module")
def build(reference_dir):
    """Builds a network of the paper's size and its parameters from a case's seed."""
    spec = reference_dir / "diffpose_state_dict.json"
    spec = spec if spec.exists() else GOLDEN / spec.name

    def build(case, changes, without=None):
        config = h36m.get_config().model
        config.update(changes)
        network = network_lib.build(config_lib.parse(ModelConfig, config, "config.model"))
        tensors = seeded_weights(spec, int(case["weights_seed"]))
        if without:
            tensors = {n: tensor for n, tensor in tensors.items() if not n.startswith(without)}
        expected = jax.eval_shape(network.init, jax.random.key(0))
        return network, torch_weights.from_torch(tensors, expected)

    return build


@pytest.fixture(scope="module")
def diffpose(load, build):
    """The case of the full model: arrays, network, parameters."""
    case = load("diffpose_case.npz")
    return case, *build(case, {})


def assert_close(result, expected, *, absolute=0.0, relative=0.0, of_std=0.0):
    """Bounds the deviation: absolute, relative to each number, or to the array's deviation."""
    result, expected = np.float64(result), np.float64(expected)
    assert result.shape == expected.shape
    bound = absolute + relative * np.abs(expected) + of_std * expected.std()
    deviation = np.abs(result - expected)
    # A bound of 0 (a coefficient that is exactly 0) leaves no room at all.
    share = np.divide(deviation, bound, out=np.where(deviation == 0, 0.0, np.inf), where=bound > 0)
    worst = np.unravel_index(np.argmax(share), share.shape)
    message = (
        f"largest deviation {deviation.max():.3g}; nearest to its bound at {list(map(int, worst))}:"
        f" {result[worst]:.9g} for {expected[worst]:.9g}, {share[worst]:.1%} of what is allowed"
    )
    print(message)
    assert np.isfinite(result).all()
    assert share[worst] <= 1, message


def given_candidates(case, prefix):
    """Candidates of a case as the network takes them: cells, which must lose nothing."""
    cells = heatmaps.coordinate_cells(jnp.asarray(case[f"{prefix}/xy"]))
    samples = Candidates(cells, jnp.asarray(case[f"{prefix}/likelihood"]))
    assert_close(samples.xy, case[f"{prefix}/xy"], absolute=1e-6)
    return samples


# --- the model ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "posterior_variance",
    ],
)
def test_schedule(diffpose, name):
    case, network, _ = diffpose
    buffers = torch_weights.schedule_buffers(network.schedule)
    assert_close(buffers[name], case[f"schedule/{name}"], relative=1e-6)


def test_channel_embedding(load):
    case = load("diffpose_case.npz")
    embedding = channel_embedding(jnp.asarray(case["channel/x"]))
    assert_close(embedding, case["channel/embedding"], absolute=1e-6)


@pytest.mark.parametrize(
    ("file", "prefix"), [("diffpose_case.npz", "argmax"), ("ablation_case.npz", "argmax_only")]
)
def test_argmax(load, file, prefix):
    case = load(file)
    best = heatmaps.argmax(jnp.asarray(case["heatmaps"], jnp.float32))
    xy, likelihood = case[f"{prefix}/xy"], case[f"{prefix}/likelihood"]
    assert_close(jnp.reshape(best.xy, xy.shape), xy, absolute=1e-6)
    assert_close(jnp.reshape(best.likelihood, likelihood.shape), likelihood, absolute=1e-6)


def test_likelihood_is_the_height_at_the_cell(load):
    """Of the given candidates: ties cells, coordinates and row-major order together."""
    case = load("diffpose_case.npz")
    samples = given_candidates(case, "samples")
    heights = case["heatmaps"].reshape(*case["heatmaps"].shape[:2], -1).swapaxes(1, 2)
    at_cells = np.take_along_axis(np.float32(heights), np.asarray(samples.cells), axis=1)
    assert_close(at_cells, case["samples/likelihood"], absolute=1e-6)


def test_condition(diffpose):
    case, network, params = diffpose
    condition = network.condition(params, given_candidates(case, "samples"))
    assert_close(condition, case["condition"], of_std=1e-5)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablated_condition(load, build, name):
    case = load("ablation_case.npz")
    network, params = build(case, *ABLATIONS[name])
    condition = network.condition(params, given_candidates(case, name))
    assert_close(condition, case[f"{name}/condition"], of_std=1e-5)


def test_denoiser(diffpose):
    case, network, params = diffpose
    x, t, condition = (jnp.asarray(case[f"denoiser/{name}"]) for name in "xtc")
    eps = network.predict(params, x, t, network.project_condition(params, condition))
    assert_close(eps, case["denoiser/eps"], of_std=1e-5)


@pytest.fixture(scope="module")
def projected(diffpose):
    """The condition of the case's candidates, as the denoiser takes it."""
    case, network, params = diffpose
    condition = network.condition(params, given_candidates(case, "samples"))
    return network.project_condition(params, condition)


def test_loss(diffpose, projected):
    case, network, params = diffpose
    loss = network.loss_at(
        params,
        projected,
        network.pose_scale * jnp.asarray(case["loss/pose_m"]),
        jnp.asarray(case["loss/t"]),
        jnp.asarray(case["loss/noise"]),
    )
    assert_close(loss, case["loss/value"], relative=1e-5)


def test_reverse_chain(diffpose, projected):
    case, network, params = diffpose
    steps = sampling.parse_solver(network.schedule)

    def chain(projected, noise):
        return sampling.reverse_chain(network.denoise(params, projected), steps, noise)

    vector = jax.vmap(chain, in_axes=(0, 1))(projected, jnp.asarray(case["reverse/noise"]))
    assert_close(vector / network.pose_scale, case["reverse/pose_m"], of_std=1e-4)


# --- metrics -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hypotheses_and_truth(load):
    case = load("metrics_case.npz")
    return jnp.asarray(case["hypotheses_mm"]), jnp.asarray(case["gt_mm"])


def test_metrics_of_each_hypothesis(load, hypotheses_and_truth):
    case = load("metrics_case.npz")
    hypotheses, truth = hypotheses_and_truth
    errors = metrics.joint_errors(hypotheses, truth[:, None])
    aligned = jax.jit(procrustes_align)(hypotheses, truth[:, None])
    aligned_errors = metrics.joint_errors(aligned, truth[:, None])
    assert_close(errors.mean(-1), case["mpjpe"], absolute=1e-3)
    assert_close(aligned_errors.mean(-1), case["pa_mpjpe"], absolute=1e-3)
    assert_close(metrics.pck(errors), case["pck150"], absolute=1e-3)
    assert_close(metrics.symmetry_error(hypotheses), case["symmetry_mm"], absolute=1e-3)


@pytest.fixture(scope="module")
def frame_metrics(hypotheses_and_truth):
    return jax.jit(metrics.per_frame_metrics)(*hypotheses_and_truth)


def test_best_hypotheses(load, frame_metrics):
    """One hypothesis equals its truth: a tie of distances that rounding must not break."""
    case = load("metrics_case.npz")
    assert_close(frame_metrics["mpjpe_best"], case["mpjpe"].min(1), absolute=1e-3)
    assert_close(frame_metrics["pa_mpjpe_best"], case["pa_mpjpe"].min(1), absolute=1e-3)
    assert_close(frame_metrics["pck150_best"], case["pck150"].max(1), absolute=1e-3)
    assert_close(frame_metrics["mpjpe_best"], case["min_mpjpe"], absolute=1e-3)
    assert_close(frame_metrics["pa_mpjpe_best"], case["min_pa_mpjpe"], absolute=1e-3)


def test_cps(load, frame_metrics):
    score = frame_metrics["cps_best"].mean()
    assert_close(score, load("metrics_case.npz")["cps"], absolute=1e-3)


def test_ece_quantile(load, frame_metrics):
    """A share of the hypotheses: nothing but the right count will do."""
    expected = load("metrics_case.npz")["ece_quantile"]
    assert_close(frame_metrics["ece_quantile"], expected, absolute=1e-6)


# --- the detector ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hrnet_case(load, reference_dir):
    """The case of HRNet: arrays and the detector with the case's weights."""
    case = load("hrnet_case.npz")
    spec = reference_dir / "hrnet_w32_state_dict.json"
    spec = spec if spec.exists() else GOLDEN / spec.name
    params = hrnet.from_torch(seeded_weights(spec, int(case["weights_seed"])))
    side = len(case["image"])
    return case, Detector(hrnet.HRNet(), params, side, "hrnet_w32-seeded")


def test_hrnet(hrnet_case):
    case, detector = hrnet_case
    heatmaps = detector.heatmaps(case["image"][None])
    assert_close(heatmaps[0], case["heatmaps"], of_std=1e-4)


# --- data --------------------------------------------------------------------------------


def test_released_data_file(reference_dir, load):
    """The file of the published preprocessing, by the reader, to what its program trains on."""
    case, path = load("h36m_released_format.npz"), reference_dir / "h36m_released_format.h5"
    if not path.exists():
        pytest.skip(f"{reference_dir} holds no {path.name}")
    released.check(path, "standard")
    columns = {}
    for split in ("train", "test"):
        chunks = [
            chunk
            for piece in released.pieces(path, "standard", split)
            for chunk in released.read(path, "standard", split, piece)
        ]
        columns[split] = {name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]}
    test = columns["test"]
    columns["h36ma"] = {name: values[test["ambiguous"]] for name, values in test.items()}
    every_16th = every_16th_row(test["row"])
    columns["test_every64"] = {name: values[every_16th] for name, values in test.items()}
    for subset, found in columns.items():
        assert_close(found["pose_mm"], case[f"{subset}/gt_mm"], absolute=1e-3)
        if f"{subset}/pose_m" not in case:
            continue
        vector = pose_to_vector(jnp.asarray(found["pose_mm"]), pose_scale=1.0)
        pose_m = jnp.swapaxes(vector.reshape(-1, 3, 16), 1, 2)
        assert_close(pose_m, case[f"{subset}/pose_m"], absolute=5e-6)
        assert found["action"].tolist() == case[f"{subset}/action"].tolist()
        sums = np.float64(found["heatmaps"]).sum((2, 3))
        assert_close(sums, case[f"{subset}/heatmap_sum"], relative=1e-5)
