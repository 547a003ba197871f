"""Results on disk: their names say what was measured, so that no result silently replaces another."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import FiniteFloat

from mrcn_fast.reid.documents import DocumentError, read_json
from mrcn_fast.reid.evaluation.pairings import TITLES
from mrcn_fast.reid.settings import SettingError, by_name, checked, record
from mrcn_fast.reid.training.checkpoint import RESULT_NAMES
from mrcn_fast.reid.training.config import FREE_ON_RESUME

HEADLINE: Final = ("rank1", "rank10", "rank20", "mAP", "mINP")
# The values that scores depend on, in a result and in each of its searches.
_MEASURED: Final = (
    "dataset", "split", "step", "network", "trained_on", "rerank", "k1", "k2", "skip_unreadable",
    "precision", "backend", "device",
)  # fmt: skip
_SEARCHED: Final = ("protocol", "settings", "trials", "fingerprint")
# A file's name may have 255 bytes.
_STEM: Final = 80
# Results that differ in these alone measure the same, up to rounding.
_WHERE: Final = ("backend", "device")

# The types of the parts of a result that are read again, and of a record of other files.
_MEAN: Final = record("mean", dict.fromkeys(HEADLINE, FiniteFloat))
_SCORES: Final = record("scores", {"mean": _MEAN}, more=True)
_DISTANCES: Final = record("distances", dict.fromkeys(("intra", "inter", "delta"), FiniteFloat | None))
_SEARCH: Final = record(
    "search",
    dict.fromkeys(_SEARCHED, Any) | {"mean": _MEAN, "pairings": by_name(_SCORES), "distances": _DISTANCES},
    more=True,
)
_RESULT: Final = record(
    "result",
    dict.fromkeys(_MEASURED, Any)
    | {"config": dict[str, Any], "searches": by_name(_SEARCH), "unreadable": list[str]},
    more=True,
)
_MADE: Final = record("record", {"made_of": dict[str, Any]}, more=True)

log = logging.getLogger(__name__)


class ResultError(ValueError):
    """A result would replace another one."""


def measurement(result: Mapping[str, Any]) -> dict[str, Any]:
    """Select the values of a result that its scores depend on, in the types of JSON.

    Raises KeyError, TypeError or AttributeError for anything but a result.
    """
    found = {name: result[name] for name in _MEASURED}
    found["config"] = {name: value for name, value in result["config"].items() if name not in FREE_ON_RESUME}
    found["searches"] = {
        name: {key: search[key] for key in _SEARCHED} for name, search in result["searches"].items()
    }
    content: dict[str, Any] = json.loads(json.dumps(found))
    return content


def result_name(result: Mapping[str, Any], checkpoint: str = "checkpoint") -> str:
    """Name the file of a result by the options in words and 8 digits of the digest of its measurement.

    For example, test-step-6-all-search-single-shot-random-draw-10-trials-1f0c92ab.json. `checkpoint` is the
    stem of the checkpoint's file name; the name contains its first 80 characters if it isn't the usual one.
    """
    searches = list(result["searches"].values())
    words = ["test", checkpoint[:_STEM] * (checkpoint != "checkpoint"), f"step {result['step']}"]
    trials = searches[0]["trials"]
    words += [*result["searches"], searches[0]["settings"], f"{trials} trial{'s' * (trials > 1)}"]
    words += ["reranked" * result["rerank"], "without unreadable" * result["skip_unreadable"]]
    words += ["other data" * (result["dataset"] != result["trained_on"]["name"])]
    words += [result["precision"] * (result["precision"] != result["config"]["precision"])]
    of = json.dumps(measurement(result), sort_keys=True).encode()
    return f"{slug(words)}-{hashlib.sha256(of).hexdigest()[:8]}.json"


def slug(words: Iterable[str]) -> str:
    """Join words to a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def kept_result(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Find a result in the folder with the same measurement as `wanted`, on any device and backend.

    Files that are not complete results are logged and left as they are.
    """
    asked = _anywhere(measurement(wanted))
    for path in sorted(folder.glob(RESULT_NAMES)):
        try:
            result: dict[str, Any] = read_json(path, "a result of scoring")
            checked(_RESULT, result, "")
        except (DocumentError, SettingError) as error:
            log.warning("%s: not taken for a result: %s", path, error)
            continue
        whole = result["skip_unreadable"] or not result["unreadable"]
        if whole and _anywhere(measurement(result)) == asked:
            return result
    return None


def _anywhere(measured: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in measured.items() if name not in _WHERE}


def check_free(record: Path, others: Iterable[Path], made_of: Mapping[str, Any]) -> None:
    """Raise ResultError, which names the difference, for existing files that were made of something else.

    The JSON file `record` says under "made_of" what it and the `others` were made of.
    """
    there = [path for path in (record, *others) if path.exists()]
    if not there:
        return
    try:
        found = checked(_MADE, read_json(record, "what was made"), "")["made_of"]
    except (DocumentError, SettingError):
        differing = "and no record says what it was made of"
    else:
        asked = json.loads(json.dumps(made_of))
        names = [name for name in {**found, **asked} if found.get(name) != asked.get(name)]
        if not names:
            return
        differing = f"and differs from this one in {', '.join(names)}"
    raise ResultError(
        f"{there[0]}: is there already, {differing}. Give another folder (--out), or replace it (--overwrite)"
    )


def describe(result: dict[str, Any]) -> str:
    """Describe a result in a few lines: what was measured, and the scores in percent, mean ± deviation."""
    names = {"rank1": "Rank-1", "rank10": "Rank-10", "rank20": "Rank-20"}
    lines = []
    for name, search in result["searches"].items():
        trials = search["trials"]
        described = [f"{result['dataset']}, split {result['split']}", name, search["settings"]]
        if result["rerank"]:
            described.append(f"re-ranked with k1={result['k1']} and k2={result['k2']}")
        described.append(f"{trials} trial{'s' * (trials > 1)}")
        described += [
            f"{_range(search['valid_queries'])} of {search['queries']} queries valid",
            f"{_range(search['gallery_images'])} gallery images",
        ]
        lines.append(", ".join(filter(None, described)))
        lines += [
            f"  {names.get(key, key):8s}{100 * search['mean'][key]:6.2f} ± {100 * search['std'][key]:.2f}"
            for key in HEADLINE
        ]
        lines += [
            f"  {TITLES[pairing]}: "
            + ", ".join(f"{names.get(key, key)} {100 * scores['mean'][key]:.2f}" for key in ("rank1", "mAP"))
            for pairing, scores in search["pairings"].items()
        ]
        apart = search["distances"]
        if apart["delta"] is not None:
            lines.append(
                f"  δ {apart['delta']:.3f}: distance {apart['intra']:.3f} within people, "
                f"{apart['inter']:.3f} between"
            )
    served = f", backend {result['backend']}" if result["backend"] else ""
    lines.append(f"computed in {result['precision']} on {result['device']}{served}")
    if result["unreadable"]:
        lines.append(f"left out {len(result['unreadable'])} images that can't be read, named in the result")
    return "\n".join([*lines, f"written to {result['path']}"])


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least} to {most}"
