"""The programs as modules: their functions, without their flags."""

import importlib

from absl import flags


def load(name):
    """Imports `experiments.NAME`; programs have flags of equal names, so these are removed."""
    module = importlib.import_module(f"experiments.{name}")
    own = flags.FLAGS.flags_by_module_dict().get(module.__name__, [])
    flags.FLAGS.remove_flag_values([flag.name for flag in own])
    return module
