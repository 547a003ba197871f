"""Features for other search engines: an index of FAISS, and Parquet, which databases and data frames read.

Both have features of length 1, so that the inner product of two of them is their cosine similarity.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal, get_args

from mrcn_fast.files import write_atomically, write_json
from mrcn_fast.reid.search.features import SUFFIX, FeatureError, Features, write_features
from mrcn_fast.reid.search.hits import visible
from mrcn_fast.reid.search.index import faiss_module
from mrcn_fast.reid.search.nearest import unit

Engine = Literal["safetensors", "faiss", "parquet"]
"""The kinds of files that `mrcn-fast extract` writes."""

SUFFIXES: Final[dict[Engine, str]] = {
    engine: SUFFIX if engine == "safetensors" else f".{engine}" for engine in get_args(Engine)
}

# How many rows of a Parquet file are in memory at a time; the format calls them a row group.
_GROUP: Final = 1 << 14


def check_engine(engine: Engine) -> None:
    """Raise FeatureError where the package that writes the engine's files isn't installed."""
    if engine == "faiss":
        faiss_module("--to faiss", FeatureError)
    if engine == "parquet":
        _pyarrow()


def write_faiss(path: str | Path, features: Features) -> None:
    """Write features of length 1 as an exact index of FAISS (IndexFlatIP), whose rows are the images.

    `PATH.json` beside it has the names of the images by row, and the metadata of the features. Names are
    written as `mrcn_fast.reid.search.hits.visible` gives them.

    Args:
        path: the file of the index
        features: (images, size), finite and not zero

    Raises:
        FeatureError: for other features, and without the package faiss-cpu
        OSError: where a file can't be written
    """
    faiss = faiss_module("--to faiss", FeatureError)
    index = faiss.IndexFlatIP(features.rows.size)
    index.add(unit(features, 0, features.rows.count).numpy())
    # The old names go first, so that they never stand beside another index.
    Path(f"{path}.json").unlink(missing_ok=True)
    write_atomically(path, lambda file: faiss.write_index(index, faiss.PyCallbackIOWriter(file.write)))
    write_json(f"{path}.json", {**features.about, "names": _names(features)})


def write_parquet(path: str | Path, features: Features) -> None:
    """Write features of length 1 as Parquet, with the columns `name` (text) and `feature`.

    A feature is a list of float32 of fixed size. The metadata of the features is that of the file's schema.
    Names are written as `mrcn_fast.reid.search.hits.visible` gives them.

    Args:
        path: the file to write
        features: (images, size), finite and not zero

    Raises:
        FeatureError: for other features, and without the package pyarrow
        OSError: where the file can't be written
    """
    arrow, parquet = _pyarrow()
    size, count = features.rows.size, features.rows.count
    schema = arrow.schema(
        [("name", arrow.string()), ("feature", arrow.list_(arrow.float32(), size))], dict(features.about)
    )
    names = _names(features)

    def write(file: Any) -> None:
        with parquet.ParquetWriter(file, schema) as writer:
            for start in range(0, count, _GROUP):
                stop = min(start + _GROUP, count)
                values = arrow.array(unit(features, start, stop).flatten().numpy())
                column = arrow.FixedSizeListArray.from_arrays(values, size)
                writer.write_table(arrow.table([names[start:stop], column], schema=schema))

    write_atomically(path, write)


ENGINES: Final[dict[Engine, Callable[[str | Path, Features], None]]] = {
    "safetensors": write_features,
    "faiss": write_faiss,
    "parquet": write_parquet,
}
"""The function that writes features for each engine."""


def _names(features: Features) -> list[str]:
    return [visible(features.name(row)) for row in range(features.rows.count)]


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise FeatureError(
            "pyarrow is not installed, which --to parquet needs: pip install pyarrow, or write "
            f"{SUFFIX}, without --to"
        ) from None
    return pyarrow, parquet
