"""Training: the trainer, checkpoints, optimiser, processes, progress."""
