"""TFDS builder of Human3.6M: heatmaps and poses from any of the three forms it comes in."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from diffpose_jax.data import prepared as detections
from diffpose_jax.data.human36m import raw, released, sequences
from diffpose_jax.data.human36m import wehrbein as flow

FORMATS: tuple[str, ...] = ("raw", "released", "flow")
_SPLITS = ("train", "test")
_RAW_FIELDS = ("actions", "poses", "crop", "input_px")
_DIGEST_BYTES = 1 << 16


@dataclasses.dataclass(eq=False)
class Human36mConfig(detections.DetectionsConfig):
    """What the examples depend on; make it with `builder_config`.

    Attributes:
        format: What the source is: "raw", the owners' videos and CDF files; "released", the HDF5
            file of the published preprocessing; "flow", the pickles of Wehrbein et al.
        division: "standard", S9 and S11 are the test split, or "validation", S5 and S8 are.
        actions: Which actions to take (raw).
        poses: Which poses are the truth: "mono", as in the paper, or "mono_universal", bodies
            scaled to one height (raw).
        crop: Which joints the crop goes around, see `raw.CROPS` (raw).
        input_px: Side of the crops: 256, or 255 as in the published program (raw).
        source: Tells one released file or pair of pickles from another.
    """

    format: str = FORMATS[0]
    division: str = "standard"
    actions: tuple[str, ...] = sequences.ACTIONS
    poses: str = raw.POSES[0]
    crop: str = "all_joints"
    input_px: int = 256
    source: str = ""


def default_config() -> ml_collections.ConfigDict:
    """Gives the fields that `builder_config` takes, with their defaults."""
    default = Human36mConfig(name="")
    fields = ("format", "division", *_RAW_FIELDS, "loss")
    return ml_collections.ConfigDict({field: getattr(default, field) for field in fields})


def builder_config(
    config: ml_collections.ConfigDict,
    source: str | Path,
    detector: detections.Detector | None = None,
) -> Human36mConfig:
    """Checks a configuration and names it after its content.

    There is one Human3.6M, so the files of the raw form are no part of it. The other two forms
    hold the heatmaps of some detector: they are told apart by the sizes of their files and a part
    of each.

    Args:
        config: Fields of `default_config`; what is missing keeps its default.
        source: Where the files are, see `Human36m`.
        detector: For the raw form, gives the heatmaps.

    Returns:
        The builder's configuration.

    Raises:
        ValueError: If a field is unknown or out of range, or the detector does not fit.
        FileNotFoundError: If the source is a released file or a pickle that is not there.
    """
    defaults = default_config().to_dict()
    if unknown := sorted(set(config) - set(defaults)):
        raise ValueError(f"data.{unknown[0]} is unknown; data has {', '.join(defaults)}.")
    fields = defaults | config.to_dict()
    fields["actions"] = tuple(fields["actions"])
    for field, known in {
        "format": FORMATS,
        "division": tuple(sequences.SPLITS),
        "poses": raw.POSES,
        "crop": tuple(raw.CROPS),
    }.items():
        if fields[field] not in known:
            raise ValueError(
                f"data.{field} is {fields[field]!r}; it must be one of {', '.join(known)}."
            )
    unknown = [action for action in fields["actions"] if action not in sequences.ACTIONS]
    if unknown or not fields["actions"]:
        raise ValueError(
            f"data.actions is {fields['actions']}; it must name some of "
            f"{', '.join(sequences.ACTIONS)}."
        )
    made = Human36mConfig(name="", **fields)
    if made.format == "raw":
        if detector is None or detector.input_px != made.input_px:
            given = "none is given" if detector is None else f"it reads {detector.input_px} px"
            raise ValueError(
                f"the raw form needs a detector that reads crops of data.input_px = "
                f"{made.input_px} px; {given}."
            )
        made = dataclasses.replace(made, detector=detector.fingerprint)
    else:
        if changed := [field for field in _RAW_FIELDS if fields[field] != defaults[field]]:
            raise ValueError(
                f"data.{changed[0]} cannot be chosen: {made.format!r} data sets hold heatmaps and "
                "poses that were made already."
            )
        made = dataclasses.replace(made, source=_digest(_files(Path(source), made)))
    return detections.named(made, f"{made.format}_{made.division}")


def _files(source: Path, config: Human36mConfig) -> list[Path]:
    """Lists the files of a source that holds heatmaps."""
    if config.format == "released":
        return [source]
    tables = {sequences.table(config.division, split) for split in _SPLITS}
    return [source / flow.FILES[table] for table in sorted(tables)]


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file.")
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(size // 2 - _DIGEST_BYTES // 2, 0), os.SEEK_SET)
            digest.update(f"{size}\0".encode() + file.read(_DIGEST_BYTES))
    return digest.hexdigest()[:12]


class Human36m(detections.DetectionsBuilder):
    """Human3.6M: seven people performing fifteen actions before four cameras.

    Args:
        config: See `builder_config`.
        source: The folder that holds the subjects' folders (raw) or the pickles (flow), or the
            HDF5 file (released); needed to prepare the data set.
        detector: The configuration's; needed to prepare the data set from its raw form.
        data_dir: Folder of all data sets; by default where TFDS keeps them.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        config: Human36mConfig,
        source: str | Path,
        detector: detections.Detector | None = None,
        data_dir: str | Path | None = None,
    ) -> None:
        self._source = Path(source)
        super().__init__(config=config, detector=detector, data_dir=data_dir)

    def columns(self) -> dict[str, tfds.features.FeatureConnector]:
        """The features beside heatmaps and poses."""
        return {
            "subject": tfds.features.Text(doc="such as S9"),
            "action": tfds.features.Text(doc="such as WalkDog"),
            "subaction": tfds.features.Scalar(np.int32, doc="0 or 1"),
            "camera": tfds.features.Text(doc="the camera's number, such as 54138969"),
            "frame": tfds.features.Scalar(np.int32, doc="frame of the video, from 0"),
            "row": tfds.features.Scalar(np.int32, doc="place in the whole table"),
            "hard": tfds.features.Scalar(
                np.bool_, doc="in the ambiguous subset H36MA; always false from the raw form"
            ),
        }

    def fields(self) -> dict[str, Any]:
        """What of the configuration made a difference."""
        fields = super().fields()
        if self.builder_config.format == "raw":
            return fields
        return {key: value for key, value in fields.items() if key not in _RAW_FIELDS}

    def check(self) -> None:
        """Looks at all files: reads all poses, and all videos without decoding them.

        Raises:
            ValueError, FileNotFoundError: See `raw.check`, `released.check` and `flow.check`.
        """
        config = self.builder_config
        if config.format == "raw":
            tables = {sequences.table(config.division, split) for split in _SPLITS}
            found = [self._recordings(table) for table in sorted(tables)]
            raw.check([recording for recordings in found for recording in recordings])
        elif config.format == "released":
            released.check(self._source, config.division)
        else:
            flow.check(self._source, config.division)

    def parts(self) -> list[detections.Part]:
        """One part for each recording, piece of the released table, or pickle."""
        config = self.builder_config
        if config.format == "raw":
            return [part for split in _SPLITS for part in self._raw_parts(split)]
        if config.format == "flow":
            return [
                detections.Part(
                    split, split, functools.partial(flow.read, self._source, config.division, split)
                )
                for split in _SPLITS
            ]
        return [
            detections.Part(
                f"{split}_{piece.start}",
                split,
                functools.partial(released.read, self._source, config.division, split, piece),
            )
            for split in _SPLITS
            for piece in released.pieces(self._source, config.division, split)
        ]

    def _recordings(self, table: str) -> list[raw.Recording]:
        config = self.builder_config
        subjects = sequences.SPLITS["standard"][table]
        return raw.recordings(self._source, subjects, config.actions, config.poses)

    def _raw_parts(self, split: str) -> list[detections.Part]:
        config = self.builder_config
        parts, row = [], 0
        for recording in self._recordings(sequences.table(config.division, split)):
            subject = recording.sequence.subject
            if subject in sequences.SPLITS[config.division][split]:
                read = functools.partial(raw.read, recording, row, config.crop, config.input_px)
                parts.append(detections.Part(f"{subject}_{recording.video.stem}", split, read))
            row += raw.count_poses(recording.poses_2d) // sequences.STRIDE
        return parts


def prepare(
    config: ml_collections.ConfigDict,
    source: str | Path,
    data_dir: str | Path | None,
    detector: detections.Detector | None = None,
) -> Human36m:
    """Gives the builder of a configuration, after writing its data set if that is not there yet.

    Args:
        config: See `builder_config`.
        source: Where the files are, see `Human36m`.
        data_dir: Folder of all data sets; by default where TFDS keeps them.
        detector: Finds the joints in the crops of the raw form; without one for the others.

    Returns:
        The prepared builder, for `detections.read`.

    Raises:
        ValueError, FileNotFoundError: See `builder_config` and `Human36m.check`.
    """
    made = builder_config(config, source, detector)
    builder = Human36m(
        config=made,
        source=source,
        detector=detector if made.detector else None,
        data_dir=data_dir,
    )
    builder.prepare()
    return builder
