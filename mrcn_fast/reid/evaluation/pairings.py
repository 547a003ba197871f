"""The pairings: three ways to compare images by their two test features, F and F₊.

An image's test feature joins F and F₊, each of length 1. With v, v₊ of a visible image and n, n₊ of an
infrared image, the similarity is

    paper    v·n + v₊·n₊             the features concatenated, as the paper does: the headline
    crossed  v·n₊ + v₊·n             the original of one modality against the restituted of the other
    all      (v + v₊)·(n + n₊)       the sum of the four products, as MMN's code scores its two features

If the crossed pairing scores far above the paper's, training has exchanged the modalities: v₊ is like n, n₊
is like v, and v is unlike n. The CQC loss (eq. 8-10) is zero then, and the headline is low.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, get_args

from torch import Tensor

Pairing = Literal["paper", "crossed", "all"]
PAIRINGS: Final[tuple[Pairing, ...]] = get_args(Pairing)
HEADLINE_PAIRING: Final[Pairing] = "paper"
TITLES: Final[dict[Pairing, str]] = {
    "paper": "v·n + v₊·n₊",
    "crossed": "v·n₊ + v₊·n",
    "all": "(v + v₊)·(n + n₊)",
}
EXCHANGED: Final = 0.10
"""Modalities count as exchanged where the crossed rank-1 is above the paper's by more than this."""


def pairings_of(test_sets: int) -> tuple[Pairing, ...]:
    """The pairings of a network with this many sets in a test feature; with one set, all are the same."""
    return PAIRINGS if test_sets == 2 else (HEADLINE_PAIRING,)


def paired(query: Tensor, gallery: Tensor, pairing: Pairing) -> tuple[Tensor, Tensor]:
    """Rearrange features so that `query @ gallery.T` is the similarity by a pairing.

    Shape:
        query, gallery: (Q, 2 D) and (G, 2 D), test features with F before F₊
        result: the same shapes; for "all", (Q, D) and (G, D)
    """
    if pairing == "paper":
        return query, gallery
    if pairing == "crossed":
        return query, gallery.roll(gallery.shape[1] // 2, dims=1)
    return _sum_of_sets(query), _sum_of_sets(gallery)


def _sum_of_sets(features: Tensor) -> Tensor:
    return features.unflatten(1, (2, -1)).sum(dim=1)


def exchange(rank1: Mapping[str, float]) -> str | None:
    """Return a warning if rank-1 by pairing shows that training exchanged the modalities, else None."""
    if "crossed" not in rank1 or rank1["crossed"] - rank1["paper"] <= EXCHANGED:
        return None
    paper, crossed = 100 * rank1["paper"], 100 * rank1["crossed"]
    return (
        f"modalities exchanged: rank-1 is {paper:.1f} by the paper's pairing, {TITLES['paper']}, and "
        f"{crossed:.1f} by the crossed one, {TITLES['crossed']}. Training seems to have made restituted "
        "features like the other modality's originals and to have left the originals apart, which meets the "
        "CQC loss. Unit features (cqc_features: unit), the mean (cqc_reduction: mean), a smaller cqc_weight "
        "and more steps work against it"
    )
