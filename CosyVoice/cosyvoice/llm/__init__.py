"""The language model that writes S3 tokens from text."""
