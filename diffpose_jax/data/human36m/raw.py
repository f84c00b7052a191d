"""Human3.6M as its owners give it out: videos and poses in CDF files, subject by subject.

A subject's folder `S1` holds `Poses_D2_Positions` (32 projected joints), `Poses_D3_Positions_mono`
(32 joints in camera coordinates, millimetres), `Poses_D3_Positions_mono_universal` (the same of
bodies that are scaled to one height) and `Videos`, with one file a recording, see `sequences`.
As unpacked from the official archives, the poses lie in `MyPoseFeatures/D2_Positions` and so on.

Frames and poses correspond from the first on. Videos may be longer than their poses: most run on
for a few frames, and of some recordings of S9 the poses were cut to the part that is right (Waiting
1 has 1,612 poses and 3,393 frames). A video that is shorter is not whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, UInt8
from tqdm import tqdm

from diffpose_jax.data import sources
from diffpose_jax.data.human36m import sequences
from diffpose_jax.data.human36m.sequences import Sequence
from diffpose_jax.detectors import crops
from diffpose_jax.io import extras
from diffpose_jax.io.files import FileError
from diffpose_jax.skeleton import H36M_FROM_32, MPII_TO_H36M

POSES: tuple[str, ...] = ("mono", "mono_universal")
CROPS: dict[str, tuple[int, ...]] = {
    "all_joints": tuple(range(32)),
    "detector_joints": tuple(H36M_FROM_32[joint] for joint in MPII_TO_H36M),
}
"""Which of the 32 joints the square crop is drawn around, 1.2 times as large as their extent.

"all_joints" is what the published program does. The paper crops "as Wehrbein et al.", whose
detections are given out without the program that made them; the notes beside DiffPose's
preprocessing describe their crop as the same square around 16 joints, taken here to be those that
the detector finds. It is tighter: toes, fingers and the nose do not count.
"""

_FRAMES = 64
_EXTRA = "human36m"


class Recording(NamedTuple):
    """The files of one recording: CDF files of the projected and of the 3D joints, and MP4."""

    sequence: Sequence
    poses_2d: Path
    poses_3d: Path
    video: Path


def recordings(
    folder: Path, subjects: tuple[str, ...], actions: tuple[str, ...], poses: str
) -> list[Recording]:
    """Lists the recordings in the order of the published table: by subject and file name.

    Args:
      folder: holds the subjects' folders.
      subjects: such as ("S9", "S11").
      actions: of `sequences.ACTIONS`.
      poses: one of `POSES`.
    """
    found = []
    for subject in subjects:
        flat = _folder(folder / subject, "D2_Positions")
        solid = _folder(folder / subject, f"D3_Positions_{poses}")
        of_subject = []
        for sequence in sequences.expected(subject, actions):
            names = sequences.file_names(sequence)
            name = next((name for name in names if (flat / f"{name}.cdf").is_file()), names[0])
            video = folder / subject / "Videos" / f"{name}.mp4"
            poses_2d, poses_3d = (at / f"{name}.cdf" for at in (flat, solid))
            of_subject.append(Recording(sequence, poses_2d, poses_3d, video))
        found += sorted(of_subject, key=lambda recording: recording.poses_2d.name)
    missing = [path for recording in found for path in recording[1:] if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} files of {len(found)} recordings are missing:"
            f" {sources.listed(missing)}; unpack the whole archives, or ask for fewer actions."
        )
    return found


def _folder(subject: Path, name: str) -> Path:
    candidates = [subject / f"Poses_{name}", subject / "MyPoseFeatures" / name]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    names = " nor ".join(str(candidate.relative_to(subject)) for candidate in candidates)
    raise FileNotFoundError(
        f"{subject} has no folder {names}: unpack the archives of each subject there."
    )


def check(found: list[Recording]) -> None:
    """Finds out whether the files can be read and belong together, without decoding the videos."""
    for recording in tqdm(found, desc="checking recordings", unit=" recordings"):
        flat = read_poses(recording.poses_2d, 2)
        solid = read_poses(recording.poses_3d, 3)
        if len(flat) != len(solid) or len(flat) < sequences.STRIDE:
            raise FileError(
                f"{recording.poses_2d} has {len(flat)} frames, {recording.poses_3d} {len(solid)};"
                f" both must have as many, and at least {sequences.STRIDE}."
            )
        frames = count_frames(recording.video)
        if frames < len(flat):
            raise FileError(
                f"{recording.video} has {frames} frames, fewer than the {len(flat)} poses in "
                f"{recording.poses_2d}; is it the right video, and whole?"
            )


def read_poses(path: Path, dimensions: int) -> Float64[np.ndarray, "F 32 dimensions"]:
    """Reads a CDF file of poses, in pixels (2 dimensions) or millimetres (3)."""
    cdflib = extras.load("cdflib", _EXTRA)
    with sources.reading(path, "a CDF file"):
        file = cdflib.CDF(path)
        info = file.cdf_info()
        known = info.rVariables + info.zVariables
        if "Pose" not in known:
            raise FileError(f"{path} has no variable Pose, only {', '.join(known) or 'none'}.")
        poses = np.asarray(file.varget("Pose"), np.float64)
    if poses.ndim != 3 or poses.shape[::2] != (1, 32 * dimensions):
        raise FileError(
            f"{path}: Pose has shape {poses.shape}; 32 joints make it (1, F, {32 * dimensions})."
        )
    if not np.isfinite(poses).all():
        raise FileError(f"{path}: Pose holds NaN or infinity.")
    return poses.reshape(-1, 32, dimensions)


def count_poses(path: Path) -> int:
    """How many frames a checked file of poses has, from its header."""
    cdflib = extras.load("cdflib", _EXTRA)
    with sources.reading(path, "a CDF file"):
        return int(cdflib.CDF(path).varinq("Pose").Dim_Sizes[0])


def count_frames(path: Path) -> int:
    """Counts the frames of a video, FileError if fewer than it announces, without decoding them."""
    av = extras.load("av", _EXTRA)
    with sources.reading(path, "a video"), av.open(path) as container:
        stream = container.streams.video[0]
        frames = sum(packet.size > 0 for packet in container.demux(stream))
        announced = stream.frames
    if frames < announced:
        raise FileError(f"{path} is cut off: it holds {frames} of its {announced} frames.")
    return frames


def read(
    recording: Recording, first_row: int, crop: str, input_px: int
) -> Iterator[dict[str, np.ndarray]]:
    """Reads every fourth frame of a recording, 64 at a time, as `crops` and the other columns.

    Args:
      recording: see `recordings`.
      first_row: place of its first frame in the whole table.
      crop: a key of `CROPS`.
      input_px: side of the crops.
    """
    keypoints_px = read_poses(recording.poses_2d, 2)
    points_mm = read_poses(recording.poses_3d, 3)
    frames = np.arange(sequences.STRIDE - 1, len(keypoints_px), sequences.STRIDE)
    square = crops.square_crop(keypoints_px[frames][:, CROPS[crop]])
    cut = _cut(recording.video, frames, square, input_px)
    for start in range(0, len(frames), _FRAMES):
        here = frames[start : start + _FRAMES]
        rows = first_row + start + np.arange(len(here))
        yield {
            "crops": np.stack(list(itertools.islice(cut, len(here)))),
            "ambiguous": np.zeros(len(here), bool),
            **sequences.columns(recording.sequence, here, rows, points_mm[here][:, H36M_FROM_32]),
        }


def _cut(
    path: Path, frames: Int[np.ndarray, " n"], square: crops.Crop, input_px: int
) -> Iterator[UInt8[np.ndarray, "P P 3"]]:
    """Cuts a square out of each of the frames of a video."""
    wanted = dict(zip(frames.tolist(), zip(*square, strict=True), strict=True))
    last = max(wanted)
    av = extras.load("av", _EXTRA)
    with sources.reading(path, "a video"), av.open(path) as container:
        for number, decoded in enumerate(container.decode(video=0)):
            if number in wanted:
                picture, (corner_px, side_px) = decoded.to_ndarray(format="rgb24"), wanted[number]
                try:
                    yield crops.square_crop_image(picture, corner_px, side_px, input_px)
                except ValueError as error:
                    raise FileError(f"{path}: frame {number}: {error}") from error
            if number == last:
                return
    raise FileError(f"{path} ends before frame {last}, which is needed.")
