"""The approximate search by an index of FAISS, which is built once and kept in a file.

The index divides the features into about √N cells around centres that k-means finds, and stores each number
in 8 bits. A search compares the queries with the images of the nearest cells only.
"""

from __future__ import annotations

import hashlib
import logging
import math
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import torch

from mrcn_fast.files import write_atomically, write_json
from mrcn_fast.reid.documents import DocumentError, read_json
from mrcn_fast.reid.search.features import Features
from mrcn_fast.reid.search.nearest import Hits, check_sizes, in_mib, unit
from mrcn_fast.reid.settings import SettingError, checked, record

# FAISS wants at least 39 features per cell to find the cells, and uses no more than 256.
_LEAST_PER_CELL, _MOST_PER_CELL = 39, 64
_LEAST_PROBES: Final = 8
_PROBED_SHARE: Final = 16
_READ_BYTES: Final = 1 << 22
_INSTEAD: Final = "Give another --index, or remove this one to have it built again"
_RECORD: Final = record("record", {"gallery": str, "index": str})

log = logging.getLogger(__name__)


class IndexFileError(ValueError):
    """An index can't be used. The message has the path, the expected and the found."""


def open_index(path: str | Path, gallery: Features, *, memory: int) -> Any:
    """Open the index of a gallery in a file, which is built if it isn't there.

    The record PATH.json beside it has the fingerprints of the index and of the gallery.

    Args:
        path: the file of the index, as FAISS writes it
        gallery: the features, which are read in chunks
        memory: the most bytes that features take while the index is built, beside the index itself

    Raises:
        IndexFileError: for a file that is no index of this gallery or no record; both stay as they are
        OSError: where the index can't be written
    """
    path, faiss = Path(path), faiss_module("--index", IndexFileError)
    place = record_of(path)
    kept = _kept(place) if path.exists() or place.exists() else {}
    if not path.exists():
        index = _built(faiss, gallery, memory)
        write_atomically(path, lambda file: faiss.write_index(index, faiss.PyCallbackIOWriter(file.write)))
        write_json(place, {"gallery": fingerprint(gallery), "index": _digest(path)})
        return index
    if kept["index"] != _digest(path):
        raise IndexFileError(f"{path}: expected the index of {place.name}; found another file. {_INSTEAD}")
    if kept["gallery"] != fingerprint(gallery):
        raise IndexFileError(
            f"{path}: expected the index of {gallery.origin}; found one of other features. {_INSTEAD}"
        )
    return faiss.read_index(str(path))


def approximate(index: Any, query: Features, gallery: Features, top: int, probes: int | None = None) -> Hits:
    """Find about the `top` nearest gallery images of each query by an index.

    Args:
        index: of `open_index`
        query, gallery: features of one size
        top: the number of images per query
        probes: the cells that are searched; None: a sixteenth of all, and at least 8

    Returns:
        the hits; a row of -1, with a score of minus infinity, where the probed cells have too few images
    """
    check_sizes(query, gallery)
    top = min(top, gallery.rows.count)
    index.nprobe = min(probes or max(_LEAST_PROBES, index.nlist // _PROBED_SHARE), index.nlist)
    found, rows = index.search(unit(query, 0, query.rows.count).numpy(), top)
    scores = torch.from_numpy(found)
    return Hits(scores.masked_fill(torch.from_numpy(rows) < 0, -torch.inf), torch.from_numpy(rows))


def recall(found: Hits, exact: Hits) -> float:
    """The share of the exact hits that were found, as a share of 1, over all queries."""
    same = (found.rows[:, :, None] == exact.rows[:, None, :]).any(dim=1)
    return float(same.float().mean())


def record_of(path: str | Path) -> Path:
    """The file beside an index that says what it is of."""
    path = Path(path)
    return path.with_name(f"{path.name}.json")


def fingerprint(features: Features) -> str:
    """SHA-256 of the shape, the names and the values of features."""
    rows = features.rows
    digest = hashlib.sha256(repr((rows.count, rows.size)).encode())
    digest.update(features.names.content if features.names is not None else b"")
    at_once = max(1, _READ_BYTES // (4 * rows.size))
    for start in range(0, rows.count, at_once):
        digest.update(rows.read(start, min(start + at_once, rows.count)).numpy().tobytes())
    return digest.hexdigest()


def faiss_module(flag: str, error: type[ValueError]) -> ModuleType:
    """Import FAISS. Raises `error` where it isn't installed; `flag` is what needs it."""
    try:
        import faiss
    except ModuleNotFoundError:
        raise error(
            f"faiss is not installed, which {flag} needs: pip install faiss-cpu, or go without {flag}"
        ) from None
    module: ModuleType = faiss
    return module


def _kept(place: Path) -> dict[str, str]:
    """Read the record beside an index."""
    try:
        kept: dict[str, str] = checked(_RECORD, read_json(place, "the record of an index"), "")
    except DocumentError as error:
        raise IndexFileError(f"{error}. {_INSTEAD}") from None
    except SettingError as error:
        raise IndexFileError(f"{place}: expected the record of an index: {error}. {_INSTEAD}") from None
    return kept


def _built(faiss: ModuleType, gallery: Features, memory: int) -> Any:
    rows = gallery.rows
    cells = max(1, min(round(math.sqrt(rows.count)), rows.count // _LEAST_PER_CELL))
    # The features are there twice while FAISS works on them.
    chunk = memory // (2 * 4 * rows.size)
    if chunk < min(rows.count, _LEAST_PER_CELL * cells):
        needed = _LEAST_PER_CELL * cells * 2 * 4 * rows.size
        raise ValueError(
            f"got {in_mib(memory)} of memory, expected at least {in_mib(needed)} to build an index of "
            f"{rows.count} features of {rows.size} numbers: give more --memory, or search exactly, without "
            "--index"
        )
    log.info("Building an index of %d features in %d cells", rows.count, cells)
    index = faiss.index_factory(rows.size, f"IVF{cells},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(_sample(gallery, min(chunk, _MOST_PER_CELL * cells)))
    for start in range(0, rows.count, chunk):
        index.add(unit(gallery, start, min(start + chunk, rows.count)).numpy())
    return index


def _sample(gallery: Features, count: int) -> Any:
    """At most `count` features of the gallery, spread evenly."""
    places = np.linspace(0, gallery.rows.count - 1, min(count, gallery.rows.count)).astype(int)
    found = torch.empty(len(places), gallery.rows.size)
    for number, row in enumerate(places):
        found[number] = unit(gallery, row, row + 1)
    return found.numpy()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()
