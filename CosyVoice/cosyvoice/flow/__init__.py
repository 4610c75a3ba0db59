"""Flow matching: S3 tokens to a mel spectrogram."""
