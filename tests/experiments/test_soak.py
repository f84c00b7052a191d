"""A long session needs no more of the machine at its end than soon after its beginning."""

import ctypes
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from small import examples, model_of, network, parsed, small_config, write_motion

from diffpose_jax.data import pipeline
from diffpose_jax.report import results
from diffpose_jax.training import loop
from diffpose_jax.training.step import Trainer

RESIDENT_MB = 60
"""Bound of the growth of the resident memory between the second and the last quarter of the rounds.

It goes up and down by 20 MB; executables that a round leaves behind are 80 MB and more a round.
"""
IN_USE_MB, IN_USE_MB_PER_ROUND = 5, 0.15
"""The same of the memory in use, which is exact but for a few MB.

TensorStore (0.1.86) never frees the strings that `KvStore.Spec.to_json` returns, which Orbax calls
for each of the 264 arrays of a round: 0.08 MB a round. All else leaves 0.02.
"""
OF_PROCESS = Path("/proc/self")


def train_and_sample(seed):
    config = small_config(num_steps=1, steps_per_dispatch=1, checkpoint_every=1)
    trainer = Trainer(network(config), parsed(config).training)
    few = examples(seed, 16)
    data = pipeline.TrainingData(few, None, seed)
    batches = data.dispatches(0, 1, 1, 16, images=slice(0, 16))
    key = jax.random.key(seed)
    devices = jax.devices()[:1]
    list(loop.run(trainer, trainer.init(key), key, batches, devices))
    jax.block_until_ready(model_of(config, key).sample(key, few.heatmaps(np.arange(1)), 2))


def test_what_was_compiled_serves_models_that_are_built_alike():
    """JAX never forgets what it compiled for a function that was pmapped."""
    found = []
    for seed in range(2):
        train_and_sample(seed)
        gc.collect()
        found.append(len(jax.devices()[0].client.live_executables()))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_memory_and_open_files_do_not_grow(tmp_path, request):
    """Of a session of its own, this file as a program: it trains and evaluates in turn."""
    environment = programs.environment(tmp_path, PYTHONMALLOC="malloc")  # `in_use_mb` is all
    command = [sys.executable, __file__, tmp_path, str(request.config.getoption("--soak-minutes"))]
    session = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert session.returncode == 0, session.stderr[-3000:]
    print(session.stdout)
    rounds = [json.loads(line) for line in session.stdout.splitlines() if line.startswith("{")]
    quarter = len(rounds) // 4
    in_use_mb = IN_USE_MB + IN_USE_MB_PER_ROUND * len(rounds) / 2
    for what, bound in (("resident_mb", RESIDENT_MB), ("in_use_mb", in_use_mb), ("files", 0)):
        second, last = (
            float(np.median([of_round[what] for of_round in part]))
            for part in (rounds[quarter : 2 * quarter], rounds[-quarter:])
        )
        print(f"{what}: {second:.1f} in the second quarter of {len(rounds)} rounds, {last:.1f}")
        assert last - second <= bound, what


class MallInfo2(ctypes.Structure):
    """What the C library says of its memory: see mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                     "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


def measured():
    gc.collect()
    c_library = ctypes.CDLL(None)
    c_library.malloc_trim(0)  # what is free but kept comes and goes by 300 MB
    c_library.mallinfo2.restype = MallInfo2
    info = c_library.mallinfo2()
    pages = int((OF_PROCESS / "statm").read_text().split()[1])
    return {
        "resident_mb": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
        "in_use_mb": round((info.uordblks + info.hblkhd) / 2**20, 2),
        "files": len(list((OF_PROCESS / "fd").iterdir())),
    }


def soak(folder, minutes):
    train = programs.load("train").train
    source = str(write_motion(folder / "motion"))
    end = time.monotonic() + 60 * minutes
    for count in itertools.count():
        if time.monotonic() > end and count >= 8:
            break
        config = small_config(ema_decay=0.9)
        config.seed = count
        config.data.calibration_share = 0.5
        config.data.builder.update(source=source, train_views_per_frame=1, test_views_per_frame=1)
        run = folder / f"run_{count}"
        train(parsed(config), run, folder / "data")
        results.evaluate_run(run, run, data_dir=folder / "data")
        print(json.dumps(measured()), flush=True)


if __name__ == "__main__":
    soak(Path(sys.argv[1]), float(sys.argv[2]))
