"""The sampler as a program: it draws what the library draws, where there is no library."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from absl import app
from jax import export
from small import random_errors, random_heatmaps, small_model, small_network

from diffpose_jax import inference
from diffpose_jax.config import ConfigError
from diffpose_jax.interop import stablehlo
from diffpose_jax.io import extras, files
from diffpose_jax.io.trees import CheckpointError
from diffpose_jax.skeleton import H36M_JOINTS, MPII_JOINTS

NUM_HYPOTHESES = 30
BATCHES = (1, 3, 70)
SEED = 2**32 - 1

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "stablehlo"
    stablehlo.write(folder, stablehlo.build(small_model(), NUM_HYPOTHESES, small_model().solver))
    return folder


def example_of(folder):
    spec = importlib.util.spec_from_file_location("example", folder / "example.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Modules that are None in sys.modules cannot be imported. -I: no PYTHONPATH, not this folder.
ISOLATED = """
import sys
from pathlib import Path

absent = ("diffpose_jax", "flax", "orbax", "ml_collections", "absl")
sys.modules |= dict.fromkeys(absent)
folder, seed, *rest = sys.argv[1:]
sys.path.insert(0, folder)
import example
import numpy as np

sample = example.load(Path(folder))
for inputs, output in zip(rest[::2], rest[1::2], strict=True):
    np.save(output, sample(int(seed), np.load(inputs)))
assert not any(name.split(".")[0] in absent and sys.modules[name] for name in sys.modules)
"""


def test_the_same_seed_gives_the_library_s_hypotheses_without_the_library(folder, tmp_path):
    maps, names = random_heatmaps(0, max(BATCHES)), []
    for number in BATCHES:
        names += [tmp_path / f"maps{number}.npy", tmp_path / f"poses{number}.npy"]
        np.save(names[-2], maps[:number])
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", ISOLATED, folder, str(SEED), *names],
        env={"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = small_model().sample(jax.random.key(SEED), maps, NUM_HYPOTHESES)
    assert np.std(expected, axis=1)[:, 1:].min() > 10
    for number, name in zip(BATCHES, names[1::2], strict=True):
        poses_mm = np.load(name)
        assert poses_mm.dtype == np.float32
        np.testing.assert_allclose(poses_mm, expected[:number], atol=0.1)


@pytest.mark.parametrize(
    ("solver", "changes"),
    [("dpm++:3", {"candidates": "per_hypothesis"}), ("ddpm:2@4+cov", {"target": "edm"})],
)
def test_another_solver_and_another_model(tmp_path, solver, changes):
    library = dataclasses.replace(small_model(**changes), errors=random_errors(1))
    maps = random_heatmaps(5, 2)
    stablehlo.write(tmp_path / "s", stablehlo.build(library, 2, library.parse_solver(solver)))
    poses_mm = example_of(tmp_path / "s").load(tmp_path / "s")(7, maps)
    expected = library.sample(jax.random.key(7), maps, 2, solver=solver)
    np.testing.assert_allclose(poses_mm, expected, atol=0.1)
    assert json.loads((tmp_path / "s" / "sampler.json").read_text())["solver"] == solver


def test_the_passes_are_those_of_the_platform_that_runs_it():
    """Wherever it is exported: 200 hypotheses at a time on a CPU, all 6,400 elsewhere."""
    network, solver = small_network(), small_model().solver
    shapes = (
        jax.eval_shape(network.init, jax.random.key(0)),
        jax.ShapeDtypeStruct((), jnp.uint32),
        jax.ShapeDtypeStruct((64, 16, 64, 64), jnp.float32),
    )

    @jax.jit
    def sampler(params, seed, heatmaps):
        return network.draw(params, jax.random.key(seed), solver, heatmaps, 100).poses_mm

    for platform, expected in (("cpu", [True, False]), ("cuda", [False, True])):
        program = export.export(sampler, platforms=[platform])(*shapes).mlir_module()
        assert [f"tensor<{size}x32xf32>" in program for size in (200, 6_400)] == expected


def test_the_description(folder):
    description = json.loads((folder / "sampler.json").read_text())
    exported = export.deserialize(bytearray((folder / "sampler.stablehlo").read_bytes()))
    expected = {
        "format": "diffpose_jax sampler 1",
        "jax": jax.__version__,
        "platforms": ["cpu", "cuda"],
        "heatmap_joints": list(MPII_JOINTS),
        "pose_joints": list(H36M_JOINTS),
        "calling_convention_version": exported.calling_convention_version,
    }
    assert description == description | expected
    assert description["arguments"]["heatmaps"].startswith("float32 (B, 16, 64, 64)")
    assert description["result"]["poses_mm"].startswith("float32 (B, 30, 17, 3)")
    assert str(exported.out_avals[0].shape) == "(b, 30, 17, 3)"


def test_the_program_does_not_tell_where_it_was_written_and_holds_no_parameters(folder):
    program = (folder / "sampler.stablehlo").read_bytes()
    assert b"network.py" in program
    for place in (stablehlo.__file__, jax.__file__):
        assert os.path.dirname(place).encode() not in program
    assert jax.config.jax_hlo_source_file_canonicalization_regex is None
    assert len(program) < 200_000


def test_a_program_that_this_jax_cannot_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    description = json.loads((tmp_path / "sampler.json").read_text()) | {"jax": "99.1"}
    (tmp_path / "sampler.json").write_text(json.dumps(description))
    (tmp_path / "sampler.stablehlo").write_bytes(b"x")
    message = r"cannot read .*sampler\.stablehlo.* jax 99\.1: install"
    with pytest.raises(RuntimeError, match=message):
        example_of(tmp_path).load(tmp_path)


def test_what_cannot_be_built(monkeypatch):
    with pytest.raises(ConfigError, match="num_hypotheses must be at least 1, not 0"):
        stablehlo.build(small_model(), 0, small_model().solver)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(extras.MissingExtraError, match=r"diffpose_jax\[stablehlo\]"):
        stablehlo.build(small_model(), 1, small_model().solver)


def test_a_folder_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    contents = {"a": b"1", "b": b"2"}
    whole = files.write_atomic

    def fails_at_b(path, content):
        if path.name == "b":
            raise OSError(28, "No space left on device", str(path))
        return whole(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", fails_at_b)
        with pytest.raises(OSError, match="No space left"):
            stablehlo.write(tmp_path / "s", contents)
    assert not list(tmp_path.iterdir())
    stablehlo.write(tmp_path / "s", contents)
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == contents
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(CheckpointError, match="s is there already"):
        stablehlo.write(tmp_path / "s", contents)


@pytest.fixture
def export_with(tmp_path, monkeypatch):
    """`experiments.export` with these flags."""
    program = programs.load("export")
    library = small_model()
    evaluation = dataclasses.replace(library.config.evaluation, num_hypotheses=4)
    config = dataclasses.replace(library.config, evaluation=evaluation)
    inference.export(dataclasses.replace(library, config=config), tmp_path / "model")
    names = {"checkpoint": tmp_path / "model", "output": tmp_path / "export", "weights": None}

    def run(**flags):
        defaults = {"half": False, "stablehlo": False, "num_hypotheses": None, "solver": None}
        for name, value in (names | defaults | flags).items():
            monkeypatch.setattr(program, name.upper(), types.SimpleNamespace(value=value))
        program.main([])

    return run


def test_the_program_writes_it_beside_the_checkpoint(export_with, tmp_path):
    for name, flags, expected in (
        ("given", {"num_hypotheses": 3, "solver": "ddim:2"}, (3, "ddim:2")),
        ("default", {}, (4, "ddpm")),
    ):
        export_with(stablehlo=True, output=tmp_path / name, **flags)
        description = json.loads((tmp_path / name / "stablehlo" / "sampler.json").read_text())
        assert (description["num_hypotheses"], description["solver"]) == expected
    assert inference.load(tmp_path / "given").network.sampler.num_candidates == 6


def test_what_the_program_refuses_leaves_nothing_behind(export_with, tmp_path):
    with pytest.raises(ConfigError, match="solver must be"):
        export_with(stablehlo=True, solver="euler")
    for flags in ({"num_hypotheses": 3}, {"solver": "ddim:2"}):
        with pytest.raises(app.UsageError, match="are for --stablehlo"):
            export_with(**flags)
    assert not (tmp_path / "export").exists()
