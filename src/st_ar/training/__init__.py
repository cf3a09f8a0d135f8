"""Training: the loop, the optimizer and its schedule, checkpoints, the log."""
