"""Strangers' files: every reader against mutated ones; see `test_harmful_files` for made ones.

The fast run has a few cases of each target, the slow one 10,000; see `fuzzing` for the rules. A
failure names its target and case; `python tests/test_fuzz.py TARGET CASE FOLDER` makes its files
again.
"""

import functools
import io
import json
import os
import pickle
import signal
import sys
import tempfile
import types
import zlib
from pathlib import Path

import fuzzing
import jax
import ml_collections
import numpy as np
import programs
import pytest
from fuzzing import Target, binary, json_lines, json_object, packed, text
from motion_files import CMU_BONES, CMU_HIERARCHY, amc_text, asf_text, cmu_bvh, cmu_frame, lafan1
from PIL import Image
from small import distinct_config, small_network
from test_tensorflow_js import TENSORS, content, entries

from diffpose_jax import detectors
from diffpose_jax.data import compact, motion
from diffpose_jax.data.motion.skeletons import CMU_BVH
from diffpose_jax.detectors import tensorflow_js
from diffpose_jax.evaluation import aggregation
from diffpose_jax.evaluation import baselines as controls
from diffpose_jax.interop import torch_weights
from diffpose_jax.io import pictures, scalars, trees
from diffpose_jax.method import network as model
from diffpose_jax.prediction.predict import predict as prediction
from diffpose_jax.training import checkpoints, runs

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches children by /proc")
convert, sweep = programs.load("convert"), programs.load("sweep")

FAST_CASES, SLOW_CASES = 150, 10_000
FEWER_CASES = {"checkpoint": (30, 1_000)}
"""A whole one takes 80 ms; `checkpoint_arrays` and `checkpoint_config` are its parts."""

TARGETS = {}


def target(make):
    TARGETS[make.__name__.removeprefix("_")] = functools.cache(make)
    return make


def contents(folder):
    """All files of a folder by their names in it, each with one valid content."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): [path.read_bytes()] for path in paths}


def npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def npz(**arrays):
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def compressed(**arrays):
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def npy_head(rng, seeds):
    """The beginning of a .npy file, a Python dictionary as text, changed as a text."""
    (seed,) = seeds
    if rng.random() < 0.5:
        return binary(rng, seeds)
    head, body = seed[10:128], seed[128:]
    head = text(rng, [head])
    size = len(head).to_bytes(4, "little")[:2] if len(head) < 65_536 else b"\xff\xff"
    return seed[:8] + size + head + body


ZIPPED = packed(fuzzing.unzip, fuzzing.zip_of, lambda name: npy_head)


def all_finite(array):
    return None if np.isfinite(array).all() else "values that are not finite were accepted"


def heatmaps():
    maps = np.zeros((2, 16, 64, 64), np.float32)
    maps[..., 20:23, 30:33] = 0.5
    return maps


@target
def heatmaps_npy():
    return Target(
        {"maps.npy": [npy(heatmaps()[0]), npy(heatmaps().astype(np.float16))]},
        {"maps.npy": lambda rng, seeds: npy_head(rng, [seeds[rng.integers(2)]])},
        prediction.read_heatmaps,
        all_finite,
    )


@target
def heatmaps_npz():
    maps = heatmaps().astype(np.float16)
    seeds = [npz(heatmaps=maps), compressed(heatmaps=maps, names=np.array(["a", "b"]))]
    return Target({"maps.npz": seeds}, {"maps.npz": ZIPPED}, prediction.read_heatmaps, all_finite)


def check_clip(clip):
    return all_finite(clip.positions_mm) or (None if clip.fps > 0 else f"fps {clip.fps}")


@target
def motion_npz():
    clip = motion.load_embedded()[0]
    arrays = {"positions_mm": clip.positions_mm[:6], "fps": clip.fps}
    seeds = [npz(**arrays), compressed(**arrays)]
    return Target({"a.npz": seeds}, {"a.npz": ZIPPED}, motion.read_clip, check_clip)


@target
def bvh():
    seeds = [source(3).encode() for source in (cmu_bvh, lafan1)]
    return Target({"a.bvh": seeds}, {"a.bvh": text}, motion.read_clip, check_clip)


@target
def asf_amc():
    asf, amc = asf_text(CMU_BONES, CMU_HIERARCHY), amc_text([cmu_frame()] * 3)
    return Target(
        {"02.asf": [asf.encode()], "02_01.amc": [amc.encode()]},
        {"02.asf": text, "02_01.amc": text},
        lambda path: motion.read_clip(path.with_name("02_01.amc")),
        check_clip,
    )


@target
def skeleton_json():
    joints = {name: dict(landmark.weights) for name, landmark in CMU_BVH.landmarks.items()}
    joints["Nose"] = {"joint": "Head", "offset_mm": [0, 0, 42.5], "axes": "HeadEnd"}
    joints["Spine"] = "Spine"
    fields = {"unit_mm": 56.4, "up": "y", "fps": 60, "skip_frames": 1, "stride": 2}
    return Target(
        {
            "skeleton.json": [json.dumps({**fields, "joints": joints}).encode()],
            "a.bvh": [cmu_bvh(6).encode()],
        },
        {"skeleton.json": json_object},
        lambda path: motion.read_clip(path.with_name("a.bvh")),
        check_clip,
    )


@target
def calibration_json():
    rng = np.random.default_rng(0)
    fitted = aggregation.fit_calibration(
        rng.uniform(0, 90, (20, 17)), rng.uniform(1, 90, (20, 17)), 0.9
    )
    with tempfile.TemporaryDirectory() as folder:
        aggregation.write_calibration(folder, "medoid", fitted, {"seed": 1})
        files = contents(Path(folder))

    def read(path):
        found = aggregation.read_calibration(path.parent, "medoid", {"seed": 1})
        return found and (found, found.meaning, found.is_guaranteed)

    return Target(files, dict.fromkeys(files, json_object), read)


@target
def scalars_jsonl():
    lines = [{"step": step, "loss": 1 / (step + 1), "learning_rate": 1e-4} for step in range(6)]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return Target({"metrics.jsonl": [content]}, {"metrics.jsonl": json_lines}, scalars.read_scalars)


@target
def _tensorflow_js():
    manifest = [{"paths": ["1.bin", "2.bin"], "weights": entries()}]
    model = {"modelTopology": {"node": []}, "weightsManifest": manifest}
    numbers = content()
    return Target(
        {
            "model.json": [json.dumps(model).encode()],
            "1.bin": [numbers[:10]],
            "2.bin": [numbers[10:]],
        },
        {"model.json": json_object, "1.bin": binary, "2.bin": binary},
        lambda path: tensorflow_js.read_weights(path.with_name("model.json")),
        lambda tensors: None if len(tensors) <= 2 * len(TENSORS) else f"{len(tensors)} tensors",
    )


@target
def detector_json():
    content = {"format": detectors.FORMAT, "network": "hrnet_w32"}
    return Target(
        {"detector.json": [json.dumps(content).encode()]},
        {"detector.json": json_object},
        lambda path: detectors._read_network_name(path.parent),
    )


@target
def results_json():
    metrics = {"mpjpe_best": 67.3, "ece": 0.05, "mpjpe_best_at": {"1": 141.4, "200": 67.3}}
    subset = {"frames": 1320, "model": metrics, "mean_pose": metrics}
    content = {"num_hypotheses": 200, "subsets": {"all": subset, "ambiguous": subset}}
    return Target(
        {"a/seed_1/results.json": [json.dumps(content).encode()]},
        {"a/seed_1/results.json": json_object},
        lambda path: sweep.table({"a": ""}, [1], path.parents[2], "all", False).to_markdown(),
    )


@target
def run_config_json():
    with tempfile.TemporaryDirectory() as name:
        config = ml_collections.ConfigDict({"seed": 1})
        runs.write_config(Path(name), config, {"time": "now", "versions": {"jax": "1"}})
        files = contents(Path(name))

    def read(path):
        runs.write_json = lambda *_: None
        runs.write_config(path.parent, config)

    return Target(files, dict.fromkeys(files, json_object), read)


@target
def controls_npz():
    ones = functools.partial(np.ones, dtype=np.float32)
    regression = controls.RegressionParams(
        {"params": {"in": {"kernel": ones((48, 8))}}}, *(ones((16, 3)) for _ in range(4))
    )
    fitted = controls.Controls(ones((17, 3)), regression, controls.GaussianParams(ones((48, 48))))
    with tempfile.TemporaryDirectory() as name:
        controls.save(Path(name, "controls.npz"), fitted, {"seed": 1})
        files = contents(Path(name))
    return Target(files, dict.fromkeys(files, ZIPPED), controls.load)


@functools.cache
def small_model():
    """Made in the child: what forks must not have a backend of JAX. Nothing is compiled."""
    sizes = {"encoder_layers": 0, "denoiser_blocks": 1}
    network = small_network(**sizes)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), shapes)
    return model.Model(network, params, distinct_config(**sizes))


@target
def torch_file():
    trained = small_model()
    shapes = jax.eval_shape(trained.network.init, jax.random.key(0))
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pt")
        torch_weights.write_file(path, trained.params, trained.network.schedule)
        seeds.append(path.read_bytes())
        content = torch.load(path, weights_only=True)
        torch.save(content["model"], path, _use_new_zipfile_serialization=False)
        seeds.append(path.read_bytes())

    def read(path):
        # What is accepted is not written, and the slow part is the same for all files.
        convert.checkpoints.export = convert.detectors.save = lambda *_: None
        convert.jax = types.SimpleNamespace(eval_shape=lambda *_: shapes, random=jax.random)
        return convert.convert(path, path.with_name("output"), "raw", trained.config)

    def unpack(data):
        return fuzzing.unzip(data) if data[:2] == b"PK" else {"whole": data}

    def pack(parts):
        return parts["whole"] if len(parts) == 1 else fuzzing.zip_of(parts)

    return Target({"model.pt": seeds}, {"model.pt": packed(unpack, pack, lambda _: binary)}, read)


def checkpoint_files():
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.export(small_model(), Path(folder, "export"))
        return contents(Path(folder))


def load_export(path):
    return checkpoints.load(next(parent for parent in path.parents if parent.name == "export"))


@target
def checkpoint():
    files = checkpoint_files()
    return Target(files, mutations_of_folder(files), load_export)


def mutations_of_folder(files):
    return {
        name: json_object if content[:1] == b"{" else binary
        for name, (content,) in files.items()
        if content
    }


@target
def checkpoint_arrays():
    """Without what a model adds: a case in a tenth of the time."""
    tree = {"a": np.arange(60, dtype=np.float32).reshape(3, 20), "b": {"c": np.ones(3, np.int32)}}
    with tempfile.TemporaryDirectory() as folder:
        trees.save_tree(Path(folder, "export"), tree)
        files = contents(Path(folder))
    return Target(
        files,
        mutations_of_folder(files),
        lambda path: trees.load_tree(
            next(parent for parent in path.parents if parent.name == "export"), tree
        ),
    )


@target
def checkpoint_config():
    files = checkpoint_files()
    name = "export/metadata/metadata"
    metadata = json.loads(files[name][0])
    # Without their check sums, as earlier versions had them: a forger would make new ones.
    plain = {key: value for key, value in metadata.items() if "crc32" not in key}
    model = {"config": {"model": plain["config"]["model"], "evaluation": {"weights": "raw"}}}
    files[name] += [json.dumps(content).encode() for content in (plain, *3 * [plain | model])]
    params = small_model().params

    def load(path):
        trees.read_trees = lambda *_: {"params": params}  # the metadata alone is read
        return load_export(path)

    return Target(files, {name: json_object}, load)


@target
def _pictures():
    gradient = np.uint8(np.add.outer(np.arange(24) * 4, np.arange(40) * 3)[..., None] + [0, 20, 40])
    image = Image.fromarray(gradient)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "jpg": [{"exif": exif}, {"progressive": True}],
        "png": [{"exif": exif}, {}],
        "webp": [{"lossless": True}, {"exif": exif}],
        "gif": [{}],
        "bmp": [{}],
        "tif": [{"compression": kind} for kind in (None, "tiff_lzw", "tiff_deflate", "jpeg")],
        "jp2": [{}],
        "avif": [{}],
        "ppm": [{}],
    }
    files = {}
    for suffix, options in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"picture.{suffix}")
            files[path.name] = []
            for option in options:
                image.save(path, **option)
                files[path.name].append(path.read_bytes())
            if suffix in ("png", "gif", "tif"):
                for mode in ("P", "L", "1"):
                    image.convert(mode).save(path)
                    files[path.name].append(path.read_bytes())
    mutations = dict.fromkeys(files, binary)
    mutations["picture.png"] = packed(fuzzing.png_chunks, fuzzing.png_of, lambda _: binary)
    return Target(files, mutations, pictures.read)


@target
def heatmap_records():
    maps = np.random.default_rng(0).normal(0, 1, (16, 64, 64)).astype(np.float32)
    maps[:8] = heatmaps()[0, :8]
    seeds = [compact.encode(maps[None], loss)[0] for loss in (0.3, None)]

    def pack(parts):
        return zlib.crc32(parts["all"]).to_bytes(4, "little") + parts["all"]

    def read(path):
        try:
            return compact.decode([path.read_bytes()])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error  # what is decoded is no file

    mutate = packed(lambda data: {"all": data[4:]}, pack, lambda _: binary)
    return Target({"record": seeds}, {"record": mutate}, read)


READERS = tuple(TARGETS)


def fill_memory(path):
    try:
        return (b"1" * (1200 << 20))[:1]
    except MemoryError as error:
        raise ValueError(f"{path}: too much") from error


def flood(path):
    raise ValueError(f"{path}" * 10_000)


MISBEHAVIOUR = {
    "crashes": (lambda path: os.kill(os.getpid(), signal.SIGSEGV), "ended the process: signal 11"),
    "ends": (lambda path: os._exit(3), "ended the process: code 3"),
    "loses its temper": (lambda path: {}["key"], "an error that is not documented"),
    "names no file": (lambda path: int("x"), "the message does not name the file"),
    "floods": (flood, "a message of"),
    "runs": (lambda path: os.system("true"), "os.system"),
    "compiles": (lambda path: eval("1 + 1"), "exec"),
    "unpickles": (lambda path: pickle.loads(pickle.dumps(int)), "pickle.find_class"),
    "writes": (lambda path: path.with_name("more").write_text("x"), "open"),
    "fills the memory": (fill_memory, "filled 1"),
}


def misbehaving(do):
    """A reader that does so from the second time on: the first is with the valid file."""
    times = iter(range(10**6))
    return Target({"a": [b"1"]}, {"a": binary}, lambda path: next(times) and do(path))


TARGETS |= {name: functools.partial(misbehaving, do) for name, (do, _) in MISBEHAVIOUR.items()}


@pytest.mark.parametrize("name", MISBEHAVIOUR)
def test_the_guard_sees_a_reader_that(name, tmp_path):
    outcome = fuzzing.run(__name__, name, 1, tmp_path)
    assert MISBEHAVIOUR[name][1] in outcome.failures[0]
    assert outcome.accepted == outcome.refused == 0


@pytest.mark.slow
def test_the_guard_sees_a_reader_that_hangs(tmp_path):
    outcome = fuzzing.run(__name__, "hangs", 1, tmp_path)
    assert "ended the process: signal 27" in outcome.failures[0]
    assert "def hang" not in outcome.failures[0]
    assert " in hang" in outcome.failures[0]  # the traceback names it


def hang(path):
    while True:
        pass


TARGETS["hangs"] = functools.partial(misbehaving, hang)


@pytest.fixture(scope="module", autouse=True)
def server():
    fuzzing.start_server()


def fuzz(name, cases, tmp_path):
    outcome = fuzzing.run(__name__, name, cases, tmp_path)
    print(f"{name}: {outcome}")
    if outcome.failures:
        pytest.fail(f"{name}: {outcome}\n\n" + "\n\n".join(outcome.failures), pytrace=False)
    assert outcome.cases == cases


@pytest.mark.parametrize("name", READERS)
def test_mutated_files(name, tmp_path):
    fuzz(name, FEWER_CASES.get(name, (FAST_CASES,))[0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_mutated_files(name, tmp_path):
    fuzz(name, FEWER_CASES.get(name, (SLOW_CASES,))[-1], tmp_path)


if __name__ == "__main__":
    name, case, folder = sys.argv[1:]
    print(fuzzing.reproduce(TARGETS[name](), int(case), Path(folder)))
