"""Locks on folders: who holds one, and that it ends with its process."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

from diffpose_jax.io import locks
from diffpose_jax.io.files import read_json


def test_a_second_one_is_refused_and_told_by_whom(tmp_path):
    folder = tmp_path / "runs" / "a"
    with locks.exclusive(folder):
        holder = read_json(folder / locks.HOLDER)
        with pytest.raises(locks.LockedError) as error, locks.exclusive(folder):
            pass
    assert holder["pid"] == os.getpid()
    assert str(error.value) == (
        f"{folder} is in use by process {os.getpid()} on {holder['host']} since {holder['since']}:"
        " wait for it or stop it, or choose another folder"
    )
    with locks.exclusive(folder):
        pass
    assert [path.name for path in folder.iterdir()] == [locks.LOCK]


@pytest.mark.parametrize("content", ["", "[1]"])
def test_a_holder_that_says_nothing(tmp_path, content):
    with locks.exclusive(tmp_path):
        (tmp_path / locks.HOLDER).write_text(content)
        with pytest.raises(locks.LockedError, match="by another process"):
            locks.exclusive(tmp_path).__enter__()


HOLD = """
import sys, time
from pathlib import Path
from diffpose_jax.io import locks
with locks.{kind}(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep({seconds})
"""


def hold(kind, folder, seconds):
    code = HOLD.format(kind=kind, seconds=seconds)
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    with hold("exclusive", tmp_path, 60) as process:
        with pytest.raises(locks.LockedError, match=f"process {process.pid} on"):
            locks.exclusive(tmp_path).__enter__()
        process.kill()
        process.wait()
    with locks.exclusive(tmp_path):
        assert read_json(tmp_path / locks.HOLDER)["pid"] == os.getpid()


def test_waiting_for_another_process(tmp_path):
    with hold("waiting", tmp_path, 0.5) as process:
        assert process.poll() is None
        with locks.waiting(tmp_path):
            assert process.wait(5) == 0
