"""Clean motion for training, from what recordings and their converters leave in the files."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import Counter
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from tqdm import tqdm

from diffpose_jax.data.motion import clips
from diffpose_jax.data.motion.bodies import retarget
from diffpose_jax.data.motion.clips import Clip
from diffpose_jax.data.motion.recording import listed, read_lines
from diffpose_jax.io.arrays import npz_bytes
from diffpose_jax.io.files import read_json, write_atomic, write_json
from diffpose_jax.skeleton import H36M_BONES, H36M_JOINTS, H36M_PARENTS

FASTEST_M_S = 12.0
"""Of a joint relative to the hip, and of the hip's height. A kick at a football reaches 11; a spin
kick of martial arts reaches 12.5 and loses a few frames."""

SHORTEST_S = 0.5

_KEPT = "frames kept"
_AT_REST = "frames dropped: rest poses"
_SHORT = f"frames dropped: in pieces under {SHORTEST_S} s"
_THINNED = "frames dropped: thinned"

_SETTINGS = "cleaning.json"
# Zero poses are within 3 degrees of a T; no other frame of CMU's subjects 1 to 3 and 5 to 9, who
# dance, too, has both arms and both knees within 20.
_REST_COSINE = np.cos(np.radians(20))
_ARMS = [H36M_JOINTS.index(name) for name in ("LElbow", "LWrist", "RElbow", "RWrist")]
_OUTWARDS = np.array([1, 1, -1, -1])  # along the line from the right shoulder to the left
_SHOULDERS = [H36M_JOINTS.index(name) for name in ("LShoulder", "RShoulder")]
_KNEES = [H36M_JOINTS.index(name) for name in ("LKnee", "RKnee")]
_ANKLES = [H36M_JOINTS.index(name) for name in ("LAnkle", "RAnkle")]


def clean(clip: Clip, fps: float = 0.0) -> tuple[list[Clip], Counter[str]]:
    """Gives a clip the bones of one body, and leaves out what is no motion.

    It is divided between frames where a joint moves faster than `FASTEST_M_S`: a cut, or an error
    of the capture. Each piece loses the rest pose that it starts with (a T), and is dropped if it
    is then shorter than `SHORTEST_S`. Where a converter smeared a cut, a blend of the poses over
    some frames, each of these is a piece of its own.

    Args:
      clip: the motion as recorded.
      fps: frames a second that are enough, see `clips.thin`.

    Returns:
      The pieces that are left, named as the clip, the second with ".2" and so on; the number of
      cuts, and of frames by what became of them.

    Raises:
      ValueError: a bone has no length, so that it has no direction.
    """
    points = clip.positions_mm.astype(np.float64)
    for parent, joint in H36M_BONES:
        if np.linalg.norm(points[:, joint] - points[:, parent], axis=-1).min() < 1:
            raise ValueError(
                f"{clip.name}: the bone that ends in {H36M_JOINTS[joint]} has no length"
            )
    positions_mm = retarget(points)
    cuts = np.flatnonzero(step_speeds(positions_mm, clip.fps) > FASTEST_M_S) + 1
    pieces: list[Clip] = []
    counts = Counter({"cuts": len(cuts), _KEPT: 0, _AT_REST: 0, _SHORT: 0, _THINNED: 0})
    for piece_mm in np.split(positions_mm, cuts):
        rest = int(np.argmin([*_is_rest_pose(piece_mm), False]))
        counts[_AT_REST] += rest
        piece_mm = piece_mm[rest:]
        if len(piece_mm) < round(SHORTEST_S * clip.fps):
            counts[_SHORT] += len(piece_mm)
            continue
        name = f"{clip.name}.{len(pieces) + 1}" if pieces else clip.name
        whole = dataclasses.replace(clip, name=name, positions_mm=piece_mm.astype(np.float32))
        pieces.append(clips.thin(whole, fps))
        kept = len(pieces[-1].positions_mm)
        counts.update({_KEPT: kept, _THINNED: len(piece_mm) - kept})
    return pieces, counts


def clean_folder(
    source: str | Path, output: str | Path, fps: float = 0.0, names: str | Path | None = None
) -> Counter[str]:
    """Cleans the motion files under a folder, into a folder that `clips.read_folder` reads.

    Each piece is written as `<name>.npz`; what is under `test/` stays there. Stopped and started
    again, it goes on with the recordings whose `<name>.npz` is missing.

    Args:
      source: searched with all its sub-folders.
      output: not within the source.
      fps: frames a second that are enough, see `clips.thin`.
      names: a text file of the recordings to clean, a pattern (`fnmatch`, case counts) a line: of
        names as `clips.read_folder` gives them, or of their last parts. After # stands a comment.

    Returns:
      The numbers of `clean`, in sum, and of recordings.

    Raises:
      ValueError: a file cannot be read, a pattern matches nothing, or the output holds motion that
        was cleaned with other frames a second.
      OSError: if a file cannot be written, as on a full disk.
    """
    source, output = Path(source), Path(output)
    if source.resolve() in (output.resolve(), *output.resolve().parents):
        raise ValueError(f"{output} lies in {source}: its motion would be read as recordings")
    found = clips.find_files(source)
    if names is not None:
        found = _chosen(found, Path(names), source)
    _check_settings(output / _SETTINGS, {"fps": fps})
    totals: Counter[str] = Counter()
    for name, path in tqdm(found.items(), desc="cleaning", unit=" recordings"):
        is_test = source / clips.TEST_FOLDER in path.parents
        folder = output / clips.TEST_FOLDER if is_test else output
        if (folder / f"{name}.npz").exists():
            totals["recordings that were there already"] += 1
            continue
        recording = dataclasses.replace(clips.read_clip(path, root=source), name=name)
        pieces, counts = clean(recording, fps)
        # The first one last: it tells that the others are there.
        for piece in reversed(pieces):
            content = {"positions_mm": piece.positions_mm, "fps": piece.fps}
            write_atomic(folder / f"{piece.name}.npz", npz_bytes(content))
        what = "cleaned" if pieces else "of which nothing is left"
        totals.update({f"recordings {what}": 1, "clips written": len(pieces), **counts})
    return totals


def _chosen(found: dict[str, Path], names: Path, source: Path) -> dict[str, Path]:
    """The recordings that a list names, each of its lines at least one."""
    lines = [line.text.partition("#")[0].strip() for line in read_lines(names)]
    matching = {
        pattern: {
            name
            for name in found
            if any(fnmatch.fnmatchcase(part, pattern) for part in (name, name.rpartition("/")[2]))
        }
        for pattern in lines
        if pattern
    }
    unknown = [pattern for pattern, recordings in matching.items() if not recordings]
    if unknown or not matching:
        raise ValueError(
            f"{names}: no recording under {source} for {listed(unknown) or 'an empty list'}; "
            f"it has: {listed(found)}"
        )
    chosen = set().union(*matching.values())
    return {name: path for name, path in found.items() if name in chosen}


def _check_settings(path: Path, settings: dict[str, float]) -> None:
    """Keeps motion of two kinds from one folder."""
    if path.exists() and (other := read_json(path)) != settings:
        raise ValueError(
            f"{path.parent} holds motion cleaned with {other}, not {settings}; name another folder"
        )
    write_json(path, settings)


def step_speeds(positions_mm: Float[np.ndarray, "F 17 3"], fps: float) -> Float[np.ndarray, " F-1"]:
    """Speed of the fastest joint from each frame to the next, in metres a second.

    Joints count relative to the hip, the hip by its height alone: x = y = 0 for it in a clip.
    """
    moving = positions_mm.copy()
    moving[:, 1:] -= moving[:, :1]
    return np.linalg.norm(np.diff(moving, axis=0), axis=-1).max(axis=1) * fps / 1000


def _is_rest_pose(positions_mm: Float[np.ndarray, "F 17 3"]) -> Bool[np.ndarray, " F"]:
    """Whether both arms are straight out sideways and both knees straight."""
    bones = positions_mm - positions_mm[:, H36M_PARENTS]
    bones /= np.maximum(np.linalg.norm(bones, axis=-1, keepdims=True), 1e-9)  # the hip has none
    left, right = np.moveaxis(positions_mm[:, _SHOULDERS], 1, 0)
    line = (left - right) / np.linalg.norm(left - right, axis=-1, keepdims=True)
    arms = np.einsum("fjc,fc->fj", bones[:, _ARMS], line) * _OUTWARDS
    knees = np.sum(bones[:, _KNEES] * bones[:, _ANKLES], axis=-1)
    return np.concatenate([arms, knees], axis=1).min(axis=1) > _REST_COSINE
