"""A module imports only from modules earlier on the one way through the code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffpose_jax

ROOT = Path(diffpose_jax.__file__).parent

ORDER = [
    "_version",
    "skeleton",
    "config",
    "extras",
    "files",
    "devices",
    "numpy_files",
    "scalars",
    "runs",
    "gaussian_fit",
    "channel_embedding",
    "heatmaps",
    "embedding_transformer",
    "plain_encoders",
    "denoiser",
    "diffusion",
    "sampling",
    "model",
    "training",
    "torch_weights",
    "checkpoints",
    "stablehlo",
    "alignment",
    "metrics",
    "aggregation",
    "controls",
    "pictures",
    "detectors.crops",
    "detectors.hrnet",
    "detectors.tensorflow_js",
    "detectors.efficientpose",
    "detectors",
    "data",
    "data.cameras",
    "data.hdf5",
    "data.matlab5",
    "data.mocap.recording",
    "data.mocap.asf_amc",
    "data.mocap.bvh",
    "data.mocap.skeletons",
    "data.mocap",
    "data.mocap.make",
    "data.simulator",
    "data.compact",
    "data.detections",
    "data.motion.bodies",
    "data.motion.motion_dataset_builder",
    "data.motion",
    "data.mpi_inf_3dhp.annotations",
    "data.mpi_inf_3dhp.mpi_inf_3dhp_dataset_builder",
    "data.mpi_inf_3dhp",
    "data.lsp",
    "data.human36m.sequences",
    "data.human36m.raw",
    "data.human36m.released",
    "data.human36m.flow",
    "data.human36m.human36m_dataset_builder",
    "data.human36m",
    "data.pipeline",
    "evaluation",
    "plotting",
    "report",
    "prediction",
    "published",
    "tables",
    "results",
    "",
]
"""Modules by their names within the package; "" is the package itself, what users import."""


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imported(path):
    """Modules of the package that a file imports, anywhere in it, as names within it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            # `from package import name`: a module of that name, or what the package defines.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if inside(n) in FILES else node.module for n in names]
        else:
            continue
        yield from (inside(name) for name in names if name.split(".")[0] == ROOT.name)


def inside(name):
    return name.removeprefix(ROOT.name).removeprefix(".")


def test_every_module_is_in_the_order():
    assert len(set(ORDER)) == len(ORDER)
    assert set(FILES) == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_back(name):
    later = [other for other in imported(FILES[name]) if ORDER.index(other) >= ORDER.index(name)]
    assert not later, f"{name} imports {later}, which come after it"


def test_the_parser_finds_each_kind_of_import(tmp_path):
    (tmp_path / "module.py").write_text(
        "import diffpose_jax\n"
        "import numpy, diffpose_jax.model\n"
        "from diffpose_jax import heatmaps as h, load\n"
        "from diffpose_jax.skeleton import H36M_JOINTS\n"
        "def function():\n    from diffpose_jax.data import motion\n"
    )
    expected = ["", "model", "heatmaps", "", "skeleton", "data.motion"]
    assert list(imported(tmp_path / "module.py")) == expected


def test_no_module_imports_tensorflow_or_torch(tmp_path):
    """Both stand in the path, as they may on a user's machine, and tell when they are imported."""
    for name in ("tensorflow", "torch"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    names = sorted(f"{ROOT.name}.{name}".rstrip(".") for name in FILES)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + "\n".join(
        f"import {name}" for name in names
    )
    program += "\nassert not {'tensorflow', 'torch'} & set(sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
