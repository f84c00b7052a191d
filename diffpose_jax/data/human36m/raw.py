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

import contextlib
import itertools
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from diffpose_jax.data import cameras
from diffpose_jax.data.human36m import sequences
from diffpose_jax.data.human36m.sequences import Sequence
from diffpose_jax.detectors import crops
from diffpose_jax.io import extras
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
_FARTHEST = 1e6  # millimetres, and pixels
_MOST_FRAMES = 100_000  # the longest recording has about 6,000
_MOST_CDF_BYTES = 128 << 20  # as they are, and unpacked
_MOST_CALLS = 200_000
_WHOLE_IS_PACKED = bytes.fromhex("cccc0001")  # the second four bytes, else 0000ffff
_PIECE_BYTES = 64 << 10
_MOST_PACKED_CDF_BYTES = 4 << 20  # the packing of runs of zeros makes 128 times as many
_CDF_NUMBERS = ("CDF_FLOAT", "CDF_DOUBLE", "CDF_REAL4", "CDF_REAL8")


class Recording(NamedTuple):
    """The files of one recording.

    Attributes:
        sequence: What they show.
        poses_2d: CDF file of the projected joints.
        poses_3d: CDF file of the joints.
        video: MP4 file.
    """

    sequence: Sequence
    poses_2d: Path
    poses_3d: Path
    video: Path


def recordings(
    folder: Path, subjects: tuple[str, ...], actions: tuple[str, ...], poses: str
) -> list[Recording]:
    """Lists the recordings in the order of the published table: by subject and file name.

    Args:
        folder: Holds the subjects' folders.
        subjects: Such as ("S9", "S11").
        actions: Of `sequences.ACTIONS`.
        poses: One of `POSES`.

    Returns:
        The recordings without the broken ones.

    Raises:
        FileNotFoundError: If a folder or a file is missing.
        ValueError: If a file of poses has a name that no recording has.
    """
    found = []
    for subject in subjects:
        flat = _folder(folder / subject, "D2_Positions")
        solid = _folder(folder / subject, f"D3_Positions_{poses}")
        videos = folder / subject / "Videos"
        of_subject = []
        for path in sorted(flat.glob("*.cdf")):
            if path.name.startswith("_ALL"):  # every action in one go, without a place in the table
                continue
            try:
                sequence = sequences.parse(subject, path.stem)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            if sequence.action in actions and sequence not in sequences.BROKEN:
                names = (path, solid / path.name, videos / f"{path.stem}.mp4")
                of_subject.append(Recording(sequence, *names))
        _check_complete(flat, of_subject, sequences.expected(subject, actions))
        found += of_subject
    missing = [str(path) for recording in found for path in recording[1:] if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} files of recordings in {folder} are missing: {_name(missing)}."
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


def _check_complete(folder: Path, found: list[Recording], expected: list[Sequence]) -> None:
    missing = sorted(set(expected) - {recording.sequence for recording in found})
    if missing:
        names = [f"{s.action} (subaction {s.subaction}) {s.camera}" for s in missing]
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(expected)} recordings: {_name(names)}. Unpack "
            "the whole archive, or ask for fewer actions."
        )


def _name(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" .." if len(names) > 5 else "")


def check(found: list[Recording]) -> None:
    """Finds out whether the files can be read and belong together, without decoding the videos.

    Args:
        found: See `recordings`.

    Raises:
        ValueError: If a file is damaged or not what it should be, if either file of poses has
            another number of frames, or if a video is shorter than its poses.
    """
    for recording in tqdm(found, desc="checking recordings", unit=" recordings"):
        flat = read_poses(recording.poses_2d, 2)
        solid = read_poses(recording.poses_3d, 3)
        if len(flat) != len(solid):
            raise ValueError(
                f"{recording.poses_2d} has {len(flat)} frames, {recording.poses_3d} {len(solid)}."
            )
        if len(flat) < sequences.STRIDE:
            raise ValueError(f"{recording.poses_2d} has {len(flat)} frames; no fourth one.")
        frames = count_frames(recording.video)
        if frames < len(flat):
            raise ValueError(
                f"{recording.video} has {frames} frames, fewer than the {len(flat)} poses in "
                f"{recording.poses_2d}; is it the right video, and whole?"
            )


def read_poses(path: Path, dimensions: int) -> np.ndarray:
    """Reads a CDF file of poses.

    Args:
        path: The file; its variable "Pose" is (1, F, 64) or (1, F, 96).
        dimensions: 2 or 3.

    Returns:
        (F, 32, dimensions) float64: pixels or millimetres.

    Raises:
        ValueError: If it is not such a file; it is named.
    """
    with _cdf(path) as file:
        frames = _count_poses(file, path, dimensions)
        with _few_calls():
            poses = np.asarray(file.varget("Pose"), np.float64)
    if poses.shape != (1, frames, 32 * dimensions):
        raise ValueError(f"{path} is damaged: it holds {poses.shape} of its {frames} frames.")
    if not (np.abs(poses) < _FARTHEST).all():  # nan is refused, too
        raise ValueError(f"{path}: Pose holds NaN, infinity or what is far too large.")
    return poses.reshape(-1, 32, dimensions)


@contextlib.contextmanager
def _cdf(path: Path) -> Iterator[Any]:
    """Opens a CDF file; whatever goes wrong within the context is told of the file."""
    cdflib = extras.load("cdflib", "human36m")
    try:
        if path.stat().st_size > _MOST_CDF_BYTES:
            raise _NoPosesError(f"{path} is larger than {_MOST_CDF_BYTES:,} bytes.")
        _check_unpacked(path)
        with _few_calls():
            file = cdflib.CDF(path)
        yield file
    except _NoPosesError:
        raise
    # A damaged file makes the parser fail in any way.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a CDF file: {str(error)[:300]}") from error


def _check_unpacked(path: Path) -> None:
    """Refuses what would fill the memory: cdflib unpacks blocks to whatever their bytes say."""
    data = path.read_bytes()
    if data[4:8] == _WHOLE_IS_PACKED and len(data) > _MOST_PACKED_CDF_BYTES:
        raise _NoPosesError(
            f"{path} is packed as a whole, and larger than {_MOST_PACKED_CDF_BYTES:,} bytes; unpack"
            " it with the CDF toolkit's cdfconvert."
        )
    room = 2 * _MOST_CDF_BYTES  # for what is read and what it becomes: blocks can overlap
    for block in re.finditer(rb"\x1f\x8b\x08", data):  # how gzip begins
        unpack = zlib.decompressobj(wbits=31)
        for start in range(block.start(), len(data), _PIECE_BYTES):
            piece = data[start : start + _PIECE_BYTES]
            room -= len(piece)
            try:
                room -= len(unpack.decompress(piece))
            except zlib.error:  # it was chance, or reading will tell
                break
            if unpack.eof or room < 0:
                break
        if room < 0:
            raise _NoPosesError(f"{path} unpacks to far more than poses are.")


def _count_poses(file: Any, path: Path, dimensions: int) -> int:
    """The frames of the variable Pose, as the file's header has them."""
    with _few_calls():
        info = file.cdf_info()
        known = info.rVariables + info.zVariables
        pose = file.varinq("Pose") if "Pose" in known else None
    if pose is None:
        names = ", ".join(name[:40] for name in known[:20]) or "none"
        raise _NoPosesError(f"{path} has no variable Pose, only {names}.")
    shape = (pose.Last_Rec + 1, *pose.Dim_Sizes)
    if len(shape) != 3 or shape[0] != 1 or shape[2] != 32 * dimensions:
        raise _NoPosesError(
            f"{path}: Pose has shape {shape}; 32 joints make it (1, F, {32 * dimensions})."
        )
    if not 0 <= shape[1] <= _MOST_FRAMES or pose.Data_Type_Description not in _CDF_NUMBERS:
        raise _NoPosesError(
            f"{path}: Pose has {shape[1]} frames of {pose.Data_Type_Description}; it must have"
            f" {_CDF_NUMBERS[0]} or such, of at most {_MOST_FRAMES:,} frames."
        )
    return shape[1]


class _NoPosesError(ValueError):
    """A CDF file is whole, but not one of poses."""


@contextlib.contextmanager
def _few_calls() -> Iterator[None]:
    """Ends what makes far more calls of functions than an honest file needs.

    A CDF file is a web of references, which cdflib follows as they come: in a damaged one for
    ever. It is all Python, so that its calls can be counted, in this thread alone.

    Raises:
        RuntimeError: After `_MOST_CALLS` calls.
    """
    calls = itertools.count()

    def count(*_: Any) -> None:
        if next(calls) > _MOST_CALLS:
            raise RuntimeError("it leads in circles")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)


def count_frames(path: Path) -> int:
    """Counts the frames of a video without decoding more than the first.

    Args:
        path: The file.

    Raises:
        ValueError: If it cannot be decoded, or ends before the number of frames that it announces.
    """
    av = extras.load("av", "human36m")
    try:
        with av.open(path) as container:
            next(container.decode(video=0))
        with av.open(path) as container:
            stream = container.streams.video[0]
            frames = sum(packet.size > 0 for packet in container.demux(stream))
            announced = stream.frames
    # av reads texts of a damaged file, too.
    except (av.FFmpegError, IndexError, StopIteration, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be decoded as a video: {error}") from error
    if frames < announced:
        raise ValueError(f"{path} is cut off: it holds {frames} of its {announced} frames.")
    return frames


def count_poses(path: Path) -> int:
    """Tells how many frames a file of projected joints has, from its header.

    Raises:
        ValueError: As `read_poses`.
    """
    with _cdf(path) as file:
        return _count_poses(file, path, 2)


def read(
    recording: Recording, first_row: int, crop: str, input_px: int
) -> Iterator[dict[str, np.ndarray]]:
    """Reads every fourth frame of a recording.

    Args:
        recording: See `recordings`.
        first_row: Place of its first frame in the whole table.
        crop: A key of `CROPS`.
        input_px: P, side of the crops.

    Yields:
        Columns of up to 64 frames: `crops` (n, P, P, 3) uint8, `hard` (n,), False, and those of
        `sequences.columns`.

    Raises:
        ValueError: If the video cannot be decoded to the last pose, or the person is not in it.
    """
    keypoints_px = read_poses(recording.poses_2d, 2)
    points_mm = read_poses(recording.poses_3d, 3)
    frames = np.arange(sequences.STRIDE - 1, len(keypoints_px), sequences.STRIDE)
    square = cameras.square_crop(keypoints_px[frames][:, CROPS[crop]])
    cut = _cut(recording.video, frames, square, input_px)
    for start in range(0, len(frames), _FRAMES):
        here = frames[start : start + _FRAMES]
        yield {
            "crops": np.stack(list(itertools.islice(cut, len(here)))),
            "hard": np.zeros(len(here), bool),
            **sequences.columns(
                recording.sequence,
                here,
                first_row + start + np.arange(len(here)),
                points_mm[here][:, H36M_FROM_32],
            ),
        }


def _cut(
    path: Path, frames: np.ndarray, square: cameras.Crop, input_px: int
) -> Iterator[np.ndarray]:
    """Cuts the squares (n,) out of frames (n,) of a video."""
    parts = zip(frames, _pictures(path, frames), *square, strict=True)
    for frame, picture, corner_px, side_px in parts:
        try:
            yield crops.square_crop_image(picture, corner_px, side_px, input_px)
        except ValueError as error:
            raise ValueError(f"{path}: frame {frame}: {error}") from error


def _pictures(path: Path, frames: np.ndarray) -> Iterator[np.ndarray]:
    """Decodes frames (n,), in order, of a video: (H, W, 3) uint8, RGB."""
    av = extras.load("av", "human36m")
    wanted, decoded = set(frames.tolist()), 0
    try:
        with av.open(path) as container:
            for frame in container.decode(video=0):
                if decoded in wanted:
                    yield frame.to_ndarray(format="rgb24")
                decoded += 1
                if decoded > frames[-1]:
                    return
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be decoded after {decoded} frames: {error}") from error
    raise ValueError(f"{path} ends after {decoded} frames; frame {frames[-1]} is needed.")
