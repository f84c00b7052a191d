"""Predicts poses from pictures of people, from heatmaps, or from pictures of LSP.

    python -m experiments.predict --checkpoint runs/quickstart --detector DIR --image photo.jpg
        --output DIR
    python -m experiments.predict --checkpoint runs/quickstart --heatmaps maps.npy --output DIR
    python -m experiments.predict --checkpoint runs/quickstart --lsp im00001,im00042 --output DIR

Writes hypotheses.npz (`predict.contents` lists its arrays), poses.png and pose.html, which turns
in 3D. Of several people (`--box` given several times), pictures (a folder) or heatmaps, each has a
folder of its own in the output.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags

import experiments
from diffpose_jax import detectors, inference
from diffpose_jax.data import prepared
from diffpose_jax.detectors import Detector
from diffpose_jax.detectors.crops import Crop
from diffpose_jax.evaluation import aggregation, calibration
from diffpose_jax.io import pictures
from diffpose_jax.io.pictures import PictureError
from diffpose_jax.prediction import finder, predict
from diffpose_jax.prediction.finder import Box, Detection, PredictionError
from diffpose_jax.prediction.predict import Prediction
from diffpose_jax.skeleton import MPII_JOINTS

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run, or an export.")
IMAGE = flags.DEFINE_string("image", None, "A picture of a person, or a folder of pictures.")
HEATMAPS = flags.DEFINE_string(
    "heatmaps", None, "A .npy file, or .npz with heatmaps, (16, 64, 64) or (B, 16, 64, 64)."
)
DETECTOR = flags.DEFINE_string(
    "detector", None, "Folder of a detector, such as experiments.convert --efficientpose writes."
)
LSP = flags.DEFINE_list(
    "lsp", None, "Pictures of LSP that experiments.prepare --dataset lsp has made heatmaps of."
)
DATA_DIR = flags.DEFINE_string("data_dir", None, "Of --lsp; default: where TFDS keeps data sets.")
BOX = flags.DEFINE_multi_string(
    "box", [], "Where a person is in the picture: x,y,w,h in pixels; once for each person."
)
NUM_HYPOTHESES = flags.DEFINE_integer("num_hypotheses", 200, "Hypotheses.", lower_bound=1)
POSE = flags.DEFINE_enum(
    "pose",
    "heatmap_agreement",
    list(aggregation.METHODS),
    "How the hypotheses become a single pose.",
)
SOLVER = flags.DEFINE_string(
    "solver", None, "Such as ddpm:4@24+cov, for fewer steps; default: the configuration's."
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the hypotheses.")
FOCAL_PX = flags.DEFINE_float(
    "focal_px",
    None,
    "Focal length in pixels, by which poses in a crop's axes are turned to the camera's; default:"
    " what the picture says (EXIF).",
    lower_bound=1.0,
)
HEIGHT_MM = flags.DEFINE_float(
    "height_mm", None, "The person's stature, to which poses and radii are scaled.", lower_bound=1.0
)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write.")


class Subject(NamedTuple):
    """A person to predict: a name, the folder to write and how to get the heatmaps."""

    name: str
    folder: Path
    detect: Callable[[], Detection]


def main(_: list[str]) -> None:
    """Predicts and writes."""
    if CHECKPOINT.value is None or OUTPUT.value is None:
        raise app.UsageError("--checkpoint and --output are needed")
    subjects = _subjects(Path(OUTPUT.value))
    model = inference.load(CHECKPOINT.value)
    if SOLVER.value is not None:
        model = dataclasses.replace(model, default_solver=model.parse_solver(SOLVER.value))
    calibrated = calibration.read_calibration(CHECKPOINT.value, POSE.value)
    key = jax.random.key(SEED.value)
    failed = 0
    for subject in subjects:
        try:
            found = subject.detect()
            predicted = predict.predict(
                model, key, found.heatmaps, NUM_HYPOTHESES.value, POSE.value, calibrated
            )
            if predicted.axes == "crop" and found.ray is not None:
                predicted = predicted.in_camera_axes(found.ray)
            if HEIGHT_MM.value is not None:
                predicted = predicted.of_height(HEIGHT_MM.value)
            predict.write(subject.folder, subject.name, found, predicted)
        except PictureError as error:  # names the file
            print(f"error: {error}", file=sys.stderr)
            failed += 1
        except PredictionError as error:
            print(f"error: {subject.name}: {error}", file=sys.stderr)
            failed += 1
        else:
            print(_summary(subject.folder, found, predicted), flush=True)
    if failed:
        sys.exit(f"{failed} of {len(subjects)} gave no poses" if len(subjects) > 1 else 1)


def _subjects(output: Path) -> list[Subject]:
    """What the flags name."""
    if [IMAGE.value, HEATMAPS.value, LSP.value].count(None) != 2:
        raise app.UsageError("one of --image, --heatmaps and --lsp is needed")
    if BOX.value and (IMAGE.value is None or Path(IMAGE.value).is_dir()):
        raise app.UsageError("--box says where people are in one picture: give it as --image FILE")
    if output.exists() and not output.is_dir():
        raise PredictionError(f"--output {output} is a file; name a folder")
    if HEATMAPS.value is not None:
        return _heatmaps(Path(HEATMAPS.value), output)
    if LSP.value is not None:
        return _lsp(LSP.value, output)
    if IMAGE.value is None or DETECTOR.value is None:
        raise app.UsageError(
            "--image needs --detector DIR; python -m experiments.convert --efficientpose download"
            " --output DIR makes one"
        )
    load = functools.cache(functools.partial(detectors.load, DETECTOR.value))
    return _pictures(Path(IMAGE.value), output, load)


def _heatmaps(path: Path, output: Path) -> list[Subject]:
    """One for each picture's heatmaps; a single one lies in the output itself."""
    maps = predict.read_heatmaps(path)

    def subject(name: str, folder: Path, of_picture: np.ndarray) -> Subject:
        found = Detection(of_picture)
        return Subject(name, folder, functools.partial(predict.check_not_flat, found))

    if len(maps) == 1:
        return [subject(path.name, output, maps[0])]
    return [
        subject(f"{path.name}, {row}", output / f"heatmaps_{row:04d}", of_picture)
        for row, of_picture in enumerate(maps)
    ]


def _lsp(names: list[str], output: Path) -> list[Subject]:
    """One for each named picture of the prepared data set."""
    try:
        columns, heatmaps = prepared.read(prepared.find(DATA_DIR.value, "lsp", {}), "test")
    except ValueError as error:
        raise PredictionError(str(error)) from error
    rows = {name: row for row, name in enumerate(columns["name"].tolist())}
    if missing := [name for name in names if name not in rows]:
        raise PredictionError(f"--lsp: {', '.join(missing)} are not among the {len(rows)} pictures")

    def detect(row: int) -> Detection:
        crop = Crop(columns["corner_px"][[row]], columns["side_px"][[row]])
        return predict.check_not_flat(Detection(heatmaps(np.array([row]))[0], crop))

    return [Subject(name, output / name, functools.partial(detect, rows[name])) for name in names]


def _pictures(path: Path, output: Path, load: Callable[[], Detector]) -> list[Subject]:
    """One for each picture, or each person in one; a single one lies in the output itself."""
    if path.is_dir():
        paths = pictures.find(path)
        stems = [picture.stem.casefold() for picture in paths]

        def detect(picture: Path) -> Detection:
            return finder.detect(load(), pictures.read(picture), focal_px=_focal_px(picture))

        return [
            Subject(
                picture.name,
                # One folder each, also for a.jpg and a.png.
                output / (picture.stem if stems.count(stem) == 1 else picture.name),
                functools.partial(detect, picture),
            )
            for picture, stem in zip(paths, stems, strict=True)
        ]
    image = pictures.read(path)
    boxes: list[Box | None] = [Box.parse(text) for text in BOX.value] or [None]
    for box in filter(None, boxes):
        box.crop(image)  # Before any work: it tells of a box that lies outside.

    def subject(name: str, folder: Path, box: Box | None) -> Subject:
        return Subject(
            name, folder, lambda: finder.detect(load(), image, box, focal_px=_focal_px(path))
        )

    if len(boxes) == 1:
        return [subject(path.name, output, boxes[0])]
    return [
        subject(f"{path.name}, person {number}", output / f"person_{number}", box)
        for number, box in enumerate(boxes, start=1)
    ]


def _focal_px(path: Path) -> float | None:
    return FOCAL_PX.value or pictures.focal_px(path)


def _summary(folder: Path, found: Detection, predicted: Prediction) -> str:
    """What a terminal says of a person."""
    chosen = predicted.chosen
    lines = [
        f"{folder}: {len(predicted.draw.poses_mm)} hypotheses, {chosen.name},"
        f" {chosen.level:.0%} radius {np.median(chosen.radius_mm[1:]):.0f} mm (joints' median)",
        f"  radius: {chosen.meaning}",
    ]
    if predicted.axes == "crop":
        lines.append("  axes: of a camera that looks at the crop's centre (focal length unknown)")
    unseen = [name for name, seen in zip(MPII_JOINTS, found.is_found, strict=True) if not seen]
    if unseen and found.crop is not None:
        lines.append(f"  not seen: {', '.join(unseen)}")
    return "\n".join(lines)


if __name__ == "__main__":
    experiments.run(main)
