"""Columns of Arrow that datasets has no function for: distinct texts, whole columns, lists, files."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from datasets.features import features as registry

from qa.files import written_whole

ROWS_PER_RECORD_BATCH = 1000  # as datasets writes them


@dataclass
class DistinctText:
    """A column of strings that holds each distinct one once, of any total size: Arrow's dictionary encoding.

    datasets has no feature type for it: under its own ones it writes out, or reads, the strings row by row.
    """

    dtype: ClassVar[str] = "large_string"
    pa_type: ClassVar[pa.DataType] = pa.dictionary(pa.int32(), pa.large_string())
    _type: str = field(default="DistinctText", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        return storage.cast(self.pa_type)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # datasets calls all feature types of others experimental
    registry.register_feature(DistinctText, DistinctText.__name__)


class Texts(NamedTuple):
    """A column of texts: the distinct ones, in the order of their first rows, and which of them each row holds."""

    distinct: pa.LargeStringArray  # (num_distinct,)
    row: np.ndarray  # (num_rows,) int32


def distinct_texts(dataset: Dataset, name: str, rows: slice = slice(None)) -> Texts:
    """The texts of some rows, each distinct one once, whether they are stored so (dictionary-encoded) or row by row."""
    column = dataset.with_format("arrow", columns=[name])[rows].column(name).cast(DistinctText.pa_type).combine_chunks()
    # A selection of rows has the dictionary of all of them.
    used, first, row = np.unique(column.indices.to_numpy(), return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.argsort(order).astype(np.int32)
    return Texts(column.dictionary.take(pa.array(used[order])), rank[row])


def column(dataset: Dataset, name: str) -> pa.Array:
    """One column as one Arrow array: no Python object per row, and a selection or shuffle of rows is honoured."""
    return dataset.with_format("arrow", columns=[name])[:].column(name).combine_chunks()


def lists(lengths: np.ndarray | list[int], values: np.ndarray) -> pa.ListArray:
    """Lists of so many of the values each."""
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), values)


def write_arrow(path: str, features: Features, tables: Iterable[pa.Table], notes: str = "") -> None:
    """Writes an Arrow file that `Dataset.from_file` reads, and `read_notes`, as `written_whole` does."""
    schema = features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, "notes": notes})
    with written_whole(path) as partial, pa.OSFile(partial, "wb") as file:
        with pa.ipc.new_stream(file, schema) as writer:
            for table in tables:
                writer.write_table(table.cast(schema), max_chunksize=ROWS_PER_RECORD_BATCH)


def read_notes(path: str) -> str:
    with pa.memory_map(path) as file, pa.ipc.open_stream(file) as stream:
        return stream.schema.metadata[b"notes"].decode()
