"""`mrcn-fast bench loader DATA`: images per second of training's loader, beside what published code does.

Loading is decoding, resizing and collating. Augmentation works on whole batches afterwards; it is measured
alone and together with loading. The ways to load:

- cold: the files, after the system was asked to drop them from memory (posix_fadvise, POSIX_FADV_DONTNEED);
  the disk, the hypervisor or a file server may still hold them
- warm: the files, just after they were read
- cached: the memory-mapped cache of `--cache`, which is in memory since it was written
- as published: all images as one array in memory, as published re-identification code prepares them. Pillow
  and PyTorch pad, crop, flip, normalize and erase them one image at a time, in the loading processes.

A stretch reads every image once, in random order. The ways take turns, so that other work of the machine
slows all of them alike.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
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
from mrcn_fast.benchmark.results import AS_PUBLISHED
from mrcn_fast.benchmark.timing import check_measurable
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
from mrcn_fast.reid.kinds import NUMPY, AnyPath, Device, OneOf, PathText, Seconds, Several, Workers
from mrcn_fast.reid.settings import SettingError, check_fields
from mrcn_fast.reid.training.batches import PairedImages, collate, without_unreadable

# Pairs per batch: the paper's 4 identities x 4 images.
_BATCH: Final = 16
# The largest number of images per modality; those of a larger data set are chosen evenly from all of it.
_MOST_IMAGES: Final = 2048
# The largest number of batches per stretch.
_MOST_BATCHES: Final = 32
_LEAST_STRETCHES: Final = 5


_Pixels = Annotated[int, Field(ge=1, le=8192), NUMPY]


@dataclasses.dataclass
class LoaderConfig:
    """What `measure_loader` measures.

    Raises SettingError for a field that doesn't fit its annotation.
    """

    data: AnyPath
    """Root of the data set's tree."""
    dataset: Annotated[str, OneOf(tuple(DATASETS))] | None = None
    """Name of the data set; without it, the tree decides."""
    height: _Pixels = 288
    """Image height in pixels."""
    width: _Pixels = 128
    """Image width in pixels."""
    filter: Annotated[str, OneOf(FILTERS)] = "lanczos"
    """Pillow's filter that resizes images."""
    workers: Several[Workers] = (0, 1, 2)
    """Numbers of loading processes."""
    seconds: Seconds = 3.0
    """Least measuring time per way and number of processes."""
    cache: PathText | None = None
    """Folder for the cache; without it, a temporary one."""
    device: Device = "cpu"
    """Where the batches are augmented."""
    skip_unreadable: bool = False
    """Leave out images that can't be read, which are logged and counted; without it they are an error."""

    def __post_init__(self) -> None:
        check_fields(self, SettingError)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


def measure_loader(config: LoaderConfig) -> dict[str, Any]:
    """Measure the loader on a data set's training images.

    Args:
        config: the data set, and how its images are loaded

    Returns:
        A result line. "images_per_second": by number of processes and way, [20th percentile, median, 80th
        percentile] over stretches. "augmentation": the same of augmentation alone. "evicted": the share of
        files that were out of memory when cold began, None where the system doesn't tell. "preparation":
        seconds that the cache and the array as published take before loading, and the "bytes" of either.

    Raises:
        DatasetError: the tree is broken, or an image can't be read.
        ValueError: a modality has fewer images than a batch.
        OSError: the cache's folder can't be written to.
    """
    if config.cache is not None:
        check_folder(config.cache, "the cache")
    name = config.dataset or recognize(config.data)
    training = _training_images(config, name)
    with ExitStack() as stack:
        folder = config.cache or stack.enter_context(tempfile.TemporaryDirectory())
        sources, preparation = _sources(training, name, config.size, config.filter, folder)
        augment = Augmentation(config.size)
        rates, evicted = {}, None
        for count in config.workers:
            ways = _ways(training, sources, augment, count, config.device)
            rates[str(count)] = _stretches(ways, config.seconds)
            evicted = ways[0].evicted if evicted is None else evicted
    return benchmark.machine(config.device) | {
        "case": f"loader {name} {config.height}x{config.width} {config.filter}",
        "cores": os.cpu_count(),
        "images": [len(training.visible), len(training.infrared)],
        "stretch": 2 * _BATCH * _batches_per_stretch(training),
        "images_per_second": rates,
        "augmentation": _augmentation_rate(config.size, augment, config.seconds, config.device),
        "evicted": evicted,
        "preparation": preparation,
    }


def _training_images(config: LoaderConfig, name: str) -> TrainingSet:
    """Open the training images that are measured."""
    training = open_dataset(name, config.data).training()
    if config.skip_unreadable:
        place = f"{name} at {config.data}"
        training, _ = without_unreadable(training, place, workers=max(config.workers, default=0))
    return _spread(training)


class PublishedImages(Dataset[Tensor]):
    """Images as published re-identification code loads them: one array in memory, augmented one at a time.

    `[i]` is float32 (3, H, W).

    Args:
        pixels: uint8 (n, H, W, 3)
        padding: pixels on each side, before the crop
        flip: the probability of a flip
        erase: the probability that a rectangle is erased
    """

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
    """The batches of a stretch, with every image at most once; `shuffle` draws them anew."""

    def __init__(self, training: TrainingSet) -> None:
        self._training = training
        self._generator = np.random.default_rng(0)
        self._batches = _batches_per_stretch(training)
        self.pairs: list[tuple[int, int]] = []

    def shuffle(self) -> list[Path]:
        """Draw the next stretch's images and return their paths."""
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
    """One way to load."""

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
        """Load the next stretch; return its images per second."""
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
    """Where images come from, each as (visible, infrared)."""

    files: tuple[Dataset[Tensor], Dataset[Tensor]]
    cache: tuple[Dataset[Tensor], Dataset[Tensor]]
    published: tuple[Dataset[Tensor], Dataset[Tensor]]


def _sources(
    training: TrainingSet, name: str, size: tuple[int, int], filter: str, folder: str | Path
) -> tuple[_Sources, dict[str, float]]:
    """Make the sources; return them, and the seconds and bytes that the cache and the array cost."""
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
        AS_PUBLISHED: round(end - between, 2),
        "bytes": sum(array.nbytes for array in arrays),
    }
    visible, infrared = map(PublishedImages, arrays)
    return _Sources((files[0], files[1]), (cache[0], cache[1]), (visible, infrared)), preparation


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
        way(f"{AS_PUBLISHED}, augmented", sources.published, _nothing, moved),
    ]


def _stretches(ways: Sequence[_Way], seconds: float) -> dict[str, list[float]]:
    """Return the quantiles over stretches by way; the ways take turns.

    A first stretch of each, which starts its processes, is not counted.
    """
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
    """Return the images per second of augmenting batches of one modality that are on the device already."""
    images = torch.randint(256, (_BATCH, 3, *size), dtype=torch.uint8).to(device)

    def run() -> None:
        augment(images)
        if device != "cpu":
            torch.cuda.synchronize()

    timing = benchmark.measure({"augmentation": run}, seconds)["augmentation"]
    return _rounded([_BATCH / taken for taken in reversed(timing)])


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 1) for value in values]


def _batches_per_stretch(training: TrainingSet) -> int:
    return min(len(training.visible), len(training.infrared), _MOST_BATCHES * _BATCH) // _BATCH


def _spread(training: TrainingSet) -> TrainingSet:
    """Choose at most _MOST_IMAGES images of each modality, evenly from the whole training set."""

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
    """Ask the system to drop the files from memory; it can drop only what it has written to the disk."""
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
    """Return the share of files whose first byte is not in memory; None where the system doesn't tell."""
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
            # The file system can't answer.
            return None
        finally:
            os.close(descriptor)
    return round(out / len(paths), 3)


def print_speeds(result: dict[str, Any]) -> None:
    """Print a result of `measure_loader` as a Markdown table."""
    rates = result["images_per_second"]
    visible, infrared = result["images"]
    print(f"{result['cpu']}, {result['cores']} cores, torch {result['torch']}; {result['case']}")
    print(
        f"images per second, median over stretches of {result['stretch']} of {visible} + {infrared} images\n"
    )
    print(f"| | {' | '.join(f'{count} workers' for count in rates)} |\n|---|{'---:|' * len(rates)}")
    for way in next(iter(rates.values()), {}):
        print(f"| {way} | {' | '.join(f'{found[way][1]:,.0f}' for found in rates.values())} |")
    print(f"\naugmentation alone: {result['augmentation'][1]:,.0f} images per second")
    evicted = "unknown" if result["evicted"] is None else f"{100 * result['evicted']:.0f} %"
    print(f"cold: files out of memory before a stretch: {evicted}")
    cost = result["preparation"]
    print(
        f"{cost['bytes'] / 1e6:,.0f} MB: the cache, on the disk, made once in {cost['cache']} s; "
        f"the array as published, in memory, made at every start in {cost[AS_PUBLISHED]} s"
    )


def flags() -> Flags:
    """Return the flags of `bench loader`."""
    found = Flags("bench loader", "measure images per second of training's loader, without a network")
    found.add_word("data", PathText, "the data set's tree")
    found.add_of(LoaderConfig, skip={"data"})
    found.add("--out", PATH, None, "append the result to this file as a JSON line")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mrcn-fast bench loader argv...`: measure, and print the table."""
    values = flags().values(argv)
    out: Path | None = values.pop("out")
    config = LoaderConfig(**values)
    check_alone()
    if out:
        check_file(out, "the result")
    if torch.device(config.device).type != "cpu":
        check_measurable(config.device)
    log_to_console()
    result = measure_loader(config)
    print_speeds(result)
    if out:
        benchmark.write(out, result)
    return 0
