import os

# Before JAX starts: eight devices, so that what runs on several is tested on several.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# In the programs that tests start, what a user would be warned of is an error.
os.environ["PYTHONWARNINGS"] = "error,ignore::DeprecationWarning"

from jaxtyping import install_import_hook

# Before the package is imported: every test checks the shapes and types of its annotations.
install_import_hook("diffpose_jax", "typechecking.check")

import jax
import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="module")
def quick_compilation():
    """The tests' time is the compiler's; what it optimises does not matter to them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption(
        "--reference-dir", default=None, help="folder of reference cases; default: tests/golden"
    )
    parser.addoption(
        "--soak-minutes", type=float, default=2, help="how long test_soak.py trains and evaluates"
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow") or "slow" in (config.getoption("-m") or ""):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
