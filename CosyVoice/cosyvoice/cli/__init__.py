"""The published command line of CosyVoice: `CosyVoice(model_dir)` and its two halves."""
