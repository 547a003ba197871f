"""Synthetic people, and the writers that put them into the trees of the published data sets."""
