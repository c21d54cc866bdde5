"""The training loop, and a file for each stage's loss."""
