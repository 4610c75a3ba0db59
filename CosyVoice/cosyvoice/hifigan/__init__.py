"""Vocoder: a mel spectrogram to a waveform."""
