"""The kernels' Python side: each module offers the same operations for the tensors it serves."""
