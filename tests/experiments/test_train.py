"""The commands, end to end in processes of their own, on a few frames and a tiny model."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import programs
import pytest
from paths import ROOT
from small import examples, write_motion

import diffpose_jax
from diffpose_jax.config import ConfigError
from diffpose_jax.evaluation import calibration as calibration_lib
from diffpose_jax.io import scalars
from diffpose_jax.training import checkpoints
from diffpose_jax.training.step import Trainer

NUM_STEPS, STEPS_PER_DISPATCH, CHECKPOINT_EVERY = 60, 2, 4

CONFIG = """
from small import small_config


def get_config():
    config = small_config(num_steps=60, steps_per_dispatch=2, checkpoint_every=4)
    config.training.update(decay="cosine", ema_decay=0.9, draws_per_image=2)
    config.data.predrawn_candidates = 8
    config.data.calibration_share = 0.5
    config.data.builder.update(source={source!r}, train_views_per_frame=1, test_views_per_frame=1)
    config.model.target = "edm"
    config.evaluation.update(weights="ema", solver="ddpm:4@24+cov")
    return config
"""


class Workplace:
    """A folder with motion, a configuration, prepared data and a cache of compiled programs."""

    def __init__(self, folder):
        self.folder = folder
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        self.environment = programs.environment(folder)
        source = str(write_motion(folder / "motion"))
        self.config = folder / "tiny.py"
        self.config.write_text(CONFIG.format(source=source))

    def start(self, module, *arguments):
        # Into files: a pipe that nobody reads would stop the process when it is full.
        command = [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)]
        with self.stdout.open("w") as out, self.stderr.open("w") as err:
            return subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=out, stderr=err)

    def run(self, module, *arguments):
        """Runs to the end; gives what was printed."""
        process = self.start(module, *arguments)
        assert process.wait(timeout=300) == 0, self.stderr.read_text()[-3000:]
        return self.stdout.read_text()

    def training(self, workdir):
        data = ("--data_dir", self.folder / "data")
        return ("--config", self.config, "--workdir", workdir, *data)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("experiments"))


@pytest.fixture(scope="module")
def run(workplace):
    """The unbroken run."""
    workdir = workplace.folder / "unbroken"
    workplace.run("train", *workplace.training(workdir))
    return workdir


def read_json(path):
    return json.loads(path.read_text())


def restore(run):
    """The newest state of a run."""
    loaded = checkpoints.load(run)
    trainer = Trainer(loaded.network, loaded.config.training)
    with checkpoints.RunCheckpoints(run / "checkpoints", loaded.config, keep=2) as saved:
        return jax.device_get(saved.restore_latest(trainer.init(jax.random.key(0))))


def assert_same_runs(run, other):
    a, b = (jax.tree_util.tree_leaves_with_path(restore(folder)) for folder in (run, other))
    for (path, x), (_, y) in zip(a, b, strict=True):
        assert x.tobytes() == y.tobytes(), path
    for name in ("metrics.jsonl", "results.json", "prediction_errors.npz"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    a, b = (read_json(folder / "config.json") for folder in (run, other))
    assert a | {"started": b["started"]} == b


def test_train_writes_all_that_is_promised(run):
    written = {path.name for path in run.iterdir()}
    assert written >= {"report.html", "baselines.npz", "tables.md", "table_all.csv"}
    assert (run / "figures" / "calibration.png").exists()
    assert [name for name in written if name.startswith(".")] == [".lock"]
    lines = scalars.read_scalars(run / "metrics.jsonl")
    steps = np.arange(STEPS_PER_DISPATCH, NUM_STEPS + 1, STEPS_PER_DISPATCH)
    assert [line["step"] for line in lines] == steps.tolist()
    assert np.isfinite([line["loss"] for line in lines]).all()
    rates = 1e-3 * 0.5 * (1 + np.cos(np.pi * (steps - 1) / NUM_STEPS))
    np.testing.assert_allclose([line["learning_rate"] for line in lines], rates, rtol=1e-3)
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {str(NUM_STEPS), str(NUM_STEPS - CHECKPOINT_EVERY)}
    config = read_json(run / "config.json")
    (start,) = config.pop("started")
    model = checkpoints.load(run)
    assert config == json.loads(json.dumps(dataclasses.asdict(model.config)))
    assert (start["step"], start["seed"], start["devices"]) == (0, config["seed"], ["cpu"])
    assert start["data_fingerprint"] == model.data_fingerprint != ""
    assert start["versions"]["jax"] == jax.__version__
    assert list((run / "figures").glob("*.png"))
    results = read_json(run / "results.json")
    assert results["num_hypotheses"] == 20
    methods = results["subsets"]["all"]
    assert methods["frames"] == 8
    assert {"model", "mean_pose", "regression", "gaussian"} < set(methods)
    assert 0 <= methods["model_heatmap_agreement"]["coverage"] <= 1
    calibration = calibration_lib.read_calibration(run, "heatmap_agreement")
    assert (calibration.num_frames, calibration.num_groups) == (12, 1)
    assert set(methods["model"]["mpjpe_best_at"]) == {"1", "2", "5", "10", "20"}


@pytest.mark.usefixtures("quick_compilation")
def test_training_starts_from_weights(workplace, run, tmp_path):
    """Of an equal model; here it learns next to nothing, so that they are those it began with."""
    before = checkpoints.load(run)
    config = dataclasses.replace(
        before.config,
        training=dataclasses.replace(
            before.config.training,
            init_from=str(run),
            num_steps=2,
            checkpoint_every=2,
            learning_rate=1e-12,
        ),
    )
    train = programs.load("train").train
    data_dir = str(workplace.folder / "data")
    train(config, tmp_path / "run", data_dir)
    chex.assert_trees_all_close(
        checkpoints.load(tmp_path / "run", "raw").params, before.params, atol=1e-9
    )
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, clip=20.0))
    with pytest.raises(ConfigError, match=r"of another model; set config.model.clip=30.0$"):
        train(other, tmp_path / "other", data_dir)


def test_run_again_trains_nothing(workplace, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    names = ("baselines.npz", "prediction_errors.npz", "metrics.jsonl")
    paths = [*(copy / name for name in names), *(copy / "checkpoints").rglob("*")]
    times_ns = {path: path.stat().st_mtime_ns for path in paths if path.is_file()}
    workplace.run("train", *workplace.training(copy))
    assert times_ns == {path: path.stat().st_mtime_ns for path in times_ns}
    assert_same_runs(run, copy)


def test_evaluate(workplace, run, tmp_path):
    before = (run / "results.json").read_bytes()
    printed = workplace.run(
        "evaluate",
        *("--checkpoint", run, "--num_hypotheses", 3, "--solver", "ddim:2"),
        *("--output", tmp_path / "output", "--data_dir", workplace.folder / "data"),
    )
    results = read_json(tmp_path / "output" / "results.json")
    assert results["num_hypotheses"] == 3
    ours, theirs = (of["subsets"]["all"] for of in (results, json.loads(before)))
    assert set(ours["gaussian"]["mpjpe_best_at"]) == {"1", "2", "3"}
    assert ours["model"]["mpjpe_mean"] != theirs["model"]["mpjpe_mean"]
    assert ours["regression"] == pytest.approx(theirs["regression"])
    assert (tmp_path / "output" / "report.html").exists()
    assert (run / "results.json").read_bytes() == before
    assert all(word in printed for word in ("mpjpe_best", "mean_pose", "regression", "gaussian"))


def test_export(workplace, run, tmp_path):
    printed = workplace.run("export", "--checkpoint", run, "--output", tmp_path / "export")
    assert str(tmp_path / "export") in printed
    copied = (tmp_path / "export" / "calibration.json").read_bytes()
    assert copied == (run / "calibration.json").read_bytes()
    model, exported = diffpose_jax.load(run), diffpose_jax.load(tmp_path / "export")
    assert model.config.evaluation.weights == "ema"
    maps = examples(0, 1).heatmaps(np.arange(1))
    samples, ours = (np.asarray(m.sample(jax.random.key(0), maps, 4)) for m in (exported, model))
    assert samples.tobytes() == ours.tobytes()  # by a solver that needs the measured errors


NOTEBOOK = ROOT / "experiments" / "evaluate.ipynb"
EXECUTE = """
import sys, nbformat, nbclient
notebook = nbformat.read(sys.argv[1], as_version=4)
folder = {"metadata": {"path": sys.argv[2]}}
nbclient.NotebookClient(notebook, timeout=600, resources=folder).execute()
nbformat.write(notebook, sys.argv[3])
"""


def code_cells(notebook):
    return [cell for cell in read_json(notebook)["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_notebook_runs(workplace, run, tmp_path):
    """From top to bottom on another run, in its own folder; every cell gives something."""
    environment = workplace.environment | {
        "DIFFPOSE_CHECKPOINT": str(run),
        "DIFFPOSE_DATA_DIR": str(workplace.folder / "data"),
        "DIFFPOSE_NUM_FRAMES": "8",
        "PYTHONPATH": str(ROOT),
    }
    executed = tmp_path / "executed.ipynb"
    command = [sys.executable, "-c", EXECUTE, NOTEBOOK, NOTEBOOK.parent, executed]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for cell in code_cells(executed)[1:]:
        assert cell["outputs"] or "=" in cell["source"][-1], cell["source"]


def test_the_notebook_is_stored_with_its_outputs():
    cells = code_cells(NOTEBOOK)
    kinds = [k for cell in cells for output in cell["outputs"] for k in output.get("data", {})]
    assert (kinds.count("image/png"), kinds.count("text/markdown")) == (5, 2)
    assert all(cell["execution_count"] for cell in cells)


HUMAN36M = """
from small import small_config

from configs import h36m_released


def get_config():
    config = small_config(num_steps=10, steps_per_dispatch=5)
    config.data = h36m_released.get_config().data
    config.evaluation.update(group_by=("action",), ambiguous="stored")
    return config
"""


def test_human36m_from_the_published_file_to_tables(workplace, tmp_path):
    """Prepared, trained and evaluated; then again under a protocol, at two counts."""
    data = ("--data_dir", tmp_path / "data")
    printed = workplace.run(
        "prepare",
        *("--dataset", "human36m", "--human36m.format=released", *data),
        *("--source", ROOT / "tests" / "golden" / "h36m_released_format.h5"),
    )
    assert "train 2, test 5 examples" in printed
    config = tmp_path / "human36m.py"
    config.write_text(HUMAN36M)
    workplace.run("train", "--config", config, "--workdir", tmp_path / "run", *data)
    results = read_json(tmp_path / "run" / "results.json")
    assert (len(results["groups"]["action"]), results["subsets"]["all"]["frames"]) == (1, 1)
    assert "Wehrbein et al., published" in (tmp_path / "run" / "tables.md").read_text()

    workplace.run(
        "evaluate",
        *("--checkpoint", tmp_path / "run", "--output", tmp_path / "protocol", *data),
        *("--config", ROOT / "configs" / "protocols.py:human36m_released"),
        *("--config.evaluation.baselines=False", "--num_hypotheses", "2,3"),
    )
    for name, count in (("results.json", 3), ("results_2.json", 2)):
        assert read_json(tmp_path / "protocol" / name)["num_hypotheses"] == count


def test_killed_and_started_again(workplace, run):
    """Once, when a line that was drawn is written; test_interruption.py kills at any moment."""
    workdir = workplace.folder / "killed"
    metrics = workdir / "metrics.jsonl"
    step = np.random.default_rng(1).choice(np.arange(STEPS_PER_DISPATCH, NUM_STEPS))
    process = workplace.start("train", *workplace.training(workdir))
    while process.poll() is None:
        lines = scalars.read_scalars(metrics)
        if lines and lines[-1]["step"] >= step:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    saved = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(saved, default=0) < NUM_STEPS
    workplace.run("train", *workplace.training(workdir))
    assert_same_runs(run, workdir)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("train", ["--config", "CONFIG", "--config.model.foo=1"], "foo"),
        ("train", ["--config", "CONFIG", "--config.model.num_samples=8"],
         "config.model.num_samples is called config.model.num_candidates now"),
        ("train", [], "--config is missing"),
        ("train", ["--config", "CONFIG", "--config.evaluation.solver=euler"], "the solver must be"),
        ("train", ["--config", "CONFIG", "--config.data.calibration_share=0.0"],
         "config.evaluation.solver = 'ddpm:4@24+cov' needs errors measured on recordings"),
        ("evaluate", ["--checkpoint", "no/such/run"], "no/such/run does not exist"),
        ("evaluate", ["--checkpoint", "x", "--num_hypotheses", "0"], "must be at least 1"),
        ("prepare", ["--dataset", "motion", "--source", "no/such/folder"], "no/such/folder"),
    ],
)  # fmt: skip
def test_errors(workplace, tmp_path, module, arguments, message):
    arguments = [str(workplace.config) if word == "CONFIG" else word for word in arguments]
    option = {"train": "--workdir", "evaluate": "--output", "prepare": "--data_dir"}[module]
    process = workplace.start(module, *arguments, option, tmp_path / "output")
    assert process.wait(timeout=120) > 0
    assert message in workplace.stderr.read_text()
    assert not (tmp_path / "output" / "checkpoints").exists()


@pytest.mark.slow
def test_benchmark_of_the_data(workplace):
    printed = workplace.run("benchmark", "--parts", "data", "--examples", 1000)
    machine, data = map(json.loads, printed.splitlines())
    assert (machine["backend"], data["examples"]) == ("cpu", 1000)
    assert data["prepared_per_second"] > 0
    ratio = data["read_per_second"] / data["training_consumes_per_second"]
    assert data["read_over_training"] == pytest.approx(ratio, rel=1e-2)


@pytest.mark.slow
def test_benchmark_beside_the_floor(workplace, tmp_path):
    """Each figure with its floor, and all of them in the table."""
    table = tmp_path / "table.md"
    printed = workplace.run(
        *("benchmark", "--parts", "sample,train,metrics", "--table", table),
        *("--sizes", "1x50", "--solvers", "ddpm,ddpm:2", "--batch_sizes", 2),
    )
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["part"] for line in lines] == ["machine", *3 * ["sample"], "train", "metrics"]
    measured = [line for line in lines if "seconds" in line]
    assert len(measured) == 4
    for line in measured:
        ratio = line["floor_seconds"] / line["seconds"]
        assert 0 < line["efficiency"] < 2
        assert line["efficiency"] == pytest.approx(ratio, rel=1e-2)
        assert line["peak_memory_mb"] > 100
    assert measured[0]["floor_seconds"] > 5 * measured[1]["floor_seconds"]
    assert lines[3]["denoiser_error_over_std"] < 1e-5
    text = table.read_text()
    for line in lines:
        assert f"## {line['part']}\n" in text
        assert all(f"| {value} |" in text for value in line.values() if value != line["part"])
