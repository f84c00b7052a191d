"""Published PyTorch files to checkpoints and back, with files that PyTorch wrote."""

import os
import pickle
import subprocess
import sys

import chex
import jax
import numpy as np
import programs
import pytest
from paths import GOLDEN, ROOT
from seeded_weights import seeded_weights
from small import distinct_config, parsed, small_model, small_network

import diffpose_jax
from configs import h36m_released
from diffpose_jax import detectors, inference
from diffpose_jax.detectors import hrnet
from diffpose_jax.interop import torch_weights
from diffpose_jax.interop.torch_weights import WeightsError
from diffpose_jax.io.trees import CheckpointError

torch = pytest.importorskip("torch", reason="PyTorch files are converted only with PyTorch")
convert = programs.load("convert").convert

SPEC = GOLDEN / "diffpose_state_dict.json"
NORMS = [f"denoise_fn.res_pose{block}.bn{layer}" for block in (1, 2) for layer in (1, 2)]
SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2", "p2_loss_weight",
)  # fmt: skip
"""Buffers of the published program's diffusion."""


def small_parsed(**changes):
    return parsed(distinct_config(**changes))


@pytest.fixture(scope="module")
def case():
    with np.load(GOLDEN / "diffpose_case.npz") as arrays:
        return dict(arrays)


def buffers(case):
    """All that the published program's state dict has beside parameters, with its numbers."""
    rng = np.random.default_rng(0)
    of_schedule = {name: case.get(f"schedule/{name}", np.ones(25)) for name in SCHEDULE}
    of_norms = {}
    for name in NORMS:
        of_norms[f"{name}.running_mean"] = rng.normal(size=1024)
        of_norms[f"{name}.running_var"] = rng.uniform(1, 2, 1024)
        of_norms[f"{name}.num_batches_tracked"] = np.int64(700_000)
    centres = {"condition_emb.pos_encoder.centers": np.linspace(-1, 1, 64)}
    return {
        name: torch.from_numpy(np.array(value, value.dtype if value.ndim == 0 else np.float32))
        for name, value in (of_schedule | of_norms | centres).items()
    }


def in_released_layout(raw, ema):
    """What the published program saves: state dicts of the model, its average and the scaler."""
    average = {"initted": torch.tensor([True]), "step": torch.tensor([70_000])}
    average |= {f"online_model.{name}": tensor for name, tensor in raw.items()}
    average |= {f"ema_model.{name}": tensor for name, tensor in ema.items()}
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5,
              "growth_interval": 2000, "_growth_tracker": 17}  # fmt: skip
    return {"step": 700_000, "model": raw, "ema": average, "scaler": scaler}


def tensors_of(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def state_dicts(case):
    """By kind of weights; the raw ones are the case's."""
    seeds = {"raw": int(case["weights_seed"]), "ema": int(case["weights_seed"]) + 1}
    constants = buffers(case)
    return {kind: tensors_of(seeded_weights(SPEC, s)) | constants for kind, s in seeds.items()}


@pytest.fixture(scope="module")
def released(state_dicts, tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "model-final.pt"
    torch.save(in_released_layout(**state_dicts), path)
    return path


@pytest.fixture(scope="module")
def exported(released):
    """The export, by the program itself, and what it printed."""
    output = released.parent / "export"
    arguments = ["--torch", released, "--output", output]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "experiments.convert", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return output, done.stdout


def test_the_export_has_the_released_configuration(exported):
    """Its numbers are those of the tensors below, which `test_reference` computes with."""
    output, printed = exported
    expected = h36m_released.get_config()
    expected.model.matmul_dtype = "float32"  # the program's 16 bits were for the training
    assert diffpose_jax.load(output).config == parsed(expected)
    assert f"{output}: a DiffPose model, raw weights" in printed
    for name in (*SCHEDULE, *(f"{norm}.running_var" for norm in NORMS)):
        assert name in printed


def test_raw_and_ema_weights(released, state_dicts, exported, tmp_path):
    what, unused = convert(released, tmp_path / "ema", "ema", parsed(h36m_released.get_config()))
    assert what == "a DiffPose model, ema weights"
    assert set(unused) == {
        *SCHEDULE, "condition_emb.pos_encoder.centers", "condition_emb.conf_out.weight",
        "condition_emb.conf_out.bias",
        *(f"{norm}.{kind}" for norm in NORMS for kind in (
            "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
        )),
    }  # fmt: skip
    for folder, kind in ((exported[0], "raw"), (tmp_path / "ema", "ema")):
        model = inference.load(folder)
        tensors = torch_weights.to_torch(model.params, model.network.schedule)
        for name, tensor in state_dicts[kind].items():
            if name not in unused:
                np.testing.assert_array_equal(tensors[name], tensor, err_msg=f"{kind} {name}")


def test_written_back_it_is_what_the_published_program_loads(case, exported, state_dicts, tmp_path):
    """Its loading is strict: all names, shapes and types."""
    model = inference.load(exported[0])
    path = tmp_path / "folder" / "back.pt"
    torch_weights.write_file(path, model.params, model.network.schedule)
    content = torch.load(path, weights_only=True)
    assert set(content) == {"step", "model", "ema", "scaler"}
    average = content["ema"]
    assert {"initted", "step"} <= set(average)
    assert len(average) == 2 + 2 * len(content["model"])
    copies = [content["model"]] + [
        {n.removeprefix(prefix): t for n, t in average.items() if n.startswith(prefix)}
        for prefix in ("online_model.", "ema_model.")
    ]
    for written in copies:
        assert written.keys() == state_dicts["raw"].keys()
        for name, tensor in state_dicts["raw"].items():
            assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape), name
            if f"schedule/{name}" in case or "centers" in name:
                np.testing.assert_allclose(written[name], tensor, rtol=1e-5, atol=1e-7)
            elif name not in torch_weights.unused([name]):
                np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    # And it reads its own file.
    convert(path, tmp_path / "again", "ema", model.config)
    chex.assert_trees_all_equal(inference.load(tmp_path / "again").params, model.params)


# --- files that are not what they should be ----------------------------------------------


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path, model = tmp_path_factory.mktemp("small") / "small.pt", small_model()
    torch_weights.write_file(path, model.params, model.network.schedule)
    return path


def error_of(path, output, weights="raw", config=None):
    with pytest.raises(WeightsError) as error:
        convert(path, output, weights, config or small_parsed())
    assert str(path) in str(error.value)
    assert not output.exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("weights", "changes", "problem"),
    [
        ("raw", {"denoise_fn.pose.weight": None}, "denoise_fn.pose.weight is missing."),
        ("ema", {"denoise_fn.pose.weight": None}, "denoise_fn.pose.weight is missing."),
        ("raw", {"denoise_fn.pose.bias": [0.0]}, "denoise_fn.pose.bias are no tensors"),
    ],
)
def test_a_wrong_tensor_is_named(small_file, tmp_path, weights, changes, problem):
    content = torch.load(small_file, weights_only=True)
    part, prefix = {"raw": ("model", ""), "ema": ("ema", "ema_model.")}[weights]
    for name, value in changes.items():
        content[part][prefix + name] = value
        if value is None:
            del content[part][prefix + name]
    path = tmp_path / "changed.pt"
    torch.save(content, path)
    assert problem in error_of(path, tmp_path / "output", weights)
    other = {"raw": "ema", "ema": "raw"}[weights]  # which is whole
    convert(path, tmp_path / "output", other, small_parsed())


def test_a_state_dict_alone(small_file, tmp_path):
    content = torch.load(small_file, weights_only=True)
    path = tmp_path / "plain.pt"
    torch.save(content["model"], path)
    assert "holds no ema weights" in error_of(path, tmp_path / "output", "ema")
    convert(path, tmp_path / "output", "raw", small_parsed())
    convert(small_file, tmp_path / "whole", "raw", small_parsed())
    plain, whole = (inference.load(tmp_path / name).params for name in ("output", "whole"))
    chex.assert_trees_all_equal(plain, whole)


@pytest.mark.parametrize(
    ("content", "weights", "problem"),
    [
        ({"model": {"a": torch.ones(2)}}, "ema", "holds no ema weights: 'ema' is missing"),
        ({"ema": {"a": torch.ones(2)}}, "raw", "holds no raw weights: 'model' is missing"),
        ([torch.ones(2)], "raw", "holds a list, not a dictionary of tensors"),
        ({}, "raw", "is no state dict: it is empty"),
        ({"epoch": 3, "lr": 0.1}, "raw", "is no state dict: epoch, lr are no tensors"),
        ({"weights": torch.ones(2)}, "raw", "weights do not fit the network: "),
    ],
)
def test_other_contents(tmp_path, content, weights, problem):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    assert problem in error_of(path, tmp_path / "output", weights)


def test_no_such_file(tmp_path):
    assert "nothing.pt does not exist" in error_of(tmp_path / "nothing.pt", tmp_path / "output")


@pytest.mark.parametrize("keep", [0, 5000, -100])
def test_a_truncated_file(small_file, tmp_path, keep):
    path = tmp_path / "half.pt"
    path.write_bytes(small_file.read_bytes()[:keep])
    message = error_of(path, tmp_path / "output")
    assert "is not a PyTorch file of tensors alone" in message


class Program:
    """Unpickled, it would run a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(
    pickle.dumps(content))], ids=["zip", "pickle"])  # fmt: skip
def test_code_in_a_file_does_not_run(tmp_path, write):
    made = tmp_path / "made"
    path = tmp_path / "model.pt"
    write({"model": Program(f"touch {made}")}, path)
    message = error_of(path, tmp_path / "output")
    assert not made.exists()
    assert "weights_only" not in message  # PyTorch's own advice
    assert len(message) < 300
    pickle.loads(pickle.dumps(Program(f"touch {made}")))
    assert made.exists()


def test_nothing_is_overwritten(small_file, tmp_path):
    with pytest.raises(CheckpointError, match="there already"):
        convert(small_file, tmp_path, "raw", small_parsed())
    assert not list(tmp_path.iterdir())


def test_no_pytorch_file_of_another_encoder(tmp_path):
    network = small_network(encoder="candidates")
    params = jax.tree.map(
        lambda p: np.zeros(p.shape, p.dtype), jax.eval_shape(network.init, jax.random.key(0))
    )
    with pytest.raises(WeightsError, match='no other encoder than the "embedding"'):
        torch_weights.write_file(tmp_path / "model.pt", params, network.schedule)
    assert not list(tmp_path.iterdir())


# --- the detector ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hrnet_tensors():
    return seeded_weights(GOLDEN / "hrnet_w32_state_dict.json", seed=7)


@pytest.mark.parametrize("layout", ["plain", "net"])
def test_hrnet_becomes_a_detector(hrnet_tensors, tmp_path, layout):
    path, output = tmp_path / "pose_hrnet_w32_256x256.pth", tmp_path / "hrnet"
    tensors = tensors_of(hrnet_tensors)
    torch.save({"plain": tensors, "net": {"epoch": 12, "net": tensors}}[layout], path)
    assert convert(path, output, "raw", small_parsed()) == ("the detector HRNet-W32", [])
    chex.assert_trees_all_equal(detectors.load(output).params, hrnet.from_torch(hrnet_tensors))


def test_another_detector(tmp_path):
    path = tmp_path / "hrnet_w48.pth"
    torch.save({"final_layer.weight": torch.zeros(17, 48, 1, 1)}, path)
    message = error_of(path, tmp_path / "output")
    assert "final_layer.weight is (17, 48, 1, 1), not (16, 32, 1, 1)" in message
    assert "conv1.weight is missing" in message
