"""People in pictures whose joints are known in 3D: to fit the simulator, or a model's radius, to.

A file `.npz` holds, of P pictures and N people in them,

* `jpeg` and `offset` (P + 1,): picture i is the file `jpeg[offset[i]:offset[i + 1]]` (bytes);
* `image_index` (N,): the picture of each person;
* `pose_camera_mm` (N, 17, 3): the joints in camera coordinates (x right, y down, z forward),
  Human3.6M order, and `pose_pixels` (N, 17, 2): their projections;
* and may hold `joint_valid` (N, 17), `scale` (pictures are so much smaller than what `pose_pixels`
  counts), `camera_K` (C, 3, 3) with `camera_index` (N,), which tell the focal length, and
  `frame_index` (N,): people of one frame are one moment, seen by several cameras.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Integer
from tqdm import tqdm

from diffpose_jax.data import cameras
from diffpose_jax.data.simulator_fit import Labelled
from diffpose_jax.detectors import Detector, crops
from diffpose_jax.io import arrays, pictures
from diffpose_jax.io.files import FileError
from diffpose_jax.skeleton import MPII_TO_H36M

_NEEDED = {"jpeg", "offset", "image_index", "pose_camera_mm", "pose_pixels"}


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledPeople:
    """What such a file holds.

    Attributes:
      path: the file.
      jpegs: the pictures, as files hold them.
      image: the picture of each person.
      points_mm: the joints in camera coordinates.
      pixels: their projections in the stored pictures.
      is_valid: which of them count.
      moments: a label for each person; people of one moment are one pose.
      rays: unit vectors to the crops' centres; None if the focal length is not known.
    """

    path: Path
    jpegs: list[bytes]
    image: Integer[np.ndarray, " N"]
    points_mm: Float[np.ndarray, "N 17 3"]
    pixels: Float[np.ndarray, "N 17 2"]
    is_valid: Bool[np.ndarray, "N 17"]
    moments: Integer[np.ndarray, " N"]
    rays: Float[np.ndarray, "N 3"] | None

    def poses_mm(self, axes: str) -> Float[np.ndarray, "N 17 3"]:
        """The poses, hip-centred with y up, in the axes of the "camera" or the "crop".

        Raises:
          ValueError: for the crop's, if the focal length is not known.
        """
        poses_mm = cameras.output_pose(self.points_mm)
        if axes == "camera":
            return poses_mm
        if self.rays is None:
            raise ValueError(
                f"{self.path}: poses in the axes of the crop need camera_K and camera_index"
            )
        return poses_mm @ cameras.turns_to(self.rays).swapaxes(1, 2)

    @property
    def crops(self) -> crops.Crop:
        """The square around each person, as models see them."""
        return crops.square_crop(self.pixels)

    def detect(self, detector: Detector) -> Labelled:
        """The detector's heatmaps of them all."""
        squares, parts, images = self.crops, [], {}
        for person in tqdm(range(len(self.image)), desc="detecting", unit=" people"):
            index = int(self.image[person])
            if index not in images:  # people of one picture stand together
                images = {index: pictures.read(f"{self.path}, {index}", self.jpegs[index])}
            corner_px, side_px = squares.corner_px[person], squares.side_px[person]
            square = crops.square_crop_image(images[index], corner_px, side_px, detector.input_px)
            parts.append(detector.heatmaps(square[None]))
        return Labelled(
            heatmaps=np.concatenate(parts),
            points_mm=self.points_mm,
            keypoints_xy=crops.pixels_to_cells(self.pixels, *squares),
            is_valid=self.is_valid[:, MPII_TO_H36M],
        )


def read(path: str | Path) -> LabelledPeople:
    """Reads such a file.

    Raises:
      FileError: if it is no such file; the message says what is missing or wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        content = arrays.read(path)
        if not isinstance(content, dict) or not set(content) >= _NEEDED:
            missing = sorted(_NEEDED - set(content)) if isinstance(content, dict) else "all"
            raise ValueError(f"it lacks {missing}")
        return _parsed(path, content)
    except (ValueError, IndexError) as error:
        raise FileError(f"{path} does not hold labelled pictures: {error}") from error


def _parsed(path: Path, content: dict[str, np.ndarray]) -> LabelledPeople:
    image = content["image_index"]
    number = len(image)
    shapes = {
        "pose_camera_mm": (number, 17, 3), "pose_pixels": (number, 17, 2),
        "joint_valid": (number, 17), "frame_index": (number,), "camera_index": (number,),
    }  # fmt: skip
    for name, shape in shapes.items():
        if name in content and content[name].shape != shape:
            raise ValueError(f"{name} is {content[name].shape}, not {shape}")
    offset = content["offset"]
    if number == 0 or image.min() < 0 or image.max() >= len(offset) - 1:
        raise ValueError("image_index names pictures that are not there, or nobody")
    data = content["jpeg"].tobytes()
    jpegs = [data[first:last] for first, last in itertools.pairwise(offset)]
    scale = float(content.get("scale", np.float64(1.0)))
    pixels = (content["pose_pixels"].astype(np.float64) + 0.5) * scale - 0.5
    points_mm = content["pose_camera_mm"].astype(np.float64)
    if not (np.isfinite(pixels).all() and np.isfinite(points_mm).all()):
        raise ValueError("poses hold numbers that are not finite")
    people = LabelledPeople(
        path=path,
        jpegs=jpegs,
        image=image.astype(int),
        points_mm=points_mm,
        pixels=pixels,
        is_valid=content.get("joint_valid", np.ones((number, 17), bool)).astype(bool),
        moments=content.get("frame_index", np.arange(number)).astype(int),
        rays=None,
    )
    if not {"camera_K", "camera_index"} <= set(content):
        return people
    matrices = content["camera_K"].astype(np.float64)[content["camera_index"]]
    middle_px = (people.crops.middle_px + 0.5) / scale - 0.5
    rays = cameras.rays(middle_px, matrices[:, 0, 0], matrices[:, :2, 2])
    return dataclasses.replace(people, rays=rays)
