"""The tiny data sets and runs of the re-identification tests."""

from tests.reid.conftest import finished, resnet18, tiny_config, tiny_llcm, tiny_regdb, tiny_run, tiny_tree

__all__ = ["finished", "resnet18", "tiny_config", "tiny_llcm", "tiny_regdb", "tiny_run", "tiny_tree"]
