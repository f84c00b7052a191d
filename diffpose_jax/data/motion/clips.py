"""Motion capture: the clips that come with the package, and a user's own motion files.

The embedded clips (see README.md beside this file) let the whole program run without a
download. They are few and correlated: numbers obtained on them say that the method works,
not how well it would do on Human3.6M.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from diffpose_jax.data.motion.asf_amc import read_amc
from diffpose_jax.data.motion.bodies import STATURE_JOINTS, STATURE_PARENTS
from diffpose_jax.data.motion.bvh import read_bvh
from diffpose_jax.data.motion.recording import Recording, listed
from diffpose_jax.data.motion.skeletons import MAPPING_FILE, to_h36m
from diffpose_jax.io import arrays
from diffpose_jax.skeleton import H36M_JOINTS, NUM_JOINTS

ARCHIVE = Path(__file__).with_name("mocap.npz")
"""The clips that come with the package, made by `make.py`."""

TEST_FOLDER = "test"
"""Sub-folder of a user's folder: all motion under it is for testing."""

_STATURE_MM = (1000.0, 2300.0)
_LOWEST_FLOOR_MM = -300.0
_FARTHEST_MM = 1e6
_FASTEST_FPS = 1e5

_READERS: dict[str, Callable[[Path], Recording]] = {".amc": read_amc, ".bvh": read_bvh}
_SUFFIXES = (*_READERS, ".npz")


@dataclasses.dataclass(frozen=True)
class Clip:
    """One recording of one person."""

    name: str  # unique among the clips it was loaded with
    split: str  # "train" or "test"; a clip is never divided between them
    fps: float  # frames a second
    # World axes, z up, the floor near z = 0. The hip has x = y = 0 in every frame.
    positions_mm: Float32[np.ndarray, "F 17 3"]


def load_embedded() -> list[Clip]:
    """Loads the clips that come with the package."""
    with np.load(ARCHIVE, allow_pickle=False) as archive:
        content = dict(archive)
    positions_mm = (content["positions"] * content["unit_mm"]).astype(np.float32)
    parts = np.split(positions_mm, np.cumsum(content["lengths"])[:-1])
    columns = (content["names"], content["splits"], content["fps"], parts)
    return [
        Clip(str(name), str(split), float(fps), part)
        for name, split, fps, part in zip(*columns, strict=True)
    ]


def read_clip(path: str | Path, *, root: str | Path | None = None) -> Clip:
    """Reads one motion file of the user, `.npz`, `.bvh` or `.amc`, see README.md.

    Args:
      path: the file; the clip is named as it is, without suffix, and in the training split.
      root: the folder up to which, from that of the file, a `skeleton.json` is looked for; by
        default that of the file alone. The nearest holds.

    Raises:
      ValueError: the format is unknown or the content is not a human motion in millimetres.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"{path}: convert this {suffix} file to one of: {', '.join(_SUFFIXES)}")
    if suffix in _READERS:
        mapping = _mapping_file(path, Path(root or path.parent))
        positions_mm, fps = to_h36m(path, _READERS[suffix](path), mapping)
    else:
        positions_mm, fps = _read_npz(path)
    if problem := _problem(positions_mm, fps):
        raise ValueError(f"{path}: {problem}")
    positions_mm = positions_mm.astype(np.float64)
    positions_mm[..., :2] -= positions_mm[:, :1, :2]
    return Clip(path.stem, "train", fps, positions_mm.astype(np.float32))


def _read_npz(path: Path) -> tuple[np.ndarray, float]:
    expected = (
        f"{path} is not a motion file: it must be written by numpy.savez with the keys "
        "positions_mm (F, 17, 3) and fps (one number)"
    )
    try:
        content = arrays.read(path)
    except ValueError as error:
        raise ValueError(f"{expected}: {error}") from error
    if not isinstance(content, dict) or not {"positions_mm", "fps"} <= set(content):
        raise ValueError(expected)
    fps = content["fps"]
    if fps.size != 1 or fps.dtype.kind not in "fiu":
        raise ValueError(f"{expected}: fps is {fps.shape} {fps.dtype}")
    return content["positions_mm"], float(fps.item())


def _mapping_file(path: Path, root: Path) -> Path | None:
    """The nearest mapping file, from the folder of a motion file up to `root`."""
    folders = [folder for folder in path.parents if folder == root or root in folder.parents]
    found = (folder / MAPPING_FILE for folder in folders or [path.parent])
    return next((file for file in found if file.is_file()), None)


def thin(clip: Clip, fps: float) -> Clip:
    """Drops frames of a clip, evenly, as long as `fps` or more are left; 0 keeps all."""
    # 0.2 %: 30.00003 and 29.97 frames a second, as files tell them, are 30.
    stride = max(1, int(clip.fps / fps * 1.002)) if fps else 1
    positions_mm = clip.positions_mm[::stride]
    return dataclasses.replace(clip, fps=clip.fps / stride, positions_mm=positions_mm)


def find_files(folder: str | Path) -> dict[str, Path]:
    """Finds all motion files under a folder, by the names that `read_folder` gives their clips.

    Raises:
      ValueError: there are none, or two have one name.
    """
    folder = Path(folder)
    named: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in _SUFFIXES or not path.is_file():
            continue
        base = folder / TEST_FOLDER if folder / TEST_FOLDER in path.parents else folder
        name = path.relative_to(base).with_suffix("").as_posix()
        if name in named:
            raise ValueError(
                f"{path} and {named[name]} have the same clip name {name!r}; rename or remove one"
            )
        named[name] = path
    if not named:
        raise ValueError(f"no motion files under {folder}; it must hold {', '.join(_SUFFIXES)}")
    return named


def read_folder(folder: str | Path, *, fps: float = 0.0, test_clips: str = "") -> list[Clip]:
    """Reads all motion files under a folder and divides them into train and test, by clip.

    Files under the sub-folder `test/` and those that `test_clips` names are the test clips and
    all others the training clips. With neither, a hash of its name puts about one clip in five
    into test, at least one into each split. Files of other kinds are passed over. The clips are in
    order of their names: paths within the folder (or `test/`) without suffix.

    Args:
      folder: searched with all its sub-folders.
      fps: frames a second that are enough, see `thin`.
      test_clips: a pattern (`fnmatch`, case counts) for names of test clips: "03_*" holds out
        subject 3 of the CMU database.

    Raises:
      ValueError: a split would be empty, two clips have one name, `test_clips` matches none, or
        a file cannot be read.
    """
    folder = Path(folder)
    test_folder, named = folder / TEST_FOLDER, find_files(folder)
    matching = {name for name in named if fnmatch.fnmatchcase(name, test_clips)}
    if test_clips and not matching:
        raise ValueError(
            f"{folder} has no clip that matches test_clips {test_clips!r}; it has: {listed(named)}"
        )
    if test_clips or test_folder.is_dir():
        test = matching | {name for name, path in named.items() if test_folder in path.parents}
    else:
        test = _test_names(named)
    for split, names in (("train", named.keys() - test), ("test", test)):
        if not names:
            raise ValueError(
                f"{folder} gives no {split} clip: it needs at least two motion files; with a "
                "sub-folder test/ or a pattern, one at least in it and one at least outside it"
            )
    found = []
    for name, path in sorted(named.items()):
        clip = thin(read_clip(path, root=folder), fps)
        split = "test" if name in test else "train"
        found.append(dataclasses.replace(clip, name=name, split=split))
    return found


def _test_names(names: Iterable[str]) -> set[str]:
    """About one name in five, the same on every machine and as the folder grows."""
    digests = {name: int(hashlib.sha256(name.encode()).hexdigest(), 16) for name in names}
    ordered = sorted(digests, key=digests.__getitem__)
    chosen = {name for name in ordered if digests[name] % 5 == 0} or {ordered[0]}
    # Neither split is empty, where there are two clips.
    return chosen - {ordered[-1]} if len(chosen) == len(ordered) else chosen


def _problem(positions_mm: np.ndarray, fps: float) -> str | None:
    """Why something cannot be a human motion in this convention."""
    shape = positions_mm.shape
    if shape[1:] != (NUM_JOINTS, 3) or not shape[0]:
        return f"positions_mm has shape {shape}, not (F, 17, 3) for {', '.join(H36M_JOINTS)}"
    is_number = positions_mm.dtype.kind in "fiu" and np.isfinite(positions_mm).all()
    if not is_number or np.abs(positions_mm, dtype=np.float64).max() > _FARTHEST_MM:
        return "positions_mm has values that are not finite numbers, or a kilometre away"
    if not 0 < fps <= _FASTEST_FPS:
        return f"fps is {fps}; it must be positive and at most {_FASTEST_FPS:g}"
    positions_mm = positions_mm.astype(np.float64)
    # The bones from ankle to head add up to about the stature in any pose.
    bones = positions_mm[:, STATURE_JOINTS] - positions_mm[:, STATURE_PARENTS]
    stature = np.median(np.linalg.norm(bones, axis=-1).sum(axis=-1))
    if not _STATURE_MM[0] < stature < _STATURE_MM[1]:
        return (
            f"the bones from ankle to head add up to {stature:.4g} mm, which is no adult; give "
            "positions in millimetres (metres x 1000) in Human3.6M joint order"
        )
    lowest = np.median(positions_mm[..., 2].min(axis=1))
    if lowest < _LOWEST_FLOOR_MM:
        return (
            f"the lowest joint is at z = {lowest:.0f} mm in the median frame; give world positions "
            "with z up and the floor at z = 0, not positions relative to the hip"
        )
    return None
