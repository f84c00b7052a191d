"""The programs: their functions without their flags, and the environment that they start in."""

import importlib
import os
import sys

from absl import flags
from paths import ROOT


def load(name):
    """Imports `experiments.NAME`; programs have flags of equal names, so these are removed."""
    module = importlib.import_module(f"experiments.{name}")
    own = flags.FLAGS.flags_by_module_dict().get(module.__name__, [])
    flags.FLAGS.remove_flag_values([flag.name for flag in own])
    return module


def environment(folder, **more):
    """Of a process of its own: one device, and quickly compiled programs, kept in the folder."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **more,
    }
