"""Writes tiny files in the formats that Human3.6M and its preprocessed forms come in."""

import pickle

import av
import h5py
import numpy as np
from cdflib.cdfwrite import CDF

from diffpose_jax.data import cameras
from diffpose_jax.data.human36m import sequences
from diffpose_jax.skeleton import H36M_FROM_32

SIZE_PX = 128


def write_cdf(path, array, variable="Pose"):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = CDF(str(path), cdf_spec={"Majority": "row_major"}, delete=True)
    spec = {
        "Variable": variable,
        "Data_Type": 44,  # CDF_FLOAT
        "Num_Elements": 1,
        "Rec_Vary": True,
        "Dim_Sizes": list(array.shape[1:]),
        "Compress": 6,
    }
    file.write_var(spec, var_data=np.float32(array))
    file.close()


def write_video(path, pictures, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=50)
        stream.width, stream.height, stream.pix_fmt = SIZE_PX, SIZE_PX, "yuv420p"
        stream.bit_rate = 20_000_000
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def recording_poses(rng, frames):
    """A walk of 32 joints before a camera: pixels (F, 32, 2) and camera coordinates (F, 32, 3)."""
    camera = cameras.Camera(None, None, np.array([120.0]), np.array([[SIZE_PX / 2, SIZE_PX / 2]]))
    body = rng.normal(0.0, 350.0, (32, 3))
    path = np.cumsum(rng.normal(0.0, 20.0, (frames, 1, 3)), axis=0)
    points_mm = np.array([0.0, 0.0, 3500.0]) + body + path
    return cameras.project(points_mm.reshape(1, -1, 3), camera).reshape(frames, 32, 2), points_mm


def pictures_of(keypoints_px):
    """Pictures whose green tells the frame, with a white disc on the hip."""
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX]
    for frame, (hip_x, hip_y) in enumerate(keypoints_px[:, H36M_FROM_32[0]]):
        picture = np.zeros((SIZE_PX, SIZE_PX, 3), np.uint8)
        picture[..., 1] = green_of(frame)
        picture[np.hypot(x - hip_x, y - hip_y) < 5.0] = 255
        yield picture


def green_of(frame):
    return 20 + 7 * frame


def file_name(sequence):
    names = sequences.file_names(sequence)
    return names[-1] if sequence.subject == "S1" else names[0]


def write_raw(folder, subjects, actions, archive=False):
    """Writes recordings of 8 to 11 frames, videos one more: {sequence: (pixels, points in mm)}."""
    rng = np.random.default_rng(0)
    written = {}
    prefix = "MyPoseFeatures/" if archive else "Poses_"
    for subject in subjects:
        for sequence in sequences.expected(subject, actions):
            keypoints_px, points_mm = recording_poses(rng, int(rng.integers(8, 12)))
            name, at = file_name(sequence), folder / subject
            count = len(points_mm)
            write_cdf(at / f"{prefix}D2_Positions/{name}.cdf", keypoints_px.reshape(1, count, 64))
            for kind, scale in (("mono", 1.0), ("mono_universal", 0.9)):
                write_cdf(
                    at / f"{prefix}D3_Positions_{kind}/{name}.cdf",
                    scale * points_mm.reshape(1, count, 96),
                )
            longer = np.concatenate([keypoints_px, keypoints_px[-1:]])
            write_video(at / f"Videos/{name}.mp4", pictures_of(longer))
            written[sequence] = keypoints_px, points_mm
    return written


RELEASED_ROW = np.dtype(
    [
        ("action", "S16"),
        ("argmax_2d", "<f4", (2, 16)),
        ("cam", "S8"),
        ("crop_size", "<i4"),
        ("frame_orig", "<i4"),
        ("gt_2d", "<f4", (2, 17)),
        ("gt_2d_image_coords", "<f4", (2, 32)),
        ("gt_3d", "<f4", (3, 17)),
        ("hardsubset", "u1", (1,)),
        ("heatmap", "<f2", (16, 64, 64)),
        ("subaction", "S1"),
        ("subject", "S3"),
    ]
)


def released_rows(table, count):
    """Rows as the published preprocessing writes them: subject by subject, video by video."""
    rng = np.random.default_rng(0)
    rows = np.zeros(count, RELEASED_ROW)
    subjects = sequences.SPLITS["standard"][table]
    place = np.arange(count)
    rows["subject"] = np.sort(np.resize(subjects, count))
    rows["action"] = np.resize(sequences.ACTIONS, count)
    rows["subaction"] = np.char.mod("%d", place % 2)
    rows["cam"] = np.resize(sequences.CAMERAS, count)
    rows["frame_orig"] = 4 * place + 3
    rows["hardsubset"] = rng.integers(0, 2, (count, 1)) * (table == "test")
    rows["gt_3d"] = rng.normal(0, 300, (count, 3, 17)) + np.array([[0.0], [0.0], [5000.0]])
    # Few digits: the file stays small.
    rows["heatmap"] = rng.integers(-1, 8, (count, 16, 64, 64)) / 8
    return rows


def write_released(path, compression=5, **tables):
    with h5py.File(path, "w") as file:
        for name, rows in tables.items():
            file.create_dataset(
                f"dataset/{name}", data=rows, maxshape=(None,), chunks=(3,), compression=compression
            )


def wehrbein_content(table, frames):
    """A pickle's content; `frames` in each recording of two actions, none in the others."""
    rng = np.random.default_rng(0)
    content = {}
    for subject in sequences.SPLITS["standard"][table]:
        for sequence in sequences.expected(subject, sequences.ACTIONS):
            count = frames if sequence.action in ("Directions", "Sitting") else 0
            fits = np.zeros((count, 16, 7))
            fits[..., 0] = rng.uniform(0.2, 1.0, (count, 16))
            fits[..., 1:3] = rng.uniform(5, 58, (count, 16, 2))
            fits[..., [3, 5]] = rng.uniform(1.5, 4.0, (count, 16, 2))
            fits[..., 4] = rng.uniform(-4, 4, (count, 16))
            points = rng.normal(0, 300, (count, 3, 17)) + np.array([[0.0], [0.0], [5000.0]])
            name = f"/{subject}/{file_name(sequence)}"
            node = content
            for key in (subject, sequence.action, str(sequence.subaction)):
                node = node.setdefault(key, {})
            node[sequence.camera] = {
                "imgpath": [f"{name}/{4 * i + 4}.jpg" for i in range(count)],
                "3d_gt": points.reshape(count, 51),
                "2d_hrnet": fits[..., 1:3].swapaxes(1, 2).reshape(count, 32),
                "gaussfit": fits.reshape(count, 112),
            }
    return content


def write_wehrbein(folder, frames=3):
    contents = {}
    for table in ("train", "test"):
        contents[table] = wehrbein_content(table, frames)
        (folder / f"{table}set_h36m.pickle").write_bytes(pickle.dumps(contents[table]))
    return contents
