"""TFDS builders for sets of real detections: larger than memory, and hours to prepare.

TFDS sorts a split in memory before it writes it. `DetectionsBuilder` writes part by part instead,
in the order of the parts, and keeps each finished part, so that a killed preparation goes on where
it stopped. What it leaves is an ordinary TFDS data set of `array_record` files, which
`as_data_source` reads without TensorFlow. Beside them lie all columns but the heatmaps, one file a
split, so that opening a split reads no heatmaps.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import inspect
import io
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import quote

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Float, UInt8
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder
from tqdm import tqdm

from diffpose_jax.config import check_range, parse
from diffpose_jax.data import compact
from diffpose_jax.data.prepared import reader
from diffpose_jax.data.prepared.reader import Columns
from diffpose_jax.io.arrays import npz_bytes
from diffpose_jax.io.files import sync, write_atomic, write_json
from diffpose_jax.io.locks import waiting
from diffpose_jax.skeleton import NUM_JOINTS

_PARTS = f"parts_{reader.VERSION}"
_WRITER_OPTIONS = "group_size:1"  # what random access needs
# A reader keeps every shard open: few large ones, whatever the number of parts.
_SHARD_BYTES = 256 << 20

POSE = tfds.features.Tensor(
    shape=(NUM_JOINTS, 3),
    dtype=np.float32,
    encoding="bytes",
    doc="millimetres from the hip, Human3.6M order, x right, y up, z towards the camera",
)
"""The feature `pose_mm` of data sets with 3D truth."""


@runtime_checkable
class Detector(Protocol):
    """A 2D detector, such as `detectors.Detector`."""

    @property
    def fingerprint(self) -> str:
        """Names the network and a hash of its weights, such as "hrnet_w32-5aa3d1"."""

    @property
    def input_px(self) -> int:
        """The side of the crops that it reads."""

    def heatmaps(self, crops: UInt8[np.ndarray, "B P P 3"]) -> Float[np.ndarray, "B 16 64 64"]:
        """Finds the joints in RGB crops; called by one thread at a time."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a data set that is prepared on its own, such as a recording by one camera.

    Attributes:
      name: no other part of the data set has it.
      split: where its examples go.
      read: gives its examples in chunks: all of the data set's columns, with either `heatmaps`
        (n, 16, 64, 64) or, for the detector, `crops` (n, P, P, 3) uint8; runs in a thread.
    """

    name: str
    split: str
    read: Callable[[], Iterator[Columns]]


@dataclasses.dataclass(frozen=True)
class DetectionsConfig:
    """What a user chooses for every such data set; a data set adds fields of its own.

    Attributes:
      max_dropped_mass: share of a heatmap's mass that may be dropped; None keeps all of it (see
        `compact`).
    """

    max_dropped_mass: float | None = compact.MAX_DROPPED_MASS

    def __post_init__(self) -> None:
        if self.max_dropped_mass is not None:
            check_range(self, max_dropped_mass=(0, 1 - 1e-9))


class StoredHeatmaps(tfds.features.FeatureConnector):
    """Heatmaps (16, 64, 64) float32, stored as `compact` encodes them, dense ones too."""

    def get_tensor_info(self) -> tfds.features.TensorInfo:
        """Tells shape and type of decoded heatmaps."""
        return tfds.features.TensorInfo(shape=compact.SHAPE, dtype=np.float32)

    def get_serialized_info(self) -> tfds.features.TensorInfo:
        """Tells shape and type of what is stored."""
        return tfds.features.TensorInfo(shape=(), dtype=np.object_)

    def encode_example(self, example_data: bytes) -> bytes:
        """Takes a record of `compact.encode`, which the builder calls for many examples at once."""
        return example_data

    def decode_example_np(self, example_data: bytes) -> Float[np.ndarray, "16 64 64"]:
        """Turns a record into heatmaps."""
        return compact.decode([example_data])[0]

    def to_json_content(self) -> dict[str, Any]:
        """Tells what `features.json` needs: nothing."""
        return {}

    @classmethod
    def from_json_content(cls, value: dict[str, Any]) -> StoredHeatmaps:
        """Makes the feature from the content of `features.json`."""
        del value
        return cls()


class DetectionsBuilder(FileReaderBuilder):
    """Base of the builders; a data set gives `columns`, `parts`, and what else it has of its own.

    Its examples hold `heatmaps` and the data set's columns, in the order of the parts and, within
    a part, in the order in which it is read. Its folder is named after `fields`, so that other
    fields make another data set.

    Args:
      fields: what the user chose, a mapping to fields of `CONFIG`; the others keep their defaults.
      source: the user's copy, a folder or a file.
      detector: gives the heatmaps, where the parts hold crops.
      data_dir: folder of all data sets; by default where TFDS keeps them.

    Attributes:
      config: what the user chose.
      fields: all that the examples depend on, by which `find` tells data sets apart.

    Raises:
      ConfigError: for a field that does not exist or does not fit.
      ValueError: for a detector that does not fit.
    """

    VERSION = tfds.core.Version(reader.VERSION)
    CONFIG: type[DetectionsConfig] = DetectionsConfig
    LABEL: tuple[str, ...] = ()
    """Fields of the configuration whose values begin the name of the folder, for people."""

    def __init__(
        self,
        fields: Any,
        source: str | Path = "",
        detector: Detector | None = None,
        data_dir: str | Path | None = None,
    ) -> None:
        self.config: Any = parse(self.CONFIG, fields, self.name)
        self.source, self.detector = Path(source), detector
        self.fields = self.describe()
        self._detecting = threading.Lock()
        digest = hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode()).hexdigest()[:12]
        name = "_".join([*(str(self.fields[field]) for field in self.LABEL), digest])
        with quiet_tfds():
            config = tfds.core.BuilderConfig(name=name)
            super().__init__(config=config, data_dir=data_dir, file_format="array_record")

    @abc.abstractmethod
    def columns(self) -> dict[str, tfds.features.FeatureConnector]:
        """The features beside heatmaps: `POSE`, `Text`, `Scalar`, or `Tensor`; at least one."""

    @abc.abstractmethod
    def parts(self) -> list[Part]:
        """All parts, in the order in which they are stored."""

    def describe(self) -> dict[str, Any]:
        """What `fields` is; ValueError says what does not fit the configuration."""
        fields = dataclasses.asdict(self.config)
        if self.detector is not None:
            fields |= {"detector": self.detector.fingerprint, "input_px": self.detector.input_px}
        return fields

    def check(self) -> None:
        """Looks at all sources before hours are spent on the first of them."""

    def prepare(self) -> None:
        """Writes the data set if it is not there yet.

        What an earlier call that was stopped has finished is used. At the end, when the parts
        are joined, the data set takes its place on the disk twice. A second process that prepares
        the same waits for the first.

        Raises:
          ValueError, FileNotFoundError: what `check` and the parts raise; a note says in which.
          OSError: if it cannot be written, as on a full disk.
        """
        with preparing(Path(self.data_dir)):
            self.download_and_prepare()
            if not self.info.initialized:  # written by another process while this one waited
                self.info.read_from_directory(self.data_dir)
            shutil.rmtree(Path(self.data_dir).parent / _PARTS, ignore_errors=True)

    def _info(self) -> tfds.core.DatasetInfo:
        heatmaps = StoredHeatmaps(doc="MPII order, row = y, column = x")
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"heatmaps": heatmaps, **self.columns()}),
            description=(inspect.getdoc(type(self)) or "").partition("\n")[0],
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        """Called by TFDS while `data_path` is a folder that it renames when this is done."""
        del dl_manager, download_config
        self.check()
        parts = self.parts()
        folder = Path(self.data_path).parent / _PARTS
        self._write_parts(parts, folder)
        files: dict[str, list[Path]] = {}
        for part in parts:
            files.setdefault(part.split, []).append(_part_file(folder, part))
        splits = [self._merge(split, paths) for split, paths in files.items()]
        write_json(Path(self.data_path) / reader.CONFIGURATION, self.fields)
        self.info.set_splits(tfds.core.SplitDict(splits))
        for path in Path(self.data_path).iterdir():
            sync(path)

    def _write_parts(self, parts: list[Part], folder: Path) -> None:
        """Writes those that are not there yet, several at a time, each in a thread."""
        folder.mkdir(parents=True, exist_ok=True)
        todo = [part for part in parts if not _part_file(folder, part).exists()]
        stop = threading.Event()
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            tqdm(desc="parts", total=len(parts), initial=len(parts) - len(todo)) as finished,
            tqdm(desc="examples", unit=" examples") as examples,
        ):
            try:
                futures = [
                    pool.submit(self._write_part, part, folder, stop, examples) for part in todo
                ]
                for future in as_completed(futures):
                    future.result()
                    finished.update()
            finally:  # after an error or a signal
                stop.set()

    def _write_part(self, part: Part, folder: Path, stop: threading.Event, examples: tqdm) -> None:
        """Writes the records of a part and beside them its columns: whole or not at all."""
        if stop.is_set():
            return
        path = _part_file(folder, part)
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        pieces = []
        writer = ArrayRecordWriter(os.fspath(beside), _WRITER_OPTIONS)
        try:
            for chunk in part.read():
                columns, heatmaps = self._checked(chunk)
                del chunk  # or it would stay in memory until the next one has come
                for record in self._records(columns, heatmaps):
                    writer.write(record)
                pieces.append(columns)
                examples.update(len(heatmaps))
                if stop.is_set():
                    return
            if not pieces:
                raise ValueError("it holds no examples")
            writer.close()
            _save_columns(path.with_suffix(".npz"), pieces)
            # The records come last: where they are, the part is finished.
            sync(beside)
            beside.replace(path)
            sync(folder)
        except Exception as error:
            stop.set()
            error.add_note(
                f"in part {part.name!r}; the finished parts are kept for the next attempt"
            )
            raise
        finally:
            with contextlib.suppress(RuntimeError):  # of a full disk, as was the error before
                writer.close()
            beside.unlink(missing_ok=True)

    def _checked(self, chunk: Columns) -> tuple[Columns, list[bytes]]:
        """The columns of a chunk, with the types of the features, and its encoded heatmaps."""
        features = self.info.features
        chunk = dict(chunk)
        if "crops" in chunk:
            if self.detector is None:
                raise ValueError("it holds crops, and there is no detector")
            with self._detecting:
                chunk["heatmaps"] = np.asarray(self.detector.heatmaps(chunk.pop("crops")))
        if set(chunk) != set(features):
            raise ValueError(f"its columns are {sorted(chunk)}; they must be {sorted(features)}")
        heatmaps = compact.encode(chunk.pop("heatmaps"), self.config.max_dropped_mass)
        columns = {}
        for name, values in chunk.items():
            text = isinstance(features[name], tfds.features.Text)
            dtype = np.str_ if text else features[name].np_dtype
            columns[name] = np.asarray(values).astype(dtype, casting="same_kind")
            expected = (len(heatmaps), *features[name].shape)
            if columns[name].shape != expected:
                raise ValueError(f"{name} has shape {columns[name].shape}; it must be {expected}")
            if columns[name].dtype.kind == "f" and not np.isfinite(columns[name]).all():
                raise ValueError(f"{name} is not finite")
        return columns, heatmaps

    def _records(self, columns: Columns, heatmaps: list[bytes]) -> Iterator[bytes]:
        """The examples of a chunk as TFDS stores them."""
        features = self.info.features
        serializer = tfds.core.ExampleSerializer(features.get_serialized_info())
        for row, encoded in enumerate(heatmaps):
            example = {name: column[row] for name, column in columns.items()}
            example = features.encode_example(example | {"heatmaps": encoded})
            # TFDS itself leaves the order of the columns to chance.
            yield serializer.get_tf_example(example).SerializeToString(deterministic=True)

    def _merge(self, split: str, files: list[Path]) -> tfds.core.SplitInfo:
        """Copies the parts of a split into shards and their columns into one file."""
        template = self._get_filename_template(split)
        sizes = np.array([path.stat().st_size for path in files])
        shard_of = dict(zip(files, (np.cumsum(sizes) - sizes) // _SHARD_BYTES, strict=True))
        shards = [list(group) for _, group in itertools.groupby(files, shard_of.get)]
        lengths = []
        for index, paths in enumerate(shards):
            path = template.sharded_filepath(shard_index=index, num_shards=len(shards))
            writer = ArrayRecordWriter(os.fspath(path), _WRITER_OPTIONS)
            lengths.append(0)
            for record in itertools.chain.from_iterable(map(_read_records, paths)):
                writer.write(record)
                lengths[-1] += 1
            writer.close()
        columns = [reader.load_columns(path.with_suffix(".npz")) for path in files]
        _save_columns(reader.columns_file(self.data_path, split), columns)
        return tfds.core.SplitInfo(split, lengths, int(sizes.sum()), template)


def _part_file(folder: Path, part: Part) -> Path:
    return folder / f"{quote(part.name, safe='')}.array_record"


def _read_records(path: Path) -> Iterator[bytes]:
    records = ArrayRecordReader(os.fspath(path))
    for start in range(0, records.num_records(), reader.RECORDS_AT_ONCE):
        stop = min(start + reader.RECORDS_AT_ONCE, records.num_records())
        yield from records.read(start, stop)
    records.close()


def _save_columns(path: Path, pieces: list[Columns]) -> None:
    joined = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    write_atomic(path, npz_bytes(joined, compressed=True))


@contextlib.contextmanager
def preparing(folder: Path) -> Iterator[None]:
    """What a data set's folder is prepared in: by one process at a time, without TFDS's messages.

    At the end it removes what TFDS leaves behind when it is killed.

    Raises:
      OSError: in place of the error that array_record has for a file that it cannot write.
    """
    with waiting(folder.parent), quiet_tfds():
        try:
            yield
        except RuntimeError as error:
            if type(error) is not RuntimeError:
                raise
            unwritten = OSError(f"{folder} cannot be prepared: {error}")
            unwritten.__notes__ = getattr(error, "__notes__", [])
            raise unwritten from error
        for unfinished in folder.parent.glob(f"incomplete.*_{folder.name}"):
            shutil.rmtree(unfinished)


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Keeps TFDS from warning of unknown configurations and from announcing a download."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
