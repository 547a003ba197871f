"""Former names of modules can be imported, and a warning gives the present name."""

from __future__ import annotations

import importlib
import sys

import pytest

from mrcn_fast.reid.data import checks, types
from mrcn_fast.reid.moved import MOVED

# Modules whose names are packages now, with what was documented in them.
PACKAGES = {
    "data.datasets": ["DATASETS", "is_whole", "open_dataset", "recognize"],
    "data.synthetic": ["WRITERS", "write_llcm", "write_regdb", "write_sysu"],
    "evaluation": ["PROTOCOLS", "Scores", "average", "score", "skipped_images"],
    "training": ["Trainer", "TrainingError"],
}


@pytest.mark.parametrize("former", MOVED)
def test_a_module_is_found_by_its_former_name(former: str, monkeypatch: pytest.MonkeyPatch) -> None:
    present = importlib.import_module(f"mrcn_fast.reid.{MOVED[former]}")
    monkeypatch.delitem(sys.modules, f"mrcn_fast.reid.{former}", raising=False)
    spec = present.__spec__
    with pytest.warns(DeprecationWarning, match=f"is {present.__name__} now") as warned:
        assert importlib.import_module(f"mrcn_fast.reid.{former}") is present
    assert present.__spec__ is spec
    assert len(warned) == 1


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_the_names_of_the_module_before_it(package: str) -> None:
    module = importlib.import_module(f"mrcn_fast.reid.{package}")
    assert sorted(module.__all__) == sorted(PACKAGES[package])
    assert all(getattr(module, name) is not None for name in PACKAGES[package])
    assert not hasattr(module, "nonsense")


def test_a_moved_function_is_found_at_its_former_place() -> None:
    with pytest.warns(DeprecationWarning, match=r"is mrcn_fast\.reid\.data\.checks\.pair_modalities now"):
        assert types.pair_modalities is checks.pair_modalities
    assert not hasattr(types, "nonsense")


def test_an_unknown_module_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"mrcn_fast\.reid\.nonsense"):
        importlib.import_module("mrcn_fast.reid.nonsense")
