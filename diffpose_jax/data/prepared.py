"""TFDS builders for sets of real detections: larger than memory, and hours to prepare.

TFDS sorts a split in memory before it writes it. `DetectionsBuilder` writes part by part instead,
in the order of the parts, and keeps each finished part, so that a killed preparation goes on where
it stopped. What it leaves is an ordinary TFDS data set of `array_record` files, which
`as_data_source` reads without TensorFlow. Beside them lie all columns but the heatmaps, one file a
split, so that opening a split reads no heatmaps.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from diffpose_jax.data import compact
from diffpose_jax.io import locks
from diffpose_jax.io.files import read_json, sync, write_atomic, write_json
from diffpose_jax.skeleton import HEATMAP_SIZE, NUM_HEATMAPS, NUM_JOINTS

_SHAPE = (NUM_HEATMAPS, HEATMAP_SIZE, HEATMAP_SIZE)
# A reader keeps every shard open: few large ones, whatever the number of parts.
_SHARD_BYTES = 256 << 20
_RECORDS_AT_ONCE = 128
_FINGERPRINTED = 256
_CONFIGURATION = "configuration.json"
_WRITER_OPTIONS = "group_size:1"  # what random access needs

Columns = dict[str, np.ndarray]
_Config = TypeVar("_Config", bound="DetectionsConfig")


class Detector(Protocol):
    """A 2D detector.

    Attributes:
      fingerprint: names the network and a hash of its weights, such as "hrnet_w32-5aa3d1".
      input_px: P, the side of the crops that it reads.
    """

    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    @property
    def input_px(self) -> int: ...  # noqa: D102

    def heatmaps(self, crops: np.ndarray) -> np.ndarray:
        """Crops (n, P, P, 3) uint8 RGB to heatmaps (n, 16, 64, 64)."""
        ...


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a data set that is prepared on its own, such as a recording by one camera.

    Attributes:
      name: no other part of the data set has it.
      split: where its examples go.
      read: gives its examples in chunks: columns by name with a leading axis n, all of the data
        set's, with either `heatmaps` (n, 16, 64, 64) or, for the detector, `crops` (n, P, P, 3)
        uint8. It runs in a thread of its own, beside the reads of other parts.
    """

    name: str
    split: str
    read: Callable[[], Iterator[Columns]]


@dataclasses.dataclass(eq=False)
class DetectionsConfig(tfds.core.BuilderConfig):
    """What the examples of every such set depend on; a data set adds fields of its own.

    Attributes:
      detector: the detector's fingerprint; empty where the parts hold heatmaps.
      loss: share of a heatmap's mass that may be dropped; None keeps all of it (see `compact`).
    """

    detector: str = ""
    loss: float | None = compact.DEFAULT_LOSS


def named(config: _Config, label: str) -> _Config:
    """Names a configuration after its content, so that another one makes another data set.

    Args:
      config: all its own fields must be plain values, or dataclasses of them.
      label: what the name begins with; a hash follows.
    """
    # `name` is a field of TFDS, which has no types.
    return dataclasses.replace(config, name=f"{label}_{_fingerprint(config)}")  # type: ignore[call-arg]


def _own_fields(config: DetectionsConfig) -> dict[str, Any]:
    base = {field.name for field in dataclasses.fields(tfds.core.BuilderConfig)}
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in base}


def _fingerprint(config: DetectionsConfig) -> str:
    own = json.dumps(_own_fields(config), sort_keys=True)
    return hashlib.sha256(own.encode()).hexdigest()[:12]


class StoredHeatmaps(tfds.features.FeatureConnector):
    """Heatmaps stored as `compact` encodes them, dense ones too.

    Decoded: (16, 64, 64) float32. With `tfds.decode.SkipDecoding` the bytes come back.
    """

    def get_tensor_info(self) -> tfds.features.TensorInfo:
        """Tells shape and type of decoded heatmaps."""
        return tfds.features.TensorInfo(shape=_SHAPE, dtype=np.float32)

    def get_serialized_info(self) -> tfds.features.TensorInfo:
        """Tells shape and type of what is stored."""
        return tfds.features.TensorInfo(shape=(), dtype=np.object_)

    def encode_example(self, example_data: bytes) -> bytes:
        """Takes a record of `compact.encode`, which the builder calls for many examples at once."""
        return example_data

    def decode_example_np(self, example_data: bytes) -> np.ndarray:
        """Turns a record into heatmaps (16, 64, 64)."""
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
    """Base of the builders; a data set gives `VERSION`, `columns`, `parts` and `check`.

    Its examples hold `heatmaps` and `pose_mm` and the data set's columns. They are stored in the
    order of the parts and, within a part, in the order in which it is read. Its docstring's first
    line is the data set's description.

    Args:
      config: made by `named`.
      detector: needed to prepare a data set whose parts hold crops, not to read it.
      data_dir: folder of all data sets; by default where TFDS keeps them.
    """

    def __init__(
        self,
        *,
        config: DetectionsConfig,
        detector: Detector | None = None,
        data_dir: str | Path | None = None,
    ) -> None:
        with quiet_tfds():
            super().__init__(config=config, data_dir=data_dir, file_format="array_record")
        self._detector = detector

    @abc.abstractmethod
    def columns(self) -> dict[str, tfds.features.FeatureConnector]:
        """The features of the data set's own columns: `Text`, `Scalar`, or `Tensor`."""

    @abc.abstractmethod
    def parts(self) -> list[Part]:
        """All parts, in the order in which they are stored."""

    def fields(self) -> dict[str, Any]:
        """What of the configuration made a difference, by which `find` tells data sets apart."""
        return _own_fields(self.builder_config)

    def check(self) -> None:
        """Looks at all sources before hours are spent on the first of them.

        Raises:
          ValueError, FileNotFoundError: says what is missing or unreadable.
        """

    def prepare(self) -> None:
        """Writes the data set if it is not there yet.

        What an earlier call that was stopped has finished is used. At the end, when the parts
        are joined, the data set takes its place on the disk twice. A second process that prepares
        the same waits for the first.

        Raises:
          ValueError: for a configuration without its hash in its name, a detector other than the
            configuration's, two parts of one name, or a part that does not hold the columns.
          ValueError, FileNotFoundError: what `check` and the parts raise; a note says in which
            part.
          OSError: if it cannot be written, as on a full disk.
        """
        with preparing(Path(self.data_dir)):
            self.download_and_prepare()
            if not self.info.initialized:  # written by another process while this one waited
                self.info.read_from_directory(self.data_dir)
            shutil.rmtree(self._parts_folder(), ignore_errors=True)

    def _info(self) -> tfds.core.DatasetInfo:
        pose = tfds.features.Tensor(
            shape=(NUM_JOINTS, 3),
            dtype=np.float32,
            encoding="bytes",
            doc="Human3.6M order, from the hip, x right, y up, z towards the camera",
        )
        heatmaps = StoredHeatmaps(doc="MPII order, row = y, column = x")
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"heatmaps": heatmaps, "pose_mm": pose, **self.columns()}
            ),
            description=(inspect.getdoc(type(self)) or "").partition("\n")[0],
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        """Called by TFDS while `data_path` is a folder that it renames when this is done."""
        del dl_manager, download_config
        self._check_configuration()
        self.check()
        parts = self.parts()
        for name, times in collections.Counter(part.name for part in parts).items():
            if times > 1:
                raise ValueError(f"{times} parts have the name {name!r}")
        folder = self._parts_folder()
        self._write_parts(parts, folder)
        files: dict[str, list[Path]] = {}
        for part in parts:
            files.setdefault(part.split, []).append(_part_file(folder, part))
        splits = [self._merge(split, paths) for split, paths in files.items()]
        write_json(Path(self.data_path) / _CONFIGURATION, self.fields())
        self.info.set_splits(tfds.core.SplitDict(splits))
        for path in Path(self.data_path).iterdir():
            sync(path)

    def _parts_folder(self) -> Path:
        return Path(self.data_path).parent / f"parts_{self.version}"

    def _check_configuration(self) -> None:
        config = self.builder_config
        if not config.name.endswith(_fingerprint(config)):
            raise ValueError(f"configuration {config.name!r} was not made by `detections.named`")
        given = "" if self._detector is None else self._detector.fingerprint
        if given != config.detector:
            raise ValueError(
                f"the configuration is for the detector {config.detector!r}, not for {given!r}"
            )

    def _write_parts(self, parts: list[Part], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        todo = [part for part in parts if not _part_file(folder, part).exists()]
        writers: dict[str, _PartWriter] = {}
        with (
            contextlib.closing(_read_ahead(todo)) as chunks,
            tqdm(desc="parts", total=len(parts), initial=len(parts) - len(todo)) as finished,
            tqdm(desc="examples", unit=" examples") as examples,
        ):
            try:
                for part, chunk in chunks:
                    if part.name not in writers:
                        writers[part.name] = _PartWriter(_part_file(folder, part))
                    with _noted(part):
                        if chunk is None:
                            writers[part.name].finish()
                            del writers[part.name]
                            finished.update()
                        else:
                            columns, records = self._encode(chunk)
                            writers[part.name].write(columns, records)
                            examples.update(len(columns["pose_mm"]))
                    del chunk  # or it would stay in memory until the next one has come
            finally:
                for writer in writers.values():
                    writer.discard()

    def _encode(self, chunk: Columns) -> tuple[Columns, Iterator[bytes]]:
        """Gives the columns of a chunk but the heatmaps, and its examples as TFDS stores them."""
        features = self.info.features
        chunk = dict(chunk)
        if "crops" in chunk:
            if self._detector is None:
                raise ValueError("it holds crops, and there is no detector")
            chunk["heatmaps"] = np.asarray(self._detector.heatmaps(chunk.pop("crops")))
        if set(chunk) != set(features):
            raise ValueError(f"its columns are {sorted(chunk)}; they must be {sorted(features)}")
        heatmaps = compact.encode(chunk.pop("heatmaps"), self.builder_config.loss)
        columns = {}
        for name, values in chunk.items():
            text = isinstance(features[name], tfds.features.Text)
            dtype = np.str_ if text else features[name].np_dtype
            columns[name] = np.asarray(values).astype(dtype, casting="same_kind")
            expected = (len(heatmaps), *features[name].shape)
            if columns[name].shape != expected:
                raise ValueError(f"{name} has shape {columns[name].shape}; it must be {expected}")
        serializer = tfds.core.ExampleSerializer(features.get_serialized_info())

        def record(row: int) -> bytes:
            example = {name: column[row] for name, column in columns.items()}
            example = features.encode_example(example | {"heatmaps": heatmaps[row]})
            # TFDS itself leaves the order of the columns to chance.
            return serializer.get_tf_example(example).SerializeToString(deterministic=True)

        return columns, map(record, range(len(heatmaps)))

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
            for record in itertools.chain.from_iterable(map(_records, paths)):
                writer.write(record)
                lengths[-1] += 1
            writer.close()
        columns = [_load_columns(path.with_suffix(".npz")) for path in files]
        _save_columns(
            _columns_file(self.data_path, split),
            {name: np.concatenate([part[name] for part in columns]) for name in columns[0]},
        )
        return tfds.core.SplitInfo(split, lengths, int(sizes.sum()), template)


@contextlib.contextmanager
def preparing(folder: Path) -> Iterator[None]:
    """What a data set is prepared in: one process at a time, without TFDS's messages.

    At the end it removes what TFDS leaves behind when it is killed.

    Args:
      folder: the data set's, which need not be there yet.

    Raises:
      OSError: in place of the error that array_record has for a file that it cannot write.
    """
    with locks.waiting(folder.parent), quiet_tfds():
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
    """Keeps TFDS from warning of configurations that are not known beforehand.

    And from announcing a download, although there is nothing to download. Its progress bars, on
    stderr, stay.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


class _PartWriter:
    """Writes the records of a part and beside them its columns: whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._writer = ArrayRecordWriter(os.fspath(self._beside), _WRITER_OPTIONS)
        self._columns: list[Columns] = []

    def write(self, columns: Columns, records: Iterable[bytes]) -> None:
        for record in records:
            self._writer.write(record)
        self._columns.append(columns)

    def finish(self) -> None:
        if not self._columns:
            raise ValueError("it holds no examples")
        self._writer.close()
        _save_columns(
            self._path.with_suffix(".npz"),
            {name: np.concatenate([c[name] for c in self._columns]) for name in self._columns[0]},
        )
        # The records come last: where they are, the part is finished.
        sync(self._beside)
        self._beside.replace(self._path)
        sync(self._path.parent)

    def discard(self) -> None:
        with contextlib.suppress(RuntimeError):  # of a full disk, as was the error before
            self._writer.close()
        self._beside.unlink()


def _read_ahead(parts: Iterable[Part]) -> Generator[tuple[Part, Columns | None], None, None]:
    """Reads several parts at a time, each in a thread, and gives their chunks as they come.

    A part's chunks come in order, with None after the last. One chunk of each part in progress is
    read ahead, so that a few are in memory at any time.
    """
    parts = iter(parts)
    running: dict[Future[Columns | None], tuple[Part, Iterator[Columns]]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def read_on(part: Part, chunks: Iterator[Columns]) -> None:
            running[pool.submit(next, chunks, None)] = (part, chunks)

        for part in itertools.islice(parts, os.cpu_count()):
            read_on(part, _chunks(part))
        while running:
            future = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            part, chunks = running.pop(future)
            with _noted(part):
                chunk = future.result()
            if chunk is not None:
                read_on(part, chunks)
            elif following := next(parts, None):
                read_on(following, _chunks(following))
            yield part, chunk
            del future, chunk  # or they would stay in memory until the next one has come


def _chunks(part: Part) -> Iterator[Columns]:
    # A generator, so that all of the reading is done where it is advanced: in a thread.
    yield from part.read()


@contextlib.contextmanager
def _noted(part: Part) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"in part {part.name!r}; the finished parts are kept for the next attempt")
        raise


def _records(path: Path) -> Iterator[bytes]:
    reader = ArrayRecordReader(os.fspath(path))
    for start in range(0, reader.num_records(), _RECORDS_AT_ONCE):
        yield from reader.read(start, min(start + _RECORDS_AT_ONCE, reader.num_records()))
    reader.close()


def _part_file(folder: Path, part: Part) -> Path:
    return folder / f"{quote(part.name, safe='')}.array_record"


def _columns_file(folder: str | os.PathLike[str], split: str) -> Path:
    return Path(folder) / f"columns_{split}.npz"


def _save_columns(path: Path, columns: Columns) -> None:
    content = io.BytesIO()
    arrays: dict[str, Any] = columns
    np.savez_compressed(content, **arrays)
    write_atomic(path, content.getvalue())


def _load_columns(path: Path) -> Columns:
    with np.load(path) as columns:
        return dict(columns)


def all_of(dataset: str, data_dir: str | Path | None) -> Path:
    """The folder of all prepared forms of a data set: in `data_dir`, or where TFDS keeps them."""
    return Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / dataset


def find(data_dir: str | Path | None, dataset: str, wanted: Mapping[str, Any]) -> Path:
    """The one prepared data set that was made as wanted.

    Args:
      data_dir: folder of all data sets; by default where TFDS keeps them.
      dataset: its name, such as "human36m".
      wanted: values of fields of its configuration. A field that made no difference to a prepared
        data set, such as the crop where the source held heatmaps, need not fit.

    Returns:
      The folder, for `read`.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if there are several; the message lists them and how they differ.
    """
    base = all_of(dataset, data_dir)
    found = {path.parent: read_json(path) for path in sorted(base.glob(f"*/*/{_CONFIGURATION}"))}
    fitting = [
        folder
        for folder, fields in found.items()
        if all(fields.get(key, value) == value for key, value in wanted.items())
    ]
    if len(fitting) == 1:
        return fitting[0]
    listed = "".join(f"\n  {folder}: {fields}" for folder, fields in found.items())
    if not fitting:
        raise FileNotFoundError(
            f"no {dataset} with {dict(wanted)} is prepared in {base}; make it with"
            f" experiments.prepare --dataset {dataset}" + (f". There are:{listed}" if found else "")
        )
    raise ValueError(
        f"several prepared {dataset} have {dict(wanted)}; say more in config.data.prepared, to"
        f" choose one of:{listed}"
    )


def opened(folder: str | Path) -> tfds.core.DatasetBuilder:
    """The builder of a prepared data set, from its folder (`builder.data_dir`).

    Raises:
      FileNotFoundError: if there is no prepared data set.
    """
    folder = Path(folder).absolute()
    info = folder / "dataset_info.json"
    if not info.exists():
        raise FileNotFoundError(f"{folder} holds no prepared data set; prepare it first")
    return _opened(folder, info.stat().st_mtime_ns)


@functools.cache
def _opened(folder: Path, _written_ns: int) -> tfds.core.DatasetBuilder:
    """One for each data set, written once: TFDS keeps every builder for as long as Python runs."""
    return tfds.builder_from_directory(folder)


def read(
    prepared: tfds.core.DatasetBuilder | str | Path, split: str
) -> tuple[Columns, Callable[[np.ndarray], np.ndarray]]:
    """Opens a split of a prepared data set without reading its heatmaps.

    Args:
      prepared: its builder, or its folder (`builder.data_dir`).
      split: one of its splits.

    Returns:
      All columns but the heatmaps, (N, ..), in the stored order; and a function from rows (n,) to
      their heatmaps (n, 16, 64, 64) float32, in any order and from any thread.

    Raises:
      FileNotFoundError: if there is no prepared data set.
      ValueError: if it has no such split, or is damaged.
    """
    folder = Path(prepared if isinstance(prepared, str | Path) else prepared.data_dir)
    builder = opened(folder)
    if split not in builder.info.splits:
        raise ValueError(f"{folder} has no split {split!r}, but {', '.join(builder.info.splits)}")
    info = builder.info.splits[split]
    try:
        columns = _load_columns(_columns_file(folder, split))
        found = [ArrayRecordReader(os.fspath(path)).num_records() for path in info.filepaths]
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{_damaged(folder, split)}: {error}") from error
    if found != list(info.shard_lengths) or sum(found) != len(columns["pose_mm"]):
        raise ValueError(
            f"{_damaged(folder, split)}: its files hold {found} records, not"
            f" {list(info.shard_lengths)}, for {len(columns['pose_mm'])} rows"
        )
    stored = builder.as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    pool = ThreadPoolExecutor(os.cpu_count())

    def heatmaps(rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows)
        out = np.empty((len(rows), *_SHAPE), np.float32)

        def fill(start: int) -> None:
            some = slice(start, start + _RECORDS_AT_ONCE)
            try:
                records = stored.__getitems__(rows[some].tolist())
                compact.decode(list(map(_stored_heatmaps, records)), out[some])
            except RuntimeError as error:  # array_record's, for a check sum that does not fit
                raise ValueError(f"{_damaged(folder, split)}: {error}") from error

        list(pool.map(fill, range(0, len(rows), _RECORDS_AT_ONCE)))
        return out

    return columns, heatmaps


def fingerprint(prepared: str | Path) -> str:
    """Names the content of a prepared data set, wherever it lies and whenever it was made.

    A hash over the number of examples, the bytes that they take and `_FINGERPRINTED` of them from
    each split, evenly spread, and over the check sums of the files of columns. It reads little, so
    that it is for telling data sets apart, not for finding damage.

    Args:
      prepared: its folder.

    Raises:
      FileNotFoundError: if there is no prepared data set.
      ValueError: if an example is damaged.
    """
    builder = opened(prepared)
    digest = hashlib.sha256()
    for split, info in sorted(builder.info.splits.items()):
        digest.update(f"{split} {info.num_examples} {info.num_bytes}\0".encode())
        source = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        rows = np.linspace(0, len(source) - 1, min(len(source), _FINGERPRINTED)).astype(int)
        try:
            records = source.__getitems__(rows.tolist())
        except RuntimeError as error:  # as in `read`
            raise ValueError(f"{_damaged(Path(prepared), split)}: {error}") from error
        for record in records:
            # In the order of the names: in a record it is by chance.
            columns = tf_example_pb2.Example.FromString(record).features.feature
            for name, column in sorted(columns.items()):
                digest.update(name.encode() + column.SerializeToString(deterministic=True))
        path = _columns_file(prepared, split)
        if path.exists():
            with zipfile.ZipFile(path) as archive:
                for file in archive.infolist():
                    digest.update(f"{file.filename} {file.file_size} {file.CRC}\0".encode())
    return digest.hexdigest()[:16]


def _stored_heatmaps(record: bytes) -> bytes:
    # TFDS would parse all columns for it.
    example = tf_example_pb2.Example.FromString(record)
    return example.features.feature["heatmaps"].bytes_list.value[0]


def _damaged(folder: Path, split: str) -> str:
    return f"the {split} split in {folder} is damaged; delete the folder and prepare it again"
