"""Finds prepared data sets by what they were made with, and reads them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Float, Int
from tensorflow_datasets.proto import tf_example_pb2

from diffpose_jax.data import compact
from diffpose_jax.io.files import read_json

VERSION = "1.1.0"
"""Of what is stored; data sets of another version are not found."""
CONFIGURATION = "configuration.json"
"""The file in a prepared data set with the fields that it was made with."""

RECORDS_AT_ONCE = 128
_FINGERPRINTED = 256

Columns = dict[str, np.ndarray]
"""Arrays by name, a row of each for an example."""


def all_of(dataset: str, data_dir: str | Path | None) -> Path:
    """The folder of all prepared forms of a data set: in `data_dir`, or where TFDS keeps them."""
    return Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / dataset


def columns_file(folder: str | os.PathLike[str], split: str) -> Path:
    """The file with all columns of a split but the heatmaps."""
    return Path(folder) / f"columns_{split}.npz"


def load_columns(path: Path) -> Columns:
    """Reads a `columns_file`."""
    with np.load(path) as columns:
        return dict(columns)


def find(data_dir: str | Path | None, dataset: str, wanted: Mapping[str, Any]) -> Path:
    """The folder of the one prepared data set that was made as wanted, for `read`.

    Args:
      data_dir: folder of all data sets; by default where TFDS keeps them.
      dataset: its name, such as "human36m".
      wanted: values of fields of its configuration. A field that made no difference to a prepared
        data set, such as the crop where the source held heatmaps, need not fit.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if there are several.
    """
    wanted = json.loads(json.dumps(dict(wanted)))  # a tuple is stored as a list
    base = all_of(dataset, data_dir)
    paths = sorted(base.glob(f"*/{VERSION}/{CONFIGURATION}"))
    found = {path.parent: read_json(path) for path in paths}
    fitting = [
        folder
        for folder, fields in found.items()
        if all(fields.get(key, value) == value for key, value in wanted.items())
    ]
    if len(fitting) == 1:
        return fitting[0]
    listed = "".join(f"\n  {folder}: {fields}" for folder, fields in found.items())
    if fitting:
        raise ValueError(
            f"several prepared {dataset} have {wanted}; say more (in config.data.prepared):{listed}"
        )
    raise FileNotFoundError(
        f"no {dataset} with {wanted} is prepared in {base}; make it with experiments.prepare"
        f" --dataset {dataset}" + (f". There are:{listed}" if found else "")
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
    folder: str | Path, split: str
) -> tuple[Columns, Callable[[Int[np.ndarray, " n"]], Float[np.ndarray, "n 16 64 64"]]]:
    """Opens a split of a prepared data set without reading its heatmaps.

    Returns:
      All columns but the heatmaps, in the stored order; and a function from rows to their
      heatmaps, float32, in any order and from any thread.

    Raises:
      FileNotFoundError: if there is no prepared data set.
      ValueError: if it has no such split, or is damaged.
    """
    folder = Path(folder)
    builder = opened(folder)
    if split not in builder.info.splits:
        raise ValueError(f"{folder} has no split {split!r}, but {', '.join(builder.info.splits)}")
    info = builder.info.splits[split]
    try:
        columns = load_columns(columns_file(folder, split))
        found = [ArrayRecordReader(os.fspath(path)).num_records() for path in info.filepaths]
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{_damaged(folder, split)}: {error}") from error
    num_rows = len(next(iter(columns.values())))
    if found != list(info.shard_lengths) or sum(found) != num_rows:
        raise ValueError(
            f"{_damaged(folder, split)}: its files hold {found} records, not"
            f" {list(info.shard_lengths)}, for {num_rows} rows"
        )
    stored = _raw_records(builder, split)
    pool = ThreadPoolExecutor(os.cpu_count())

    def heatmaps(rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n 16 64 64"]:
        out = np.empty((len(rows), *compact.SHAPE), np.float32)

        def fill(start: int) -> None:
            some = slice(start, start + RECORDS_AT_ONCE)
            try:
                records = stored.__getitems__(rows[some].tolist())
                compact.decode(list(map(_stored_heatmaps, records)), out[some])
            except RuntimeError as error:  # array_record's, for a check sum that does not fit
                raise ValueError(f"{_damaged(folder, split)}: {error}") from error

        list(pool.map(fill, range(0, len(rows), RECORDS_AT_ONCE)))
        return out

    return columns, heatmaps


def fingerprint(folder: str | Path) -> str:
    """Names the content of a prepared data set, wherever it lies and whenever it was made.

    A hash over the number of examples, the bytes that they take and `_FINGERPRINTED` of them from
    each split, evenly spread, and over the check sums of the files of columns. It reads little, so
    that it is for telling data sets apart, not for finding damage.
    """
    builder = opened(folder)
    digest = hashlib.sha256()
    for split, info in sorted(builder.info.splits.items()):
        digest.update(f"{split} {info.num_examples} {info.num_bytes}\0".encode())
        source = _raw_records(builder, split)
        rows = np.linspace(0, len(source) - 1, min(len(source), _FINGERPRINTED)).astype(int)
        try:
            records = source.__getitems__(rows.tolist())
        except RuntimeError as error:  # as in `read`
            raise ValueError(f"{_damaged(Path(folder), split)}: {error}") from error
        for record in records:
            # In the order of the names: in a record it is by chance.
            columns = tf_example_pb2.Example.FromString(record).features.feature
            for name, column in sorted(columns.items()):
                digest.update(name.encode() + column.SerializeToString(deterministic=True))
        path = columns_file(folder, split)
        if path.exists():
            with zipfile.ZipFile(path) as archive:
                for file in archive.infolist():
                    digest.update(f"{file.filename} {file.file_size} {file.CRC}\0".encode())
    return digest.hexdigest()[:16]


def _raw_records(builder: tfds.core.DatasetBuilder, split: str) -> Any:
    return builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)


def _stored_heatmaps(record: bytes) -> bytes:
    # TFDS would parse all columns for it.
    example = tf_example_pb2.Example.FromString(record)
    return example.features.feature["heatmaps"].bytes_list.value[0]


def _damaged(folder: Path, split: str) -> str:
    return f"the {split} split in {folder} is damaged; delete the folder and prepare it again"
