"""What the examples share: options, data, the training loop with its checkpoints, and pictures."""
