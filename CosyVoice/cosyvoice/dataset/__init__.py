"""Parquet shards of recordings -> batches for training."""
