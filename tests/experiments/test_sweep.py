"""Several configurations over several seeds: which runs are done, and the table of them."""

import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import programs
import pytest
from absl import app
from paths import ROOT
from small import write_motion

from configs import ablations
from diffpose_jax.config import ConfigError

sweep = programs.load("sweep")
SPEC = "configs/ablations.py:quickstart/"

CONFIG = """
from small import small_config


def get_config(name):
    config = small_config(num_steps=4, steps_per_dispatch=2, checkpoint_every=4)
    config.model.update(encoder_layers=0, diffusion_steps=4)
    config.data.builder.update(source={source!r}, train_views_per_frame=1, test_views_per_frame=1)
    config.evaluation.num_hypotheses = {{"two": 2, "three": 3}}[name]
    config.evaluation.report_frames = 1
    return config
"""


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_rows_are_configurations_and_a_table_is_its_rows():
    specs = ["configs/h36m.py", "other/mine.py:half/small", f"{SPEC}components"]
    expected = {"h36m": specs[0], "small": specs[1]}
    expected |= {row: f"{SPEC}{row}" for row in ablations.TABLES["components"]}
    assert sweep.expand(specs) == expected
    full = "configs/ablations.py:full"
    assert sweep.expand([full, full]) == {"full": full}
    with pytest.raises(ConfigError, match=r"ablations.py:full and .*quickstart/full are both call"):
        sweep.expand([full, f"{SPEC}full"])


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("configs/nothing.py", "No such file or directory: .*configs/nothing.py"),
        ("README.md", r"README.md: .*line \d+"),
        ("configs/ablations.py", "configs/ablations.py: .*missing 1 required"),
        ("configs/h36m.py:full", "configs/h36m.py:full: .*takes 0 positional"),
    ],
)
def test_no_such_configuration(spec, problem, tmp_path):
    with pytest.raises(ConfigError, match=problem):
        sweep.sweep({"row": spec}, [1], tmp_path / "output", [])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def runs(monkeypatch):
    """What would have been run: (arguments, environment); runs of the row "broken" fail."""
    seen = []

    def run(command, check, env):
        assert command[:2] == [sys.executable, "-m"]
        seen.append((command[2:], env))
        value = dict(itertools.pairwise(command))
        output = Path(value.get("--workdir") or value["--output"])
        failed = output.parent.name == "broken" or not Path(value.get("--checkpoint", ".")).exists()
        if not failed:
            write_json(output / "results.json", {})
        return subprocess.CompletedProcess(command, int(failed))

    monkeypatch.setattr(sweep.subprocess, "run", run)
    return seen


ROWS = {row: f"{SPEC}{row}" for row in ("hypotheses_10", "full", "candidates_32")}
ROWS["hypotheses_10_too"] = f"{SPEC}hypotheses_10"


def test_commands(runs, tmp_path):
    overrides = ["--config.training.num_steps=40", "--config.model.clip=9"]
    assert sweep.sweep(ROWS, [5, 6], tmp_path, overrides, "prepared") == []
    expected = []
    for seed in (5, 6):
        folder = {row: str(tmp_path / row / f"seed_{seed}") for row in ROWS}
        trained, data = folder["hypotheses_10"], ["--data_dir", "prepared"]
        evaluate = ["experiments.evaluate", "--checkpoint", trained, "--output"]
        expected += [
            ["experiments.train", "--config", ROWS["hypotheses_10"], "--workdir", trained,
             f"--config.seed={seed}", "--config.evaluation.baselines=False", *overrides, *data],
            [*evaluate, folder["full"], "--num_hypotheses=200", *data],
            [*evaluate, folder["candidates_32"], "--num_hypotheses=200", *data],
            [*evaluate, folder["hypotheses_10_too"], *data],
        ]  # fmt: skip
    assert [arguments for arguments, _ in runs] == expected
    for _, environment in runs:
        assert environment == os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}


def test_run_again_it_does_what_is_missing(runs, tmp_path):
    sweep.sweep(ROWS, [5], tmp_path, [])
    (tmp_path / "full" / "seed_5" / "results.json").unlink()
    runs.clear()
    more = ROWS | {"without_argmax": f"{SPEC}without_argmax"}
    assert sweep.sweep(more, [5, 6], tmp_path, []) == []
    done = [dict(itertools.pairwise(arguments)) for arguments, _ in runs]
    folders = [Path(value.get("--workdir") or value["--output"]) for value in done]
    assert [(path.parent.name, path.name) for path in folders] == [
        ("full", "seed_5"), ("without_argmax", "seed_5"), *((row, "seed_6") for row in more)
    ]  # fmt: skip
    runs.clear()
    with pytest.raises(ConfigError, match=r"sweep\.json has other settings after --"):
        sweep.sweep(ROWS, [7], tmp_path, ["--config.model.clip=8"])
    assert runs == []


def test_a_run_that_fails_is_reported_and_the_others_are_done(runs, tmp_path):
    rows = {"broken": f"{SPEC}full", "full": f"{SPEC}full", "other": f"{SPEC}without_argmax"}
    failed = sweep.sweep(rows, [5, 6], tmp_path, [])
    # Also what shares its training.
    assert failed == ["broken, seed 5", "full, seed 5", "broken, seed 6", "full, seed 6"]
    assert all((tmp_path / "other" / f"seed_{seed}" / "results.json").exists() for seed in (5, 6))


def write_results(output, row, seed, **subsets):
    groups = {name: {"frames": 3, "model": metrics} for name, metrics in subsets.items()}
    write_json(output / row / f"seed_{seed}" / "results.json", {"subsets": groups})


def test_table(tmp_path):
    ambiguous = {"mpjpe_best": 70.0}
    write_results(tmp_path, "full", 1, all={"mpjpe_best": 50.0, "ece": 0.5}, ambiguous=ambiguous)
    write_results(tmp_path, "full", 2, all={"mpjpe_best": 52.0})  # without ambiguous frames
    write_results(tmp_path, "full", 4, all={"mpjpe_best": 1.0})  # another sweep's seed

    def filled(subset, is_published):
        rows = {"full": "", "without_argmax": ""}
        table = sweep.table(rows, [1, 2, 3], tmp_path, subset, is_published)
        assert table.columns[:2] == ("mpjpe_best", "pa_mpjpe_best")
        return {name: {c: v for c, v in values.items() if v} for name, values in table.rows}

    expected = {"full": {"mpjpe_best": [50.0, 52.0], "ece": [0.5]}, "without_argmax": {}}
    for is_published in (False, True):  # what was published is of the ambiguous frames
        assert filled("all", is_published) == expected
    rows = filled("ambiguous", True)
    assert list(rows) == [
        "full", "full, published", "without_argmax", "without_argmax, published"
    ]  # fmt: skip
    assert rows["without_argmax, published"]["mpjpe_best"] == [62.5]
    assert filled("ambiguous", False) == {"full": {"mpjpe_best": [70.0]}, "without_argmax": {}}


@pytest.mark.slow
def test_a_sweep(tmp_path):
    config, output = tmp_path / "tiny.py", tmp_path / "output"
    config.write_text(CONFIG.format(source=str(write_motion(tmp_path / "motion"))))
    done = subprocess.run(
        [sys.executable, "-m", "experiments.sweep", "--configs", f"{config}:two,{config}:three",
         "--seeds", "3", "--output", output, "--data_dir", tmp_path / "data",
         "--", "--config.model.diffusion_steps=3"],
        cwd=ROOT, env=programs.environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = (output / "table.md").read_text()
    assert table in done.stdout
    for name, number in (("two", 2), ("three", 3)):
        results = json.loads((output / name / "seed_3" / "results.json").read_text())
        assert results["num_hypotheses"] == number
        assert "regression" not in results["subsets"]["all"]
        best = results["subsets"]["all"]["model"]["mpjpe_best"]
        assert f"| {name} | {best:.1f} | " in table
    assert not (output / "three" / "seed_3" / "checkpoints").exists()
    trained = json.loads((output / "two" / "seed_3" / "config.json").read_text())
    assert (trained["seed"], trained["model"]["diffusion_steps"]) == (3, 3)
    lines = (output / "table_all.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [["two", "1"], ["three", "1"]]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [({}, "--configs and --output are needed"), ({"SEEDS": ["one"]}, "must be integers, not one")],
)
def test_wrong_arguments(monkeypatch, flags, problem):
    values = {"CONFIGS": ["a.py"], "OUTPUT": "x"} | flags if flags else {"CONFIGS": None}
    for name, value in values.items():
        monkeypatch.setattr(sweep, name, types.SimpleNamespace(value=value))
    with pytest.raises(app.UsageError, match=problem):
        sweep.main([])
