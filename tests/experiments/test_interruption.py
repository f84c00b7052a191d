"""Killed, stopped or out of room, and started again, a run ends as if it had not been.

The processes are real. They are forked from one that has imported everything, so that a life costs
little but what it is there for.
"""

import collections
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import test_prepared
from programs import environment, load
from small import parsed, small_config, write_motion

import experiments
from diffpose_jax.data import motion, prepared
from diffpose_jax.io import locks, scalars
from diffpose_jax.method import network as network_lib
from diffpose_jax.training import checkpoints, runs
from diffpose_jax.training.step import Trainer

NUM_STEPS, STEPS_PER_DISPATCH, CHECKPOINT_EVERY = 60, 2, 4

TEMPLATE = """
import os, sys, traceback, warnings
from pathlib import Path
import test_interruption
test_interruption.load("train")
warnings.simplefilter("ignore")  # jax and Python warn of the fork; no thread runs here yet

for line in sys.stdin:
    task, folder, source = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if not pid:
        try:
            getattr(test_interruption, task)(Path(folder), source)
            os._exit(0)
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr, flush=True)
            os._exit(1 if isinstance(stop.code, str) else stop.code or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def config_of(source):
    config = small_config(
        num_steps=NUM_STEPS,
        steps_per_dispatch=STEPS_PER_DISPATCH,
        checkpoint_every=CHECKPOINT_EVERY,
        decay="cosine",
        ema_decay=0.9,
    )
    config.data.predrawn_candidates = 8
    config.data.builder.update(source=source, train_views_per_frame=8, test_views_per_frame=8)
    return config


def train(folder, source):
    """What the program does up to the evaluation."""
    with locks.exclusive(folder / "run"):
        load("train").train(parsed(config_of(source)), folder / "run", str(folder / "data"))


def program(folder, source):
    """The same as the program does it: with its messages and exit codes."""
    sys.argv[:] = ["train"]
    experiments.run(lambda _: train(folder, source))


def mount(folder, source):
    """Mounts a disk in memory on the folder, or mounts it again, with options."""
    options = source if "remount" in source else f"{source} -t tmpfs tmpfs"
    subprocess.run(f"mount -o {options} {folder}", shell=True, check=True)


def copy(folder, source):
    """Copies the folder to where the other processes see it."""
    shutil.copytree(folder, source)


def prepare(folder, source):
    """Prepares a data set of detections, slowly enough to be killed in the middle."""
    del source

    def slow(name, columns):
        del name
        time.sleep(0.05)
        return columns

    test_prepared.make(folder, slow).prepare()


PROGRESS = re.compile(r"^\s*$|\x1b\[A|\d%\||/s\]$|\?it/s")


def prepare_motion(folder, source):
    """Prepares more views than training needs, as it would be over too soon."""
    config = config_of(source).data.builder
    config.update(train_views_per_frame=200, test_views_per_frame=200)
    return motion.prepare(config, folder)


class Template:
    """The process that the others are forked from."""

    def __init__(self, folder, *command):
        self.stderr, self._read = folder / "stderr", 0
        with self.stderr.open("w") as stderr:
            self._process = subprocess.Popen(
                [*command, sys.executable, "-c", TEMPLATE],
                env=environment(folder),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def life(self, task, folder, source="", send=None):
        """Runs a task; gives its exit code and how long it ran.

        `send` is when to send it a signal, in seconds, and which.
        """
        self._process.stdin.write(f"{task}\t{folder}\t{source}\n")
        self._process.stdin.flush()
        pid, start = int(self._process.stdout.readline()), time.monotonic()
        if send is not None:
            time.sleep(send[0])
            # One that has ended by itself may be gone.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, send[1])
        return int(self._process.stdout.readline()), time.monotonic() - start

    def messages(self):
        """What was said on stderr since this was last asked for, without progress bars."""
        said = self.stderr.read_text()[self._read :]
        self._read += len(said)
        return "\n".join(line for line in re.split("[\r\n]", said) if not PROGRESS.search(line))

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    template = Template(tmp_path_factory.mktemp("template"))
    yield template
    template.close()


def state_of(folder, source):
    config = parsed(config_of(source))
    trainer = Trainer(network_lib.build(config.model), config.training)
    with checkpoints.RunCheckpoints(folder / "run" / "checkpoints", config, keep=2) as saved:
        return jax.device_get(saved.restore_latest(trainer.init(jax.random.key(0))))


def prepared_by(folder, source):
    builder = motion.prepare(config_of(source).data.builder, folder / "data")
    assert test_prepared.beside(builder) == [str(builder.info.version)]
    return [motion.read_all(builder, split) for split in ("train", "test")]


def assert_same(a, b):
    a, b = map(jax.tree_util.tree_leaves_with_path, (a, b))
    for (path, x), (_, y) in zip(a, b, strict=True):
        assert x.tobytes() == y.tobytes(), path


def at_random_moments(template, task, folder, source, number, times, seed, check):
    """Sends a signal so many times; `check`s each folder when its task has come to its end."""
    assert template.life(task, folder / "compiling", source)[0] == 0, template.messages()
    unbroken = folder / "unbroken"
    _, seconds = template.life(task, unbroken, source)
    rng = np.random.default_rng(seed)
    broken, codes, finished, unfinished = folder / "broken_0", [], 0, collections.Counter()
    while len(codes) < times or broken.exists():
        # The last of the runs is let go to its end.
        send = (rng.uniform(0, seconds), number) if len(codes) < times else None
        is_first = not broken.exists()
        code, took = template.life(task, broken, source, send)
        if code == 0:
            seconds = min(seconds, took) if is_first else seconds  # or most would end before
            check(unbroken, broken)
            finished += 1
            broken = folder / f"broken_{finished}"
        else:
            codes.append(code)
            for what in ("orbax-checkpoint-tmp", "incomplete", ".part"):
                unfinished[what] += any(what in path.name for path in broken.rglob("*"))
    print(
        f"\n{task}: {seconds:.1f} s unbroken; {number.name} {times} times (seed {seed}) to"
        f" {finished} runs; it left unfinished: {dict(unfinished)}"
    )
    return codes


@pytest.mark.slow
def test_training_killed_at_any_moment(template, tmp_path):
    """During the preparation of the data, the steps, and while checkpoints are written."""
    source = str(write_motion(tmp_path / "motion"))
    moments = []

    def check(unbroken, broken):
        assert_same_runs(unbroken, broken, source)
        moments.extend(start["step"] for start in read_starts(broken))

    codes = at_random_moments(
        template, "train", tmp_path, source, signal.SIGKILL, times=50, seed=0, check=check
    )
    assert set(codes) == {-signal.SIGKILL}, template.messages()
    print(f"begun at the steps {moments}")
    assert len(set(moments)) > 5


@pytest.mark.slow
def test_training_stopped_at_any_moment(template, tmp_path):
    source = str(write_motion(tmp_path / "motion"))
    template.messages()
    codes = at_random_moments(
        template,
        *("program", tmp_path, source, signal.SIGTERM),
        times=10,
        seed=2,
        check=lambda unbroken, broken: assert_same_runs(unbroken, broken, source),
    )
    # By the signal itself in the first milliseconds, before the program sees to it.
    assert set(codes) <= {128 + signal.SIGTERM, -signal.SIGTERM}
    said = template.messages()
    assert "Traceback" not in said
    assert said.count("stopped by SIGTERM; the same command goes on") == codes.count(143) > 0


def assert_same_runs(unbroken, broken, source):
    assert_same(state_of(unbroken, source), state_of(broken, source))
    assert_same(prepared_by(unbroken, source), prepared_by(broken, source))
    a, b = (folder / "run" / "metrics.jsonl" for folder in (unbroken, broken))
    assert a.read_bytes() == b.read_bytes()
    assert len(scalars.read_scalars(a)) == NUM_STEPS // STEPS_PER_DISPATCH
    steps = [start["step"] for start in read_starts(broken)]
    assert steps == sorted(steps)
    names = {path.name for path in (broken / "run" / "checkpoints").iterdir()}
    assert len(names) == 2
    assert str(NUM_STEPS) in names


def read_starts(folder):
    return json.loads((folder / "run" / runs.CONFIG).read_text())["started"]


@pytest.mark.slow
def test_preparation_of_motion_killed_at_any_moment(template, tmp_path):
    source = str(write_motion(tmp_path / "motion"))

    def check(unbroken, broken):
        folders = [prepare_motion(folder, source) for folder in (unbroken, broken)]
        assert len({prepared.fingerprint(folder.data_dir) for folder in folders}) == 1
        for split in ("train", "test"):
            assert_same(*(motion.read_all(folder, split) for folder in folders))
        assert test_prepared.beside(folders[1]) == [str(folders[1].info.version)]

    codes = at_random_moments(
        template, "prepare_motion", tmp_path, source, signal.SIGKILL, times=20, seed=3, check=check
    )
    assert set(codes) == {-signal.SIGKILL}, template.messages()


@pytest.mark.slow
def test_preparation_killed_at_any_moment(template, tmp_path):
    def check(unbroken, broken):
        a, b = (test_prepared.make(folder) for folder in (unbroken, broken))
        assert test_prepared.contents(a) == test_prepared.contents(b)
        assert test_prepared.beside(b) == [test_prepared.VERSION]

    codes = at_random_moments(
        template, "prepare", tmp_path, "", signal.SIGKILL, times=30, seed=1, check=check
    )
    assert set(codes) == {-signal.SIGKILL}, template.messages()


# Disks.

NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


@pytest.fixture
def small_disk(tmp_path, template):
    """A template in whose processes a disk can be mounted, and the place for it."""
    del template  # it is there to warm the compilations up
    able = subprocess.run(
        [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True, check=False
    )
    if able.returncode:
        pytest.skip(f"no disk can be mounted in a namespace here: {able.stderr.decode().strip()}")
    disk = tmp_path / "disk"
    disk.mkdir()
    template = Template(tmp_path, *NAMESPACE)
    yield template, disk
    template.close()


@pytest.mark.slow
def test_a_full_disk(small_disk, tmp_path):
    """Full during the preparation, at a checkpoint, in the scalars: the run says so and goes on."""
    template, disk = small_disk
    source = str(write_motion(tmp_path / "motion"))
    unbroken = tmp_path / "unbroken"
    assert template.life("program", unbroken, source)[0] == 0, template.messages()
    size = sum(path.stat().st_size for path in unbroken.rglob("*")) >> 10
    template.messages()
    refused = 0
    for number, share in enumerate((0.1, 0.5, 0.65, 0.75, 0.85, 0.95, 1.05)):
        place = disk / str(number)
        place.mkdir()
        template.life("mount", place, f"size={int(share * size)}k")
        code, _ = template.life("program", place, source)
        said = template.messages()
        print(f"{int(share * size)} kB: exit code {code}: {said}")
        assert len(said) < 1000
        assert "Traceback" not in said
        if code:
            refused += 1
            assert code == 1
            assert re.search(r"^error: .*(No space left|not enough|disk)", said, re.M | re.I)
        template.life("mount", place, "remount,size=100m")
        assert template.life("program", place, source)[0] == 0, template.messages()
        template.life("copy", place, tmp_path / f"copy{number}")
        assert_same_runs(unbroken, tmp_path / f"copy{number}", source)
    assert refused > 5


@pytest.mark.slow
def test_a_disk_that_cannot_be_written(small_disk, tmp_path):
    template, disk = small_disk
    source = str(write_motion(tmp_path / "motion"))
    template.life("mount", disk, "size=10m")
    template.life("mount", disk, "remount,ro")
    code, _ = template.life("program", disk, source)
    said = template.messages()
    assert code == 1
    assert re.search(rf"^error: .*Read-only file system: '{disk}", said, re.M), said
    assert "Traceback" not in said
