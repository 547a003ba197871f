"""Tests of the package: a module per subject; `tests.support` holds what several of them share."""
