"""Scores of a network within its run, by its data set's test protocol."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lightning_fabric import Fabric
from rich.progress import Progress
from torch import Tensor, nn

from mrcn_fast.reid.data import SYSUMM01
from mrcn_fast.reid.data.types import Modality, PersonDataset, Sample
from mrcn_fast.reid.evaluation.protocol import searches_of, without
from mrcn_fast.reid.evaluation.results import HEADLINE
from mrcn_fast.reid.evaluation.scoring import ScoringOptions, score_searches
from mrcn_fast.reid.evaluation.trained import Trained
from mrcn_fast.reid.training.checkpoint import BEST_NAME, Checkpoint, save_checkpoint
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.journal import Journal

log = logging.getLogger(__name__)

# The score of the headline search that the best checkpoint has most of.
CRITERION: Final = "rank1"


@dataclass(frozen=True)
class _Remembering(Trained):
    """A network that keeps the features which it gives, by their image."""

    seen: dict[Sample, Tensor] = field(default_factory=dict)

    def features(self, samples: Sequence[Sample], modality: Modality, **options: Any) -> Tensor:
        found = super().features(samples, modality, **options)
        self.seen.update(zip(samples, found, strict=True))
        return found


class Validation:
    """Scores a network in training, writes the scores to the journal, and keeps the best checkpoint.

    The scores are those that `mrcn-fast test` gives without options or, where the configuration says so,
    those of the same protocol on SYSU-MM01's validation identities. Random generators and the network's
    state stay as they are, so that a run ends at the same weights with validations as without.

    Args:
        config: of the run
        dataset: whose test images are scored
        fabric: has the device and the precision
        backend: that serves the network's blocks

    Raises:
        DatasetError: for a tree without the lists or images of the protocol
    """

    def __init__(self, config: TrainConfig, dataset: PersonDataset, fabric: Fabric, backend: str) -> None:
        self.config, self.dataset, self.fabric, self.backend = config, dataset, fabric, backend
        people = ""
        searched = dataset
        if config.validate_on == "val" and isinstance(dataset, SYSUMM01):
            people, searched = " on its validation identities", dataset.validation()
        self.searches = searches_of(searched, {})
        self.options = ScoringOptions(
            skip_unreadable=config.skip_unreadable, workers=config.workers, cache=config.cache
        )
        headline = self.searches[0]
        settings = f", {headline.settings}" if headline.settings else ""
        self.protocol = f"test protocol of {dataset.name}{people}, {headline.name}{settings}"

    def run(self, model: nn.Module, state: Checkpoint, journal: Journal) -> None:
        """Score the network, whose checkpoint is `state`; the best one so far becomes best.pth."""
        path = journal.path.with_name(BEST_NAME)
        trained = _Remembering(
            path=path,
            state=state,
            config=self.config,
            model=model,
            fabric=self.fabric,
            precision=self.config.precision,
            backend=self.backend,
            dataset=self.dataset,
        )
        scored, unreadable = score_searches(trained, self.searches, self.options, Progress(disable=True))
        scores = {search.name: _means(found) for search, found in zip(self.searches, scored, strict=True)}
        headline = scores[self.searches[0].name]
        best = max(
            (line["searches"][line["headline"]][CRITERION] for line in journal.validations), default=-1
        )
        improved = headline[CRITERION] > best
        # A run that is killed between these two validates again when it goes on.
        if improved:
            save_checkpoint(path, state)
        journal.write_validation(
            {
                "step": state.step,
                "epoch": state.epoch - 1,
                "validation": self.protocol,
                "headline": self.searches[0].name,
                "searches": scores,
            }
        )
        if journal.log is not None:
            searches = [without(search, unreadable) for search in self.searches]
            journal.log.features(state.step, searches, trained.seen)
        log.info(
            "Validation after step %d by the %s: rank-1 %.1f, mAP %.1f, mINP %.1f%s",
            *(state.step, self.protocol, *(100 * headline[name] for name in ("rank1", "mAP", "mINP"))),
            f", the best so far: {path}" if improved else f"; the best so far is {100 * best:.1f}",
        )


def _means(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: scores["mean"][name] for name in HEADLINE}
