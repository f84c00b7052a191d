"""Strangers' files: every reader against mutated ones, see `fuzzing`, in a child process.

`test_convert` does the same with PyTorch's files.
"""

import json
import signal
import subprocess
import sys

import fuzzing
import pytest
from paths import TESTS
from programs import environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard reads /proc")


def run(folder, cases, names):
    """Fuzzes targets; what is wrong with each. The one that ends a process is the only one."""
    problems, remaining = {name: [] for name in names}, list(names)
    while remaining:
        command = [sys.executable, TESTS / "fuzzing.py", folder, str(cases), *remaining]
        done = subprocess.run(command, env=environment(folder), capture_output=True, text=True)
        if done.returncode == 0:
            break
        name, case, file = (folder / "progress").read_text().split()
        why = f"case {case}, {file} ended the process with code {done.returncode}"
        problems[name].append(f"{why}: {done.stderr[-3000:]}")
        remaining = remaining[remaining.index(name) + 1 :]
    if (folder / "failures").exists():
        for line in (folder / "failures").read_text().splitlines():
            name, problem = json.loads(line)
            problems[name].append(problem)
    return problems


FAST_CASES, SLOW_CASES = 50, 10_000
READERS = [name for name in fuzzing.READERS if name != "torch_files"]


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    return run(tmp_path_factory.mktemp("fuzz"), FAST_CASES, READERS)


@pytest.mark.parametrize("name", READERS)
def test_mutated_files(name, problems):
    assert not problems[name], "\n\n".join(problems[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_mutated_files(name, tmp_path):
    problems = run(tmp_path, SLOW_CASES, [name])
    assert not problems[name], "\n\n".join(problems[name][:10])


def test_the_guard_sees_what_breaks_the_rules(tmp_path):
    expected = {
        "stumbles": "an error that is not documented",
        "runs": "os.system",
        "writes": "open",
        "unpickles": "pickle.find_class",
        "fills": "it filled 1",
        "crashes": f"ended the process with code {-signal.SIGSEGV}",
        "hangs": f"ended the process with code {-signal.SIGPROF}",
    }
    problems = run(tmp_path, 1, expected)
    for name, problem in expected.items():
        assert len(problems[name]) == 1
        assert problem in problems[name][0]
