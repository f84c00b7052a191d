"""From a trained model to what a user looks at: results.json, figures/ and report.html."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array

from diffpose_jax import checkpoints, controls, evaluation, files, plotting, report, scalars
from diffpose_jax.data import pipeline
from diffpose_jax.data.pipeline import Examples
from diffpose_jax.model import Model


def evaluate_run(
    checkpoint: Path,
    output: Path,
    settings: ml_collections.ConfigDict | None = None,
    num_hypotheses: int | None = None,
    data_dir: str | None = None,
) -> dict[str, Any]:
    """Evaluates a model on its test split; fits the controls first if they are not there.

    Args:
      checkpoint: a run's folder, or an export.
      output: where results.json, figures/, report.html and controls/ go.
      settings: `config.evaluation`; by default as it was when the training began.
      num_hypotheses: M; by default what the settings say.
      data_dir: where prepared data sets lie; by default where TFDS keeps them.

    Returns:
      The content of results.json.
    """
    model = checkpoints.load(checkpoint, settings and settings.weights)
    config = model.config
    settings = settings or config.evaluation
    num_hypotheses = num_hypotheses or settings.num_hypotheses
    # Apart from the keys of the training, which are split from the key of the seed itself.
    controls_key, evaluation_key = jax.random.split(jax.random.key(config.seed + 1_000_000))
    test = pipeline.load(config.data, "test", data_dir)

    output.mkdir(parents=True, exist_ok=True)
    saved = [folder / "controls" for folder in (output, checkpoint)]
    fitted_dir = next((folder for folder in saved if folder.exists()), saved[0])
    if not fitted_dir.exists():
        train = pipeline.load(config.data, "train", data_dir)
        fitted = evaluation.fit_controls(controls_key, train, settings)
        checkpoints.save_tree(fitted_dir, controls.to_tree(fitted))
    fitted = controls.from_tree(checkpoints.load_tree(fitted_dir))

    ambiguous = evaluation.ambiguous_frames(test, settings.ambiguous_sigma_px, settings.batch_size)
    results = evaluation.evaluate(
        evaluation_key,
        model,
        fitted,
        test,
        {"ambiguous": ambiguous},
        num_hypotheses=num_hypotheses,
        batch_size=settings.batch_size,
    )
    files.write_json(output / "results.json", results)

    rows = report_rows(ambiguous, settings.report_frames)
    names = [test.names[row] + ", ambiguous" * bool(ambiguous[row]) for row in rows]
    examples = draw_examples(evaluation_key, model, test, rows, names, num_hypotheses)
    write_report(checkpoint, output, results, config, examples)
    return results


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
