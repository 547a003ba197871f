"""What `mrcn-fast bench` measures: kernels and their baselines, the training step, the scorer, the loader."""
