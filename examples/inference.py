"""A search: train a tiny network on synthetic people, open its checkpoint, and rank images of your own.

The gallery and the query are plain image files. `Sample` names a file with its modality; the identity and
the camera are only needed to score a search.
"""

import logging
import tempfile
from pathlib import Path

from mrcn_fast.reid.data import PersonDataset, Sample, write_regdb
from mrcn_fast.reid.evaluation.scoring import open_trained
from mrcn_fast.reid.training import Trainer
from mrcn_fast.reid.training.config import TrainConfig


def trained_on(tree: Path, out: Path) -> Path:
    """Train for a few steps, so that there is a checkpoint; a real one takes longer."""
    config = TrainConfig(
        data=str(tree), out=str(out), dataset="regdb", depth=18, height=48, width=24, padding=3,
        identities=4, images=2, batches=3, epochs=1, workers=0, accelerator="cpu",
    )  # fmt: skip
    return Trainer(config).fit()


def images_of_one_person(dataset: PersonDataset) -> tuple[Path, list[Path]]:
    """Return an infrared query and a visible gallery, as paths."""
    search = dataset.searches()[1]  # infrared to visible
    return search.query[0].path, [sample.path for sample in search.galleries[0][:12]]


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        tree = write_regdb(Path(folder, "tree"), image_size=(64, 32), identities=12, images=3)
        network = open_trained(trained_on(tree, Path(folder, "run")), tree, accelerator="cpu")
        query, gallery = images_of_one_person(network.dataset)

        of_query = network.features([Sample(query, 0, 0, "infrared")], "infrared")
        of_gallery = network.features([Sample(path, 0, 0, "visible") for path in gallery], "visible")
        similarity = (of_query @ of_gallery.T)[0]
        print(f"query {query.name}")
        for place in similarity.argsort(descending=True)[:5].tolist():
            print(f"  {similarity[place].item():.3f}  {gallery[place].name}")


if __name__ == "__main__":
    main()
