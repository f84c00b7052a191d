"""A module imports only from earlier layers, or from its own without a cycle."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import diffpose_jax

ROOT = Path(diffpose_jax.__file__).parent

LAYERS = [
    "_version skeleton",
    "config io",
    "distributed",
    "method",
    "training",
    "inference",
    "detectors",
    "data",
    "evaluation",
    "interop report",
    "prediction",
    "",
]
"""Top-level modules and folders, earlier ones first; "" is what users import."""

LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names.split(" ")}


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


def layer(module):
    return LAYER_OF[module.split(".")[0]]


@pytest.mark.parametrize("name", FILES)
def test_imports_go_to_earlier_layers(name):
    top = name.split(".")[0]
    others = {module for module in imported(FILES[name]) if module.split(".")[0] != top}
    later = [module for module in others if layer(module) >= layer(name)]
    assert not later, f"{name} imports {later}, which are not in an earlier layer"


def test_no_imports_go_in_circles():
    graph = {name: set(imported(path)) - {name} for name, path in FILES.items()}
    graphlib.TopologicalSorter(graph).prepare()


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
