"""From a trained model to what a user looks at: results.json, tables, figures/, report.html."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from jax import Array
from matplotlib.figure import Figure

from diffpose_jax import distributed as devices
from diffpose_jax.config import ConfigError
from diffpose_jax.data import pipeline
from diffpose_jax.data.pipeline import Examples
from diffpose_jax.evaluation import aggregation
from diffpose_jax.evaluation import baselines as controls
from diffpose_jax.evaluation import evaluate as evaluation
from diffpose_jax.evaluation.aggregation import Calibration
from diffpose_jax.evaluation.baselines import Controls
from diffpose_jax.io import files, scalars, trees
from diffpose_jax.method import diffusion
from diffpose_jax.method.network import Model
from diffpose_jax.report import figures as plotting
from diffpose_jax.report import page as report
from diffpose_jax.report import published, tables
from diffpose_jax.training import checkpoints

CONTROLS = "controls.npz"
"""The file in a run's folder with the controls."""


def evaluate_run(
    checkpoint: Path,
    output: Path,
    protocol: ml_collections.ConfigDict | None = None,
    num_hypotheses: Sequence[int] = (),
    data_dir: str | None = None,
    solver: str | None = None,
) -> dict[str, Any]:
    """Evaluates a model on a test split; fits the controls first if they are not there.

    Args:
      checkpoint: a run's folder, or an export.
      output: where results.json, the tables, figures/, report.html, controls.npz and
        calibration.json go.
      protocol: a configuration whose `data` and `evaluation` say on what and how; by default the
        model's own, as it was when the training began.
      num_hypotheses: one or several M, evaluated in one pass; by default what the protocol says.
        The most of them are in results.json and the report, fewer in results_M.json.
      data_dir: where prepared data sets lie; by default where TFDS keeps them.
      solver: of the reverse process, see `diffusion.reverse_steps`; by default what the protocol
        says.

    Returns:
      The content of results.json.

    Raises:
      CheckpointError: if the checkpoint cannot be read, or what was fitted to it.
      ConfigError: for a protocol that does not fit the data set.
    """
    model = checkpoints.load(checkpoint, protocol and protocol.evaluation.weights)
    config = model.config
    protocol = protocol or config
    settings = protocol.evaluation
    model = dataclasses.replace(model, solver=solver or settings.get("solver", model.solver))
    try:
        diffusion.reverse_steps(model.network.schedule, model.solver)
    except ValueError as error:
        raise ConfigError(f"config.evaluation.solver: {error}") from error
    counts = sorted(set(num_hypotheses or (settings.num_hypotheses,)), reverse=True)
    # Apart from the keys of the training, which are split from the key of the seed itself.
    controls_key, evaluation_key, calibration_key = jax.random.split(
        jax.random.key(config.seed + 1_000_000), 3
    )
    with devices.first_process_first("data"):
        test = pipeline.load(protocol.data, "test", data_dir)
    if unknown := [key for key in settings.group_by if key not in test.groups]:
        raise ConfigError(
            f"config.evaluation.group_by: {protocol.data.name} has no {', '.join(unknown)}; it has"
            f" {', '.join(test.groups)}"
        )
    trained_on = model.data_fingerprint
    if protocol.data.name == config.data.name:
        warn_of_other_data(checkpoint, config.data.name, trained_on, test.fingerprint)
    fitted_on = {
        "data": test.fingerprint if protocol.data == config.data else trained_on,
        "calibration_share": config.data.calibration_share,
        "seed": config.seed,
    }
    # Without the frames that calibrate: what the model was trained on.
    train = functools.cache(
        lambda: pipeline.hold_out(
            pipeline.load(config.data, "train", data_dir), config.data.calibration_share
        )
    )
    output.mkdir(parents=True, exist_ok=True)
    folders = (output, checkpoint)
    with devices.first_process_first("controls and calibration"):
        fitted = _controls(controls_key, train, settings, fitted_on, folders)
        calibration = _calibration(calibration_key, train, model, settings, fitted_on, folders)

    ambiguous = ambiguous_frames(test, settings)
    counted = np.ones(len(test), bool) if test.counted is None else test.counted
    contents = evaluation.evaluate(
        evaluation_key,
        model,
        fitted,
        test,
        {"all": counted, "ambiguous": ambiguous},
        num_hypotheses=counts,
        batch_size=settings.batch_size,
        group_by=settings.group_by,
        calibration=calibration,
        pose=settings.pose,
    )
    results = contents[counts[0]]
    if not devices.is_first():
        return results
    for count in counts[1:]:
        files.write_json(output / f"results_{count}.json", contents[count])
    write_tables(output, contents, protocol)
    files.write_json(output / "results.json", results)

    rows = report_rows(ambiguous, settings.report_frames)
    names = [test.names[row] + ", ambiguous" * bool(ambiguous[row]) for row in rows]
    examples = draw_examples(evaluation_key, model, test, rows, names, counts[0])
    write_report(checkpoint, output, results, config, examples)
    return results


def warn_of_other_data(checkpoint: Path, name: str, trained_on: str, found: str) -> None:
    """Warns if a model was trained on a data set of the same name with another fingerprint."""
    if trained_on not in ("", found):
        logging.warning(
            "%s was trained on a %s with other content (fingerprint %s) than the one here (%s)",
            *(checkpoint, name, trained_on, found),
        )


def _controls(
    key: Array,
    train: Callable[[], tuple[Examples, Examples | None]],
    settings: ml_collections.ConfigDict,
    fitted_on: dict[str, Any],
    folders: tuple[Path, ...],
) -> Controls | None:
    """The controls from the first folder that has them, or fitted now and written to the first.

    Those in a folder were perhaps fitted with other settings, or to other data: then they are
    fitted anew.
    """
    if not settings.controls:
        return None
    fitted_on = fitted_on | {
        name: settings[name] for name in settings if name.startswith("regression_")
    }
    for folder in folders:
        path = folder / CONTROLS
        if path.is_file():
            fitted, was_fitted_on = controls.load(path)
            if aggregation.is_as_fitted(path, was_fitted_on, fitted_on):
                return fitted
    fitted = evaluation.fit_controls(key, train()[0], settings)
    controls.save(folders[0] / CONTROLS, fitted, fitted_on)
    return fitted


def _calibration(
    key: Array,
    train: Callable[[], tuple[Examples, Examples | None]],
    model: Model,
    settings: ml_collections.ConfigDict,
    fitted_on: dict[str, Any],
    folders: tuple[Path, ...],
) -> Calibration:
    """The calibration, likewise; an uncalibrated one if no recordings were held out for it."""
    fitted_on = fitted_on | {
        "parameters": trees.check_sum(model.params),
        "num_hypotheses": settings.num_hypotheses,
        "level": settings.radius_level,
        "solver": model.solver,
    }
    for folder in folders:
        found = aggregation.read_calibration(folder, settings.pose, fitted_on)
        if found is not None:
            return found
    held_out = train()[1] if model.config.data.calibration_share else None
    if held_out is None:
        return aggregation.uncalibrated(settings.radius_level)
    calibration = evaluation.fit_calibration(
        key,
        model,
        held_out,
        pose=settings.pose,
        level=settings.radius_level,
        num_hypotheses=settings.num_hypotheses,
        batch_size=settings.batch_size,
    )
    aggregation.write_calibration(folders[0], settings.pose, calibration, fitted_on)
    return calibration


def ambiguous_frames(test: Examples, settings: ml_collections.ConfigDict) -> np.ndarray:
    """Marks the ambiguous frames (N,), as `config.evaluation.ambiguous` says.

    Raises:
      ConfigError: if the data set has no list of its own, or the file of names does not fit.
    """
    if settings.ambiguous == "rule":
        return evaluation.ambiguous_frames(test, settings.ambiguous_sigma_px, settings.batch_size)
    if settings.ambiguous == "stored":
        if test.ambiguous is None:
            raise ConfigError(
                "config.evaluation.ambiguous: the data set marks no frames; take 'rule' or a file"
            )
        return test.ambiguous
    path = Path(settings.ambiguous)
    if not path.is_file():
        raise ConfigError(
            f"config.evaluation.ambiguous: must be rule, stored, or a file; there is no {path}"
        )
    listed = {line.strip() for line in path.read_text(errors="replace").splitlines()}
    listed -= {""}
    if unknown := sorted(listed - set(test.names.tolist())):
        raise ConfigError(
            f"{path}: no frame of the test split is named {unknown[0]!r:.200} ({len(unknown)} names"
            f" are unknown); names are like {str(test.names[0])!r}"
        )
    return np.isin(test.names, sorted(listed))


_METHOD_NAMES = {
    **{
        name: f"DiffPose, one pose: {method.replace('_', ' ')}"
        for name, method in evaluation.SINGLE_POSES.items()
    },
    "gaussian": "Gaussian draws around the regression",
    "regression": "regression from the argmax joints",
    "mean_pose": "mean training pose",
}
_PUBLISHED = {("human36m", "all"): published.H36M, ("human36m", "ambiguous"): published.H36MA}


def make_tables(
    contents: dict[int, dict[str, Any]], protocol: ml_collections.ConfigDict
) -> dict[str, tuple[str, tables.Table]]:
    """Tables of all methods, by subset and by group.

    Args:
      contents: what `evaluation.evaluate` gives.
      protocol: its `data.name` says which published rows stand below ours, its
        `evaluation.group_metrics` which metrics get a table by group.

    Returns:
      {name: (title, table)}.
    """
    most = max(contents)
    made: dict[str, tuple[str, tables.Table]] = {}
    for subset, methods in contents[most]["subsets"].items():
        of_counts = {count: content["subsets"][subset] for count, content in contents.items()}
        rows = [(name, _single(metrics)) for name, metrics in _rows(of_counts)]
        numbers = _PUBLISHED.get((protocol.data.name, subset), {})
        rows += [(f"{name}, published", _single(metrics)) for name, metrics in numbers.items()]
        title = f"{subset} frames ({methods['frames']}), means over the frames"
        made[subset] = title, tables.Table(tuple(tables.COLUMNS), tuple(rows))
    for key, of_key in contents[most].get("groups", {}).items():
        for metric in protocol.evaluation.group_metrics:
            heading, digits = tables.COLUMNS[metric]
            columns = (*of_key, "mean", "all frames")
            found: dict[str, dict[str, list[float]]] = {}
            for column in columns:
                for name, metrics in _rows(
                    {count: _of_group(content, key, column) for count, content in contents.items()}
                ):
                    found.setdefault(name, {})[column] = [metrics[metric]]
            if (protocol.data.name, key, metric) == ("mpi_inf_3dhp", "scene", "pck150_best"):
                by_scene = published.MPI_INF_3DHP_PCK
                found["DiffPose, published"] = _single(by_scene | {"all frames": by_scene["all"]})
            title = f"{heading} by {key}; mean: unweighted over the {len(of_key)}"
            headings = {column: (column.replace("_", " "), digits) for column in columns}
            made[f"{key}_{metric}"] = title, tables.Table(columns, tuple(found.items()), headings)
    return made


def write_tables(
    output: Path, contents: dict[int, dict[str, Any]], protocol: ml_collections.ConfigDict
) -> None:
    """Writes tables.md and each table in it as a CSV file, see `make_tables`."""
    made = make_tables(contents, protocol)
    for name, (_, table) in made.items():
        files.write_atomic(output / f"table_{name}.csv", table.to_csv().encode())
    text = "\n".join(f"{title}\n\n{table.to_markdown()}" for title, table in made.values())
    files.write_atomic(output / "tables.md", text.encode())


def _of_group(content: dict[str, Any], key: str, column: str) -> dict[str, Any]:
    """{method: metrics} of a group, of the mean over the groups, or of all frames."""
    if column == "mean":
        return content["averages"][key]
    return content["subsets"]["all"] if column == "all frames" else content["groups"][key][column]


def _rows(of_counts: dict[int, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, metrics) of the model at each number of hypotheses, then of the controls."""
    for count, methods in of_counts.items():
        yield f"DiffPose, {count} hypotheses", methods["model"]
    for method, name in _METHOD_NAMES.items():
        if method in methods:
            yield name, methods[method]


def _single(metrics: dict[str, Any]) -> dict[str, list[float]]:
    return {name: [value] for name, value in metrics.items() if isinstance(value, float)}


def report_rows(ambiguous: np.ndarray, num_frames: int) -> np.ndarray:
    """Frames for the report, evenly spread: half of them ambiguous ones, if there are as many."""
    parts = []
    for subset, count in ((ambiguous, num_frames // 2), (~ambiguous, num_frames - num_frames // 2)):
        rows = np.flatnonzero(subset)
        parts.append(rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)])
    return np.concatenate(parts)


def draw_examples(
    key: Array,
    model: Model,
    test: Examples,
    rows: np.ndarray,
    names: list[str],
    num_hypotheses: int,
) -> list[report.ReportExample]:
    """Samples frames and draws their figures."""
    maps = jnp.asarray(test.heatmaps(rows))
    hypotheses_mm = np.asarray(model.sample(key, maps, num_hypotheses))
    candidates = jax.device_get(
        jax.vmap(model.network.draw_candidates)(jax.random.split(key, len(rows)), maps)
    )
    xy = np.asarray(candidates.xy)
    return [
        report.ReportExample(
            name=names[i],
            hypotheses_mm=hypotheses_mm[i],
            truth_mm=test.pose_mm[row],
            figure=plotting.plot_example(
                np.asarray(maps[i]),
                xy[i],
                np.asarray(candidates.likelihood[i]),
                hypotheses_mm[i],
                test.pose_mm[row],
                title=names[i],
            ),
        )
        for i, row in enumerate(rows)
    ]


def write_report(
    run: Path,
    output: Path,
    results: dict[str, Any],
    config: ml_collections.ConfigDict,
    examples: list[report.ReportExample],
) -> None:
    """Writes figures/*.png and report.html."""
    folder = output / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "Error of the best of K hypotheses": plotting.plot_min_mpjpe(
            plotting.min_mpjpe_curves(results)
        )
    }
    lines = scalars.read_scalars(run / "metrics.jsonl")
    if lines:
        figures["Training loss"] = plotting.plot_loss(
            [line["step"] for line in lines], [line["loss"] for line in lines]
        )
    saved = [
        (caption, plotting.save(figure, folder / f"{_file_name(caption)}.png"))
        for caption, figure in figures.items()
    ]
    examples = [
        dataclasses.replace(
            example,
            figure=plotting.save(example.figure, folder / f"example_{number}.png"),
        )
        if isinstance(example.figure, Figure)
        else example
        for number, example in enumerate(examples, start=1)
    ]
    report.write_report(
        output / "report.html",
        title=f"DiffPose: {run.resolve().name}",
        results=results,
        config_text=str(config),
        figures=saved,
        examples=examples,
    )


def _file_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def print_table(results: dict[str, Any]) -> None:
    """Prints the headline metrics as a table."""
    columns = ("mpjpe_best", "pa_mpjpe_best", "mpjpe_mean", "energy_score", "ece")
    for subset, methods in results["subsets"].items():
        title = f"{subset} ({methods['frames']} frames)"
        print(f"\n{title:28s}" + "".join(f"{column:>15s}" for column in columns))
        for method, metrics in methods.items():
            if method != "frames":
                cells = [metrics.get(column) for column in columns]
                print(
                    f"{method:28s}"
                    + "".join(f"{'-':>15s}" if cell is None else f"{cell:15.3f}" for cell in cells)
                )
