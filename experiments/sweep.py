"""Trains and evaluates several configurations over several seeds; prints the table.

    python -m experiments.sweep --configs configs/ablations.py:quickstart/components --seeds 0,1,2 \
        --output runs/components -- --config.training.num_steps=4000

`--configs` lists configuration files; `configs/ablations.py` also takes the name of a table for all
of its rows. What follows `--` goes to every training. Run again, it does what is not finished;
configurations that differ only in their number of hypotheses share one training.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import ml_collections
from absl import app, flags

import experiments
from configs import ablations
from diffpose_jax.config import ConfigError
from diffpose_jax.io import files
from diffpose_jax.report import published, tables

CONFIGS = flags.DEFINE_list("configs", None, "Configuration files, with :NAME where they take one.")
SEEDS = flags.DEFINE_list("seeds", ["42", "2967", "6173", "5478", "989"], "Default: the paper's.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of all the runs and of the tables.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Prepared data sets; default: TFDS's.")


def expand(specs: list[str]) -> dict[str, str]:
    """{row: configuration file with argument}; a table of the ablations becomes its rows."""
    rows: dict[str, str] = {}
    for spec in specs:
        path, _, argument = spec.partition(":")
        base, slash, name = argument.rpartition("/")
        for row in ablations.TABLES.get(name, (name,)):
            config = f"{path}:{base}{slash}{row}" if row else path
            row = row or Path(path).stem
            if rows.setdefault(row, config) != config:
                raise ConfigError(f"--configs: {rows[row]} and {config} are both called {row}")
    return rows


def load_config(spec: str) -> ml_collections.ConfigDict:
    """Reads a configuration file, as `--config` does."""
    path, _, argument = spec.partition(":")
    try:
        get_config = runpy.run_path(path)["get_config"]
        return get_config(argument) if argument else get_config()
    except (ImportError, KeyError, OSError, SyntaxError, TypeError, ValueError) as error:
        raise ConfigError(f"--configs: {spec}: {error}") from error


def trained_by(configs: dict[str, ml_collections.ConfigDict]) -> dict[str, str]:
    """{row: the first row whose training is the same}."""
    first: dict[str, str] = {}
    shared = {}
    for row, config in configs.items():
        fields = config.to_dict()
        del fields["evaluation"]["num_hypotheses"]
        shared[row] = first.setdefault(json.dumps(fields, sort_keys=True), row)
    return shared


def sweep(
    rows: dict[str, str],
    seeds: list[int],
    output: Path,
    overrides: list[str],
    data_dir: str | None = None,
) -> list[str]:
    """Does the runs that are not finished, seed by seed; returns those that failed."""
    configs = {row: load_config(spec) for row, spec in rows.items()}
    training_of = trained_by(configs)
    begun, settings = output / "sweep.json", {"overrides": overrides}
    if begun.exists() and files.read_json(begun) != settings:
        raise ConfigError(f"{begun} has other settings after --: choose another --output")
    files.write_json(begun, settings)
    # Seeds of one configuration, and many of the rows, compile to the same programs.
    cache = {"JAX_COMPILATION_CACHE_DIR": str((output / "compiled").absolute())}
    failed = []
    runs = [(row, seed) for seed in seeds for row in rows]
    for number, (row, seed) in enumerate(runs, start=1):
        folder = output / row / f"seed_{seed}"
        if (folder / "results.json").exists():
            continue
        print(f"{number} of {len(runs)}: {row}, seed {seed}", flush=True)
        trained = training_of[row]
        if trained == row:
            program = ["train", "--config", rows[row], "--workdir", str(folder)]
            program += [f"--config.seed={seed}", "--config.evaluation.baselines=False", *overrides]
        else:
            checkpoint = str(output / trained / f"seed_{seed}")
            program = ["evaluate", "--checkpoint", checkpoint, "--output", str(folder)]
            count = configs[row].evaluation.num_hypotheses
            # An equal number stays unsaid: an override may have changed the training's.
            if count != configs[trained].evaluation.num_hypotheses:
                program.append(f"--num_hypotheses={count}")
        program += ["--data_dir", data_dir] if data_dir else []
        command = [sys.executable, "-m", f"experiments.{program[0]}", *program[1:]]
        if subprocess.run(command, check=False, env=os.environ | cache).returncode:
            failed.append(f"{row}, seed {seed}")
    return failed


def table(
    rows: dict[str, str], seeds: list[int], output: Path, subset: str, is_published: bool
) -> tables.Table:
    """The finished runs' metrics on a subset, over the seeds, with the published rows below."""
    lines = []
    for row in rows:
        paths = [output / row / f"seed_{seed}" / "results.json" for seed in seeds]
        results = [files.read_json(path)["subsets"] for path in paths if path.exists()]
        models = [subsets[subset]["model"] for subsets in results if subset in subsets]
        values = {c: [model[c] for model in models if c in model] for c in tables.COLUMNS}
        lines.append((row, values))
        if is_published and subset == "ambiguous" and row in published.ABLATIONS:
            numbers = published.ABLATIONS[row]
            lines.append((f"{row}, published", {c: [v] for c, v in numbers.items()}))
    return tables.Table(tuple(tables.COLUMNS), tuple(lines))


def main(overrides: list[str]) -> None:
    """Runs the sweep."""
    if not CONFIGS.value or not OUTPUT.value:
        raise app.UsageError("--configs and --output are needed")
    if not all(seed.isdigit() for seed in SEEDS.value):
        raise app.UsageError(f"--seeds must be integers, not {','.join(SEEDS.value)}")
    seeds = [int(seed) for seed in SEEDS.value]
    rows, output = expand(CONFIGS.value), Path(OUTPUT.value)
    failed = sweep(rows, seeds, output, overrides[1:], DATA_DIR.value)
    is_published = all(load_config(spec).data.name == "human36m" for spec in rows.values())
    text = ""
    for subset in ("all", "ambiguous"):
        of_subset = table(rows, seeds, output, subset, is_published)
        text += f"{subset} frames, {len(seeds)} seeds: mean ± spread\n\n{of_subset.to_markdown()}\n"
        files.write_atomic(output / f"table_{subset}.csv", of_subset.to_csv().encode())
    files.write_atomic(output / "table.md", text.encode())
    print(text)
    if failed:
        sys.exit(f"error: not finished: {'; '.join(failed)}. The same command does these again")


if __name__ == "__main__":
    experiments.run(main)
