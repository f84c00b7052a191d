"""Published PyTorch files to checkpoints and back, with files that PyTorch wrote."""

import os
import pickle
import subprocess
import sys
import zipfile

import chex
import graph_models
import numpy as np
import programs
import pytest
import test_fuzz
from paths import GOLDEN, ROOT
from seeded_weights import seeded_weights
from small import distinct_config, parsed, small_model
from test_harmful_files import MakesFolder, in_little_memory

import diffpose_jax
from configs import h36m_released
from diffpose_jax import detectors, inference
from diffpose_jax.detectors import hrnet, movenet
from diffpose_jax.interop import torch_weights
from diffpose_jax.interop.torch_weights import WeightsError
from diffpose_jax.io.trees import CheckpointError
from diffpose_jax.method import diffusion

torch = pytest.importorskip("torch", reason="PyTorch is not installed: it is in the extra torch")
program = programs.load("convert")
convert = program.convert

SPEC = GOLDEN / "diffpose_state_dict.json"
NORMS = [f"denoise_fn.res_pose{block}.bn{layer}" for block in (1, 2) for layer in (1, 2)]
SCHEDULE = tuple(torch_weights.schedule_buffers(diffusion.cosine_schedule(25, 0.008, 0.999)))


@pytest.fixture(scope="module")
def case():
    with np.load(GOLDEN / "diffpose_case.npz") as arrays:
        return dict(arrays)


def buffers(case):
    """What the published program's state dict has beside parameters."""
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
    scaler = {"scale": 65536.0, "_growth_tracker": 17}
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
def exported(state_dicts, tmp_path_factory):
    """The export, by the program itself, and what it printed."""
    folder = tmp_path_factory.mktemp("released")
    released, output = folder / "model-final.pt", folder / "export"
    torch.save(in_released_layout(**state_dicts), released)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "experiments.convert",
         "--torch", released, "--output", output],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
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


def test_raw_and_ema_weights(state_dicts, exported, tmp_path):
    released = exported[0].parent / "model-final.pt"
    what, unused = convert(released, tmp_path / "ema", "ema", parsed(h36m_released.get_config()))
    assert what == "a DiffPose model, ema weights"
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
    for prefix in ("", "online_model.", "ema_model."):
        saved = average if prefix else content["model"]
        written = {n.removeprefix(prefix): t for n, t in saved.items() if n.startswith(prefix)}
        assert written.keys() == state_dicts["raw"].keys()
        for name, tensor in state_dicts["raw"].items():
            assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape), name
            if f"schedule/{name}" in case or "centers" in name:
                np.testing.assert_allclose(written[name], tensor, rtol=1e-5, atol=1e-7)
            elif name not in torch_weights.unused([name]):
                np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    convert(path, tmp_path / "again", "ema", model.config)
    chex.assert_trees_all_equal(inference.load(tmp_path / "again").params, model.params)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path, model = tmp_path_factory.mktemp("small") / "small.pt", small_model()
    torch_weights.write_file(path, model.params, model.network.schedule)
    return path


def error_of(path, output, weights="raw"):
    with pytest.raises(WeightsError) as error:
        convert(path, output, weights, parsed(distinct_config()))
    assert str(path) in str(error.value)
    assert not output.exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("weights", "part", "prefix", "other"),
    [("raw", "model", "", "ema"), ("ema", "ema", "ema_model.", "raw")],
)
def test_a_missing_tensor_is_named(small_file, tmp_path, weights, part, prefix, other):
    content = torch.load(small_file, weights_only=True)
    del content[part][f"{prefix}denoise_fn.pose.weight"]
    path = tmp_path / "changed.pt"
    torch.save(content, path)
    problem = error_of(path, tmp_path / "output", weights)
    assert "denoise_fn.pose.weight is missing." in problem
    convert(path, tmp_path / "output", other, parsed(distinct_config()))  # which is whole


def test_a_state_dict_alone(small_file, tmp_path):
    path = tmp_path / "plain.pt"
    torch.save(torch.load(small_file, weights_only=True)["model"], path)
    assert "holds no ema weights" in error_of(path, tmp_path / "output", "ema")
    convert(path, tmp_path / "output", "raw", parsed(distinct_config()))
    plain = inference.load(tmp_path / "output")
    chex.assert_trees_all_equal(plain.params, small_model().params)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "other.pt does not exist"),
        ([torch.ones(2)], "holds a list, not a dictionary of tensors"),
        ({}, "is no state dict: it is empty"),
        ({"ema": {"a": torch.ones(2)}}, "holds no raw weights: 'model' is missing"),
        ({"epoch": 3, "lr": 0.1}, "is no state dict: epoch, lr are no tensors"),
        ({"model": {"a": torch.ones(2), "b": [0.0]}}, "is no state dict: b are no tensors"),
        ({"weights": torch.ones(2)}, "weights do not fit the network: "),
        ({"final_layer.weight": torch.zeros(17, 48, 1, 1)},
         "final_layer.weight is (17, 48, 1, 1), not (16, 32, 1, 1)"),
    ],
)  # fmt: skip
def test_other_contents(tmp_path, content, problem):
    path = tmp_path / "other.pt"
    if content is not None:
        torch.save(content, path)
    assert problem in error_of(path, tmp_path / "output")


@test_fuzz.pytestmark
@pytest.mark.parametrize(
    "cases", [test_fuzz.FAST_CASES, pytest.param(test_fuzz.SLOW_CASES, marks=pytest.mark.slow)]
)
def test_mutated_files(tmp_path, cases):
    problems = test_fuzz.run(tmp_path, cases, ["torch_files"])["torch_files"]
    assert not problems, "\n\n".join(problems[:10])


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(
    pickle.dumps(content))], ids=["zip", "pickle"])  # fmt: skip
def test_code_in_a_file_does_not_run(tmp_path, write):
    made, path = tmp_path / "made", tmp_path / "model.pt"
    write({"model": MakesFolder(made)}, path)
    message = error_of(path, tmp_path / "output")
    assert not made.exists()
    assert "weights_only" not in message  # PyTorch's own advice
    assert len(message) < 300


def test_truncated_and_compressed_files_and_tensors_of_much_more_than_they_hold(tmp_path):
    whole, path, output = tmp_path / "whole.pt", tmp_path / "a.pt", tmp_path / "output"
    torch.save({"w": torch.zeros(8 << 20)}, whole)
    path.write_bytes(whole.read_bytes()[:-100])
    assert "is not a PyTorch file of tensors alone" in error_of(path, output)
    with zipfile.ZipFile(whole) as z, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in z.namelist():
            packed.writestr(name, z.read(name))
    assert path.stat().st_size < 1 << 20
    assert "is not a PyTorch file of tensors alone" in error_of(path, output)
    many = torch.ones(1, dtype=torch.float16).expand(10**6, 10**6)
    with in_little_memory():
        for tensor in (many, torch.eye(3).to_sparse()):
            torch.save({"w": tensor}, path)
            assert "is not a PyTorch file of tensors alone" in error_of(path, output)
        endless = {}
        endless["again"] = endless
        torch.save(endless, path)
        assert "is no state dict" in error_of(path, output)


def test_nothing_is_overwritten_and_no_other_encoder_written(small_file, tmp_path):
    with pytest.raises(CheckpointError, match="there already"):
        convert(small_file, tmp_path, "raw", parsed(distinct_config()))
    model = small_model(encoder="candidates")
    with pytest.raises(WeightsError, match='no other encoder than the "embedding"'):
        torch_weights.write_file(tmp_path / "model.pt", model.params, model.network.schedule)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_nested", [False, True])
def test_hrnet_becomes_a_detector(tmp_path, is_nested):
    arrays = seeded_weights(GOLDEN / "hrnet_w32_state_dict.json", seed=7)
    path, output = tmp_path / "pose_hrnet_w32_256x256.pth", tmp_path / "hrnet"
    tensors = tensors_of(arrays)
    torch.save({"epoch": 12, "net": tensors} if is_nested else tensors, path)
    what, unused = convert(path, output, "raw", parsed(distinct_config()))
    assert (what, unused) == ("the detector HRNet-W32", [])
    chex.assert_trees_all_equal(detectors.load(output).params, hrnet.from_torch(arrays))


def test_movenet_becomes_a_detector(tmp_path, monkeypatch):
    tensors = graph_models.tensors_of("movenet_thunder_shapes.json")
    path, output = tmp_path / "movenet-thunder.json", tmp_path / "thunder"

    def convert_movenet():
        program.convert_graph(movenet, "movenet_thunder", str(path), output)

    with pytest.raises(WeightsError, match=r"No such file.*movenet-thunder\.json"):
        convert_movenet()
    contents = graph_models.publish(movenet, tensors, monkeypatch)
    path.write_bytes(contents[path.name])
    path.with_suffix(".bin").write_bytes(b"others")
    with pytest.raises(WeightsError, match=r"thunder\.bin is not the .*, --movenet download gets"):
        convert_movenet()
    assert not output.exists()
    path.with_suffix(".bin").write_bytes(contents["movenet-thunder.bin"])
    convert_movenet()
    chex.assert_trees_all_equal(detectors.load(output).params, movenet.from_tensors(tensors))
    with pytest.raises(CheckpointError, match="there already"):
        convert_movenet()
