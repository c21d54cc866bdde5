"""The pipeline: one file for each stage, and the order they run in."""
