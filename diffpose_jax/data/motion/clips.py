"""Motion capture: the clips that come with the package, and readers for a user's own.

The embedded clips (see README.md beside this file) let the whole program run without a
download. They are few and correlated: numbers obtained on them say that the method works,
not how well it would do on Human3.6M.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path

import numpy as np

from diffpose_jax.data.motion.asf_amc import read_amc
from diffpose_jax.data.motion.bvh import read_bvh
from diffpose_jax.data.motion.skeletons import MAPPING_FILE, to_h36m
from diffpose_jax.io import arrays as numpy_files
from diffpose_jax.skeleton import H36M_BONES, H36M_JOINTS, NUM_JOINTS

_STATURE_MM = (1000.0, 2300.0)
_LOWEST_FLOOR_MM = -300.0
_FARTHEST_MM = 1e6
_FASTEST_FPS = 1e5
_TEST_ONE_IN = 5


@dataclasses.dataclass(frozen=True)
class Clip:
    """One recording of one person.

    Attributes:
        name: unique among the clips it was loaded with.
        split: "train" or "test"; a clip is never divided between them.
        fps: frames a second.
        positions_mm: (F, 17, 3) float32, Human3.6M joint order, millimetres, world axes with z
            up and the floor near z = 0. The hip has x = y = 0 in every frame.
    """

    name: str
    split: str
    fps: float
    positions_mm: np.ndarray


def load_embedded() -> list[Clip]:
    """Loads the clips that come with the package (`mocap.npz`, made by `make.py`)."""
    with (
        resources.files(__package__).joinpath("mocap.npz").open("rb") as file,
        np.load(file, allow_pickle=False) as archive,
    ):
        content = dict(archive)
    positions_mm = (content["positions"] * content["unit_mm"]).astype(np.float32)
    parts = np.split(positions_mm, np.cumsum(content["lengths"])[:-1])
    return [
        Clip(str(name), str(split), float(fps), part)
        for name, split, fps, part in zip(
            content["names"], content["splits"], content["fps"], parts, strict=True
        )
    ]


def _read_npz(path: Path, mapping: Path | None) -> tuple[np.ndarray, float]:
    del mapping  # such a file has the 17 joints already
    expected = (
        f"{path} is not a motion file: it must be written by numpy.savez with the keys "
        "positions_mm (F, 17, 3) and fps (one number)"
    )
    try:
        content = numpy_files.read(path)
    except ValueError as error:
        raise ValueError(f"{expected}: {error}") from error
    if not isinstance(content, dict) or not {"positions_mm", "fps"} <= set(content):
        raise ValueError(expected)
    if content["fps"].size != 1 or content["fps"].dtype.kind not in "fiu":
        raise ValueError(f"{expected}: fps is {content['fps'].shape} {content['fps'].dtype}")
    return content["positions_mm"], float(content["fps"].item())


def _read_bvh(path: Path, mapping: Path | None) -> tuple[np.ndarray, float]:
    return to_h36m(path, read_bvh(path), mapping)


def _read_amc(path: Path, mapping: Path | None) -> tuple[np.ndarray, float]:
    return to_h36m(path, read_amc(path), mapping)


READERS: dict[str, Callable[[Path, Path | None], tuple[np.ndarray, float]]] = {
    ".amc": _read_amc,
    ".bvh": _read_bvh,
    ".npz": _read_npz,
}
"""File name suffix to a reader; from the file and the `skeleton.json` that holds for it, if any,
it gives positions_mm (F, 17, 3), as in `Clip`, and fps."""


def read_clip(path: str | Path, *, root: str | Path | None = None) -> Clip:
    """Reads one motion file of the user; `READERS` lists the formats.

    A `.npz` file holds `positions_mm` (F, 17, 3), in Human3.6M joint order, millimetres, world
    axes with z up and the floor near z = 0, and `fps`. `.bvh` files and `.amc` files (with their
    `.asf` beside them) have the skeleton of a known data set, or the one that a `skeleton.json`
    describes (see `skeletons` and README.md). The horizontal position may be any.

    Args:
        path: the file.
        root: the folder up to which, from that of the file, a `skeleton.json` is looked for; by
            default that of the file alone. The nearest holds.

    Returns:
        The clip, named as the file without its suffix, in the training split.

    Raises:
        ValueError: the format is unknown or the content is not a human motion in millimetres.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path}: cannot read motion from a {path.suffix or 'suffixless'} file; "
            f"convert it to one of: {_suffixes()}"
        )
    positions_mm, fps = reader(path, _mapping_file(path, Path(root or path.parent)))
    _check(path, positions_mm, fps)
    positions_mm = positions_mm.astype(np.float64)
    positions_mm[..., :2] -= positions_mm[:, :1, :2]
    return Clip(path.stem, "train", fps, positions_mm.astype(np.float32))


def _mapping_file(path: Path, root: Path) -> Path | None:
    if root not in path.parents:
        root = path.parent
    for folder in path.parents:
        if (folder / MAPPING_FILE).is_file():
            return folder / MAPPING_FILE
        if folder == root:
            break
    return None


def thin(clip: Clip, fps: float) -> Clip:
    """Drops frames of a clip, evenly, as long as so many a second are left.

    Args:
        clip: the clip.
        fps: frames a second that are enough; 0 keeps all.

    Returns:
        The clip with every n-th frame, for the largest n that leaves `fps` or more.
    """
    # 0.2 %: 30.00003 and 29.97 frames a second, as files tell them, are 30.
    stride = max(1, int(clip.fps / fps * 1.002)) if fps else 1
    return dataclasses.replace(
        clip, fps=clip.fps / stride, positions_mm=clip.positions_mm[::stride]
    )


def read_folder(folder: str | Path, *, fps: float = 0.0, test_clips: str = "") -> list[Clip]:
    """Reads all motion files under a folder and divides them into train and test, by clip.

    Files under the sub-folder `test/` and those that `test_clips` names are the test clips and
    all others the training clips. With neither, a hash of its name puts about one clip in five
    into test, at least one into each split. Files of other kinds are passed over.

    Args:
        folder: searched with all its sub-folders.
        fps: frames a second that are enough (see `thin`); 0 keeps all.
        test_clips: a pattern (`fnmatch`, case counts) for names of test clips: "03_*" holds out
            subject 3 of the CMU database.

    Returns:
        The clips in order of their names (paths within the folder without suffix; `test/` is
        not part of a name).

    Raises:
        ValueError: there is no motion file, a split would be empty, two clips have one name,
            `test_clips` matches none, or a file cannot be read (see `read_clip`).
    """
    folder = Path(folder)
    paths = [
        path for path in folder.rglob("*") if path.suffix.lower() in READERS and path.is_file()
    ]
    if not paths:
        raise ValueError(f"no motion files under {folder}; it must hold files of: {_suffixes()}")
    has_test = (folder / "test").is_dir()
    named: dict[str, tuple[Path, str]] = {}
    for path in sorted(paths):
        relative = path.relative_to(folder)
        in_test = has_test and relative.parts[0] == "test"
        name = (relative.relative_to("test") if in_test else relative).with_suffix("").as_posix()
        if name in named:
            raise ValueError(
                f"{path} and {named[name][0]} have the same clip name {name!r}; "
                "rename or remove one: a clip must not be in both splits"
            )
        is_test = in_test or (test_clips and fnmatch.fnmatchcase(name, test_clips))
        named[name] = (path, "test" if is_test else "train")
    if test_clips and not any(fnmatch.fnmatchcase(name, test_clips) for name in named):
        raise ValueError(
            f"{folder} has no clip that matches test_clips {test_clips!r}; the names are: "
            f"{', '.join(list(named)[:20])}{', ..' if len(named) > 20 else ''}"
        )
    if not has_test and not test_clips:
        test_names = _test_names(named)
        named = {
            name: (path, "test" if name in test_names else "train")
            for name, (path, _) in named.items()
        }
    for split in ("train", "test"):
        if split not in {found for _, found in named.values()}:
            raise ValueError(
                f"{folder} gives no {split} clip: it needs at least two motion files; with a "
                "sub-folder test/ or a pattern, one at least in it and one at least outside it"
            )
    return [
        thin(dataclasses.replace(read_clip(path, root=folder), name=name, split=split), fps)
        for name, (path, split) in sorted(named.items())
    ]


def _suffixes() -> str:
    return ", ".join(sorted(READERS))


def _test_names(names: Iterable[str]) -> set[str]:
    """About one name in five, the same on every machine and as the folder grows."""
    digests = {name: int(hashlib.sha256(name.encode()).hexdigest(), 16) for name in names}
    chosen = {name for name, digest in digests.items() if digest % _TEST_ONE_IN == 0}
    if len(digests) < 2:
        return set()
    if not chosen:
        return {min(digests, key=digests.__getitem__)}
    if len(chosen) == len(digests):
        chosen.remove(max(digests, key=digests.__getitem__))
    return chosen


def _check(path: Path, positions_mm: np.ndarray, fps: float) -> None:
    """Raises ValueError if the content of a file cannot be a human motion in our convention."""
    shape = positions_mm.shape
    if len(shape) != 3 or shape[0] == 0 or shape[1:] != (NUM_JOINTS, 3):
        raise ValueError(
            f"{path}: positions_mm has shape {shape}; give (F, {NUM_JOINTS}, 3) with F > 0 and "
            f"the joints {', '.join(H36M_JOINTS)}"
        )
    is_number = positions_mm.dtype.kind in "fiu" and np.isfinite(positions_mm).all()
    if not is_number or np.abs(positions_mm, dtype=np.float64).max() > _FARTHEST_MM:
        raise ValueError(
            f"{path}: positions_mm has values that are not finite numbers, or are farther than a "
            "kilometre away; remove or fill these frames"
        )
    if not 0 < fps <= _FASTEST_FPS:
        raise ValueError(
            f"{path}: fps is {fps}; give the frames a second, a positive number (at most "
            f"{_FASTEST_FPS:g})"
        )
    positions_mm = positions_mm.astype(np.float64)
    # The bones from ankle to head add up to about the stature in any pose.
    stature = sum(
        np.median(np.linalg.norm(positions_mm[:, joint] - positions_mm[:, parent], axis=-1))
        for parent, joint in H36M_BONES
        if H36M_JOINTS[joint] in ("LKnee", "LAnkle", "Spine", "Thorax", "Nose", "Head")
    )
    if not _STATURE_MM[0] < stature < _STATURE_MM[1]:
        raise ValueError(
            f"{path}: the bones from ankle to head add up to {stature:.4g} mm, which is no "
            "adult; give positions in millimetres (metres x 1000) in Human3.6M joint order"
        )
    lowest = np.median(positions_mm[..., 2].min(axis=1))
    if lowest < _LOWEST_FLOOR_MM:
        raise ValueError(
            f"{path}: the lowest joint is at z = {lowest:.0f} mm in the median frame; give world "
            "positions with z up and the floor at z = 0, not positions relative to the hip"
        )
