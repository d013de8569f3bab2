"""Columns of Arrow that datasets has no function for: distinct texts, whole columns, files."""

import contextlib
import os
import uuid
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from datasets.features import features as registry

ROWS_PER_RECORD_BATCH = 1000  # as datasets writes them


@dataclass
class DistinctText:
    """A column of strings that holds each distinct one once, of any total size: Arrow's dictionary encoding.

    datasets has no feature type for it, and would write out the strings row by row.
    """

    dtype: ClassVar[str] = "large_string"
    pa_type: ClassVar[pa.DataType] = pa.dictionary(pa.int32(), pa.large_string())
    _type: str = field(default="DistinctText", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        if storage.type == self.pa_type:
            return storage
        return storage.cast(self.pa_type.value_type).dictionary_encode()


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # datasets calls all feature types of others experimental
    registry.register_feature(DistinctText, DistinctText.__name__)


class Texts(NamedTuple):
    """A column of texts: the distinct ones, in the order of their first rows, and which of them each row holds."""

    distinct: pa.LargeStringArray  # (num_distinct,)
    row: np.ndarray  # (num_rows,) int32


def distinct_texts(dataset: Dataset, name: str, rows: slice = slice(None)) -> Texts:
    """The texts of some rows, each distinct one once, whether they are stored so (dictionary-encoded) or row by row."""
    column = dataset.with_format("arrow", columns=[name])[rows].column(name)
    if not pa.types.is_dictionary(column.type):  # large strings: texts of more than 2 GB make one array
        column = column.cast(pa.large_string()).dictionary_encode()
    if column.num_chunks == 0:
        return Texts(pa.array([], pa.large_string()), np.zeros(0, np.int32))
    column = pa.concat_arrays(column.chunks)
    # A selection of rows has the dictionary of all of them.
    used, first, row = np.unique(column.indices.to_numpy(), return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order))
    used, distinct = used[order], column.dictionary
    if len(used) < len(distinct) or (np.diff(used) < 0).any():
        distinct = distinct.take(pa.array(used))
    return Texts(distinct, rank[row])


def column(dataset: Dataset, name: str) -> pa.Array:
    """One column as one Arrow array: no Python object per row, and a selection or shuffle of rows is honoured."""
    chunks = dataset.with_format("arrow", columns=[name])[:].column(name)
    return pa.concat_arrays(chunks.chunks) if chunks.num_chunks else pa.array([], chunks.type)


def write_arrow(path: str, features: Features, tables: Iterable[pa.Table], notes: dict[str, str] | None = None) -> None:
    """Writes an Arrow file that `Dataset.from_file` reads, beside its place, and renames it.

    `notes` stand in the metadata of its schema, where `arrow_notes` finds them.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    beside = f"{path}.{uuid.uuid4().hex[:8]}.writing"
    schema = features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, **(notes or {})})
    try:
        with pa.OSFile(beside, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for table in tables:
                writer.write_table(table.cast(schema), max_chunksize=ROWS_PER_RECORD_BATCH)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(beside)
        raise


def arrow_notes(path: str) -> dict[str, str]:
    """The notes of a file that `write_arrow` has written."""
    with pa.OSFile(path) as file, pa.ipc.open_stream(file) as reader:
        return {key.decode(): value.decode() for key, value in reader.schema.metadata.items()}
