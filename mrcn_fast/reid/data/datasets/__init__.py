"""The published data sets: readers of their trees, one module per data set, and opening one by name."""
