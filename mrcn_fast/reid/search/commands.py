"""The commands extract, search and score: `COMMAND(flags, argv)` returns the exit status."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from mrcn_fast.files import write_json
from mrcn_fast.flags import Flags
from mrcn_fast.outputs import check_file, check_new
from mrcn_fast.reid.console import log_to_console
from mrcn_fast.reid.data.types import Modality
from mrcn_fast.reid.evaluation.trained import Network, NetworkOptions, open_network
from mrcn_fast.reid.kinds import NUMPY, Count, PathText, Several
from mrcn_fast.reid.search.collections import extract_collection, network_digest
from mrcn_fast.reid.search.engines import ENGINES, SUFFIXES, Engine, check_engine
from mrcn_fast.reid.search.features import SUFFIX, FeatureError, Features, HeldRows, read_features
from mrcn_fast.reid.search.hits import Found, as_json, as_text, visible, write_page
from mrcn_fast.reid.search.index import approximate, open_index, recall, record_of
from mrcn_fast.reid.search.nearest import nearest
from mrcn_fast.reid.search.scored import Metric, Protocol, as_values, score_features
from mrcn_fast.reid.settings import SettingError, check_fields

_MIB: Final = 1 << 20
# The rank up to which an index is compared with the exact search, and the most queries that are.
_RECALL_TOP, _RECALL_QUERIES = 10, 100
# Queries whose hits are printed.
_PRINTED: Final = 20
_OTHER: Final[dict[Modality, Modality]] = {"visible": "infrared", "infrared": "visible"}
_Top = Annotated[int, Field(ge=1, le=10_000), NUMPY]


def extract(flags: Flags, argv: list[str]) -> int:
    """Extract the features of images, and write them to a file."""
    flags.add_setting("--checkpoint", PathText, help="the network's checkpoint, or its folder")
    flags.add_setting("--images", PathText, help="folder, list of paths, or one image")
    flags.add_setting("--modality", Modality, help="modality of the images")
    flags.add_setting("--out", PathText, help=f"file to write, {', '.join(SUFFIXES.values())} as --to says")
    flags.add_setting(
        "--to",
        Engine,
        "safetensors",
        "kind of file: for the commands here, for FAISS, or for databases that read Parquet",
    )
    flags.add_setting("--overwrite", bool, False, "replace the file")
    flags.add_of(NetworkOptions)
    values = flags.values(argv)
    place, images, out = (values.pop(name) for name in ("checkpoint", "images", "out"))
    modality, engine, overwrite = (values.pop(name) for name in ("modality", "to", "overwrite"))
    if not out.endswith(SUFFIXES[engine]):
        flags.error(
            f"got --out {visible(out)}, expected a name that ends with {SUFFIXES[engine]}, as --to {engine} "
            "writes it"
        )
    check_engine(engine)
    for path in [out, f"{out}.json"] if engine == "faiss" else [out]:
        check_new(path, "features", overwrite)
    log_to_console()
    options = NetworkOptions(**values)
    found = extract_collection(_opened(place, options), images, modality, options)
    ENGINES[engine](out, found)
    print(f"{visible(out)}: {found.rows.count} features of {found.rows.size} numbers")
    return 0


@dataclass(kw_only=True)
class SearchOptions:
    """How a search is done, and what is written."""

    query: PathText
    """What is sought: folder, list of paths, one image, or a .safetensors file of features."""
    gallery: PathText
    """What is searched: the same."""
    checkpoint: PathText | None = None
    """The network's checkpoint, or its folder; none: query and gallery are files of features."""
    query_modality: Modality | None = None
    """Modality of the images sought."""
    gallery_modality: Modality | None = None
    """Modality of the images searched; none: the other one."""
    top: _Top = 10
    """Images to find per query."""
    memory: Count = 1024
    """The most MiB to work in, beside what the program and the network take."""
    index: PathText | None = None
    """File of a FAISS index of the gallery, which is built where there is none; none: search exactly."""
    probes: Count | None = None
    """Cells of the index to search; none: a sixteenth of them, and at least 8."""
    json: PathText | None = None
    """File to write all hits to as JSON."""
    html: PathText | None = None
    """File to write all hits to as a page with pictures, which needs no other file."""
    overwrite: bool = False
    """Replace the files of --json and --html."""

    def __post_init__(self) -> None:
        check_fields(self, SettingError)
        if self.probes is not None and self.index is None:
            raise ValueError(
                f"got probes={self.probes} without an index, which alone has cells: give --index"
            )
        if self.index is not None and not self.gallery.endswith(SUFFIX):
            raise ValueError(
                f"got an index of {self.gallery}, expected one of a {SUFFIX} file of features: write it with "
                "`mrcn-fast extract` first"
            )
        record = None if self.index is None else record_of(self.index)
        _check_distinct(self.json, self.html, self.index, record)
        for path, what in ((self.json, "the hits"), (self.html, "the page")):
            if path is not None:
                check_new(path, what, self.overwrite)
        if self.index is not None:
            check_file(self.index, "the index")


def _check_distinct(*paths: str | Path | None) -> None:
    """Refuse one file for two of the hits, the page, the index and the record beside it."""
    places = [os.path.abspath(path) for path in paths if path is not None]
    for place in places:
        if places.count(place) > 1:
            raise ValueError(
                f"got {place} twice, expected one file each for json, html, index and the index's record "
                "(INDEX.json)"
            )


def search(flags: Flags, argv: list[str]) -> int:
    """Search a gallery for the people in queries, and print and write what was found."""
    hits = {"top": "how it is searched", "json": "where the hits go"}
    flags.add_of(SearchOptions, groups={"query": "what is searched"} | hits)
    flags.add_of(NetworkOptions, groups={"skip_unreadable": "what is searched", "backend": "machine"})
    values = flags.values(argv)
    chosen = SearchOptions(**{name: values.pop(name) for name in SearchOptions.__dataclass_fields__})
    log_to_console()
    query, gallery = _both_sides(chosen, NetworkOptions(**values))
    found = _searched(query, gallery, chosen)
    if chosen.json is not None:
        write_json(chosen.json, as_json(found))
    if chosen.html is not None:
        write_page(chosen.html, found)
    for line in as_text(found, _PRINTED):
        print(line)
    return 0


def score(flags: Flags, argv: list[str]) -> int:
    """Score two files of features by a protocol."""
    flags.add_setting(
        "--features", Several[PathText], help=f"two {SUFFIX} files: the queries', the gallery's"
    )
    flags.add_setting("--protocol", Protocol, help="rules of the data set")
    flags.add_setting("--metric", Metric, "cosine", "distance of two features")
    flags.add_setting("--json", PathText, None, "file to write the scores to as shares of 1")
    flags.add_setting("--overwrite", bool, False, "replace the file of --json")
    values = flags.values(argv)
    if len(values["features"]) != 2:
        flags.error(f"got --features with {len(values['features'])} files, expected two: queries and gallery")
    if values["json"] is not None:
        check_new(values["json"], "the scores", values["overwrite"])
    query, gallery = map(read_features, values["features"])
    found = as_values(score_features(query, gallery, values["protocol"], values["metric"]))
    if values["json"] is not None:
        chosen = {name: values[name] for name in ("features", "protocol", "metric")}
        write_json(values["json"], {**chosen, **found})
    print(
        f"{values['protocol']}, {values['metric']}: {found.pop('valid_queries')} of {query.rows.count} "
        f"queries valid, {gallery.rows.count} gallery images"
    )
    for name, value in found.items():
        print(f"  {name.replace('rank', 'Rank-'):8s}{100 * value:6.2f}")
    return 0


def _opened(checkpoint: str, options: NetworkOptions) -> Network:
    return open_network(
        checkpoint,
        backend=options.backend,
        accelerator=options.accelerator,
        precision=options.precision,
    )


def _both_sides(chosen: SearchOptions, options: NetworkOptions) -> tuple[Features, Features]:
    """Read or extract the features of query and gallery, which have to be of one network."""
    stored = {
        place: read_features(place) for place in (chosen.query, chosen.gallery) if place.endswith(SUFFIX)
    }
    images = [place for place in (chosen.query, chosen.gallery) if place not in stored]
    if images and chosen.checkpoint is None:
        raise ValueError(f"got images, {images[0]}, and no network to extract with: give --checkpoint")
    modalities = _modalities(chosen, stored)
    network = None if chosen.checkpoint is None else _opened(chosen.checkpoint, options)
    digests = {place: features.about.get("network") for place, features in stored.items()}
    if network is not None:
        digests[str(network.path)] = network_digest(network)
    known = {place: digest for place, digest in digests.items() if digest is not None}
    if len(set(known.values())) > 1:
        pairs = " and ".join(f"{place} of network {digest[:12]}" for place, digest in known.items())
        raise FeatureError(
            f"got {pairs}, expected one network: extract the features again with the checkpoint"
        )
    sides: list[Features] = []
    for place, modality in zip((chosen.query, chosen.gallery), modalities, strict=True):
        if place in stored:
            sides.append(stored[place])
        else:
            assert network is not None and modality is not None
            sides.append(extract_collection(network, place, modality, options))
    return sides[0], sides[1]


def _modalities(
    chosen: SearchOptions, stored: dict[str, Features]
) -> tuple[Modality | None, Modality | None]:
    """The modality of the queries and of the gallery, as far as images need one."""
    known: Any = (
        stored[chosen.query].about.get("modality") if chosen.query in stored else chosen.query_modality
    )
    other = chosen.gallery_modality or _OTHER.get(known)
    for flag, place, modality in (("query", chosen.query, known), ("gallery", chosen.gallery, other)):
        if place not in stored and modality is None:
            raise ValueError(f"got images, {place}, without their modality: give --{flag}-modality")
    return known, other


def _searched(query: Features, gallery: Features, chosen: SearchOptions) -> Found:
    memory = chosen.memory * _MIB
    if chosen.index is None:
        return Found(query, gallery, nearest(query, gallery, chosen.top, memory=memory))
    index = open_index(chosen.index, gallery, memory=memory)
    hits = approximate(index, query, gallery, chosen.top, chosen.probes)
    compared = Features(HeldRows(query.rows.read(0, min(query.rows.count, _RECALL_QUERIES))), query.origin)
    exact = nearest(compared, gallery, _RECALL_TOP, memory=memory)
    share = recall(approximate(index, compared, gallery, _RECALL_TOP, chosen.probes), exact)
    note = (
        f"recall@{_RECALL_TOP} of the index against the exact search: {100 * share:.1f} % "
        f"({compared.rows.count} queries, {index.nprobe} of {index.nlist} cells)"
    )
    return Found(query, gallery, hits, (note,))
