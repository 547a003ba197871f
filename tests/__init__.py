"""Tests of the core; `tests.cases` draws the problems and holds the tolerance rule."""
