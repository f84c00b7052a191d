"""Mutated files for the readers of files that strangers pass around; `test_fuzz.py` runs it.

    python tests/fuzzing.py FOLDER CASES TARGET...

Case number n changes one of a target's files by a generator seeded with (SEED, n). A reader must
accept it, or refuse it by an error of its own that names the file, in bounded time and memory, and
run or write nothing. What broke a rule is appended to FOLDER/failures.
"""

import dataclasses
import faulthandler
import functools
import io
import itertools
import json
import os
import pickle
import re
import resource
import signal
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from motion_files import CMU_BONES, CMU_HIERARCHY, amc_text, asf_text, cmu_bvh, cmu_frame
from PIL import Image
from small import random_errors, small_model, small_network

import experiments
from diffpose_jax import inference
from diffpose_jax.data import motion
from diffpose_jax.data.human36m import wehrbein
from diffpose_jax.evaluation import baselines, calibration
from diffpose_jax.interop import torch_weights
from diffpose_jax.io import pictures, scalars, trees
from diffpose_jax.prediction import predict
from diffpose_jax.training import checkpoints

SEED = 20261122
CPU_SECONDS, MEMORY_KIB, ADDRESSES, LONGEST_MESSAGE = 8.0, 1 << 20, 6 << 30, 20_000

_INTEGERS = (0, 1, 127, 255, 256, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
_WORDS = ("nan", "inf", "1e309", "-1", "0", "1e30", "99999999999999999999", "1_000", "1,5", "",
          "\0", "\x1b[31m", "\u2028", "\ud7ff", "'", "{", "}", "\r\n", "A" * 70_000, "9" * 5000,
          "[" * 20_000, "{ " * 5_000)  # fmt: skip
_VALUES = (None, True, 0, -1, 3, 0.5, 1e30, 10**30, 2**63, float("nan"), float("inf"), "", "x",
           "1", "A" * 5_000, "\ud800", [], {}, [None], [[]], {"a": 1}, [[1.0] * 3])  # fmt: skip


def binary(rng, data):
    """Changes, removes and repeats bytes, half of the times near the beginning."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        reach = len(changed) if rng.random() < 0.5 else min(len(changed), 256)
        at, length = int(rng.integers(reach + 1)), int(rng.geometric(0.05))
        match int(rng.integers(6)):
            case 0 | 1:
                changed[at : at + 1] = rng.bytes(1)
            case 2:
                changed[at : at + 4] = struct.pack("<I", _INTEGERS[rng.integers(len(_INTEGERS))])
            case 3:
                del changed[at : at + length]
            case 4:
                changed[at:at] = changed[at : at + length]
            case 5 if rng.random() < 0.3:
                del changed[at:]
    return bytes(changed)


def text(rng, data):
    """Changes, removes and repeats words; one in five is changed as bytes are."""
    if rng.random() < 0.2:
        return binary(rng, data)
    words = re.findall(r"[\w.+-]+|\s+|.", data.decode(), re.DOTALL)
    for _ in range(rng.integers(1, 4)):
        reach = len(words) if rng.random() < 0.5 else min(len(words), 300)
        at, other = rng.integers(reach + 1, size=2)
        match int(rng.integers(4)):
            case 0:
                words[at : at + 1] = [_WORDS[rng.integers(len(_WORDS))]]
            case 1:
                del words[at : at + int(rng.geometric(0.1))]
            case 2:
                words[at:at] = words[other : other + int(rng.geometric(0.1))]
            case 3:
                words[at : at + 1] = words[other : other + 1]
    return "".join(words).encode("utf-8", "surrogatepass")


def json_values(rng, data):
    """Replaces or removes a value; three in ten are changed as texts are."""
    if rng.random() < 0.3:
        return text(rng, data)
    holder = [json.loads(data)]
    node, key = holder, 0
    while isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
        node = node[key]
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = keys[rng.integers(len(keys))]
    if rng.random() < 0.2 and node is not holder:
        del node[key]
    else:
        node[key] = _VALUES[rng.integers(len(_VALUES))]
    return json.dumps(holder[0]).encode("utf-8", "surrogatepass")


def zipped(rng, data):
    """Changes what lies in an archive, whose check sums are made anew, or the archive."""
    if rng.random() < 0.4:
        return binary(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    changed = list(members)[rng.integers(len(members))]
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, binary(rng, member) if name == changed else member)
    return content.getvalue()


def mutation(path):
    start = path.read_bytes()[:2]
    if path.suffix in (".bvh", ".asf", ".amc", ".jsonl"):
        return text
    if start[:1] == b"{":
        return json_values
    if start == b"PK":
        return zipped
    return binary if start else None


def written(write):
    """The files that a function writes into a folder, and how each is mutated."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        paths = [path for path in sorted(Path(name).rglob("*")) if path.is_file()]
        return {str(path.relative_to(name)): (path.read_bytes(), mutation(path)) for path in paths}


@dataclasses.dataclass
class Target:
    """The reader of a file that was changed in a folder of files as `written` gives them."""

    read: Callable[[Path], Any]
    files: dict[str, tuple[bytes, Callable | None]]
    share: float = 1.0  # of the cases


def heatmaps():
    maps = np.zeros((2, 16, 64, 64), np.float16)
    maps[..., 20:23, 30:33] = 0.5

    def write(folder):
        np.save(folder / "a.npy", maps)
        np.savez_compressed(folder / "a.npz", heatmaps=maps, names=np.array(["a", "b"]))

    def read(path):
        assert np.isfinite(predict.read_heatmaps(path)).all()

    return Target(read, written(write))


def motions():
    def write(folder):
        clip = motion.load_embedded()[0]
        np.savez(folder / "a.npz", positions_mm=clip.positions_mm[:6], fps=clip.fps)
        (folder / "a.bvh").write_text(cmu_bvh(3))
        (folder / "a.asf").write_text(asf_text(CMU_BONES, CMU_HIERARCHY))
        (folder / "a.amc").write_text(amc_text([cmu_frame()] * 3))

    def read(path):
        found = motion.read_clip(path.with_suffix(".amc") if path.suffix == ".asf" else path)
        assert np.isfinite(found.positions_mm).all()
        assert found.fps > 0

    return Target(read, written(write))


def images():
    gradient = np.uint8(np.add.outer(np.arange(24) * 4, np.arange(40) * 3)[..., None] + [0, 20, 40])
    image, exif = Image.fromarray(gradient), Image.Exif()
    exif[0x0112] = 6

    def write(folder):
        for suffix in ("jpg", "png", "webp", "gif", "bmp", "tif", "jp2", "avif", "ppm"):
            image.save(folder / f"a.{suffix}", **({"exif": exif} if suffix in "jpg webp" else {}))
        image.save(folder / "progressive.jpg", progressive=True)
        image.save(folder / "packed.tif", compression="tiff_lzw")
        image.convert("P").save(folder / "palette.png")

    return Target(pictures.read, written(write))


def torch_files():
    import torch

    model = small_model()
    shapes = jax.eval_shape(model.network.init, jax.random.key(0))

    def write(folder):
        torch_weights.write_file(folder / "a.pt", model.params, model.network.schedule)
        content = torch.load(folder / "a.pt", weights_only=True)["model"]
        torch.save(content, folder / "old.pt", _use_new_zipfile_serialization=False)

    def read(path):
        content = torch_weights.read_file(path)
        try:
            tensors = torch_weights.released_tensors(content)
            torch_weights.check_schedule(tensors, model.network.schedule)
            torch_weights.from_torch(tensors, shapes)
        except ValueError as error:  # as `experiments.convert` names the file
            raise ValueError(f"{path}: {error}") from error

    return Target(read, written(write))


def pickles():
    arrays = {"3d_gt": np.ones((2, 51)), "imgpath": ["/S9/a.54138969/4.jpg", "b"], "x": 3}
    content = pickle.dumps({"S9": {"Directions": arrays}}, protocol=4)
    return Target(wehrbein.load_arrays, {"testset_h36m.pickle": (content, binary)})


def export_of(path):
    return next(parent for parent in path.parents if parent.name == "export")


def checkpoint():
    files = written(lambda folder: inference.export(small_model(), folder / "export"))
    return Target(lambda path: inference.load(export_of(path)), files, share=0.1)


def checkpoint_arrays():
    """Without a model, in a tenth of the time."""
    tree = {"a": np.arange(60, dtype=np.float32).reshape(3, 20), "b": {"c": np.ones(3, np.int32)}}
    files = written(lambda folder: trees.save_tree(folder / "export", tree))
    return Target(lambda path: trees.load_tree(export_of(path), tree), files)


def checkpoint_metadata():
    """Without its check sums, as earlier versions wrote it: a forger would make new ones."""
    model, name = small_model(), "export/metadata/metadata"

    def write(folder):
        inference.export(model, folder / "export")
        metadata = json.loads((folder / name).read_bytes())
        kept = {key: value for key, value in metadata.items() if "crc32" not in key}
        (folder / name).write_text(json.dumps(kept))

    def read(path):
        # In place of what is slow.
        with mock.patch.object(trees, "read_trees", return_value={"params": model.params}):
            inference.load(export_of(path))

    unchanged = {file: (data, None) for file, (data, _) in written(write).items()}
    return Target(read, unchanged | {name: (unchanged[name][0], json_values)})


def fitted():
    """What lies beside a model: its errors, calibration, baselines, the scalars of its run."""
    ones = functools.partial(np.ones, dtype=np.float32)
    regression = baselines.RegressionParams(
        {"params": {"in": {"kernel": ones((48, 8))}}}, *(ones((16, 3)) for _ in range(4))
    )
    gaussian, network = baselines.GaussianParams(ones((48, 48))), small_network(diffusion_steps=2)

    def write(folder):
        uncalibrated = calibration.uncalibrated(0.9)
        calibration.write_calibration(folder, "medoid", uncalibrated, {"seed": 1})
        all_three = baselines.Baselines(ones((17, 3)), regression, gaussian)
        baselines.save(folder / "baselines.npz", all_three, {"seed": 1})
        errors = random_errors(1, num_steps=2)
        checkpoints.write_errors(folder, errors, {})
        with scalars.ScalarWriter(folder / "metrics.jsonl", 0) as writer:
            writer.write(5, loss=0.5)

    def read(path):
        readers = {
            "calibration": lambda path: calibration.read_calibration(
                path.parent, "medoid", {"seed": 1}
            ),
            "prediction_errors": lambda path: checkpoints.find_errors((path.parent,), network, {}),
            "baselines": baselines.load,
            "metrics": scalars.read_scalars,
        }
        readers[path.stem](path)

    return Target(read, written(write))


_MAKERS = (heatmaps, motions, images, torch_files, pickles, checkpoint, checkpoint_arrays,
           checkpoint_metadata, fitted)  # fmt: skip
TARGETS = {make.__name__: make for make in _MAKERS}
READERS = tuple(TARGETS)


# Readers that break the rules, for the test of the guard.
_MISBEHAVIOUR = {
    "crashes": lambda path: os.kill(os.getpid(), signal.SIGSEGV),
    "hangs": lambda path: all(itertools.repeat(True)),
    "stumbles": lambda path: {}["key"],
    "runs": lambda path: os.system("true"),
    "writes": lambda path: path.with_name("more").write_text("x"),
    "unpickles": lambda path: pickle.loads(pickle.dumps(int)),
    "fills": lambda path: (b"1" * (1200 << 20))[:1],
}


def _misbehaving(do):
    times = itertools.count()  # the first time is with the valid file
    return Target(lambda path: next(times) and do(path), {"a": (b"1", binary)})


TARGETS |= {name: functools.partial(_misbehaving, do) for name, do in _MISBEHAVIOUR.items()}


_NEVER = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "os.mkdir",
          "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod",
          "pickle.find_class", "socket.connect", "socket.bind", "socket.getaddrinfo")  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Notes what no reader may do."""

    def __init__(self):
        self.seen = None
        sys.addaudithook(self._note)

    def _note(self, event, args):
        is_wrong = event in _NEVER
        if event == "open":
            is_wrong = bool(args[2] & _WRITING) and args[0] != os.devnull
        if is_wrong and self.seen is not None:
            self.seen.append(f"{event} {args!r}"[:300])


def read_case(target, path, folder, watch):
    """Reads a mutated file; returns what was wrong with that."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # of CPU: its signal ends the process
    problem, watch.seen = "", []
    try:
        target.read(path)
    except Exception as error:
        is_ours = type(error).__module__.startswith("diffpose_jax")
        if not is_ours and type(error) not in (ValueError, FileNotFoundError):
            problem = f"an error that is not documented: {error!r:.1000}"
        elif str(folder) not in str(error):
            problem = f"the message does not name the file: {error!r:.1000}"
        elif len(str(error)) > LONGEST_MESSAGE:
            problem = f"a message of {len(str(error)):,} characters"
    finally:
        seen, watch.seen = watch.seen, None
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "; ".join(seen) or problem


def peak_kib():
    """The most memory that the process had; `resource` tells its parent's if that had more."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def fuzz(name, folder, cases, watch):
    (folder / "progress").write_text(f"{name} 0 nothing")
    target = TARGETS[name]()
    here = folder / name
    for file, (data, _) in target.files.items():
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).write_bytes(data)
    mutations = {file: mutate for file, (_, mutate) in target.files.items() if mutate}
    for file in mutations:
        target.read(here / file)  # the valid one
    before = peak_kib()
    for case in range(max(1, round(cases * target.share))):
        rng = np.random.default_rng([SEED, case])
        file = list(mutations)[rng.integers(len(mutations))]
        (here / file).write_bytes(mutations[file](rng, target.files[file][0]))
        (folder / "progress").write_text(f"{name} {case} {file}")
        problem = read_case(target, here / file, here, watch)
        if (now := peak_kib()) - before > MEMORY_KIB:
            problem, before = f"it filled {(now - before) >> 10} MiB", now
        if problem:
            with (folder / "failures").open("a") as log:
                log.write(json.dumps([name, f"case {case}, {file}: {problem}"]) + "\n")
        (here / file).write_bytes(target.files[file][0])


def main():
    folder, cases, *names = sys.argv[1:]
    faulthandler.enable()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, used + ADDRESSES))
    experiments.without_echoes()
    watch = Watch()
    for name in names:
        fuzz(name, Path(folder), int(cases), watch)


if __name__ == "__main__":
    main()
