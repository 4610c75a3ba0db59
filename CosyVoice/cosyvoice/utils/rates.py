"""The rates of sound, units and frames, which several modules count in."""

SPEECH_SAMPLE_RATE_HZ = 16_000  # what Whisper, the S3 tokenizer and the speaker encoder hear
S3_UNITS_PER_SECOND = 50
WHISPER_FRAMES_PER_SECOND = 50  # of its encoder's states; its spectrum has twice as many
MEL_FRAMES_PER_SECOND = 22_050 / 256  # sample rate over hop of the 300M models
