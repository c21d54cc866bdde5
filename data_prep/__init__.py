"""Bytes and labels: from image files to Parquet shards to batches. Knows no model."""
