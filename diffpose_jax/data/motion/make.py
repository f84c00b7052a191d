"""Makes `mocap.npz`, the motion capture that comes with the package, from its two sources.

    python -m diffpose_jax.data.motion.make --pybullet_wheel FILE --bvh_dir DIR

They are the `humanoid3d` clips in the wheel of pybullet and two recordings of the CMU database
(README.md says how to get both). Their two skeletons differ, so each clip keeps its bone directions
and gets the bone lengths of one body with the proportions of Human3.6M. The bytes written depend on
nothing but the sources (and zlib's version).
"""

from __future__ import annotations

import argparse
import functools
import json
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from diffpose_jax.data.motion.bodies import retarget
from diffpose_jax.data.motion.bvh import read_bvh
from diffpose_jax.data.motion.clips import Clip
from diffpose_jax.data.motion.skeletons import to_h36m

TEST_CLIPS = {
    "humanoid3d_dance_b", "humanoid3d_jump", "humanoid3d_punch", "humanoid3d_walk",
    "walker_turn_right0", "walker_turn_right1",
}  # fmt: skip
"""Whole clips whose actions have relatives in training (README.md gives the distances)."""

LEFT_OUT = {
    "humanoid3d_backflip", "humanoid3d_cartwheel", "humanoid3d_crawl",
    "humanoid3d_getup_facedown", "humanoid3d_getup_faceup", "humanoid3d_roll",
}  # fmt: skip
"""Clips on the floor or upside down: one short example of each is too little to learn them."""

UNIT_MM = 0.1
"""Positions are stored as int16 multiples of this: up to 3.27 m, finer than the capture."""

HUMANOID_JOINTS = (
    ("root", "chest", 4), ("chest", "neck", 4),
    ("root", "right_hip", 4), ("right_hip", "right_knee", 1), ("right_knee", "right_ankle", 4),
    ("chest", "right_shoulder", 4), ("right_shoulder", "right_elbow", 1),
    ("root", "left_hip", 4), ("left_hip", "left_knee", 1), ("left_knee", "left_ankle", 4),
    ("chest", "left_shoulder", 4), ("left_shoulder", "left_elbow", 1),
)  # fmt: skip
"""Parent and joint in the order of a frame; a quaternion (w first, 4) or an angle about z (1)."""

HUMANOID_H36M = (
    "root", "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
    "chest", "thorax", "nose", "head", "left_shoulder", "left_elbow", "left_wrist",
    "right_shoulder", "right_elbow", "right_wrist",
)  # fmt: skip
"""The joints of Human3.6M, by the humanoid's names."""


def main() -> None:
    """Reads the sources named on the command line and writes the archive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pybullet_wheel", type=Path, required=True)
    parser.add_argument("--bvh_dir", type=Path, required=True, help="holds 01_01.bvh, 01_03.bvh")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("mocap.npz"))
    arguments = parser.parse_args()
    clips = humanoid_clips(arguments.pybullet_wheel) + cmu_clips(arguments.bvh_dir)
    write(clips, arguments.output)
    for clip in clips:
        print(f"{clip.name:28s} {clip.split:5s} {clip.fps:5.1f} fps {len(clip.positions_mm):5d}")


def write(clips: list[Clip], path: Path) -> None:
    """Writes the clips as one compressed archive that `load_embedded` reads."""
    positions_mm = np.concatenate([clip.positions_mm for clip in clips])
    np.savez_compressed(
        path,
        positions=np.round(positions_mm / UNIT_MM).astype(np.int16),
        unit_mm=np.float64(UNIT_MM),
        lengths=np.array([len(clip.positions_mm) for clip in clips], np.int32),
        fps=np.array([clip.fps for clip in clips], np.float64),
        names=np.array([clip.name for clip in clips]),
        splits=np.array([clip.split for clip in clips]),
    )


def _clip(name: str, fps: float, points: np.ndarray) -> Clip:
    split = "test" if name in TEST_CLIPS else "train"
    return Clip(name, split, fps, retarget(points).astype(np.float32))


def humanoid_clips(wheel: Path) -> list[Clip]:
    """Reads the clips of the 15-joint humanoid in the wheel of pybullet, but `LEFT_OUT`."""
    with zipfile.ZipFile(wheel) as archive:
        # The file ends in a NUL byte, which no XML parser takes.
        urdf = archive.read("pybullet_data/humanoid/humanoid.urdf").rstrip(b"\0")
        offsets = {
            joint.attrib["name"]: np.array(origin.attrib["xyz"].split(), np.float64)
            for joint in ET.fromstring(urdf).iter("joint")
            for origin in joint.iter("origin")
        }
        clips = []
        motions = "pybullet_data/data/motions/"
        for path in sorted(archive.namelist()):
            is_human = path.startswith((motions + "humanoid3d_", motions + "walker/"))
            name = path.removeprefix(motions).removesuffix(".txt").replace("/", "_")
            if is_human and path.endswith(".txt") and name not in LEFT_OUT:
                frames = np.array(json.loads(archive.read(path))["Frames"], np.float64)
                # The last frame of a clip has no duration; the others share one.
                fps = float(round(1 / np.median(frames[:, 0]), 1))
                clips.append(_clip(name, fps, humanoid_points(frames, offsets)))
    return clips


def humanoid_points(
    frames: Float[np.ndarray, "F 44"], offsets: dict[str, np.ndarray]
) -> Float[np.ndarray, "F 17 3"]:
    """Forward kinematics of the humanoid, with the joints that it lacks filled in, in metres.

    Args:
      frames: duration, root position, root quaternion (w first, any length), `HUMANOID_JOINTS`.
      offsets: joint name to its position in the parent's frame; x forward, y up, z right.
    """
    from_quaternions = functools.partial(Rotation.from_quat, scalar_first=True)
    rotations = {"root": from_quaternions(frames[:, 4:8])}
    points = {"root": frames[:, 1:4]}

    def place(parent: str, offset: np.ndarray) -> np.ndarray:
        return points[parent] + rotations[parent].apply(offset / 4)  # urdf to metres

    column = 8
    for parent, joint, size in HUMANOID_JOINTS:
        numbers = frames[:, column : column + size]
        column += size
        points[joint] = place(parent, offsets[joint])
        is_hinge = size == 1
        turn = Rotation.from_euler("z", numbers) if is_hinge else from_quaternions(numbers)
        rotations[joint] = rotations[parent] * turn
    # The neck joint lies below the line of the shoulders, Human3.6M's thorax above it; the
    # shoulders then slope down from it as they do there and in the CMU skeleton.
    points["thorax"] = place("chest", offsets["neck"] + np.array([0.0, 0.14, 0.0]))
    lift = points["thorax"] - points["neck"]
    points["nose"] = lift + place("neck", np.array([0.18, 0.40, 0.0]))  # 45 mm in front
    points["head"] = lift + place("neck", np.array([0.10, 0.86, 0.0]))  # its top
    for wrist, elbow in (("left_wrist", "left_elbow"), ("right_wrist", "right_elbow")):
        points[wrist] = place(elbow, offsets[wrist])
    x, y, z = np.moveaxis(np.stack([points[name] for name in HUMANOID_H36M], axis=1), -1, 0)
    return np.stack([x, -z, y], axis=-1)


def cmu_clips(folder: Path) -> list[Clip]:
    """Reads two recordings of the CMU database (subject 1, BVH conversion), every fourth frame."""
    clips = []
    for name in ("01_01", "01_03"):
        path = folder / f"{name}.bvh"
        points, fps = to_h36m(path, read_bvh(path))
        clips.append(_clip(f"cmu_{name}", round(fps / 4, 1), points[::4]))
    return clips


if __name__ == "__main__":
    main()
