"""From a trained model to what a user looks at: results.json, tables, figures/, report.html."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax import Array
from jaxtyping import Bool, Integer, Key
from matplotlib.figure import Figure

from diffpose_jax import distributed, inference
from diffpose_jax.config import Config, ConfigError, flat
from diffpose_jax.data import pipeline
from diffpose_jax.data.pipeline import Examples
from diffpose_jax.evaluation import evaluate, fitting
from diffpose_jax.inference import Model
from diffpose_jax.io import files, scalars
from diffpose_jax.method import sampling
from diffpose_jax.report import figures, page, published, tables


def evaluate_run(
    checkpoint: Path,
    output: Path,
    protocol: Config | None = None,
    num_hypotheses: Sequence[int] = (),
    data_dir: str | None = None,
    solver: str | None = None,
) -> dict[str, Any]:
    """Evaluates a model on a test split; fits the baselines first if they are not there.

    Args:
      checkpoint: a run's folder, or an export.
      output: where results.json, the tables, figures/, report.html, baselines.npz,
        prediction_errors.npz and calibration.json go.
      protocol: its `data` and `evaluation` say on what and how; by default the model's own
        configuration, as it was when the training began.
      num_hypotheses: one or several M, evaluated in one pass; by default what the protocol says.
        The most of them are in results.json and the report, fewer in results_M.json.
      data_dir: where prepared data sets lie; by default where TFDS keeps them.
      solver: of the reverse process; by default what the protocol says.

    Returns:
      The content of results.json.

    Raises:
      CheckpointError: if the checkpoint cannot be read, or what was fitted to it.
      ConfigError: for a protocol that does not fit the data set, or an unknown solver.
    """
    model = inference.load(checkpoint, protocol.evaluation.weights if protocol else None)
    config = model.config
    protocol = protocol or config
    counts = sorted(set(num_hypotheses or (protocol.evaluation.num_hypotheses,)), reverse=True)
    settings = dataclasses.replace(
        protocol.evaluation,
        num_hypotheses=counts[0],
        solver=solver or protocol.evaluation.solver,
    )
    needs_errors = sampling.needs_errors(model.network.schedule, settings.solver)
    # Apart from the keys of the training, which are split from the key of the seed itself.
    baselines_key, evaluation_key, calibration_key = jax.random.split(
        jax.random.key(config.seed + 1_000_000), 3
    )
    errors_key = jax.random.fold_in(calibration_key, 0)
    with distributed.first_process_first("data"):
        test = pipeline.load(protocol.data, "test", data_dir)
    if unknown := [key for key in settings.group_by if key not in test.groups]:
        raise ConfigError(
            f"config.evaluation.group_by: {protocol.data.name} has no {', '.join(unknown)}; it has"
            f" {', '.join(test.groups)}"
        )
    trained_on = model.data_fingerprint
    if protocol.data.name == config.data.name and trained_on not in ("", test.fingerprint):
        logging.warning(
            "%s was trained on a %s with other content (fingerprint %s) than the one here (%s)",
            *(checkpoint, config.data.name, trained_on, test.fingerprint),
        )
    fitted_on = {
        "data": test.fingerprint if protocol.data == config.data else trained_on,
        "calibration_share": config.data.calibration_share,
        "seed": config.seed,
    }
    train, folders = fitting.training_split(config, data_dir), (output, checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    with distributed.first_process_first("fits before the evaluation"):
        if needs_errors:
            errors = fitting.prediction_errors(errors_key, train, model, settings.solver, output)
            model = dataclasses.replace(model, errors=errors)
        model = dataclasses.replace(model, default_solver=model.parse_solver(settings.solver))
        baselines = fitting.baselines(baselines_key, train, settings, fitted_on, folders)
        calibration = fitting.radius_calibration(
            calibration_key, train, model, settings, fitted_on, folders
        )
    ambiguous = fitting.ambiguous_frames(test, settings)
    counted = np.ones(len(test), bool) if test.counted is None else test.counted
    contents = evaluate.evaluate(
        evaluation_key,
        model,
        baselines,
        test,
        {"all": counted, "ambiguous": ambiguous},
        num_hypotheses=counts,
        batch_size=settings.batch_size,
        group_by=settings.group_by,
        calibration=calibration,
        pose=settings.pose,
    )
    results = contents[counts[0]]
    if not distributed.is_first():
        return results
    for count in counts[1:]:
        files.write_json(output / f"results_{count}.json", contents[count])
    write_tables(output, contents, protocol)
    files.write_json(output / "results.json", results)

    rows = report_rows(ambiguous, settings.report_frames)
    names = [test.names[row] + ", ambiguous" * bool(ambiguous[row]) for row in rows]
    # With the key of the evaluation: what is shown are the hypotheses that were measured.
    key = evaluate.hypotheses_key(evaluation_key)
    examples = draw_examples(key, model, test, rows, names, counts[0])
    write_report(checkpoint, output, results, config, examples)
    return results


METHOD_NAMES = {
    **{
        name: f"DiffPose, one pose: {method.replace('_', ' ')}"
        for name, method in evaluate.SINGLE_POSES.items()
    },
    "gaussian": "Gaussian draws around the regression",
    "regression": "regression from the argmax joints",
    "mean_pose": "mean training pose",
}
_PUBLISHED = {("human36m", "all"): published.H36M, ("human36m", "ambiguous"): published.H36MA}


def make_tables(
    contents: dict[int, dict[str, Any]], protocol: Config
) -> dict[str, tuple[str, tables.Table]]:
    """Tables of all methods, by subset and by group.

    Args:
      contents: what `evaluate.evaluate` gives.
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
                of_column = {
                    count: _of_group(content, key, column) for count, content in contents.items()
                }
                for name, metrics in _rows(of_column):
                    found.setdefault(name, {})[column] = [metrics[metric]]
            if (protocol.data.name, key, metric) == ("mpi_inf_3dhp", "scene", "pck150_best"):
                by_scene = published.MPI_INF_3DHP_PCK
                found["DiffPose, published"] = _single(by_scene | {"all frames": by_scene["all"]})
            title = f"{heading} by {key}; mean: unweighted over the {len(of_key)}"
            headings = {column: (column.replace("_", " "), digits) for column in columns}
            made[f"{key}_{metric}"] = title, tables.Table(columns, tuple(found.items()), headings)
    return made


def write_tables(output: Path, contents: dict[int, dict[str, Any]], protocol: Config) -> None:
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
    """(name, metrics) of the model at each number of hypotheses, then of the other methods."""
    for count, methods in of_counts.items():
        yield f"DiffPose, {count} hypotheses", methods["model"]
    for method, name in METHOD_NAMES.items():
        if method in methods:
            yield name, methods[method]


def _single(metrics: dict[str, Any]) -> dict[str, list[float]]:
    return {name: [value] for name, value in metrics.items() if isinstance(value, float)}


def report_rows(ambiguous: Bool[np.ndarray, " N"], num_frames: int) -> Integer[np.ndarray, " n"]:
    """Frames for the report, evenly spread: half of them ambiguous ones, if there are as many."""
    parts = []
    for subset, count in ((ambiguous, num_frames // 2), (~ambiguous, num_frames - num_frames // 2)):
        rows = np.flatnonzero(subset)
        parts.append(rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)])
    return np.concatenate(parts)


def draw_examples(
    key: Key[Array, ""],
    model: Model,
    test: Examples,
    rows: Integer[np.ndarray, " n"],
    names: list[str],
    num_hypotheses: int,
) -> list[page.ReportExample]:
    """Draws hypotheses of frames, and figures of them."""
    maps = test.heatmaps(rows)
    drawn = jax.device_get(model.draw(key, maps, num_hypotheses))
    examples = []
    for i, row in enumerate(rows):
        draw = jax.tree.map(lambda x, i=i: x[i], drawn)
        figure = figures.plot_example(
            maps[i], draw.candidates, draw.poses_mm, test.pose_mm[row], title=names[i]
        )
        examples.append(page.ReportExample(names[i], draw.poses_mm, test.pose_mm[row], figure))
    return examples


def write_report(
    run: Path,
    output: Path,
    results: dict[str, Any],
    config: Config,
    examples: list[page.ReportExample],
) -> None:
    """Writes figures/*.png and report.html."""
    folder = output / "figures"
    curves = {
        "Error of the best of K hypotheses": figures.plot_min_mpjpe(
            figures.min_mpjpe_curves(results)
        )
    }
    if results["num_hypotheses"] > 1:
        curves["Calibration"] = figures.plot_reliability(results)
    lines = scalars.read_scalars(run / "metrics.jsonl")
    if lines:
        steps, losses = (np.array([line[name] for line in lines]) for name in ("step", "loss"))
        curves["Training loss"] = figures.plot_loss(steps, losses)
    saved = [
        (caption, figures.save(figure, folder / f"{_file_name(caption)}.png"))
        for caption, figure in curves.items()
    ]
    examples = [
        dataclasses.replace(
            example, figure=figures.save(example.figure, folder / f"example_{number}.png")
        )
        if isinstance(example.figure, Figure)
        else example
        for number, example in enumerate(examples, start=1)
    ]
    page.write_report(
        output / "report.html",
        title=f"DiffPose: {run.resolve().name}",
        results=results,
        config_text="\n".join(f"{name}: {value}" for name, value in flat(config).items()),
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
                cells = [f"{'-':>15s}" if c is None else f"{c:15.3f}" for c in cells]
                print(f"{method:28s}" + "".join(cells))
