"""TFDS builder of Human3.6M: heatmaps and poses from any of the three forms it comes in."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from diffpose_jax.config import check_choice
from diffpose_jax.data import prepared
from diffpose_jax.data.human36m import raw, released, sequences, wehrbein
from diffpose_jax.data.prepared import Part

_RAW_FIELDS = ("actions", "poses", "crop", "input_px")
_DIGEST_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Human36mConfig(prepared.DetectionsConfig):
    """What a user chooses.

    Attributes:
      format: what the source is: "raw", the owners' videos and CDF files; "released", the HDF5
        file of the published preprocessing; "wehrbein", the pickles of Wehrbein et al. The other
        forms than the raw one hold heatmaps and poses that were made already.
      split: "standard", S9 and S11 are the test split, or "validation", S5 and S8 are.
      actions: which actions to take (raw).
      poses: which poses are the truth: "mono", as in the paper, or "mono_universal", bodies
        scaled to one height (raw).
      crop: which joints the crop goes around, see `raw.CROPS` (raw).
      input_px: side of the crops: 256, or 255 as in the published program (raw).
    """

    format: str = "raw"
    split: str = "standard"
    actions: tuple[str, ...] = sequences.ACTIONS
    poses: str = raw.POSES[0]
    crop: str = "all_joints"
    input_px: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(
            self,
            format=("raw", "released", "wehrbein"),
            split=tuple(sequences.SPLITS),
            poses=raw.POSES,
            crop=tuple(raw.CROPS),
        )
        if not self.actions or not set(self.actions) <= set(sequences.ACTIONS):
            raise ValueError(
                f"actions must be some of {', '.join(sequences.ACTIONS)}, not {self.actions}"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if self.format != "raw" and field.name in _RAW_FIELDS and value != field.default:
                raise ValueError(f"{field.name} cannot be chosen for the form {self.format!r}")


class Human36m(prepared.DetectionsBuilder):
    """Human3.6M: seven people performing fifteen actions before four cameras.

    `source` is the folder that holds the subjects' folders (raw) or the pickles (wehrbein), or the
    HDF5 file (released). There is one Human3.6M, so the files of the raw form are no part of
    `fields`. The other two forms hold the heatmaps of some detector: they are told apart by the
    sizes of their files and a part of each.
    """

    CONFIG = Human36mConfig
    LABEL = ("format", "split")

    def describe(self) -> dict[str, Any]:
        """What of the configuration makes a difference, and which source or detector."""
        fields = super().describe()
        if self.config.format == "raw":
            if self.detector is None or self.detector.input_px != self.config.input_px:
                raise ValueError(
                    "the raw form needs --detector, one that reads crops of"
                    f" input_px = {self.config.input_px} px"
                )
            return fields
        files = [self.source]
        if self.config.format == "wehrbein":
            files = [
                self.source / wehrbein.FILES[table] for table in sequences.tables(self.config.split)
            ]
        left_out = {*_RAW_FIELDS, "detector"}
        own = {key: value for key, value in fields.items() if key not in left_out}
        return own | {"source": _digest(files)}

    def columns(self) -> dict[str, tfds.features.FeatureConnector]:
        """The features beside heatmaps."""
        return {
            "pose_mm": prepared.POSE,
            "subject": tfds.features.Text(doc="such as S9"),
            "action": tfds.features.Text(doc="such as WalkDog"),
            "subaction": tfds.features.Scalar(np.int32, doc="0 or 1"),
            "camera": tfds.features.Text(doc="the camera's number, such as 54138969"),
            "frame": tfds.features.Scalar(np.int32, doc="frame of the video, from 0"),
            "row": tfds.features.Scalar(np.int32, doc="place in the whole table"),
            "ambiguous": tfds.features.Scalar(
                np.bool_, doc="in the subset H36MA; always false from the raw form"
            ),
        }

    def check(self) -> None:
        """Looks at all files: reads all poses, and all videos without decoding them."""
        split = self.config.split
        if self.config.format == "raw":
            raw.check(
                [found for table in sequences.tables(split) for found in self._recordings(table)]
            )
        elif self.config.format == "released":
            released.check(self.source, split)
        else:
            wehrbein.check(self.source, split)

    def parts(self) -> list[Part]:
        """One part for each recording, piece of the released table, or pickle."""
        return [part for subset in ("train", "test") for part in self._parts(subset)]

    def _parts(self, subset: str) -> list[Part]:
        source, split = self.source, self.config.split
        if self.config.format == "raw":
            return self._raw_parts(subset)
        if self.config.format == "wehrbein":
            return [Part(subset, subset, functools.partial(wehrbein.read, source, split, subset))]
        read = functools.partial(released.read, source, split, subset)
        return [
            Part(f"{subset}_{piece.start}", subset, functools.partial(read, piece))
            for piece in released.pieces(source, split, subset)
        ]

    def _recordings(self, table: str) -> list[raw.Recording]:
        subjects = sequences.SPLITS["standard"][table]
        return raw.recordings(self.source, subjects, self.config.actions, self.config.poses)

    def _raw_parts(self, subset: str) -> list[Part]:
        config = self.config
        parts, row = [], 0
        for recording in self._recordings(sequences.table(config.split, subset)):
            subject = recording.sequence.subject
            if subject in sequences.SPLITS[config.split][subset]:
                read = functools.partial(raw.read, recording, row, config.crop, config.input_px)
                parts.append(Part(f"{subject}_{recording.video.stem}", subset, read))
            row += raw.count_poses(recording.poses_2d) // sequences.STRIDE
        return parts


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file")
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(size // 2 - _DIGEST_BYTES // 2, 0))
            digest.update(f"{size}\0".encode() + file.read(_DIGEST_BYTES))
    return digest.hexdigest()[:12]
