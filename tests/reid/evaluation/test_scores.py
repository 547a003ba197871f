"""Scores against a per-query loop, numbers counted by hand, and SYSU-MM01's official evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mrcn_fast.reid.data import SYSUMM01
from mrcn_fast.reid.evaluation import scores as evaluation
from mrcn_fast.reid.evaluation.scores import Scores, average, score, skipped_images

SHARED = Path(__file__).resolve().parents[3].parent / "shared"


def loop_score(
    distance: NDArray,
    queries: NDArray,
    gallery: NDArray,
    query_cameras: NDArray,
    gallery_cameras: NDArray,
    protocol: str,
    max_rank: int,
) -> Scores:
    """Compute the scores by their definition, one query at a time."""
    curve, precisions, penalties = np.zeros(max_rank), [], []
    for row, identity in enumerate(queries):
        order = np.argsort(distance[row], kind="stable").tolist()
        if protocol == "sysu":
            order = [j for j in order if not (query_cameras[row] == 3 and gallery_cameras[j] == 2)]
        if protocol == "llcm":
            order = [
                j for j in order if not (gallery[j] == identity and gallery_cameras[j] == query_cameras[row])
            ]
        ranked = [int(gallery[j]) for j in order]
        if identity not in ranked:
            continue
        places = [place for place, found in enumerate(ranked, start=1) if found == identity]
        precisions.append(np.mean([k / place for k, place in enumerate(places, start=1)]))
        penalties.append(len(places) / places[-1])
        ranked = ranked if protocol == "regdb" else list(dict.fromkeys(ranked))
        curve[ranked.index(identity) :] += 1
    valid = len(precisions)
    return Scores(
        torch.from_numpy(curve / valid), float(np.mean(precisions)), float(np.mean(penalties)), valid
    )


def assert_equal(got: Scores, expected: Scores) -> None:
    torch.testing.assert_close(got.cmc, expected.cmc, rtol=0, atol=1e-12)
    assert got.mAP == pytest.approx(expected.mAP, abs=1e-12)
    assert got.mINP == pytest.approx(expected.mINP, abs=1e-12)
    assert got.valid_queries == expected.valid_queries


@pytest.mark.parametrize("protocol", ["sysu", "regdb", "llcm"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_loop(protocol: str, tied: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small chunks, so that queries are spread over several.
    monkeypatch.setattr("mrcn_fast.reid.evaluation.scores._CHUNK_ELEMENTS", 150)
    generator = np.random.default_rng(seed)
    rows, columns, identities = int(generator.integers(1, 40)), int(generator.integers(2, 60)), 9
    distance = generator.standard_normal((rows, columns)).astype(np.float32)
    if tied:
        distance = np.round(distance)
    # Two more query identities than the gallery has: their queries have no match.
    queries = generator.integers(0, identities + 2, rows)
    gallery = generator.integers(0, identities, columns)
    queries[0], gallery[0] = 4, 4
    query_cameras = generator.choice([3, 6] if protocol == "sysu" else [1, 2, 3], rows)
    gallery_cameras = generator.choice([1, 2, 4, 5], columns)
    query_cameras[0], gallery_cameras[0] = 6, 1
    kwargs = {"query_cameras": query_cameras, "gallery_cameras": gallery_cameras}
    if protocol == "regdb":
        kwargs = {}
    before = distance.copy()
    got = score(distance, queries, gallery, **kwargs, protocol=protocol, max_rank=12)
    arguments = (distance, queries, gallery, query_cameras, gallery_cameras)
    assert_equal(got, loop_score(*arguments, protocol, 12))
    np.testing.assert_array_equal(distance, before)
    # The way of other devices than the CPU gives the same.
    monkeypatch.setattr(
        evaluation,
        "_images_before",
        lambda values, places, matched: evaluation._images_before_stably(values, places),
    )
    assert_equal(score(distance, queries, gallery, **kwargs, protocol=protocol, max_rank=12), got)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_CHUNK_ELEMENTS", 300)
    distance = torch.rand(50, 60, generator=torch.Generator().manual_seed(0))
    ids, threads = torch.arange(60) % 7, torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(score(distance, ids[:50], ids, protocol="regdb"))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other.cmc, found[0].cmc) and other[1:] == found[0][1:]


def test_counted_by_hand() -> None:
    # Ranking: 7, 5, 5, 9, 5: matches of 5 at 2, 3 and 5; the first identity before it is 7.
    got = score([[0.2, 0.1, 0.3, 0.5, 0.4]], [5], [5, 7, 5, 5, 9], protocol="regdb", max_rank=4)
    assert got.cmc.tolist() == [0, 1, 1, 1]
    assert got.mAP == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3)
    assert got.mINP == pytest.approx(3 / 5)
    assert got.valid_queries == 1


def test_sysu_ranks_identities_and_regdb_images() -> None:
    distance, queries, gallery = [[1.0, 2.0, 3.0]], [1], [2, 2, 1]
    cameras = [1, 1, 1]
    by_identity = score(distance, queries, gallery, query_cameras=[6], gallery_cameras=cameras, max_rank=3)
    assert by_identity.cmc.tolist() == [0, 1, 1]
    assert score(distance, queries, gallery, protocol="regdb", max_rank=3).cmc.tolist() == [0, 0, 1]


def test_camera_3_skips_camera_2_only() -> None:
    distance, gallery, gallery_cameras = [[0.0, 1.0, 2.0]] * 2, [9, 1, 1], [2, 2, 4]
    near = score(distance, [1, 1], gallery, query_cameras=[3, 6], gallery_cameras=gallery_cameras)
    # Camera 3 keeps the last image alone; camera 6 finds it behind the stranger and another match.
    assert near.mAP == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert near.cmc[:2].tolist() == [0.5, 1]


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ("sysu", [[False, True, False], [False, False, False], [False, True, False]]),
        ("llcm", [[False, False, True], [False, False, False], [False, False, False]]),
        ("regdb", [[False] * 3] * 3),
    ],
)
def test_skipped_images(protocol: str, expected: list[list[bool]]) -> None:
    query_ids, query_cameras = torch.tensor([1, 1, 2]), torch.tensor([3, 6, 3])
    gallery_ids, gallery_cameras = torch.tensor([1, 1, 1]), torch.tensor([1, 2, 3])
    skipped = skipped_images(query_ids, gallery_ids, query_cameras, gallery_cameras, protocol)
    assert skipped.tolist() == expected


def test_skipped_images_knows_its_protocols() -> None:
    one = torch.tensor([1])
    with pytest.raises(ValueError, match="unknown protocol 'market'; known: sysu, regdb, llcm"):
        skipped_images(one, one, one, one, "market")


# Prints by how many bytes the process's peak of resident memory grows while a large matrix is scored.
PEAK = """
import re, sys
from pathlib import Path
import torch
from mrcn_fast.reid.evaluation import scores as evaluation

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

size, evaluation._CHUNK_ELEMENTS, protocol = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(2)
distance = torch.rand(size, size, generator=torch.Generator().manual_seed(0))
ids, cameras = torch.arange(size) // 10, torch.arange(size) % 6 + 1

def run(n):
    given = {"query_cameras": cameras[:n], "gallery_cameras": cameras[:n], "protocol": protocol}
    return evaluation.score(distance[:n, :n], ids[:n], ids[:n], **given)

run(200)
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
before = peak()
run(size)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of peak memory")
@pytest.mark.parametrize("protocol", ["sysu", "llcm"])
def test_memory_does_not_grow_with_the_matrix(protocol: str) -> None:
    size, chunk = 4000, 1 << 17
    command = [sys.executable, "-c", PEAK, str(size), str(chunk), protocol]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # As documented: below 40 bytes for an element of each thread's chunk, and a little for each row and
    # column. One mask of the whole matrix alone would take 16 MB.
    assert grown < 2 * 40 * chunk + 500 * size


def test_equal_distances_rank_in_gallery_order() -> None:
    first = score([[1.0, 1.0]], [1], [1, 2], protocol="regdb", max_rank=2)
    last = score([[1.0, 1.0]], [1], [2, 1], protocol="regdb", max_rank=2)
    assert (first.mAP, last.mAP) == (1.0, 0.5)


def test_curve_is_padded_with_its_last_value() -> None:
    assert score([[1.0, 0.0]], [1], [1, 2], protocol="regdb", max_rank=5).cmc.tolist() == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
def test_dtypes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    distance = torch.randint(-50, 50, (20, 30), generator=generator)
    queries, gallery = torch.arange(20) % 5, torch.arange(30) % 5
    expected = score(distance.float(), queries, gallery, protocol="regdb")
    assert_equal(score(distance.to(dtype), queries.int(), gallery, protocol="regdb"), expected)


def test_float64_distances_are_not_rounded() -> None:
    distance = torch.tensor([[1.0 + 1e-12, 1.0]], dtype=torch.float64)
    assert score(distance, [1], [2, 1], protocol="regdb", max_rank=1).cmc.tolist() == [1]


VALID = {"distance": np.zeros((2, 3)), "query_ids": [1, 2], "gallery_ids": [1, 2, 3]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distance": np.zeros(3)}, r"distance must be \(queries, gallery\).*got \(3,\)"),
        ({"distance": np.zeros((0, 3)), "query_ids": []}, "at least one of each"),
        ({"query_ids": [1, 2, 3]}, r"query_ids must be 2 integers.*got .*\(3,\)"),
        ({"gallery_ids": [1.0, 2.0, 3.0]}, "gallery_ids must be 3 integers.*float64"),
        ({"protocol": "market"}, "unknown protocol 'market'; known: sysu, regdb, llcm"),
        ({"protocol": "sysu"}, "needs query_cameras and gallery_cameras; got no query_cameras"),
        ({"protocol": "llcm", "query_cameras": [1, 2]}, "got no gallery_cameras"),
        ({"query_ids": [7, 8]}, "no query has a match in the gallery: 2 queries of 2 identities"),
        ({"max_rank": 0}, "got max_rank=0, expected an integer from 1 to 1048576"),
        ({"max_rank": 10**9}, "got max_rank=1000000000, expected an integer from 1 to 1048576"),
        ({"max_rank": 2.5}, "got max_rank=2.5, expected an integer"),
        ({"protocol": ["sysu"]}, r"got protocol=\['sysu'\], expected text"),
        ({"query_ids": ["a", "b"]}, "must be of one kind; got text and numbers"),
        ({"query_ids": [["a", "b"]], "gallery_ids": ["a"] * 3}, r"query_ids must be 2 integers.*\(1, 2\)"),
        ({"query_ids": None}, "query_ids must be an array of numbers; got NoneType"),
        ({"distance": [[1.0], [2.0, 3.0]]}, "got list whose rows differ in length or kind"),
        ({"distance": "near"}, r"distance must be an array of numbers; got text \(\)"),
        ({"distance": torch.zeros(2, 3).to_sparse()}, "distance must be a dense array of numbers"),
        (
            {"distance": torch.zeros(2, 3, device="meta")},
            "must be a dense array .* got a meta tensor",
        ),
        ({"distance": np.ma.masked_array(np.zeros((2, 3)))}, "distance must be a whole array"),
        ({"distance": np.zeros((2, 3)) + 1j}, "distance must be real"),
        (
            {"protocol": "llcm", "query_cameras": ["c1", "c2"], "gallery_cameras": [1] * 3},
            "query_cameras must be an array of numbers; got text",
        ),
        ({"distance": np.array([[0, 0, 0], [0, np.nan, 0]])}, "got nan for query 1 and gallery image 1"),
        ({"distance": np.array([[0, 0, np.inf], [0, 0, 0]])}, "got inf for query 0 and gallery image 2"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(**{"protocol": "regdb", **VALID, **change})


def test_arrays_of_every_kind_are_taken() -> None:
    generator = np.random.default_rng(0)
    distance = generator.random((6, 8))
    arguments: dict[str, Any] = {
        "distance": distance,
        "query_ids": np.tile([1, 2, 3], 2),
        "gallery_ids": np.tile([1, 2, 3, 4], 2),
        "query_cameras": np.tile([3, 6], 3),
        "gallery_cameras": np.tile([1, 2, 4, 5], 2),
    }
    expected = score(**arguments)
    names = np.array(["", "ann", "bob", "cy", "dee"])
    read_only = distance.copy()
    read_only.flags.writeable = False
    changes: list[dict[str, Any]] = [
        {name: value.astype(value.dtype.newbyteorder(">")) for name, value in arguments.items()},
        {name: value.tolist() for name, value in arguments.items()},
        {name: list(torch.from_numpy(value)) for name, value in arguments.items()},
        {"distance": np.asfortranarray(distance)},
        {"distance": distance[::-1][::-1]},
        {"distance": read_only},
        {"distance": distance.astype(np.longdouble)},
        {"distance": torch.from_numpy(distance).requires_grad_()},
        {"query_ids": arguments["query_ids"].astype(np.uint32)},
        *(
            {
                "query_ids": names[arguments["query_ids"]].astype(kind),
                "gallery_ids": names[arguments["gallery_ids"]],
            }
            for kind in ("U", "S", "O")
        ),
        {side: names[arguments[side]].tolist() for side in ("query_ids", "gallery_ids")},
    ]
    for change in changes:
        assert_equal(score(**(arguments | change)), expected)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e5m2])
def test_dtypes_that_torch_does_not_sort(dtype: torch.dtype) -> None:
    distance = torch.tensor([[3, 1, 2], [1, 3, 2]])
    expected = score(distance, [1, 2], [1, 2, 3], protocol="regdb")
    assert_equal(score(distance.float().to(dtype), [1, 2], [1, 2, 3], protocol="regdb"), expected)


def test_skipped_images_takes_lists() -> None:
    assert skipped_images([1, 2], [1, 2, 3], [3, 6], [2, 1, 2], "sysu").tolist() == [
        [True, False, True],
        [False, False, False],
    ]
    assert skipped_images(["a", "b"], ["a"], [1, 1], [1], "llcm").tolist() == [[True], [False]]
    with pytest.raises(ValueError, match="query_cameras must be 2 integers"):
        skipped_images([1, 2], [1], [3], [1], "sysu")


def test_average() -> None:
    trials = [
        Scores(torch.tensor([0.2, 0.4]).double(), 0.1, 0.3, 5),
        Scores(torch.tensor([0.4, 1]).double(), 0.2, 0.5, 5),
    ]
    mean = average(trials)
    assert mean.cmc.tolist() == pytest.approx([0.3, 0.7])
    assert (mean.mAP, mean.mINP) == pytest.approx((0.15, 0.4))
    assert mean.valid_queries == 5
    with pytest.raises(ValueError, match=r"different numbers of valid queries: \[4, 5\]"):
        average([trials[0], trials[1]._replace(valid_queries=4)])
    with pytest.raises(ValueError, match="at least one trial"):
        average([])


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, SYSUMM01, dict[int, NDArray]]:
    """The official scores, SYSU-MM01's test tree with empty files, and the features by camera."""
    split, tool = SHARED / "data" / "sysu-mm01", SHARED / "tools" / "make_sysu_features.py"
    if not split.is_dir() or not tool.is_file():
        pytest.skip(f"the official scores are not at {split}, or their features' tool not at {tool}")
    scipy_io = pytest.importorskip("scipy.io")
    folder = tmp_path_factory.mktemp("official")
    expected = json.loads((split / "official.json").read_text())
    seed, dim = str(expected["features"]["seed"]), str(expected["features"]["dim"])
    subprocess.run([sys.executable, str(tool), seed, dim, str(folder / "features")], check=True)
    features = {
        camera: scipy_io.loadmat(folder / f"features_cam{camera}.mat")["feature"][:, 0]
        for camera in range(1, 7)
    }
    test = scipy_io.loadmat(split / "test_id.mat")["id"].ravel().tolist()
    for camera, cells in features.items():
        for identity in test:
            place = folder / "tree" / f"cam{camera}" / f"{identity:04d}"
            place.mkdir(parents=True)
            for image in range(len(cells[identity - 1]) if identity <= len(cells) else 0):
                (place / f"{image + 1:04d}.jpg").touch()
    exp = folder / "tree" / "exp"
    exp.mkdir()
    others = sorted(set(range(1, len(test) + 3)) - set(test))[:2]
    for identity in others:
        (folder / "tree" / "cam1" / f"{identity:04d}").mkdir()
        (folder / "tree" / "cam1" / f"{identity:04d}" / "0001.jpg").touch()
    for name, identities in (("train", others[:1]), ("val", others[1:]), ("test", test)):
        (exp / f"{name}_id.txt").write_text(",".join(map(str, identities)))
    return expected, SYSUMM01(folder / "tree", permutations=split / "rand_perm_cam.mat"), features


@pytest.mark.parametrize("row", [0, 1], ids=["all-search single-shot", "indoor-search multi-shot"])
def test_equals_the_official_evaluation(
    official: tuple[dict, SYSUMM01, dict[int, NDArray]], row: int
) -> None:
    expected, tree, features = official
    expected = expected["averages_over_10_trials"][row]

    def of(samples: list) -> tuple[torch.Tensor, list[int], list[int]]:
        rows = [features[s.camera][s.identity - 1][int(s.path.stem) - 1] for s in samples]
        return torch.from_numpy(np.stack(rows)), [s.identity for s in samples], [s.camera for s in samples]

    query, query_ids, query_cameras = of(tree.query())
    trials = []
    for trial in range(10):
        mode = expected["mode"].removesuffix("_search")
        samples = tree.gallery(mode, shots=expected["shots"], trial=trial, draw="official")
        gallery, gallery_ids, gallery_cameras = of(samples)
        scores = score(
            torch.cdist(query, gallery),
            query_ids,
            gallery_ids,
            query_cameras=query_cameras,
            gallery_cameras=gallery_cameras,
        )
        trials.append(scores)
    assert (len(query_ids), len(gallery_ids)) == (expected["query"], expected["gallery"])
    for scores, known in ((average(trials), expected), (trials[0], expected["trial1"])):
        assert scores.mAP == pytest.approx(known["mAP"], abs=1e-8)
        for rank in (1, 5, 10, 20):
            if f"rank{rank}" in known:
                assert scores.cmc[rank - 1].item() == pytest.approx(known[f"rank{rank}"], abs=1e-8)
    # As published: of the 3,803 queries 1,595 have no match in an indoor gallery.
    assert average(trials).valid_queries == (3803 if expected["mode"] == "all_search" else 3803 - 1595)
