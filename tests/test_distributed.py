"""Several devices and processes: the same results as one, and no process that waits for ever."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import environment
from test_train import ROOT, Workplace, read_json, restore
from test_training import assert_same_states, leaves

from diffpose_jax import distributed
from diffpose_jax.config import ConfigError
from diffpose_jax.io import scalars


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "a:1"}, "belong together: --num_processes, --process_id is missing"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "HOST:PORT, not 'a'"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "must be 0 to .* = 1, not 2"),
        ({"coordinator": "a:1", "detect": True}, "--distributed stands for --coordinator"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ConfigError, match=message), distributed.connected(**arguments):
        pass


def test_images_go_to_processes_in_order(monkeypatch):
    """Those of the devices of a process: all of 24 images on 4 processes with 2 devices."""
    assert jax.device_count() == 8
    with pytest.raises(ConfigError, match=r"batch_size = 12 cannot be split over 8 devices"):
        distributed.images_of_process(12, "batch_size")
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    taken = []
    for process in range(4):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        taken.append(np.arange(24)[distributed.images_of_process(24, "batch_size")])
    assert (np.stack(taken) == np.arange(24).reshape(4, 6)).all()


def test_replicated_lies_where_pmap_wants_it():
    """On each of the devices, also if they are not all, and the same bits."""
    tree = {"a": np.float32([0.5, -0.0, np.inf]), "n": np.int32(3)}
    for some in (None, jax.local_devices()[:3]):
        put = distributed.replicate(tree, some)
        for name, leaf in put.items():
            copies = [np.array(shard.data) for shard in leaf.addressable_shards]
            assert len(copies) == len(some or jax.local_devices())
            assert {copy.tobytes() for copy in copies} == {tree[name].tobytes()}


def _double(factor, offset, batch, num_images):
    return {"x": factor * batch["x"] + offset, "n": jnp.full(len(batch["x"]), num_images)}


@pytest.mark.parametrize(
    ("size", "most", "to_host"), [(1, 4, True), (9, 4, False), (19, 1, True), (40, 2, False)]
)
def test_a_batch_is_spread_and_comes_back_in_order(size, most, to_host):
    """With remainders, more than fit at once, and devices without an image."""
    x = np.arange(3.0 * size, dtype=np.float32).reshape(size, 3)
    offset = (np.float32(1),)
    found = distributed.spread(_double, (2,), offset, {"x": x}, most=most, to_host=to_host)
    np.testing.assert_array_equal(found["x"], 2 * x + 1)
    assert isinstance(found["x"], np.ndarray) == to_host
    assert 1 <= found["n"].min() <= found["n"].max() <= most


TALK = """
import sys, time
from pathlib import Path

import numpy as np

from diffpose_jax import distributed

coordinator, process, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
with distributed.connected(coordinator, 2, process):
    import jax

    assert (jax.process_index(), jax.device_count(), jax.local_device_count()) == (process, 4, 2)
    assert distributed.is_first() == (process == 0)

    def tree_of(process):
        return {
            "bool": np.bool_(process == 0),
            "half": np.float16([-0.0, np.nan, 2e-7, 1 + process]),
            "empty": np.zeros((0, 3), np.float32),
            "int": np.arange(process, process + 6).reshape(2, 3).T,
            "float": jax.numpy.float32(process + 0.1),
        }

    received = distributed.broadcast_from_first(tree_of(process))
    for name, sent in tree_of(0).items():
        x, y = np.asarray(received[name]), np.asarray(sent)
        assert (x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes()), name
    # Below what float32 could tell.
    added = distributed.sum_over_processes({"a": np.array([[1.0 + process * 1e-12]])})
    assert added["a"].tolist() == [[2.0 + 1e-12]]
    assert [distributed.max_over_processes(n + process) for n in (0, 14)] == [1, 15]
    with distributed.first_process_first("a file"):
        if process == 0:
            time.sleep(1)
            (folder / "made").touch()
        assert (folder / "made").exists()
    with distributed.output_folder(folder) as own:
        (own / f"by {process}").touch()
        assert (own == folder) == (process == 0)
    print(f"process {process} is done", flush=True)
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Processes:
    """Several processes with two devices each, on this machine."""

    def __init__(self, folder, commands, environment):
        self.outputs = [(folder / f"stdout{i}", folder / f"stderr{i}") for i in range(2)]
        env = environment | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        self.processes = []
        for arguments, (stdout, stderr) in zip(commands, self.outputs, strict=True):
            command = [sys.executable, *map(str, arguments)]
            with stdout.open("w") as out, stderr.open("w") as err:
                process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err)
            self.processes.append(process)

    def wait(self, timeout=300):
        """Waits for all; gives the exit codes, what was printed, and the errors."""
        try:
            codes = [process.wait(timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return codes, *([path.read_text() for path in p] for p in zip(*self.outputs, strict=True))


def test_two_processes_talk(tmp_path):
    at = f"127.0.0.1:{free_port()}"
    commands = [("-c", TALK, at, process, tmp_path) for process in range(2)]
    codes, printed, errors = Processes(tmp_path, commands, environment(tmp_path)).wait(timeout=120)
    assert codes == [0, 0], errors
    assert "process 0 is done" in printed[0]
    assert printed[1] == ""
    assert [path.name for path in tmp_path.glob("by *")] == ["by 0"]


def test_no_cluster(tmp_path):
    of_clusters = ("SLURM_", "OMPI_", "JAX_COORDINATOR", "KUBERNETES_")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", "--config", "configs/quickstart.py",
         "--distributed", "--workdir", tmp_path / "run"],
        env={name: v for name, v in os.environ.items() if not name.startswith(of_clusters)},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: --distributed found no cluster in the environment" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


class TwoProcesses(Workplace):
    """Programs in two processes with two devices each, and in one with one."""

    def start_two(self, module, *arguments):
        at = ("--coordinator", f"127.0.0.1:{free_port()}", "--num_processes", 2)
        program = ("-m", f"experiments.{module}", *arguments, *at)
        commands = [(*program, "--process_id", process) for process in range(2)]
        return Processes(self.folder, commands, self.environment)

    def run_two(self, module, *arguments):
        codes, printed, errors = self.start_two(module, *arguments).wait()
        assert codes == [0, 0], errors
        assert printed[1] == ""
        return printed[0]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return TwoProcesses(tmp_path_factory.mktemp("devices"))


@pytest.fixture(scope="module")
def run(workplace):
    """The unbroken run of one process with one device."""
    workdir = workplace.folder / "one"
    workplace.run("train", *workplace.training(workdir))
    return workdir


def numbers(path):
    """{where it stands: number} of a JSON file."""
    content = jax.tree_util.tree_leaves_with_path(read_json(path))
    return {jax.tree_util.keystr(place): number for place, number in content}


def assert_same_but_rounding(run, other):
    assert_same_states(leaves(restore(run)), leaves(restore(other)))
    a, b = (scalars.read_scalars(folder / "metrics.jsonl") for folder in (run, other))
    for name in ("step", "loss", "grad_norm", "learning_rate"):
        x, y = ([line[name] for line in lines] for lines in (a, b))
        np.testing.assert_allclose(x, y, rtol=1e-5, err_msg=name)
    a, b = (numbers(folder / "results.json") for folder in (run, other))
    assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_two_processes_train_what_one_does(workplace, run):
    """And nothing but the files of a run of one is there in the end."""
    workdir = workplace.folder / "two"
    printed = workplace.run_two("train", *workplace.training(workdir))
    assert_same_but_rounding(run, workdir)
    assert "report.html" in printed
    one, two = ({path.name for path in folder.iterdir()} for folder in (run, workdir))
    assert one == two
    started = read_json(workdir / "config.json")["started"]
    assert [len(start["devices"]) for start in started] == [4]


@pytest.mark.slow
def test_two_processes_evaluate_what_one_does(workplace, run, tmp_path):
    """8 frames on 4 devices, at most 3 on each; with what was fitted for the run."""
    arguments = (
        *("--checkpoint", run, "--data_dir", workplace.folder / "data"),
        *("--num_hypotheses", "20,3", "--config", workplace.config),
        *("--config.evaluation.batch_size=3", "--config.evaluation.group_by=('clip',)"),
    )
    workplace.run("evaluate", *arguments, "--output", tmp_path / "one")
    workplace.run_two("evaluate", *arguments, "--output", tmp_path / "two")
    for name in ("results.json", "results_3.json"):
        one, two = (numbers(tmp_path / folder / name) for folder in ("one", "two"))
        assert one["['subsets']['all']['frames']"] == 8
        assert one == pytest.approx(two, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("process", "number"), [(0, 9), (1, 9), (1, 15)])
def test_a_process_ends_and_one_process_goes_on(workplace, run, process, number):
    """Killed, it takes the other one with it; stopped by SIGTERM, both stop after the same step."""
    workdir = workplace.folder / f"ended_{process}_{number}"
    training = (*workplace.training(workdir), "--config.data.on_device")
    both = workplace.start_two("train", *training)
    last = 0
    while last < 20 and all(p.poll() is None for p in both.processes):
        last = max((s["step"] for s in scalars.read_scalars(workdir / "metrics.jsonl")), default=0)
        time.sleep(0.01)
    both.processes[process].send_signal(number)
    start = time.monotonic()
    codes, _, errors = both.wait()
    assert time.monotonic() - start < 60
    if number == signal.SIGTERM:
        assert codes == [128 + number] * 2
        assert all("the same command goes on from here" in error for error in errors)
    else:
        assert codes[process] == -number
        assert codes[1 - process] != 0
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert 16 <= saved < 60
    workplace.run("train", *training)
    assert_same_but_rounding(run, workdir)


@pytest.mark.parametrize(
    ("size", "count", "per_pass", "passes"),
    [(12, 12, 4, 3), (12, 12, 5, 3), (12, 5, 5, 1), (12, 6, 5, 2), (3, 3, 10, 1), (12, 0, 4, 0)],
)
def test_rows_in_passes_are_the_rows(size, count, per_pass, passes):
    """All rows that are wanted, and no pass more than they take."""
    seen = []

    def function(indices):
        jax.debug.callback(lambda i: seen.append(np.asarray(i).tolist()), indices, ordered=True)
        return jnp.stack([indices, indices**2], axis=1) + 1

    def run(count):
        return distributed.in_passes(function, size, count, per_pass)

    for call in (run, jax.jit(run)):  # the count known and traced
        rows = call(count)
        jax.effects_barrier()
        expected = np.arange(count)
        np.testing.assert_array_equal(rows[:count], np.c_[expected, expected**2] + 1)
        assert rows.shape == (size, 2)
        assert len(seen) == passes
        assert all(len(indices) == min(per_pass, size) for indices in seen)
        seen.clear()
