"""Measures speed on this machine; prints one JSON object a line.

    python -m experiments.benchmark [--parts sample,train,data,detector,metrics] [--table FILE]

Weights and input are synthetic, sizes the paper's. Each part runs in a process of its own, so that
its peak memory is its own. Figures of `sample`, `train` and `metrics` stand beside their floor,
measured in the same process: the time of the useful matrix products, each measured alone at its
shape and precision, and of the bytes that must move at the memory's measured rate; `efficiency` is
floor over measured. Attention's products (2 percent of the operations), elementwise operations and
random numbers are not in the floor.

* `sample`: hypotheses of the 25-step model, and with `--solvers` of others.
* `train`: optimizer steps with the data set on the device and candidates drawn there.
* `metrics`: every metric of 64 frames x 200 hypotheses.
* `data`: a set of detections is prepared and read in random batches, against training.
* `detector`: images a second of both detectors.
"""

from __future__ import annotations

import functools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags
from jax import Array

import experiments
from configs import h36m
from diffpose_jax import config as config_lib
from diffpose_jax.config import Config, ModelConfig
from diffpose_jax.data import motion, pipeline, prepared, simulator
from diffpose_jax.detectors import efficientpose, hrnet
from diffpose_jax.evaluation import metrics
from diffpose_jax.inference import Model
from diffpose_jax.io import files
from diffpose_jax.method import network as network_lib
from diffpose_jax.method import sampling
from diffpose_jax.method.network import DiffPose
from diffpose_jax.method.pose_vector import POSE_SIZE
from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS, NUM_JOINTS
from diffpose_jax.training import loop
from diffpose_jax.training.step import Trainer

PARTS = flags.DEFINE_list(
    "parts", ["sample", "train", "metrics", "data", "detector"], "What to measure."
)
TABLE = flags.DEFINE_string("table", None, "Markdown file to write, with all figures.")
EXAMPLES = flags.DEFINE_integer("examples", 20_000, "Examples of the data set.", lower_bound=1_000)
SIZES = flags.DEFINE_list(
    "sizes", ["1x200", "64x200", "64x2000"], "Images x hypotheses of `sample`."
)
SOLVERS = flags.DEFINE_list("solvers", ["ddpm"], "Solvers of `sample`, such as ddpm,ddpm:8.")
BATCH_SIZES = flags.DEFINE_list(
    "batch_sizes", [], "Of `train`; default: 64, and 4096 on accelerators."
)
DTYPES = flags.DEFINE_list("dtypes", ["float32"], "Of the products: float32, bfloat16.")

_BATCH_SIZE, _STEPS = 64, 100
_LONG_SECONDS = 20.0
"""A call that takes longer is measured once."""


def report(**figures: Any) -> None:
    """Prints a line; numbers are rounded to four digits."""
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded), flush=True)


def report_beside_floor(
    part: str, compile_seconds: float, seconds: float, floor: float, **figures: Any
) -> None:
    """Prints a line with a time, its floor, that of the compilation and the memory so far."""
    report(
        part=part,
        **figures,
        seconds=seconds,
        floor_seconds=floor,
        efficiency=floor / seconds,
        compile_seconds=compile_seconds,
        peak_memory_mb=peak_memory_mb(),
    )


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median time of a call, after one that is not counted."""
    return compile_and_median_seconds(function, repeats)[1]


def compile_and_median_seconds(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """What the first call takes longer than the median of the next ones, and that median."""
    times: list[float] = []
    while len(times) < 2 or (len(times) < 1 + repeats and times[-1] < _LONG_SECONDS):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    median = float(np.median(times[1:]))
    return times[0] - median, median


Product = tuple[int, int, int]
"""(m, k, n) of a product (m, k) @ (k, n)."""


@functools.cache
def product_seconds(product: Product, dtype: str) -> float:
    """Time of a matrix product, the second factor kept, as a part of a longer computation."""
    m, k, n = product
    repeats = int(np.clip(2e9 / (m * k * n), 4, 200))
    x = jnp.ones((repeats, m, k), dtype)
    w = jnp.ones((k, n), dtype)

    @jax.jit
    def many(x: Array, w: Array) -> Array:
        out, _ = jax.lax.scan(lambda _, x: (x @ w, None), jnp.zeros((m, n), dtype), x)
        return out

    return median_seconds(lambda: many(x, w), 9) / repeats


@functools.cache
def bytes_per_second() -> float:
    """Rate at which memory is read and written, in place."""
    scale = jax.jit(lambda x: x * 1.0001, donate_argnums=0)
    x = jnp.ones(2**26 if jax.default_backend() == "cpu" else 2**30)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        x = jax.block_until_ready(scale(x))
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / float(np.median(times[1:]))


def condition_products(config: ModelConfig, images: int) -> list[Product]:
    """The encoder's, from histograms to projected conditions."""
    width, tokens = 2 * config.num_kernels, images * NUM_HEATMAPS
    layer = [
        (tokens, width, 3 * width),
        (tokens, width, width),
        (tokens, width, config.encoder_feed_forward),
        (tokens, config.encoder_feed_forward, width),
    ]
    return [
        (tokens, width, width),
        *config.encoder_layers * layer,
        (images, NUM_HEATMAPS * width, config.condition_size),
        (images, config.condition_size, config.denoiser_width),
    ]


def denoiser_products(config: ModelConfig, poses: int) -> list[Product]:
    """The denoiser's, of one step."""
    width, size = config.denoiser_width, POSE_SIZE
    blocks = 2 * config.denoiser_blocks * [(poses, width, width)]
    return [(poses, size + 1, width), *blocks, (poses, width, size)]


def backward(product: Product) -> list[Product]:
    """The two products of the gradients of both factors."""
    m, k, n = product
    return [(m, n, k), (k, m, n)]


def total_seconds(products: list[Product], dtype: str) -> float:
    """The floor of products, one after the other."""
    return sum(product_seconds(product, dtype) for product in products)


def _full_size(dtype: str, batch_size: int = _BATCH_SIZE) -> tuple[Config, DiffPose]:
    fields = h36m.get_config()
    fields.model.matmul_dtype = dtype
    fields.training.batch_size = batch_size
    config = config_lib.from_dict(fields)
    return config, network_lib.build(config.model)


def sample() -> None:
    """Sampling at full size."""
    rng, key = np.random.default_rng(0), jax.random.key(0)
    is_cpu = jax.default_backend() == "cpu"
    most_per_pass = network_lib.PER_PASS_ON_CPU if is_cpu else network_lib.PER_PASS
    for dtype in DTYPES.value:
        config, network = _full_size(dtype)
        model = Model(network, network.init(key), config, errors=_any_errors(network))
        for size in SIZES.value:
            images, number = map(int, size.split("x"))
            shape = (images, NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE)
            maps = rng.random(shape, np.float32)
            for solver in SOLVERS.value:
                call = functools.partial(model.sample, key, maps, number, solver)
                compiling, seconds = compile_and_median_seconds(call, 5)
                steps = len(model.parse_solver(solver))
                per_pass = min(most_per_pass, images * number)
                passes = images * number / per_pass
                floor = total_seconds(condition_products(config.model, images), dtype)
                step = total_seconds(denoiser_products(config.model, per_pass), dtype)
                floor += passes * steps * step
                what = {"images": images, "hypotheses": number, "solver": solver}
                report_beside_floor("sample", compiling, seconds, floor, dtype=dtype, **what)
        report(part="sample", dtype=dtype, **_errors(key, model, rng))


def _any_errors(network: DiffPose) -> sampling.PredictionErrors:
    """For the time that solvers take which make use of them."""
    ones = np.ones(POSE_SIZE, np.float32)
    moments = np.broadcast_to(np.diag(ones), (network.schedule.num_steps, POSE_SIZE, POSE_SIZE))
    return sampling.PredictionErrors(0 * ones, ones, moments, 0 * moments, moments)


def _errors(key: Array, model: Model, rng: np.random.Generator) -> dict[str, float]:
    """How far the noise that is predicted is from that of exact products, over its deviation."""
    network, poses = model.network, 1_000
    x_t = jnp.asarray(rng.standard_normal((poses, POSE_SIZE)), jnp.float32)
    t = jnp.asarray(rng.integers(0, network.schedule.num_steps, poses))
    projected = jnp.zeros((poses, network.denoiser.width))
    eps = jax.jit(network.predict)(model.params, x_t, t, projected)
    _, exact = _full_size("float32")
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(exact.predict)(model.params, x_t, t, projected)
    error = jnp.sqrt(jnp.mean(jnp.square(eps - expected)))
    return {"denoiser_error_over_std": float(error / jnp.std(expected))}


def _synthetic_examples(number: int) -> pipeline.TrainingArrays:
    rng = np.random.default_rng(0)
    maps = np.zeros((number, NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE), np.float16)
    for chunk in np.array_split(np.arange(number), max(1, number // 256)):
        maps[chunk] = rng.random((len(chunk), *maps.shape[1:]), np.float32)
    pose_mm = 300 * rng.standard_normal((number, NUM_JOINTS, 3)).astype(np.float32)
    return pipeline.TrainingArrays(pose_mm, maps)


def train() -> None:
    """Training at full size."""
    is_cpu = jax.default_backend() == "cpu"
    sizes = [int(size) for size in BATCH_SIZES.value] or ([64] if is_cpu else [64, 4096])
    arrays = _synthetic_examples(1_024 if is_cpu else 8_192)
    for dtype in DTYPES.value:
        for batch_size in sizes:
            steps = 10 if is_cpu else max(10, 12_800 // batch_size)
            compiling, seconds = _step_seconds(dtype, batch_size, steps, arrays)
            products, traffic = _train_floor(dtype, batch_size)
            what = {"batch": batch_size, "floor_products": products, "floor_traffic": traffic}
            floor = products + traffic
            report_beside_floor("train", compiling, seconds, floor, dtype=dtype, **what)


def _step_seconds(
    dtype: str, batch_size: int, steps: int, arrays: pipeline.TrainingArrays
) -> tuple[float, float]:
    """Seconds of the compilation and of a step, as the training program runs it on one device."""
    config, network = _full_size(dtype, batch_size)
    trainer = Trainer(network, config.training)
    rng, device = np.random.default_rng(0), jax.local_devices()[:1]
    number = len(arrays.pose_mm)

    def selections() -> Iterator[pipeline.Selection]:
        while True:
            rows = rng.integers(0, number, (steps, batch_size), np.int32)
            yield pipeline.Selection(rows, rows)

    key = jax.random.key(0)
    state = jax.jit(trainer.init)(key)
    dispatches = loop.run(trainer, state, key, selections(), device, arrays)
    compiling, seconds = compile_and_median_seconds(lambda: next(dispatches)[0], 5)
    return compiling, seconds / steps


def _train_floor(dtype: str, batch_size: int) -> tuple[float, float]:
    """Seconds of a step's products, and of what it must read and write."""
    config, network = _full_size(dtype)
    encoder = condition_products(config.model, batch_size)
    denoiser = denoiser_products(config.model, batch_size)
    products = [p for product in encoder + denoiser for p in [product, *backward(product)]]
    # Not the gradient of the histograms, which are data, nor that of the noised poses.
    products.remove(backward(encoder[0])[0])
    products.remove(backward(denoiser[0])[0])
    params = jax.eval_shape(network.init, jax.random.key(0))
    # Adam reads the gradient, two moments and the parameter, and writes the last three.
    moved = 7 * 4 * sum(x.size for x in jax.tree.leaves(params))
    moved += batch_size * NUM_HEATMAPS * HEATMAP_SIZE**2 * 2  # the heatmaps, float16
    return total_seconds(products, dtype), moved / bytes_per_second()


def measure_metrics() -> None:
    """Every metric of a batch of hypotheses."""
    rng, frames, number = np.random.default_rng(0), 64, 200
    truth = 300 * rng.standard_normal((frames, NUM_JOINTS, 3)).astype(np.float32)
    noise = 100 * rng.standard_normal((frames, number, NUM_JOINTS, 3)).astype(np.float32)
    hypotheses_mm, truth_mm = jnp.asarray(truth[:, None] + noise), jnp.asarray(truth)
    compute = jax.jit(metrics.per_frame_metrics)
    compiling, seconds = compile_and_median_seconds(lambda: compute(hypotheses_mm, truth_mm), 5)
    # The energy scores' distances between hypotheses outweigh all else: a square root and eight
    # other operations for each joint of each pair, and one more root for the pair's whole pose.
    # The sums over the joints, of roots and of squares, are left out of the floor.
    distances = frames * (NUM_JOINTS + 1) * number * (number - 1) / 2
    floor = distances / _distances_per_second()
    report_beside_floor("metrics", compiling, seconds, floor, images=frames, hypotheses=number)


def _distances_per_second() -> float:
    """Rate of distances between points that lie in the cache, one of each pair."""
    x, y = jnp.ones((3, 2**18)), jnp.zeros((3, 2**18))
    repeats = 50

    @jax.jit
    def many(x: Array, y: Array) -> Array:
        def add(i: Array, total: Array) -> Array:
            dx, dy, dz = x - y * i.astype(jnp.float32)
            return total + jnp.sqrt(dx * dx + dy * dy + dz * dz)

        return jax.lax.fori_loop(0, repeats, add, jnp.zeros(x.shape[1]))

    return repeats * x.shape[1] / median_seconds(lambda: many(x, y), 9)


class SyntheticDetections(prepared.DetectionsBuilder):
    """Simulated detections of the embedded motion, stored as those of real pictures are."""

    def columns(self) -> dict[str, tfds.features.FeatureConnector]:
        """The features beside heatmaps."""
        return {"pose_mm": prepared.POSE, "frame": tfds.features.Scalar(np.int32)}

    def parts(self) -> list[prepared.Part]:
        """Pieces of 1,000 examples."""
        return [
            prepared.Part(f"part_{start:06d}", "train", functools.partial(_read_part, start))
            for start in range(0, EXAMPLES.value, 1_000)
        ]


def _read_part(start: int) -> Iterator[prepared.Columns]:
    rng = np.random.default_rng(start)
    positions_mm = np.concatenate([clip.positions_mm for clip in motion.load_embedded()])
    config = motion.MotionConfig()
    for first in range(start, min(start + 1_000, EXAMPLES.value), 250):
        chosen = positions_mm[rng.integers(len(positions_mm), size=250)]
        made = motion.make_examples(rng, chosen, config)
        yield {
            "heatmaps": np.asarray(simulator.render(made["heatmaps"])),
            "pose_mm": made["pose_mm"],
            "frame": np.arange(first, first + 250, dtype=np.int32),
        }


def data() -> None:
    """Preparation and reading of detections, against the training of the paper's model."""
    with tempfile.TemporaryDirectory() as folder:
        builder = SyntheticDetections({}, data_dir=folder)
        start = time.perf_counter()
        builder.prepare()
        seconds_prepared = time.perf_counter() - start
        size = sum(path.stat().st_size for path in Path(builder.data_path).rglob("*"))
        columns, heatmaps = prepared.read(builder.data_dir, "train")
        rng = np.random.default_rng(0)

        def read() -> np.ndarray:
            return heatmaps(rng.integers(len(columns["pose_mm"]), size=_BATCH_SIZE * _STEPS // 4))

        seconds = median_seconds(read, 5)
    read_rate = _BATCH_SIZE * _STEPS / 4 / seconds
    _, step = _step_seconds("float32", _BATCH_SIZE, 10, _synthetic_examples(1_024))
    report(
        part="data",
        examples=EXAMPLES.value,
        prepared_per_second=EXAMPLES.value / seconds_prepared,
        bytes_per_example=size / EXAMPLES.value,
        read_per_second=read_rate,
        training_consumes_per_second=_BATCH_SIZE / step,
        read_over_training=read_rate * step / _BATCH_SIZE,
        peak_memory_mb=peak_memory_mb(),
    )


def detector() -> None:
    """Images a second of both detectors, on crops of the size that each reads."""
    batch = 2 if jax.default_backend() == "cpu" else 64
    networks = {
        "hrnet_w32": (hrnet.HRNet(), hrnet.INPUT_PX),
        "efficientpose_ii_lite": (efficientpose.EfficientPose(), efficientpose.INPUT_PX),
    }
    for name, (network, input_px) in networks.items():
        rng = np.random.default_rng(0)
        crops = jnp.asarray(rng.integers(0, 256, (batch, input_px, input_px, 3), np.uint8))
        params = jax.jit(network.init)(jax.random.key(0), crops)
        seconds = median_seconds(functools.partial(jax.jit(network.apply), params, crops), 5)
        report(part="detector", network=name, batch=batch, images_per_second=batch / seconds)


def peak_memory_mb() -> float:
    """Largest memory of this process so far: the device's, or on a CPU what is resident."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


_MEASURE = {
    "sample": sample,
    "train": train,
    "metrics": measure_metrics,
    "data": data,
    "detector": detector,
}


def machine() -> None:
    """What it is measured on."""
    report(
        part="machine",
        backend=jax.default_backend(),
        devices=[str(device.device_kind) for device in jax.local_devices()],
        jax=jax.__version__,
        products_gflops=2e-9 * 2048**3 / product_seconds((2048, 2048, 2048), "float32"),
        memory_gb_per_second=1e-9 * bytes_per_second(),
    )


def markdown(lines: list[dict[str, Any]]) -> str:
    """A table for each part, a row for each line, a column for each figure."""
    text = []
    for part in dict.fromkeys(line["part"] for line in lines):
        rows = [line for line in lines if line["part"] == part]
        rows = rows[:1] if part == "machine" else rows
        columns = [
            key for key in dict.fromkeys(key for row in rows for key in row) if key != "part"
        ]
        cells = [[str(row.get(column, "")) for column in columns] for row in rows]
        table = [columns, ["---"] * len(columns), *cells]
        text.append(f"## {part}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in table))
    return "\n".join(text)


def main(_: list[str]) -> None:
    """Runs the parts, each in a process of its own."""
    if unknown := [part for part in PARTS.value if part not in _MEASURE]:
        raise app.UsageError(f"--parts: {', '.join(unknown)} unknown; take {', '.join(_MEASURE)}")
    if len(PARTS.value) == 1:
        machine()
        _MEASURE[PARTS.value[0]]()
        return
    lines = []
    for part in PARTS.value:
        command = [sys.executable, "-m", "experiments.benchmark", *sys.argv[1:], f"--parts={part}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                lines.append(json.loads(line))
                if lines[-1]["part"] != "machine" or len(lines) == 1:
                    print(line, end="", flush=True)
        if process.returncode:
            sys.exit(f"error: part {part} ended with {process.returncode}, see above")
    if TABLE.value:
        files.write_atomic(TABLE.value, markdown(lines).encode())


if __name__ == "__main__":
    experiments.run(main)
