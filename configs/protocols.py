"""Published evaluation protocols, for a model that was trained elsewhere or under another one.

    python -m experiments.evaluate --checkpoint DIR --config configs/protocols.py:NAME --output OUT

* `human36m`: Human3.6M as in the paper's Table 1: every 64th frame of each video; by action, whose
  unweighted mean is the average that the published program prints; protocol 1 is the MPJPE,
  protocol 2 the PA-MPJPE. Table 2's ambiguous subset (H36MA) is taken from all test frames.
* `human36m_released`: the same over the frames that the published program takes, every 16th row of
  its table, and with the ambiguous frames that its data file marks.
* `mpi_inf_3dhp`: the test set of MPI-INF-3DHP: PCK, plain and scale-corrected, by scene and by
  sequence. The published program's average is the unweighted mean over the six sequences.
"""

import ml_collections

from configs import h36m


def _human36m() -> ml_collections.ConfigDict:
    return h36m.get_config()


def _human36m_released() -> ml_collections.ConfigDict:
    config = h36m.get_config()
    config.data.prepared = ml_collections.ConfigDict({"format": "released"})
    config.data.test_frames = "every_16th_row"
    config.evaluation.ambiguous = "stored"
    return config


def _mpi_inf_3dhp() -> ml_collections.ConfigDict:
    config = h36m.get_config()
    config.data.name = "mpi_inf_3dhp"
    config.data.prepared = ml_collections.ConfigDict({"annotation": "univ_annot3"})
    config.evaluation.baselines = False  # they would need the model's training data
    config.evaluation.group_by = ("scene", "subject")
    config.evaluation.group_metrics = ("pck150_best", "pck150_scaled_best", "mpjpe_best")
    return config


PROTOCOLS = {
    "human36m": _human36m,
    "human36m_released": _human36m_released,
    "mpi_inf_3dhp": _mpi_inf_3dhp,
}


def get_config(name: str) -> ml_collections.ConfigDict:
    """Returns the protocol: a configuration of which `data` and `evaluation` matter.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"{name!r} is no protocol; take one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]()
