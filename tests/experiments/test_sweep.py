"""Several configurations over several seeds: which runs are done, and the table of them."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from paths import ROOT
from small import small_config, write_motion

from configs import ablations
from diffpose_jax.config import ConfigError

sweep = programs.load("sweep")


CONFIG = """
from small import small_config


def get_config(name):
    config = small_config(num_steps=4, steps_per_dispatch=2, checkpoint_every=4)
    config.model.update(encoder_layers=0, diffusion_steps=4)
    config.data.builder.update(source={source!r}, train_views_per_frame=1, test_views_per_frame=1)
    config.evaluation.num_hypotheses = {{"two": 2, "three": 3, "broken": 2}}[name]
    config.evaluation.report_frames = 1
    if name == "broken":
        config.model.num_candidates = 0
    return config
"""


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


# --- rows --------------------------------------------------------------------------------


def test_rows_are_configurations():
    rows = sweep.expand(
        ["configs/h36m.py", "other/mine.py:half/small", "configs/ablations.py:full"]
    )
    assert rows == {
        "h36m": "configs/h36m.py",
        "small": "other/mine.py:half/small",
        "full": "configs/ablations.py:full",
    }


@pytest.mark.parametrize("base", ["", "quickstart/"])
@pytest.mark.parametrize("name", ablations.TABLES)
def test_a_table_is_its_rows(base, name):
    rows = sweep.expand([f"configs/ablations.py:{base}{name}"])
    assert tuple(rows) == ablations.TABLES[name]
    for row, spec in rows.items():
        assert spec == f"configs/ablations.py:{base}{row}"


def test_a_configuration_named_twice_is_one_row():
    specs = ["configs/ablations.py:components", "configs/ablations.py:embedding"]
    rows = sweep.expand(specs)
    assert len(rows) == len({*ablations.TABLES["components"], *ablations.TABLES["embedding"]})
    with pytest.raises(ConfigError, match=r"ablations.py:full and .*quickstart/full are both call"):
        sweep.expand(["configs/ablations.py:full", "configs/ablations.py:quickstart/full"])


def load_rows(*names):
    spec = "configs/ablations.py:quickstart/"
    return {name: sweep.load_config(f"{spec}{name}") for name in names}


def test_configurations_that_differ_in_hypotheses_share_a_training():
    rows = load_rows(
        "full", "without_argmax", "candidates_32", "hypotheses_10", "diffusion_steps_25",
        "diffusion_steps_50", "hypotheses_2000", "candidates_32_without_argmax",
    )  # fmt: skip
    assert sweep.trained_by(rows) == {
        "full": "full",
        "without_argmax": "without_argmax",
        "candidates_32": "full",
        "hypotheses_10": "full",
        "diffusion_steps_25": "full",
        "diffusion_steps_50": "diffusion_steps_50",
        "hypotheses_2000": "full",
        "candidates_32_without_argmax": "without_argmax",
    }
    assert rows["hypotheses_10"].evaluation.num_hypotheses == 10  # left as it was
    # The first of the rows is trained, whichever it is.
    rows = load_rows("hypotheses_10", "hypotheses_50")
    assert set(sweep.trained_by(rows).values()) == {"hypotheses_10"}


@pytest.mark.parametrize("field", ["seed", "evaluation.weights", "training.batch_size"])
def test_configurations_that_differ_in_more_do_not(field):
    rows = load_rows("full", "candidates_32")
    value = {"seed": 9, "evaluation.weights": "raw", "training.batch_size": 32}[field]
    rows["candidates_32"].update_from_flattened_dict({field: value})
    assert sweep.trained_by(rows) == {"full": "full", "candidates_32": "candidates_32"}


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("configs/nothing.py", "there is no file configs/nothing.py"),
        ("README.md", "README.md is not a Python file"),
        ("configs/ablations.py:without_luck", "'without_luck' is no ablation; take"),
        ("configs/ablations.py", "configs/ablations.py: .*missing 1 required"),
        ("configs/h36m.py:full", "configs/h36m.py:full: .*takes 0 positional"),
    ],
)
def test_no_such_configuration(spec, problem, tmp_path):
    with pytest.raises(ConfigError, match=problem):
        sweep.sweep({"row": spec}, [1], tmp_path / "output", [])
    assert not list(tmp_path.iterdir())


# --- runs --------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch):
    """What would have been run: (arguments, environment); each writes its results.json.

    Those of a row called "broken" fail, and an evaluation of what is not there.
    """
    seen = []

    def run(command, check, env):
        assert command[:2] == [sys.executable, "-m"]
        assert not check
        seen.append((command[2:], env))
        value = dict(itertools.pairwise(command))
        output = Path(value.get("--workdir") or value["--output"])
        checkpoint = Path(value.get("--checkpoint", ROOT))
        failed = output.parent.name == "broken" or not checkpoint.exists()
        if not failed:
            write_json(output / "results.json", {})
        return subprocess.CompletedProcess(command, int(failed))

    monkeypatch.setattr(sweep.subprocess, "run", run)
    return seen


ROWS = {
    "hypotheses_10": "configs/ablations.py:quickstart/hypotheses_10",
    "full": "configs/ablations.py:quickstart/full",
    "candidates_32": "configs/ablations.py:quickstart/candidates_32",
    "hypotheses_10_too": "configs/ablations.py:quickstart/hypotheses_10",
}


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
             f"--config.seed={seed}", "--config.evaluation.controls=False", *overrides, *data],
            [*evaluate, folder["full"], "--num_hypotheses=200", *data],
            [*evaluate, folder["candidates_32"], "--num_hypotheses=200", *data],
            [*evaluate, folder["hypotheses_10_too"], *data],
        ]  # fmt: skip
    assert [arguments for arguments, _ in runs] == expected
    for _, environment in runs:
        assert environment == os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}


def test_run_again_it_does_what_is_missing(runs, tmp_path):
    sweep.sweep(ROWS, [5, 6], tmp_path, [])
    runs.clear()
    assert sweep.sweep(ROWS, [5, 6], tmp_path, []) == []
    assert runs == []
    (tmp_path / "full" / "seed_6" / "results.json").unlink()
    # More seeds and rows are no other sweep.
    more = ROWS | {"without_argmax": "configs/ablations.py:quickstart/without_argmax"}
    assert sweep.sweep(more, [5, 6, 7], tmp_path, []) == []
    done = [Path(arguments[4 if "train" in arguments[0] else 3 + 1]) for arguments, _ in runs]
    assert [(path.parent.name, path.name) for path in done] == [
        ("without_argmax", "seed_5"), ("full", "seed_6"), ("without_argmax", "seed_6"),
        *((row, "seed_7") for row in more),
    ]  # fmt: skip


def test_other_overrides_are_refused(runs, tmp_path):
    sweep.sweep(ROWS, [5], tmp_path, ["--config.model.clip=9"])
    runs.clear()
    for overrides in ([], ["--config.model.clip=8"]):
        with pytest.raises(ConfigError, match=r"begun with other settings after --.*--output"):
            sweep.sweep(ROWS, [6], tmp_path, overrides)
    assert runs == []


def test_a_run_that_fails_is_reported_and_the_others_are_done(runs, tmp_path):
    rows = {
        "broken": "configs/ablations.py:quickstart/full",
        "full": "configs/ablations.py:quickstart/full",
        "without_argmax": "configs/ablations.py:quickstart/without_argmax",
    }
    failed = sweep.sweep(rows, [5, 6], tmp_path, [])
    # Also what shares its training.
    assert failed == ["broken, seed 5", "full, seed 5", "broken, seed 6", "full, seed 6"]
    assert len(runs) == 6
    for seed in (5, 6):
        assert (tmp_path / "without_argmax" / f"seed_{seed}" / "results.json").exists()


# --- the table ---------------------------------------------------------------------------


def write_results(output, row, seed, **subsets):
    content = {"num_hypotheses": 2, "subsets": {
        name: {"frames": 3, "model": metrics} for name, metrics in subsets.items()
    }}  # fmt: skip
    write_json(output / row / f"seed_{seed}" / "results.json", content)


def test_table(tmp_path):
    write_results(tmp_path, "full", 1, all={"mpjpe_best": 50.0, "ece": 0.5},
                  ambiguous={"mpjpe_best": 70.0})  # fmt: skip
    write_results(tmp_path, "full", 2, all={"mpjpe_best": 52.0})  # without ambiguous frames
    write_results(tmp_path, "full", 4, all={"mpjpe_best": 1.0})  # another sweep's seed
    write_results(tmp_path, "mine", 2, all={"mpjpe_best": 60.0}, ambiguous={"symmetry": 9.0})
    rows = {"full": "", "without_argmax": "", "mine": ""}

    def filled(subset, is_published):
        table = sweep.table(rows, [1, 2, 3], tmp_path, subset, is_published)
        assert table.columns[:2] == ("mpjpe_best", "pa_mpjpe_best")
        return [(name, {c: v for c, v in values.items() if v}) for name, values in table.rows]

    expected = [
        ("full", {"mpjpe_best": [50.0, 52.0], "ece": [0.5]}),
        ("without_argmax", {}),
        ("mine", {"mpjpe_best": [60.0]}),
    ]
    for is_published in (False, True):  # what was published is of the ambiguous frames
        assert filled("all", is_published) == expected
    ambiguous = [
        ("full", {"mpjpe_best": [70.0]}),
        ("without_argmax", {}),
        ("mine", {"symmetry": [9.0]}),
    ]
    assert filled("ambiguous", False) == ambiguous
    with_published = filled("ambiguous", True)
    assert [name for name, _ in with_published] == [
        "full", "full, published", "without_argmax", "without_argmax, published", "mine"
    ]  # fmt: skip
    assert dict(with_published)["without_argmax, published"] == {
        "mpjpe_best": [62.5], "pa_mpjpe_best": [46.2], "pck150_best": [95.2], "cps_best": [196.9],
        "symmetry": [14.6],
    }  # fmt: skip
    assert [row for row in with_published if "published" not in row[0]] == ambiguous


# --- end to end --------------------------------------------------------------------------


def run_sweep(folder, *arguments):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "tests"),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.run(
        [sys.executable, "-m", "experiments.sweep", *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_sweep(tmp_path):
    config, output = tmp_path / "tiny.py", tmp_path / "output"
    config.write_text(CONFIG.format(source=str(write_motion(tmp_path / "motion"))))
    names = ("two", "three", "broken")
    done = run_sweep(
        tmp_path,
        *("--configs", ",".join(f"{config}:{name}" for name in names), "--seeds", "3"),
        *("--output", output, "--data_dir", tmp_path / "data", "--"),
        *("--config.model.diffusion_steps=3", "--config.evaluation.batch_size=4"),
    )
    assert done.returncode == 1, done.stderr
    assert "error: not finished: broken, seed 3. The same command does these" in done.stderr, (
        done.stderr
    )
    assert "num_candidates must be at least 1, not 0" in done.stderr
    folders = {name: output / name / "seed_3" for name in names}
    results = {}
    for name, number in (("two", 2), ("three", 3)):
        results[name] = json.loads((folders[name] / "results.json").read_text())
        assert results[name]["num_hypotheses"] == number
        assert set(results[name]["subsets"]["all"]) >= {"frames", "model"}
        assert "regression" not in results[name]["subsets"]["all"]
    assert not (folders["three"] / "checkpoints").exists()
    trained = json.loads((folders["two"] / "config.json").read_text())
    assert trained["seed"] == 3
    assert trained["model"]["diffusion_steps"] == 3
    assert trained["data"] == json.loads(small_config_data(tmp_path))
    table = (output / "table.md").read_text()
    assert table in done.stdout
    for name in ("two", "three"):
        best = results[name]["subsets"]["all"]["model"]["mpjpe_best"]
        assert f"| {name} | {best:.1f} | " in table
    assert "| broken |  |  |" in table
    assert "published" not in table
    lines = (output / "table_all.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [
        ["two", "1"], ["three", "1"], ["broken", "0"]
    ]  # fmt: skip


def small_config_data(folder):
    config = small_config().data
    config.builder.update(
        source=str(folder / "motion"), train_views_per_frame=1, test_views_per_frame=1
    )
    return config.to_json()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--configs", "configs/h36m.py"], "--configs and --output are needed"),
        (
            ["--configs", "configs/h36m.py", "--output", "x", "--seeds", "one"],
            "--seeds must be int",
        ),
    ],
)
def test_wrong_arguments(arguments, problem):
    done = run_sweep(None, *arguments)
    assert done.returncode != 0
    assert problem in done.stderr + done.stdout
