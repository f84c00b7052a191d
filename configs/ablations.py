"""The paper's ablations: one change each, on the paper's model or on the quickstart's.

    python -m experiments.train --config configs/ablations.py:without_transformer
    python -m experiments.train --config configs/ablations.py:quickstart/without_transformer
    python -m experiments.sweep --configs configs/ablations.py:quickstart/components

`experiments.sweep` also takes the name of a table for all of its rows: the keys of `TABLES`.
Published: Table 3 (condition embedding), Table 4 (components), the sweeps over candidates,
diffusion steps and hypotheses; the numbers stand beside ours in the tables that the sweep prints.
"""

import ml_collections

from configs import h36m, quickstart

BASES = {"h36m": h36m, "quickstart": quickstart}

CANDIDATES = (1, 2, 4, 8, 16, 32, 64, 96)
"""S, the argmax counted in; `predrawn_candidates` of the quickstart are enough for the largest."""
DIFFUSION_STEPS = (10, 25, 50, 100, 250, 500, 1000)
HYPOTHESES = (1, 10, 50, 100, 200, 500, 1000, 2000)

# Name to the fields that it changes. The encoder "heatmaps" takes no candidates, so there are
# none to draw ahead; convolutions within a loop of several steps are 25 times slower on a CPU.
ABLATIONS: dict[str, dict[str, object]] = {
    "full": {},
    "sample_free": {"model.encoder": "candidates", "model.num_candidates": 1},
    "sample_based": {"model.encoder": "candidates"},
    "full_heatmap": {
        "model.encoder": "heatmaps",
        "data.predrawn_candidates": 0,
        "training.steps_per_dispatch": 1,
    },
    "without_sampling": {"model.num_candidates": 1},
    "without_argmax": {"model.include_argmax": False},
    "without_cross_spatial": {"model.cross_spatial": False},
    "without_likelihood_scaling": {"model.likelihood_scaling": False},
    "without_transformer": {"model.encoder_layers": 0},
    "without_joint_dropout": {"model.joint_dropout": 0.0},
    **{f"candidates_{n}": {"model.num_candidates": n} for n in CANDIDATES},
    **{
        f"candidates_{n}_without_argmax": {"model.num_candidates": n, "model.include_argmax": False}
        for n in CANDIDATES
    },
    **{f"diffusion_steps_{n}": {"model.diffusion_steps": n} for n in DIFFUSION_STEPS},
    **{f"hypotheses_{n}": {"evaluation.num_hypotheses": n} for n in HYPOTHESES},
}

TABLES: dict[str, tuple[str, ...]] = {
    "embedding": ("sample_free", "sample_based", "full_heatmap", "full"),
    "components": (
        "full", "without_sampling", "without_argmax", "without_cross_spatial",
        "without_likelihood_scaling", "without_transformer", "without_joint_dropout",
    ),
    "candidates": tuple(name for name in ABLATIONS if name.startswith("candidates_")),
    "diffusion_steps": tuple(name for name in ABLATIONS if name.startswith("diffusion_steps_")),
    "hypotheses": tuple(name for name in ABLATIONS if name.startswith("hypotheses_")),
}  # fmt: skip


def get_config(name: str) -> ml_collections.ConfigDict:
    """Returns the configuration of "NAME" (the paper's size) or "quickstart/NAME".

    Raises:
      ValueError: for an unknown name; the message lists them.
    """
    base, _, ablation = name.rpartition("/")
    base = base or "h36m"
    if base not in BASES or ablation not in ABLATIONS:
        raise ValueError(
            f"{name!r} is no ablation; take [{'|'.join(BASES)}/]NAME with NAME one of"
            f" {', '.join(ABLATIONS)}"
        )
    config = BASES[base].get_config()
    config.update_from_flattened_dict(ABLATIONS[ablation])
    return config
