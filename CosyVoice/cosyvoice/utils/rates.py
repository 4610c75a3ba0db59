"""The rates of sound, units and frames, which several modules count in."""

SPEECH_SAMPLE_RATE_HZ = 16_000  # what Whisper, the S3 tokenizer and the speaker encoder hear
S3_UNITS_PER_SECOND = 50
WHISPER_FRAMES_PER_SECOND = 50  # of its encoder's states; its spectrum has twice as many
MEL_SAMPLE_RATE_HZ = 22_050  # of the sound that the 300M models make
MEL_HOP_SAMPLES = 256
MEL_FRAMES_PER_SECOND = MEL_SAMPLE_RATE_HZ / MEL_HOP_SAMPLES
