"""The cache of resized images: the files' pixels, rebuilt when stale, whole whatever happens to builders."""

from __future__ import annotations

import io
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mrcn_fast.reid.data import DatasetError, PersonImages, Sample
from mrcn_fast.reid.data import cache as module
from mrcn_fast.reid.data.cache import CachedImages, cached

SIZE = (20, 8)
LOGGER = "mrcn_fast.reid.data.cache"

# A process that opens the cache of the tree in its arguments and prints what it logs, and the pixels' sum.
PROGRAM = """
import logging, sys, time
from pathlib import Path
from mrcn_fast.reid.data import PersonImages, Sample
from mrcn_fast.reid.data.cache import cached

root, folder, delay, workers = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
decode = PersonImages.__getitem__

def slowly(self, index):
    time.sleep(delay)
    return decode(self, index)

PersonImages.__getitem__ = slowly
samples = [Sample(path, 1, 1, "visible") for path in sorted(root.glob("*.png"))]
images = cached(samples, (20, 8), filter="lanczos", folder=folder, name="tree", workers=workers)
print("sum", sum(int(images[i].sum()) for i in range(len(images))), flush=True)
"""


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    (tmp_path / "tree").mkdir()
    made = []
    for index in range(40):
        path = tmp_path / "tree" / f"{index:04d}.png"
        save(path, index)
        made.append(Sample(path, 1 + index // 4, 1, "visible"))
    return made


def save(path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    Image.fromarray(generator.integers(0, 256, (31, 17, 3), dtype=np.uint8)).save(path)


def opened(samples: list[Sample], folder: Path, **changes: Any) -> CachedImages:
    options: dict[str, Any] = {"filter": "lanczos", "folder": folder, "name": "tree"} | changes
    images = cached(samples, options.pop("image_size", SIZE), **options)
    assert isinstance(images, CachedImages)
    return images


def builds(caplog: pytest.LogCaptureFixture) -> int:
    """Count the builds that were logged since the last call."""
    count = sum(": writing " in record.getMessage() for record in caplog.records)
    caplog.clear()
    return count


def left(folder: Path) -> list[str]:
    """The files in the folder besides locks."""
    return sorted(entry.name for entry in folder.glob("*") if entry.suffix != ".lock")


@pytest.fixture(autouse=True)
def logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("filter", ["bilinear", "lanczos"])
def test_items_are_those_of_the_files(
    workers: int, filter: str, samples: list[Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = torch.get_rng_state()
    images = opened(samples, tmp_path / "a" / "b", filter=filter, workers=workers)
    files = PersonImages(samples, SIZE, filter=filter)
    assert len(images) == len(files)
    for index in range(len(files)):
        assert images[index].dtype == torch.uint8
        assert torch.equal(images[index], files[index])
    assert torch.equal(torch.get_rng_state(), state)
    assert caplog.messages[0].startswith("Cache of tree: writing 40 images, 0.0 MB, to ")
    assert left(tmp_path / "a" / "b") == [images.path.name]


def test_a_whole_cache_is_used_again(
    samples: list[Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(samples, tmp_path / "cache")
    assert builds(caplog) == 1
    with monkeypatch.context() as patch:
        patch.setattr(PersonImages, "__getitem__", None)
        again = opened(samples, tmp_path / "cache")
    assert builds(caplog) == 0
    assert again.path == first.path
    assert torch.equal(again[3], first[3])


def test_a_tree_that_moved_is_the_same_tree(
    samples: list[Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened(samples, tmp_path / "cache")
    (tmp_path / "tree").rename(tmp_path / "elsewhere")
    moved = [s._replace(path=tmp_path / "elsewhere" / s.path.name) for s in samples]
    opened(moved, tmp_path / "cache")
    assert builds(caplog) == 1


@pytest.mark.parametrize("change", ["content", "time", "size", "order", "fewer", "other"])
def test_a_stale_cache_is_rebuilt_and_its_file_removed(
    change: str, samples: list[Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = opened(samples, tmp_path / "cache")
    assert builds(caplog) == 1
    before, path = old[5], samples[5].path
    found = path.stat()
    if change in ("content", "other"):
        save(path, 99)
    elif change == "time":
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    elif change == "size":
        path.write_bytes(path.read_bytes() + b" ")
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    elif change == "order":
        samples[5], samples[6] = samples[6], samples[5]
    else:
        samples.pop()
    new = opened(samples, tmp_path / "cache")
    assert builds(caplog) == 1
    assert torch.equal(new[5], PersonImages(samples, SIZE)[5])
    assert left(tmp_path / "cache") == [new.path.name] != [old.path.name]
    # Whoever has the old one open keeps it.
    assert torch.equal(old[5], before)


def test_another_format_is_stale(
    samples: list[Sample],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened(samples, tmp_path / "cache")
    monkeypatch.setattr(module, "_VERSION", module._VERSION + 1)
    opened(samples, tmp_path / "cache")
    assert builds(caplog) == 2
    assert len(left(tmp_path / "cache")) == 1


def test_sizes_filters_and_names_stand_beside_each_other(
    samples: list[Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kinds: list[dict[str, Any]] = [
        {}, {"image_size": (8, 20)}, {"filter": "bicubic"}, {"name": "tree-2"}, {"name": "tre[e]"},
    ]  # fmt: skip
    for _ in range(2):
        for kind in kinds:
            opened(samples, tmp_path / "cache", **kind)
    assert builds(caplog) == len(left(tmp_path / "cache")) == 5


DAMAGES = ["cut", "empty", "longer", "other", "zip", "pickle", "text", "header", "bit", "zeros", "another"]


def damaged(whole: bytes, damage: str) -> bytes:
    """Replace the content of a cache's file."""
    file = io.BytesIO()
    if damage == "other":
        np.save(file, np.zeros((40, 3, *SIZE), dtype=np.int8))
    elif damage == "another":
        np.save(file, np.zeros((40, 3, *SIZE), dtype=np.uint8))
    elif damage == "zip":
        np.savez(file, np.zeros((40, 3, *SIZE), dtype=np.uint8))
    elif damage == "pickle":
        pickle.dump([1, 2, 3], file)
    flipped = bytes([whole[5000] ^ 16])
    return (
        file.getvalue()
        or {
            "cut": whole[:-1],
            "empty": b"",
            "longer": whole + b"1",
            "text": b"no cache\n",
            # numpy's own reader ends on it with an error of the tokenizer.
            "header": whole[:40] + b"(" + whole[41:],
            "bit": whole[:5000] + flipped + whole[5001:],
            "zeros": whole[:128] + bytes(len(whole) - 128),
        }[damage]
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_rebuilt(
    damage: str, samples: list[Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = opened(samples, tmp_path / "cache").path
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, damage))
    caplog.clear()
    opened(samples, tmp_path / "cache")
    assert caplog.messages[0].startswith(f"Cache of tree: {path} is made anew; found: ")
    assert builds(caplog) == 1
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name not in ("bit", "zeros")])
def test_a_file_that_was_replaced_is_refused_by_name(
    damage: str, samples: list[Sample], tmp_path: Path
) -> None:
    """A process maps the file only after the run has begun."""
    images = opened(samples, tmp_path / "cache")
    content = pickle.dumps(images)
    images.path.write_bytes(damaged(images.path.read_bytes(), damage))
    with pytest.raises(
        DatasetError, match=rf"{images.path.name}: expected the cache of 40 images; found: not "
    ):
        pickle.loads(content)[0]


def test_a_cache_of_no_images_can_be_built(tmp_path: Path) -> None:
    assert len(opened([], tmp_path / "cache")) == 0
    assert len(opened([], tmp_path / "cache")) == 0


def test_a_pickled_cache_is_small_and_opens_the_file(samples: list[Sample], tmp_path: Path) -> None:
    images = opened(samples, tmp_path / "cache")
    content = pickle.dumps(images)
    assert len(content) < images.path.stat().st_size // 2
    copy = pickle.loads(content)
    assert torch.equal(copy[7], images[7])
    lost = pickle.loads(content)
    images.path.unlink()
    with pytest.raises(DatasetError, match=r"\.npy: expected the cache of 40 images; found: .*No such file"):
        lost[0]
    # Mapped before: still there.
    assert torch.equal(copy[0], images[0])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes_give_the_same(start: str, samples: list[Sample], tmp_path: Path) -> None:
    images = opened(samples, tmp_path / "cache")
    loader = DataLoader(images, batch_size=16, num_workers=1, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), torch.stack([images[i] for i in range(len(images))]))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_an_unreadable_image_is_named_and_no_cache_left(
    workers: int, damage: str, samples: list[Sample], tmp_path: Path
) -> None:
    path = samples[37].path
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:300])
    else:
        path.unlink()
    with pytest.raises(DatasetError) as caught:
        opened(samples, tmp_path / "cache", workers=workers)
    assert str(caught.value).startswith(f"{path}: expected a readable image of identity 10, camera 1; found")
    assert left(tmp_path / "cache") == []
    if damage == "cut":
        save(path, 37)
        assert torch.equal(opened(samples, tmp_path / "cache")[37], PersonImages(samples, SIZE)[37])


def test_a_full_disk_is_reported_before_the_build(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=19199)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"it needs 19200 bytes, 19199 are free.*tree-20x8-lanczos"):
        opened(samples, tmp_path / "cache")
    assert left(tmp_path / "cache") == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of a process")
def test_a_write_that_fails_says_what_it_needed(samples: list[Sample], tmp_path: Path) -> None:
    # Bytecode that the limit cuts off would be kept, and every later process would fail to read it.
    limited = (
        "import resource, sys; sys.dont_write_bytecode = True\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n" + PROGRAM
    )
    failed = run(samples, tmp_path / "cache", program=limited)
    _, err = failed.communicate(timeout=60)
    assert failed.returncode == 1
    assert "can't write the cache: File too large; it needs 19200 bytes" in err
    assert left(tmp_path / "cache") == []


def test_a_name_is_no_path(samples: list[Sample], tmp_path: Path) -> None:
    for name in ("", "a/b"):
        with pytest.raises(ValueError, match="name is part of a file's name"):
            opened(samples, tmp_path / "cache", name=name)


def run(
    samples: list[Sample], folder: Path, delay: float = 0.0, workers: int = 0, program: str = PROGRAM
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, samples[0].path.parent, folder, str(delay), str(workers)]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def total(samples: list[Sample]) -> str:
    images = PersonImages(samples, SIZE)
    return f"sum {sum(int(images[i].sum()) for i in range(len(images)))}"


def test_one_of_two_processes_builds_the_cache(samples: list[Sample], tmp_path: Path) -> None:
    both = [run(samples, tmp_path / "cache", delay=0.05) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(text.count(": writing ") for text in said) == 1
    assert sum(text.count(": waiting for the process") for text in said) <= 1
    assert all(text.splitlines()[-1] == total(samples) for text in said)
    assert len(left(tmp_path / "cache")) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_builder_does_no_harm(workers: int, samples: list[Sample], tmp_path: Path) -> None:
    """A process that is killed while it writes leaves the build to a process that waits."""
    folder = tmp_path / "cache"
    killed = run(samples, folder, delay=0.1, workers=workers)
    wait_for(lambda: folder.is_dir() and any(folder.glob("*.part")), killed)
    killed.send_signal(signal.SIGSTOP)  # it must not be done before another has begun to wait for it
    waiting = run(samples, folder, workers=workers)
    assert waiting.stdout is not None
    line = waiting.stdout.readline()
    assert line == "Cache of tree: waiting for the process that builds it\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert [name.rsplit(".", 1)[1] for name in left(folder)] == ["part"]
    said, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, err
    assert ": writing " in said
    assert said.splitlines()[-1] == total(samples)
    assert [name.rsplit(".", 1)[1] for name in left(folder)] == ["npy"]


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_need_not_be_utf8(samples: list[Sample], tmp_path: Path) -> None:
    path = samples[0].path.with_name(os.fsdecode(b"\xe4\xff.png"))
    samples[0].path.rename(path)
    samples[0] = samples[0]._replace(path=path)
    assert torch.equal(opened(samples, tmp_path / "cache")[0], PersonImages(samples, SIZE)[0])


def test_an_image_is_kept_upright(samples: list[Sample], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(samples[0].path) as file:
        file.load()
        file.save(samples[0].path, exif=exif)
    assert torch.equal(opened(samples, tmp_path / "cache")[0], PersonImages(samples, SIZE)[0])
