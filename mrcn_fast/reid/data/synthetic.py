"""Synthetic data sets in the trees of the published ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def write_sysu(
    root: str | Path,
    *,
    identities: int = 60,
    test_identities: int = 20,
    images_per_camera: int = 6,
    image_size: tuple[int, int] = (128, 64),
    seed: int = 0,
    modality_gap: float = 1.0,
    camera_style: float = 1.0,
    pose_spread: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a synthetic data set in SYSU-MM01's tree."""
    raise RuntimeError("the renderer follows")
