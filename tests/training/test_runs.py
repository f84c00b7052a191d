"""What surrounds a run: signals to stop, its record, and numbers that are not finite."""

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import load
from small import examples, parsed, small_config, write_motion

from diffpose_jax.config import ConfigError
from diffpose_jax.data import pipeline
from diffpose_jax.io import scalars
from diffpose_jax.io.trees import CheckpointError
from diffpose_jax.method import network as network_lib
from diffpose_jax.method.heatmaps import Candidates
from diffpose_jax.training import checkpoints, runs
from diffpose_jax.training.loop import NonFiniteLossError
from diffpose_jax.training.step import Batch, Trainer, train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def restored_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def restored_hook(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_raises(number, restored_handlers):
    runs.raise_when_stopped()
    with pytest.raises(runs.Stopped, match=number.name) as stopped:
        os.kill(os.getpid(), number)
    assert stopped.value.signal == number


def test_a_signal_is_not_lost_where_nothing_can_be_raised(restored_handlers):
    class Collected:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    def collect_and_wait():
        Collected()
        time.sleep(60)

    runs.raise_when_stopped()
    with pytest.raises(runs.Stopped, match="SIGTERM"):
        collect_and_wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_put_off(number, restored_handlers, capfd):
    done = []

    def work():
        with runs.deferred_stop() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # the next one ends it
            done.append("the work")

    with pytest.raises(runs.Stopped) as stopped:
        work()
    assert done
    assert stopped.value.signal == number
    assert f"{number.name}: stopping after the running steps" in capfd.readouterr().err
    for number, handler in restored_handlers.items():
        assert signal.getsignal(number) is handler


def test_every_start_is_recorded(tmp_path):
    config = parsed(small_config())
    starts = [runs.start_record(seed=3, step=step, data_fingerprint="abc") for step in (0, 40)]
    for start in starts:
        runs.write_config(tmp_path, config, start)
    runs.write_config(tmp_path, dataclasses.replace(config, seed=4))
    written = json.loads((tmp_path / runs.CONFIG).read_text())
    assert written.pop("started") == starts
    assert parsed(written) == dataclasses.replace(config, seed=4)
    start = starts[1]
    assert (start["step"], start["data_fingerprint"], start["platform"]) == (40, "abc", "cpu")
    assert len(start["devices"]) == 8
    assert start["versions"]["jax"] == jax.__version__
    assert start["versions"]["numpy"] == np.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", start["time"])
    assert start["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+dirty)?", start["commit"])


def test_a_damaged_record(tmp_path):
    for content in ("{", "[]"):
        (tmp_path / runs.CONFIG).write_text(content)
        with pytest.raises(ConfigError, match=r"config\.json is damaged"):
            runs.write_config(tmp_path, parsed(small_config()))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_motion(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


def config_of(source):
    config = small_config()
    config.model.update(encoder_layers=0, joint_dropout=0.0)
    config.data.predrawn_candidates = 8
    config.data.builder.update(source=str(source), train_views_per_frame=1, test_views_per_frame=1)
    return parsed(config)


def train(source, data_dir, workdir):
    load("train").train(config_of(source), workdir, data_dir)


@pytest.fixture(scope="module")
def unbroken(source, data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    train(source, data_dir, workdir)
    return workdir


@pytest.fixture(scope="module")
def stopped(source, data_dir, tmp_path_factory):
    """A run that SIGTERM stopped in the steps 1 to 5, of which no checkpoint is due."""
    workdir = tmp_path_factory.mktemp("stopped")
    write = scalars.ScalarWriter.write

    def write_and_send(self, step, **of_step):
        write(self, step, **of_step)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scalars.ScalarWriter, "write", write_and_send)
        with pytest.raises(runs.Stopped, match="SIGTERM"):
            train(source, data_dir, workdir)
    return workdir


@pytest.fixture
def begun(stopped, tmp_path):
    """A copy of it to go on with."""
    return shutil.copytree(stopped, tmp_path / "run")


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def assert_same_run(a, b, source):
    config = config_of(source)
    trainer = Trainer(network_lib.build(config.model), config.training)
    states = []
    for workdir in (a, b):
        with checkpoints.RunCheckpoints(workdir / "checkpoints", config, keep=2) as saved:
            states.append(saved.restore_latest(trainer.init(jax.random.key(0))))
    for x, y in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()


def test_a_stopped_run_is_saved(stopped):
    assert saved_steps(stopped) == [5]
    assert [line["step"] for line in scalars.read_scalars(stopped / "metrics.jsonl")] == [5]


def change_data(patch, changes_of):
    """Lets what is loaded have other fields."""
    load_split = pipeline.load

    def load_changed(*arguments):
        found = load_split(*arguments)
        return pipeline.Examples(**{**vars(found), **changes_of(found)})

    patch.setattr(pipeline, "load", load_changed)


def test_other_data_is_refused(begun, source, data_dir, monkeypatch):
    change_data(monkeypatch, lambda found: {"fingerprint": "other"})
    with pytest.raises(CheckpointError, match="it is other now"):
        train(source, data_dir, begun)


def assert_stops(begun, source, data_dir, step, what):
    """It stops in a step, lists its examples, and leaves the checkpoint from before."""
    with pytest.raises(NonFiniteLossError, match=f"{what} of step {step} is") as error:
        train(source, data_dir, begun)
    (path,) = begun.glob("nonfinite_step_*.json")
    assert path.name == f"nonfinite_step_{step}.json"
    assert error.value.__notes__ == [f"the examples of its batch are listed in {path}"]
    assert saved_steps(begun) == [5]
    noted = json.loads(path.read_text())
    assert noted["step"] == step
    assert noted["learning_rate"] == pytest.approx(1e-3)
    assert noted[what] in ("nan", "inf")
    return noted["examples"]


def test_a_nan_in_a_heatmap_then_mended(unbroken, begun, source, data_dir, monkeypatch):
    bad = 3

    def with_nan(found):
        def heatmaps(rows):
            maps = found.heatmaps(rows)
            maps[np.asarray(rows) == bad] = np.nan
            return maps

        return {"heatmaps": heatmaps}

    split = pipeline.load(config_of(source).data, "train", data_dir)
    rows = pipeline.TrainingData(split, None, config_of(source).seed).select(5, 15, 16).rows
    step = 6 + int(np.argmax((rows == bad).any(axis=1)))
    with monkeypatch.context() as patch:
        change_data(patch, with_nan)
        noted = assert_stops(begun, source, data_dir, step, "loss")
    assert noted == split.names[rows[step - 6]].tolist()
    assert split.names[bad] in noted
    # Mended, it goes on from where it was stopped, and ends as if nothing had been.
    train(source, data_dir, begun)
    assert_same_run(unbroken, begun, source)
    started = json.loads((begun / runs.CONFIG).read_text())["started"]
    assert [start["step"] for start in started] == [0, 5, 5]


def test_a_gradient_that_is_not_finite(begun, source, data_dir, monkeypatch):
    loss_of = network_lib.DiffPose.loss

    def loss(self, params, *arguments):
        # At 0 the root is 0 and its slope is infinite.
        return loss_of(self, params, *arguments) + jnp.sqrt(
            0.0 * jnp.sum(params["denoiser"]["blocks_0_0"]["bias"] ** 2)
        )

    monkeypatch.setattr(network_lib.DiffPose, "loss", loss)
    jax.clear_caches()  # of the steps with the true loss
    try:
        assert_stops(begun, source, data_dir, 6, "gradient")
    finally:
        jax.clear_caches()


def test_a_nan_in_a_pose_is_found_when_it_is_read(source, data_dir, monkeypatch):
    def load_motion(*_):
        found = examples(0, 6)
        found.pose_mm[[2, 4], 3, 1] = np.nan, np.inf
        return found

    monkeypatch.setattr(pipeline, "_load_motion", load_motion)
    with pytest.raises(ConfigError, match=r"train split are not finite, that of 'clip 2' is.* 2;"):
        pipeline.load(config_of(source).data, "train", data_dir)


@pytest.mark.parametrize("samples", [2**31, 2**40])
def test_the_order_beyond_32_bits(samples):
    number, batch_size = 1000, 64
    data = pipeline.TrainingData(examples(0, 4).select(np.arange(number) % 4), None, 7)
    first = samples // batch_size - 2
    rows = data.select(first, 4, batch_size).rows
    orders = {}
    for i, row in enumerate(rows.reshape(-1).tolist()):
        epoch, place = divmod(first * batch_size + i, number)  # of integers without bounds
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([7, 0, epoch]).permutation(number)
        assert row == orders[epoch][place]


def test_the_last_steps_that_can_be_counted():
    """Steps, the optimizer's count and the random keys just below 2^31."""
    last = 2**31 - 1
    config = small_config(
        ema_decay=0.9, decay="cosine", num_steps=last, steps_per_dispatch=1, checkpoint_every=1
    )
    config.model.update(encoder_layers=0, joint_dropout=0.0)
    config = parsed(config)
    trainer = Trainer(network_lib.build(config.model), config.training)
    state = trainer.init(jax.random.key(0))

    def at(step):
        counts = jax.tree.map(
            lambda x: jnp.int32(step) if x.dtype == jnp.int32 else x, state.opt_state
        )
        return state.replace(step=jnp.int32(step), opt_state=counts)

    rng = np.random.default_rng(0)
    drawn = Candidates(
        cells=jnp.asarray(rng.integers(0, 4096, (4, 4, 16)), jnp.uint16),
        likelihood=jnp.asarray(rng.random((4, 4, 16)), jnp.float16),
    )
    batch = Batch(inputs=drawn, pose_mm=examples(1, 4).pose_mm)
    step = jax.jit(lambda state: train_step(trainer, state, jax.random.key(1), batch))
    losses, now = [], at(last - 4)
    for _ in range(4):
        now, of_step = step(now)
        losses.append(float(of_step.loss))
    assert int(now.step) == last
    counts = [int(x) for x in jax.tree.leaves(now.opt_state) if x.dtype == jnp.int32]
    assert set(counts) == {last}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((now.params, now.ema)))
    assert len(set(losses)) == 4
    assert float(trainer.learning_rate(last - 1)) == pytest.approx(0.0, abs=1e-9)
