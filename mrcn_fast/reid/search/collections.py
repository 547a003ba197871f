"""Collections of images: the images of a folder, a list or a file, and their features."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mrcn_fast.reid.console import progress_bars
from mrcn_fast.reid.data.formats import SUFFIXES, is_image, pillow_formats
from mrcn_fast.reid.data.images import PersonImages, readable
from mrcn_fast.reid.data.types import UNKNOWN, DatasetError, Modality, Sample
from mrcn_fast.reid.evaluation.trained import Network, NetworkOptions
from mrcn_fast.reid.search.features import Features, HeldRows, Names
from mrcn_fast.reid.training.checkpoint import content_digest


class Collection(NamedTuple):
    """Images by their names, which are paths below the folder or absolute ones."""

    folder: Path
    names: list[str]

    def samples(self, modality: Modality) -> list[Sample]:
        """The images as samples of nobody."""
        return [Sample(self.folder / name, UNKNOWN, UNKNOWN, modality) for name in self.names]


def collect(place: str | Path) -> Collection:
    """Find the images of a folder and the folders below it, of a list of paths, or one image.

    A list is a text file with a path on each line; relative ones lie below the list's folder. Names are bytes
    of any encoding. Hidden files are left out. A folder's images come in the order of their names, a list's
    in the order of its lines.

    Raises:
        DatasetError: where no image is found, and for a list with paths of no file
        OSError: for a folder that can't be read
    """
    place = Path(place)
    _, suffixes = pillow_formats()
    if place.is_dir():
        names = sorted(_below(place, suffixes), key=os.fsencode)
        if not names:
            raise DatasetError(
                f"{place}: expected images ({', '.join(SUFFIXES)}, or others that Pillow reads) in or below "
                "this folder; found none"
            )
        return Collection(place.absolute(), names)
    if not place.is_file():
        raise DatasetError(f"{place}: expected a folder, an image or a list of images; found no such file")
    if is_image(place.name, suffixes):
        return Collection(place.parent.absolute(), [place.name])
    return _listed(place)


def _below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    """The names of the images below a folder, which may have links to folders, but no circles."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (
            os.path.relpath(os.path.join(root, name), folder) for name in files if is_image(name, suffixes)
        )


def _refuse(error: OSError) -> None:
    raise error


def _listed(place: Path) -> Collection:
    content = place.read_bytes()
    if b"\0" in content:
        raise DatasetError(
            f"{place}: expected an image with a suffix that tells so, or a list with a path on each line; "
            "found bytes that are no text"
        )
    folder = place.parent.absolute()
    lines = (os.fsdecode(line.removesuffix(b"\r")) for line in content.split(b"\n"))
    names = [line for line in lines if line.strip()]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DatasetError(
            f"{place}: expected a list with the path of an image on each line; found {len(missing)} of "
            f"{len(names)} lines that name no file, such as {missing[0]!r}. Relative paths lie below {folder}"
        )
    if not names:
        raise DatasetError(f"{place}: expected a list with the path of an image on each line; found none")
    return Collection(folder, names)


def extract_collection(
    network: Network, place: str | Path, modality: Modality, options: NetworkOptions
) -> Features:
    """Extract the test features of a collection of images of one modality.

    Raises:
        DatasetError: where no image is found, and for an image that can't be read; with
            `options.skip_unreadable` those are left out, named in the log and counted
    """
    found = collect(place)
    formats, _ = pillow_formats()
    samples = found.samples(modality)
    if options.skip_unreadable:
        samples, unreadable = readable(samples, workers=options.workers, formats=formats)
        left_out = {sample.path for sample in unreadable}
        found = found._replace(names=[name for name in found.names if found.folder / name not in left_out])
        if not samples:
            raise DatasetError(f"{place}: expected images; found {len(unreadable)} that can't be read")
    features = _extracted(network, samples, modality, formats, options)
    about = {"network": network_digest(network), "modality": modality}
    return Features(HeldRows(features), str(place), Names.of(found.names), found.folder, about=about)


def _extracted(
    network: Network,
    samples: list[Sample],
    modality: Modality,
    formats: tuple[str, ...],
    options: NetworkOptions,
) -> Tensor:
    config = network.config
    images = PersonImages(samples, (config.height, config.width), filter=config.filter, formats=formats)
    with progress_bars() as bars:
        return options.features(network, samples, modality, bars, images)


def network_digest(network: Network) -> str:
    """The SHA-256 of a network's weights, by which features of different networks are told apart."""
    return content_digest(network.state.model)
