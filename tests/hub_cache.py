"""Puts datasets and models on disk as the hub's cache holds them, so that their names resolve without a network.

Run a program with HF_HOME set to `root` and HF_HUB_OFFLINE=1 to use them.
"""

import shutil
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, Value
from datasets.naming import camelcase_to_snakecase
from datasets.splits import SplitDict, SplitInfo

from qa.columns import DistinctText

REVISION = "0123456789abcdef0123456789abcdef01234567"


def cache_dataset(root: Path, name: str, config: str, splits: dict[str, Dataset]) -> None:
    """The dataset `name` ("squad", "org/name") as `load_dataset` leaves it: one Arrow file a split, and their info."""
    *namespace, short_name = name.split("/")
    snake_name = camelcase_to_snakecase(short_name)
    folder = Path(root, "datasets", "___".join([*namespace, snake_name]), config, "0.0.0", REVISION)
    folder.mkdir(parents=True, exist_ok=True)
    infos = SplitDict(dataset_name=snake_name)
    for split, dataset in splits.items():
        dataset = dataset.flatten_indices().cast(as_strings(dataset.features))
        table = dataset.data.table
        with pa.OSFile(str(folder / f"{snake_name}-{split}.arrow"), "wb") as file:
            with pa.RecordBatchStreamWriter(file, table.schema) as writer:
                writer.write_table(table)
        infos.add(SplitInfo(split, num_bytes=table.nbytes, num_examples=len(dataset), dataset_name=snake_name))
    features = as_strings(next(iter(splits.values())).features)
    info = DatasetInfo(
        features=features, splits=infos, dataset_name=snake_name, config_name=config, builder_name="parquet"
    )
    info.write_to_directory(str(folder))


def as_strings(features: Features) -> Features:
    """The same columns without a type of our own, which the hub does not know."""
    return Features({name: Value("string") if type(t) is DistinctText else t for name, t in features.items()})


def cache_model(root: Path, repo_id: str, folder: Path) -> None:
    """The model `repo_id` with the files of `folder`, as a snapshot that the branch main points to."""
    repository = Path(root, "hub", "models--" + repo_id.replace("/", "--"))
    shutil.copytree(folder, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
