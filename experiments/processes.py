"""Flags of the programs that can run in several processes."""

from __future__ import annotations

from collections.abc import Callable

from absl import flags

import experiments
from diffpose_jax import distributed

COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, to run in several processes."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Take the three above from the cluster (SLURM, Open MPI, ...)."
)


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a program as `experiments.run` does, alone or as one of several processes."""

    def connected(arguments: list[str]) -> None:
        with distributed.connected(
            COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, detect=DISTRIBUTED.value
        ):
            main(arguments)

    experiments.run(connected)
