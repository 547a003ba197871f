"""Training: batches, losses, optimiser, the loop of a run, and what a run keeps on disk."""
