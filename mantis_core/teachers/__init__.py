"""Teachers: uncompressed networks as rows of blocks, their weights, the frozen one at work."""
