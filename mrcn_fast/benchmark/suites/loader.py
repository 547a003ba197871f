"""How many images a second training's loader gives: cold, warm and cached, beside the field's habit.

`mrcn-fast bench --loader DATA` prints a table. Loading is decoding, resizing and collating; augmentation acts
later, on whole batches, and is measured apart and together with it. The ways:

- cold: the files, after the system was told to forget them (posix_fadvise, POSIX_FADV_DONTNEED); what the
  disk, the hypervisor or a file server keeps stays
- warm: the files, read just before
- cached: the memory-mapped cache of `--cache`, in memory since it was written
- habit: all images as one array in memory, as the field's preprocessing makes it; padded, cropped, mirrored,
  normalised and erased an image at a time by Pillow and PyTorch, in the processes that load

In a stretch every image is read once, in random order. Ways take turns, so that what else the machine does
meets all of them.
"""

from __future__ import annotations

import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mrcn_fast import benchmark
from mrcn_fast.benchmark.command import unmeasurable
from mrcn_fast.flags import PATH, Flags
from mrcn_fast.outputs import check_file, check_folder
from mrcn_fast.reid.console import log_to_console
from mrcn_fast.reid.data import (
    Augmentation,
    PersonImages,
    Sample,
    TrainingSet,
    open_dataset,
    recognize,
)
from mrcn_fast.reid.data.augment import IMAGENET_MEAN, IMAGENET_STD
from mrcn_fast.reid.data.cache import cached
from mrcn_fast.reid.data.datasets.registry import DATASETS
from mrcn_fast.reid.data.images import FILTERS
from mrcn_fast.reid.data.loading import Batches
from mrcn_fast.reid.devices import check_alone
from mrcn_fast.reid.kinds import NUMPY, AnyPath, Device, OneOf, PathText, Seconds, Workers
from mrcn_fast.reid.settings import check_arguments
from mrcn_fast.reid.training.batches import PairedImages, collate, without_unreadable

# Pairs of a batch: the paper's 4 identities x 4 images.
_BATCH: Final = 16
# Of a large data set so many images of a modality, spread over all of it, are measured, ...
_MOST_IMAGES: Final = 2048
# ... and so many batches make a stretch.
_MOST_BATCHES: Final = 32
_LEAST_STRETCHES: Final = 5


_Pixels = Annotated[int, Field(ge=1, le=8192), NUMPY]


@check_arguments
def measure_loader(
    data: AnyPath,
    *,
    dataset: Annotated[str, OneOf(tuple(DATASETS))] | None = None,
    height: _Pixels = 288,
    width: _Pixels = 128,
    filter: Annotated[str, OneOf(FILTERS)] = "lanczos",
    workers: Sequence[Workers] = (0, 1, 2),
    seconds: Seconds = 3.0,
    cache: PathText | None = None,
    device: Device = "cpu",
    skip_unreadable: bool = False,
) -> dict[str, Any]:
    """Images a second of the training images under `data`, as a line of results.

    Args:
        data: root of the data set's tree
        dataset: its name; none: that of the data set whose tree it is
        height: pixels
        width: pixels
        filter: Pillow's filter that resizes images
        workers: numbers of processes
        seconds: least measuring time of each way with each of them
        cache: folder for the cache; none: one that is removed
        device: where the batches are augmented
        skip_unreadable: leave out images that can't be read, named and counted, which are an error else

    Raises DatasetError for a broken tree and for other images that can't be read, ValueError for fewer images
    than a batch's, OSError where the cache's folder can't be written to.

    "images_per_second" has, by workers and way, [20th percentile, median, 80th percentile] over stretches;
    "augmentation" has that of augmenting alone; "evicted" is the share of files that cold found out of
    memory, None where the system doesn't tell; "preparation" has the seconds that cache and habit take
    before, and the "bytes" of either, on the disk or in memory.
    """
    if cache is not None:
        check_folder(cache, "the cache")
    name = dataset or recognize(data)
    training = open_dataset(name, data).training()
    if skip_unreadable:
        training, _ = without_unreadable(training, f"{name} at {data}", workers=max(workers, default=0))
    training = _spread(training)
    with ExitStack() as stack:
        folder = cache or stack.enter_context(tempfile.TemporaryDirectory())
        sources, preparation = _sources(training, name, (height, width), filter, folder)
        augment = Augmentation((height, width))
        rates, evicted = {}, None
        for count in workers:
            ways = _ways(training, sources, augment, count, device)
            rates[str(count)] = _stretches(ways, seconds)
            evicted = ways[0].evicted if evicted is None else evicted
    return benchmark.machine(device) | {
        "case": f"loader {name} {height}x{width} {filter}",
        "cores": os.cpu_count(),
        "images": [len(training.visible), len(training.infrared)],
        "stretch": 2 * _BATCH * _batches_a_stretch(training),
        "images_per_second": rates,
        "augmentation": _augmentation_rate((height, width), augment, seconds, device),
        "evicted": evicted,
        "preparation": preparation,
    }


class HabitualImages(Dataset[Tensor]):
    """The habit: uint8 (n, H, W, 3) in memory, transformed an image at a time; `[i]` is float32 (3, H, W)."""

    def __init__(
        self, pixels: NDArray[np.uint8], *, padding: int = 10, flip: float = 0.5, erase: float = 0.5
    ) -> None:
        self.pixels = pixels
        self.padding, self.flip, self.erase = padding, flip, erase
        self._mean, self._std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        pixels = self.pixels[index]
        height, width = pixels.shape[:2]
        image = ImageOps.expand(Image.fromarray(pixels), self.padding)
        top, left = random.randint(0, 2 * self.padding), random.randint(0, 2 * self.padding)
        image = image.crop((left, top, left + width, top + height))
        if random.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        tensor = (tensor - self._mean) / self._std
        return self._erased(tensor) if random.random() < self.erase else tensor

    def _erased(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        for _ in range(100):
            area, ratio = random.uniform(0.02, 0.4) * height * width, random.uniform(0.3, 1 / 0.3)
            tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if tall < height and wide < width:
                top, left = random.randint(0, height - tall), random.randint(0, width - wide)
                image[:, top : top + tall, left : left + wide] = 0
                break
        return image


class _RandomOrder(Sampler[list[tuple[int, int]]]):
    """The batches of a stretch: every image at most once, another draw at each `shuffle`."""

    def __init__(self, training: TrainingSet) -> None:
        self._training = training
        self._generator = np.random.default_rng(0)
        self._batches = _batches_a_stretch(training)
        self.pairs: list[tuple[int, int]] = []

    def shuffle(self) -> list[Path]:
        """Draw the next stretch's images; their paths."""
        count = self._batches * _BATCH
        both = [
            self._generator.permutation(len(samples))[:count].tolist()
            for samples in (self._training.visible, self._training.infrared)
        ]
        self.pairs = list(zip(*both, strict=True))
        samples = [(self._training.visible[i], self._training.infrared[j]) for i, j in self.pairs]
        return [sample.path for pair in samples for sample in pair]

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (self.pairs[start : start + _BATCH] for start in range(0, len(self.pairs), _BATCH))


class _Way:
    """One way to load: `stretch()` is the images a second of the next stretch."""

    def __init__(
        self,
        name: str,
        order: _RandomOrder,
        batches: Batches[Any],
        prepare: Callable[[list[Path]], object],
        finish: Callable[[Tensor], object] | None = None,
    ) -> None:
        self.name = name
        self.evicted: float | None = None
        self._order, self._batches, self._prepare, self._finish = order, batches, prepare, finish

    def stretch(self) -> float:
        paths = self._order.shuffle()
        self._prepare(paths)
        if self.name == "cold":
            self.evicted = _share_out_of_memory(paths)
        start = time.perf_counter()
        for batch in self._batches:
            if self._finish is not None:
                self._finish(batch.visible)
                self._finish(batch.infrared)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return len(paths) / (time.perf_counter() - start)


class _Sources(NamedTuple):
    """Where images come from: (visible, infrared) each."""

    files: tuple[Dataset[Tensor], Dataset[Tensor]]
    cache: tuple[Dataset[Tensor], Dataset[Tensor]]
    habit: tuple[Dataset[Tensor], Dataset[Tensor]]


def _sources(
    training: TrainingSet, name: str, size: tuple[int, int], filter: str, folder: str | Path
) -> tuple[_Sources, dict[str, float]]:
    """The sources, and the seconds and bytes that cache and habit cost."""
    parts = {"visible": training.visible, "infrared": training.infrared}
    files = [PersonImages(samples, size, filter=filter) for samples in parts.values()]
    start = time.perf_counter()
    cache = [
        cached(samples, size, filter=filter, folder=folder, name=f"{name}-bench-{modality}")
        for modality, samples in parts.items()
    ]
    between = time.perf_counter()
    arrays = [np.stack([images[i].permute(1, 2, 0).numpy() for i in range(len(images))]) for images in files]
    end = time.perf_counter()
    preparation = {
        "cache": round(between - start, 2),
        "habit": round(end - between, 2),
        "bytes": sum(array.nbytes for array in arrays),
    }
    habit = [HabitualImages(array) for array in arrays]
    return _Sources((files[0], files[1]), (cache[0], cache[1]), (habit[0], habit[1])), preparation


def _ways(
    training: TrainingSet, sources: _Sources, augment: Augmentation, workers: int, device: str
) -> list[_Way]:
    def augmented(images: Tensor) -> Tensor:
        return augment(images.to(device, non_blocking=True))

    def moved(images: Tensor) -> Tensor:
        return images.to(device, non_blocking=True)

    def way(
        name: str,
        source: tuple[Dataset[Tensor], Dataset[Tensor]],
        prepare: Callable[[list[Path]], object],
        finish: Callable[[Tensor], object] | None = None,
    ) -> _Way:
        order = _RandomOrder(training)
        item: Tensor = source[0][0]
        batches = Batches(
            PairedImages(training, training, *source),
            collate,
            batch_sampler=order,
            batch_bytes=2 * _BATCH * item.numel() * item.itemsize,
            workers=workers,
            pin_memory=device != "cpu",
        )
        return _Way(name, order, batches, prepare, finish)

    return [
        way("cold", sources.files, _forget),
        way("warm", sources.files, _read),
        way("cached", sources.cache, _nothing),
        way("warm, augmented", sources.files, _read, augmented),
        way("cached, augmented", sources.cache, _nothing, augmented),
        way("habit, augmented", sources.habit, _nothing, moved),
    ]


def _stretches(ways: Sequence[_Way], seconds: float) -> dict[str, list[float]]:
    """Rates by way: quantiles over stretches, the ways in turn, after one that starts the processes."""
    rates: dict[str, list[float]] = {way.name: [] for way in ways}
    for way in ways:
        way.stretch()
    end = time.perf_counter() + seconds * len(ways)
    while time.perf_counter() < end or len(rates[ways[0].name]) < _LEAST_STRETCHES:
        for way in ways:
            rates[way.name].append(way.stretch())
    return {name: _rounded(benchmark.quantiles(found)) for name, found in rates.items()}


def _augmentation_rate(
    size: tuple[int, int], augment: Augmentation, seconds: float, device: str
) -> list[float]:
    """Images a second of augmenting batches of one modality that are on the device already."""
    images = torch.randint(256, (_BATCH, 3, *size), dtype=torch.uint8).to(device)

    def run() -> None:
        augment(images)
        if device != "cpu":
            torch.cuda.synchronize()

    timing = benchmark.measure({"augmentation": run}, seconds)["augmentation"]
    return _rounded([_BATCH / taken for taken in reversed(timing)])


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 1) for value in values]


def _batches_a_stretch(training: TrainingSet) -> int:
    return min(len(training.visible), len(training.infrared), _MOST_BATCHES * _BATCH) // _BATCH


def _spread(training: TrainingSet) -> TrainingSet:
    """At most _MOST_IMAGES images of each modality, evenly from the whole training set."""

    def chosen(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
        places = np.linspace(0, len(samples) - 1, min(len(samples), _MOST_IMAGES)).round().astype(int)
        return tuple(samples[place] for place in places)

    spread = training._replace(visible=chosen(training.visible), infrared=chosen(training.infrared))
    least = min(len(spread.visible), len(spread.infrared))
    if least < _BATCH:
        raise ValueError(f"got {least} training images of a modality, expected at least {_BATCH}, a batch")
    return spread


def _nothing(paths: list[Path]) -> None:
    """Images that are in memory need no preparation."""


def _read(paths: list[Path]) -> None:
    for path in paths:
        path.read_bytes()


def _forget(paths: list[Path]) -> None:
    """Have the system drop the files from memory; only what is on the disk can be dropped."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _share_out_of_memory(paths: list[Path]) -> float | None:
    """The share of files whose first byte would have to come from the disk; None where no one can tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    out = 0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            out += 1
        except OSError:
            # A file system that doesn't know the question.
            return None
        finally:
            os.close(descriptor)
    return round(out / len(paths), 3)


def print_speeds(result: dict[str, Any]) -> None:
    """The result as a Markdown table, with what it depends on."""
    rates = result["images_per_second"]
    visible, infrared = result["images"]
    print(f"{result['cpu']}, {result['cores']} cores, torch {result['torch']}; {result['case']}")
    print(f"images a second, median over stretches of {result['stretch']} of {visible} + {infrared} images\n")
    print(f"| | {' | '.join(f'{count} workers' for count in rates)} |\n|---|{'---:|' * len(rates)}")
    for way in next(iter(rates.values()), {}):
        print(f"| {way} | {' | '.join(f'{found[way][1]:,.0f}' for found in rates.values())} |")
    print(f"\naugmentation alone: {result['augmentation'][1]:,.0f} images a second")
    told = "can't be told" if result["evicted"] is None else f"{100 * result['evicted']:.0f} %"
    print(f"cold: files out of memory before a stretch: {told}")
    cost = result["preparation"]
    print(
        f"{cost['bytes'] / 1e6:,.0f} MB: the cache, on the disk, made once in {cost['cache']} s; "
        f"the habit's, in memory, read at every start in {cost['habit']} s"
    )


def main(argv: list[str] | None = None) -> int:
    """`mrcn-fast bench --loader DATA`: measure, and print the table."""
    flags = Flags("bench --loader", "images a second of training's loader, without a network")
    flags.add_word("data", PathText, "the data set's tree")
    flags.add_of(measure_loader, skip={"data"})
    flags.add("--out", PATH, None, "append the result to this file as a JSON line")
    options = flags.values(argv)
    out = options.pop("out")
    check_alone()
    if out:
        check_file(out, "the result")
    if torch.device(options["device"]).type != "cpu" and (reason := unmeasurable(options["device"])):
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 2
    log_to_console()
    result = measure_loader(options.pop("data"), **options)
    print_speeds(result)
    if out:
        benchmark.write(out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
