"""Tests of the core; `tests.support.cases` draws the problems and holds the tolerance rule."""
