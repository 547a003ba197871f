"""Search in one's own images: collections, files of features, exact and approximate search, and the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mrcn_fast.cli import main
from mrcn_fast.reid.data.types import DatasetError, Sample
from mrcn_fast.reid.evaluation.protocol import searches_of
from mrcn_fast.reid.evaluation.scoring import score_trial
from mrcn_fast.reid.evaluation.trained import open_network, open_trained
from mrcn_fast.reid.search import engines
from mrcn_fast.reid.search.collections import collect
from mrcn_fast.reid.search.engines import write_faiss, write_parquet
from mrcn_fast.reid.search.features import (
    FeatureError,
    Features,
    HeldRows,
    Names,
    read_features,
    write_features,
)
from mrcn_fast.reid.search.hits import Found, visible, write_page
from mrcn_fast.reid.search.nearest import Hits, nearest
from mrcn_fast.reid.search.scored import score_features

NOT_UTF8 = os.fsdecode(b"caf\xe9.png")
SCRIPT = "<script>document.body.className='ran'<"  # the rest, /script>, is a file in a folder of this name


def held(features: Tensor, **known: Any) -> Features:
    return Features(HeldRows(features), "made here", **known)


def painted(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (16, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of images of several formats, in folders, with a file that is no image and a hidden one."""
    folder = tmp_path / "pictures"
    generator = np.random.default_rng(0)
    for name in ("b.png", "a/c.jpg", "a/d.jp2", "e.gif", NOT_UTF8, "f.TIFF", "g.webp"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 20, 3), np.uint8)).save(path)
    (folder / "notes.txt").write_text("no image")
    (folder / "._b.png").write_bytes(b"an archiver's")
    (folder / "a" / "circle").symlink_to(folder)
    return folder


NAMES = ["a/c.jpg", "a/d.jp2", "b.png", NOT_UTF8, "e.gif", "f.TIFF", "g.webp"]


def test_a_folders_images_are_found_in_order(pictures: Path) -> None:
    assert collect(pictures).names == NAMES
    assert collect(pictures).folder == pictures


def test_a_list_and_one_image(pictures: Path) -> None:
    listed = pictures / "list"
    listed.write_bytes(b"b.png\r\n\ncaf\xe9.png\n" + os.fsencode(pictures / "e.gif"))
    assert collect(listed).names == ["b.png", NOT_UTF8, str(pictures / "e.gif")]
    assert collect(pictures / "b.png").names == ["b.png"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("absent", None, "found no such file"),
        ("empty", b"\n", "found none"),
        ("paths", b"b.png\nx.png\ny.png\n", "found 2 of 3 lines that name no file, such as 'x.png'"),
        ("bytes", b"\0\1", "found bytes that are no text"),
    ],
)
def test_other_places_are_refused(pictures: Path, name: str, content: bytes | None, told: str) -> None:
    if content is not None:
        (pictures / name).write_bytes(content)
    with pytest.raises(DatasetError, match=re.escape(told)):
        collect(pictures / name)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"expected images .* found none"):
        collect(tmp_path)


@pytest.mark.parametrize("kib", [17, 40, 100_000])
def test_nearest_is_the_sort_of_all_pairs(kib: int) -> None:
    """Also in chunks of a few rows, for scores of both signs, of zero, and for equal ones."""
    torch.manual_seed(0)
    query, gallery = torch.randn(7, 12), torch.randn(300, 12)
    query[0], gallery[:200] = torch.eye(12)[0], torch.randint(-1, 2, (200, 12)).float()
    gallery[(gallery == 0).all(dim=1)] = 1
    unit = [torch.nn.functional.normalize(side.double(), dim=1) for side in (query, gallery)]
    scores = unit[0] @ unit[1].T
    expected = scores.sort(dim=1, descending=True).values[:, :20]
    found = nearest(held(query), held(gallery), 20, memory=kib * 1024)
    torch.testing.assert_close(found.scores.double(), expected, rtol=0, atol=3e-7)
    # Rounding may exchange rows of nearly one score.
    torch.testing.assert_close(scores.gather(1, found.rows), expected, rtol=0, atol=3e-7)
    assert all(len(set(rows)) == 20 for rows in found.rows.tolist())


def test_equal_images_rank_in_the_order_of_the_gallery() -> None:
    gallery = torch.eye(4).repeat(50, 1)
    for kib in (20, 1024):
        found = nearest(held(-torch.eye(4)[:2]), held(gallery), 170, memory=kib * 1024)
        others = [row for row in range(200) if row % 4 != 0]
        assert found.rows[0].tolist() == others + list(range(0, 80, 4))
        assert found.scores[0].tolist() == [0.0] * 150 + [-1.0] * 20


def test_a_small_gallery_gives_all_its_images() -> None:
    assert nearest(held(torch.eye(2)), held(torch.eye(2)), 10, memory=2**20).rows.tolist() == [[0, 1], [1, 0]]


def test_bad_features_are_named() -> None:
    good, bad = torch.ones(3, 2), torch.ones(3, 2)
    for value in (0.0, torch.nan, torch.inf):
        bad[1] = value
        with pytest.raises(FeatureError, match=r"found another one for b \(row 1\)"):
            nearest(held(good), held(bad, names=Names.of(["a", "b", "c"])), 1, memory=2**20)
    with pytest.raises(FeatureError, match=r"queries with 2 numbers .* gallery with 5"):
        nearest(held(good), held(torch.ones(3, 5)), 1, memory=2**20)
    with pytest.raises(
        ValueError, match=r"got 0.1 MiB of memory, expected at least 3.\d MiB for 100 queries"
    ):
        nearest(held(torch.ones(100, 4096)), held(torch.ones(3, 4096)), 1, memory=2**16)


PEAK = """
import sys, torch
from pathlib import Path
from mrcn_fast.reid.search.features import read_features, Features, HeldRows
from mrcn_fast.reid.search.nearest import nearest

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

torch.manual_seed(0)
gallery = read_features(sys.argv[1])
query = Features(HeldRows(torch.randn(300, gallery.rows.size)), "made here")
nearest(query, Features(HeldRows(torch.randn(5, gallery.rows.size)), "small"), 5, memory=2**30)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
found = nearest(query, gallery, 10, memory=int(sys.argv[2]))
print(peak() - before)
"""


def test_a_large_gallery_is_searched_in_bounded_memory(tmp_path: Path) -> None:
    """100,000 features, 103 MB, in 24 MiB."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of memory is measured by /proc, which only Linux has")
    path, memory = tmp_path / "g.safetensors", 24 * 2**20
    save_file({"features": torch.randn(100_000, 256)}, path)
    command = [sys.executable, "-c", PEAK, str(path), str(memory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 2**20 < int(done.stdout) <= memory


def test_features_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    features = torch.randn(3, 5)
    write_features(
        path,
        held(features, names=Names.of(["a", NOT_UTF8, ""]), folder=tmp_path, about={"modality": "visible"}),
    )
    found = read_features(path)
    assert torch.equal(found.rows.read(0, 3), features)
    assert torch.equal(found.rows.read(1, 2), features[1:2])
    assert [found.name(row) for row in range(3)] == ["a", NOT_UTF8, ""]
    assert found.picture(1) == tmp_path / NOT_UTF8
    assert (found.about, found.identities) == ({"modality": "visible"}, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_features_of_other_frameworks(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "f.safetensors"
    features = torch.randn(3, 5).to(dtype)
    save_file({"a": torch.zeros(7), "features": features, "cameras": torch.tensor([1, 2, 3])}, path)
    found = read_features(path)
    assert torch.equal(found.rows.read(1, 3), features[1:].float())
    assert (found.name(2), found.picture(2)) == ("2", None)
    assert found.cameras is not None and found.cameras.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({}, "expected the key features, (images, size); found the keys none"),
        ({"feats": torch.ones(2, 2)}, "found the keys feats"),
        ({"features": torch.ones(2)}, "found F32 (2,)"),
        ({"features": torch.ones(0, 2)}, "found F32 (0, 2)"),
        ({"features": torch.ones(2, 2).long()}, "found I64 (2, 2)"),
        ({"features": torch.ones(2, 2), "names": torch.ones(2)}, "uint8 (bytes,); found float32 (2,)"),
        ({"features": torch.ones(2, 2), "names": torch.zeros(1).byte()}, "expected 2 names"),
        ({"features": torch.ones(2, 2), "identities": torch.ones(2)}, "2 integers, one for each feature"),
        ({"features": torch.ones(2, 2), "cameras": torch.ones(3).int()}, "found int32 (3,)"),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, tensors: dict[str, Tensor], told: str) -> None:
    path = tmp_path / "f.safetensors"
    save_file(tensors, path)
    with pytest.raises(FeatureError) as error:
        read_features(path)
    assert told in str(error.value) and str(path) in str(error.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    for content, told in ((b"", "an empty file"), (b"{}", "JSON text"), (None, "a folder")):
        path.mkdir() if content is None else path.write_bytes(content)
        with pytest.raises(FeatureError, match=told):
            read_features(path)
        path.rmdir() if content is None else path.unlink()


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


CPU = ("--accelerator", "cpu")


def test_extract_gives_the_networks_features(finished: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.safetensors"
    run(
        "extract", "--checkpoint", finished, "--images", pictures, "--modality", "visible", "--out", out, *CPU
    )
    found = read_features(out)
    assert [found.name(row) for row in range(found.rows.count)] == NAMES
    network = open_network(finished, accelerator="cpu")
    common = [row for row, name in enumerate(NAMES) if not name.endswith(("jp2", "gif"))]
    samples = [Sample(pictures / NAMES[row], 1, 1, "visible") for row in common]
    expected = network.features(samples, "visible")
    torch.testing.assert_close(found.rows.read(0, 7)[common], expected, rtol=0, atol=1e-6)


def test_extract_names_what_it_cant_read(
    finished: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "f.safetensors"
    words = [
        "extract",
        "--checkpoint",
        str(finished),
        "--images",
        str(pictures),
        "--modality",
        "infrared",
        *CPU,
    ]
    assert main([*words, "--out", str(out)]) == 2
    assert f"{pictures / 'broken.png'}: expected a readable image; found: content" in capsys.readouterr().err
    assert not out.exists()
    run(*words, "--out", out, "--skip-unreadable")
    found = read_features(out)
    assert [found.name(row) for row in range(7)] == NAMES
    assert "Left out 1 of 8 images" in capsys.readouterr().err
    assert main([*words, "--out", str(out), "--skip-unreadable"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "f.npz")]) == 2
    assert "expected a name that ends with .safetensors" in capsys.readouterr().err


def test_search_prints_and_writes_the_nearest(
    finished: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image is its own nearest one; a gallery's file gives what its folder gives."""
    gallery, out = tmp_path / "g.safetensors", tmp_path / "hits.json"
    own = ("--checkpoint", finished, *CPU)
    run("extract", "--images", pictures, "--modality", "visible", "--out", gallery, *own)
    query = ("--query", pictures, "--query-modality", "visible", "--gallery-modality", "visible")
    run("search", *own, *query, "--gallery", gallery, "--top", 3, "--json", out)
    printed = capsys.readouterr().out
    assert "caf\\udce9.png\n     1   1.0000  caf\\udce9.png\n" in printed
    found = json.loads(out.read_text())["queries"]
    assert [line["name"] for line in found] == [line["hits"][0]["name"] for line in found] == NAMES
    assert [len(line["hits"]) for line in found] == [3] * 7
    run("search", *own, *query, "--gallery", pictures, "--top", 3, "--json", out, "--overwrite")
    assert [line["hits"] for line in json.loads(out.read_text())["queries"]] == [
        line["hits"] for line in found
    ]
    run("search", "--query", gallery, "--gallery", gallery, "--top", 3, "--json", out, "--overwrite")
    assert json.loads(out.read_text())["queries"] == found


def test_search_refuses_what_doesnt_fit(
    finished: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "o.safetensors"
    size = open_network(finished, accelerator="cpu").reid_model.feature_size
    stranger = held(torch.ones(1, size), names=Names.of(["a"]), folder=tmp_path, about={"network": "0" * 64})
    write_features(other, stranger)
    images = ["search", "--query", str(pictures), "--gallery", str(other)]
    for words, told in (
        (images, "and no network to extract with: give --checkpoint"),
        ([*images, "--checkpoint", str(finished), *CPU], "without their modality: give --query-modality"),
        (
            [*images, "--checkpoint", str(finished), *CPU, "--query-modality", "visible"],
            f"{other} of network 000000000000",
        ),
        ([*images, "--probes", "3"], "without an index"),
        (
            ["search", "--query", "q", "--gallery", str(pictures), "--index", "i"],
            "expected one of a .safetensors file",
        ),
        ([*images, "--json", str(other)], "is there already"),
    ):
        assert main(words) == 2
        assert told in " ".join(capsys.readouterr().err.split()), words


def test_score_is_that_of_the_test_protocol(
    finished: Path, tiny_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = open_trained(finished, tiny_tree, accelerator="cpu")
    (search,) = searches_of(trained.dataset, {"trials": 1})
    sides = []
    for name, samples in (("q", search.query), ("g", search.galleries[0])):
        features = trained.features(samples, samples[0].modality)
        identities = torch.tensor([sample.identity for sample in samples])
        cameras = torch.tensor([sample.camera for sample in samples]).int()
        sides.append(features)
        content = {"features": features, "identities": identities, "cameras": cameras}
        save_file(content, tmp_path / f"{name}.safetensors")
    expected = score_trial(-(sides[0] @ sides[1].T), search.query, search.galleries[0], "sysu")
    out = tmp_path / "scores.json"
    files = (tmp_path / "q.safetensors", tmp_path / "g.safetensors")
    for metric in ("cosine", "euclidean"):
        run(
            "score",
            "--features",
            *files,
            "--protocol",
            "sysu",
            "--metric",
            metric,
            "--json",
            out,
            "--overwrite",
        )
        found = json.loads(out.read_text())
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
        assert f"Rank-1  {100 * expected['rank1']:6.2f}" in capsys.readouterr().out


def test_euclidean_distances_are_those_of_long_features_too() -> None:
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(60, 64, generator=generator) + 4000
    people = torch.arange(60)
    query = gallery + 0.3 * torch.randn(60, 64, generator=generator)
    sought, searched = (held(features, identities=people) for features in (query, gallery))
    assert score_features(sought, searched, "regdb", "euclidean").cmc[0] == 1


def test_score_says_what_is_missing(tmp_path: Path) -> None:
    whole = held(torch.ones(2, 3), identities=torch.tensor([1, 2]), cameras=torch.tensor([1, 2]))
    with pytest.raises(
        FeatureError, match=r"the key identities, an integer for each feature, .* regdb needs"
    ):
        score_features(whole, held(torch.ones(2, 3)), "regdb")
    with pytest.raises(FeatureError, match="the key cameras"):
        score_features(held(torch.ones(2, 3), identities=torch.tensor([1, 2])), whole, "llcm")
    with pytest.raises(ValueError, match="got protocol='market', expected one of sysu, regdb, llcm"):
        score_features(whole, whole, "market")


def test_an_index_is_built_used_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss", reason="faiss-cpu, of the extra [search], is not installed")
    torch.manual_seed(0)
    people = torch.randn(50, 32)
    gallery = people.repeat(40, 1) + 0.1 * torch.randn(2000, 32)
    save_file({"features": gallery}, tmp_path / "g.safetensors")
    save_file({"features": people + 0.1 * torch.randn(50, 32)}, tmp_path / "q.safetensors")
    index, out = tmp_path / "i.faiss", tmp_path / "hits.json"
    words = ("search", "--query", tmp_path / "q.safetensors", "--gallery", tmp_path / "g.safetensors")
    run(*words, "--index", index, "--json", out, "--top", 5)
    share = float(re.findall(r"recall@10 of the index .*: ([\d.]+) %", capsys.readouterr().out)[0])
    assert share > 80
    found = json.loads(out.read_text())["queries"]
    assert all(hit["row"] % 50 == query for query, line in enumerate(found) for hit in line["hits"])
    before = index.stat().st_mtime_ns
    run(*words, "--index", index, "--json", out, "--overwrite", "--top", 5, "--probes", 10**6)
    assert index.stat().st_mtime_ns == before
    assert float(re.findall(r"index .*: ([\d.]+) %", capsys.readouterr().out)[0]) >= share
    # One row has changed.
    save_file({"features": gallery.index_fill(0, torch.tensor([5]), 1.0)}, tmp_path / "g.safetensors")
    assert main([*map(str, words), "--index", str(index)]) == 2
    assert "found one of other features" in capsys.readouterr().err
    index.write_bytes(b"another file")
    assert main([*map(str, words), "--index", str(index)]) == 2
    assert "found another file" in capsys.readouterr().err
    assert index.read_bytes() == b"another file"
    record, other = index.with_name("i.faiss.json"), tmp_path / "other"
    index.unlink()
    record.write_text('{"mine": 1}')
    assert main([*map(str, words), "--index", str(index)]) == 2
    assert f"{record}: expected the record of an index: got " in capsys.readouterr().err
    assert (record.read_text(), index.exists()) == ('{"mine": 1}', False)
    other.write_bytes(b"a file of mine")
    assert main([*map(str, words), "--index", str(other)]) == 2
    assert "other.json: expected the record of an index" in capsys.readouterr().err
    assert other.read_bytes() == b"a file of mine"


@pytest.mark.parametrize(
    "outputs",
    [
        ("--index", "hits", "--json", "hits.json"),
        ("--index", "i", "--html", "i"),
        ("--json", "x.out", "--html", "./x.out"),
    ],
)
def test_one_file_for_two_outputs_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outputs: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"features": torch.eye(3)}, "f.safetensors")
    words = ("search", "--query", "f.safetensors", "--gallery", "f.safetensors")
    assert main([*words, *outputs]) == 2
    assert "expected one file each for json, html, index" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]


def test_an_index_needs_faiss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    path = tmp_path / "g.safetensors"
    save_file({"features": torch.eye(3)}, path)
    assert main(["search", "--query", str(path), "--gallery", str(path), "--index", str(tmp_path / "i")]) == 2
    assert "faiss is not installed, which --index needs: pip install faiss-cpu" in capsys.readouterr().err


def test_features_for_faiss(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss", reason="faiss-cpu, of the extra [search], is not installed")
    features = held(2 * torch.eye(3), names=Names.of(["a", NOT_UTF8, "b"]), about={"modality": "visible"})
    write_faiss(tmp_path / "f.faiss", features)
    index = faiss.read_index(str(tmp_path / "f.faiss"))
    scores, rows = index.search(np.eye(3, dtype=np.float32)[[1, 0]], 1)
    assert (rows[:, 0].tolist(), scores[:, 0].tolist()) == ([1, 0], [1.0, 1.0])
    about = json.loads((tmp_path / "f.faiss.json").read_text())
    assert about == {"modality": "visible", "names": ["a", "caf\\udce9.png", "b"]}


def test_new_names_never_stand_beside_an_old_index(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="faiss-cpu, of the extra [search], is not installed")
    index, names = tmp_path / "f.faiss", tmp_path / "f.faiss.json"
    names.write_text("old")
    index.mkdir()  # so that it can't be replaced
    with pytest.raises(OSError, match=r"f\.faiss"):
        write_faiss(index, held(torch.eye(2), names=Names.of(["new", "newer"])))
    assert index.is_dir() and not names.exists()


def test_features_for_databases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow, of the extra [search], is missing")
    monkeypatch.setattr(engines, "_GROUP", 2)
    torch.manual_seed(0)
    rows = torch.randn(5, 4)
    names = [f"{number}.png" for number in range(5)]
    write_parquet(tmp_path / "f.parquet", held(rows, names=Names.of(names), about={"network": "abc"}))
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table["name"].to_pylist() == names
    assert table.schema.metadata == {b"network": b"abc"}
    unit = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.tensor(table["feature"].to_pylist()), unit)


@pytest.mark.parametrize(("engine", "package"), [("faiss", "faiss"), ("parquet", "pyarrow")])
def test_other_engines_are_checked_first(
    engine: str,
    package: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["extract", "--checkpoint", "none", "--images", "none", "--modality", "visible", "--to", engine]
    assert main([*words, "--out", str(tmp_path / "f.safetensors")]) == 2
    assert f"expected a name that ends with .{engine}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, package, None)
    assert main([*words, "--out", str(tmp_path / f"f.{engine}")]) == 2
    assert f"{package} is not installed, which --to {engine} needs" in capsys.readouterr().err


def test_names_are_made_visible() -> None:
    name = "a\x1b[31m\n" + NOT_UTF8 + "\u202e\u00e9"
    assert visible(name) == "a\\x1b[31m\\ncaf\\udce9.png\\u202e\u00e9"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page of a red query with a name that is a script, a blue hit, and one whose picture is gone."""
    painted(tmp_path / SCRIPT / "script>.png", (255, 0, 0), (48, 96))
    painted(tmp_path / 'b" onerror="document.body.className=1.png', (0, 0, 255))
    names = Names.of([f"{SCRIPT}/script>.png", 'b" onerror="document.body.className=1.png', "gone.png"])
    side = held(torch.eye(3), names=names, folder=tmp_path)
    hits = Hits(torch.tensor([[0.9, 0.1]]), torch.tensor([[1, 2]]))
    query = held(torch.eye(3)[:1], names=names, folder=tmp_path)
    write_page(tmp_path / "page.html", Found(query, side, hits, ("recall <b>",)))
    return tmp_path / "page.html"


def test_the_page_has_pictures_and_escaped_names(page: Path) -> None:
    text = page.read_text()
    assert text.count('src="data:image/jpeg;base64,') == 2
    assert "&lt;script&gt;" in text and "<script" not in text
    assert ' onerror="' not in text and "recall &lt;b&gt;" in text
    assert text.count("no picture") == 1 and "No such file" in text


def browser(folder: Path, *words: str) -> str:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("the page is looked at in chromium, which is not installed")
    command = [
        *(chromium, "--headless", "--no-sandbox", "--disable-background-networking", "--disable-gpu"),
        f"--user-data-dir={folder / 'profile'}",
        *words,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


PROBE = """<script>addEventListener("load", () => document.title = JSON.stringify(
  [...document.images].map(image => [image.complete, image.naturalWidth, image.naturalHeight])))</script>"""


@pytest.mark.slow
def test_a_browser_shows_the_pictures_and_runs_no_name(page: Path, tmp_path: Path) -> None:
    """The page as it is is painted with both colours; without its policy, no name of a file runs either."""
    shot = tmp_path / "shot.png"
    browser(tmp_path, f"--screenshot={shot}", "--window-size=600,400", page.as_uri())
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert (np.abs(pixels - colour).max(axis=1) < 8).sum() > 300
    text = page.read_text()
    unguarded = re.sub(r"<meta http-equiv.*?>", PROBE, text, count=1, flags=re.DOTALL)
    assert unguarded != text
    page.write_text(unguarded)
    shown = browser(tmp_path, "--dump-dom", page.as_uri())
    assert "<title>[[true,48,96],[true,16,32]]</title>" in shown
    assert "<body>" in shown  # no name gave it a class
