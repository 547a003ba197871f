"""A gallery in several FAISS indexes, searched as one, as on several machines.

`mrcn-fast extract --to faiss` writes such an index of the images of one folder. Here the features are random:
200 people, and in each of two shards five images of each person. Needs faiss-cpu, of the extra [search].
"""

import json
import tempfile
from pathlib import Path

import faiss
import torch

from mrcn_fast.reid.search.engines import write_faiss
from mrcn_fast.reid.search.features import Features, HeldRows, Names


def write_shard(path: Path, people: torch.Tensor) -> None:
    """Write five images of each person, whose names are the person's number and the image's."""
    images = people.repeat(5, 1) + 0.05 * torch.randn(5 * len(people), people.shape[1])
    names = [f"{path.stem}/{person:04d}/{image}.jpg" for image in range(5) for person in range(len(people))]
    write_faiss(path, Features(HeldRows(images), "random features", Names.of(names)))


def main() -> None:
    torch.manual_seed(0)
    people = torch.nn.functional.normalize(torch.randn(200, 64), dim=1)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"shard-{number}.faiss" for number in range(2)]
        for path in paths:
            write_shard(path, people)

        # Threads search the shards at the same time. A shard's rows follow those of the shard before it.
        gallery = faiss.IndexShards(True, True)
        for path in paths:
            gallery.add_shard(faiss.read_index(str(path)))
        names = [name for path in paths for name in json.loads(Path(f"{path}.json").read_text())["names"]]

        scores, rows = gallery.search(people.numpy(), 10)
    right = sum(int(names[row].split("/")[1]) == person for person, hits in enumerate(rows) for row in hits)
    print(f"person 0: {names[rows[0, 0]]} at {scores[0, 0]:.3f}, {names[rows[0, 1]]} at {scores[0, 1]:.3f}")
    print(f"{right} of {rows.size} hits are of the right person")


if __name__ == "__main__":
    main()
