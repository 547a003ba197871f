"""Features in PostgreSQL, searched by its extension pgvector.

`mrcn-fast extract --to parquet` writes such a file of the images of a folder. Here the features are random:
ten images of each of 500 people. MRCN_FAST_DATABASE names the database, as in "host=localhost dbname=people";
the table `images` of the example is a temporary one. Needs pyarrow, psycopg and a server with pgvector.
"""

import os
import tempfile

import psycopg
import torch
from pyarrow import parquet

from mrcn_fast.reid.search.engines import write_parquet
from mrcn_fast.reid.search.features import Features, HeldRows, Names


def text(feature: list[float]) -> str:
    """A vector as pgvector reads it."""
    return f"[{','.join(map(str, feature))}]"


def main() -> None:
    torch.manual_seed(0)
    people = torch.nn.functional.normalize(torch.randn(500, 64), dim=1)
    images = people.repeat(10, 1) + 0.05 * torch.randn(5000, 64)
    names = [f"{person:04d}/{image}.jpg" for image in range(10) for person in range(500)]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/photos.parquet"
        write_parquet(path, Features(HeldRows(images), "random features", Names.of(names)))
        rows = parquet.read_table(path).to_pylist()

    with psycopg.connect(os.environ["MRCN_FAST_DATABASE"]) as database:
        database.execute("CREATE EXTENSION IF NOT EXISTS vector")
        database.execute("CREATE TEMPORARY TABLE images (name text, feature vector(64))")
        with database.cursor().copy("COPY images (name, feature) FROM STDIN") as copy:
            for row in rows:
                copy.write_row((row["name"], text(row["feature"])))
        # The features have length 1, so that <#>, the negative inner product, orders by cosine similarity.
        database.execute("CREATE INDEX ON images USING hnsw (feature vector_ip_ops)")
        hits = [
            database.execute(
                "SELECT name, -(feature <#> %(query)s::vector) FROM images "
                "ORDER BY feature <#> %(query)s::vector LIMIT 10",
                {"query": text(person.tolist())},
            ).fetchall()
            for person in people
        ]
    right = sum(int(name.split("/")[0]) == person for person, of in enumerate(hits) for name, _ in of)
    print(f"person 0: {hits[0][0][0]} at {hits[0][0][1]:.3f}")
    print(f"{right} of {10 * len(people)} hits are of the right person")


if __name__ == "__main__":
    main()
