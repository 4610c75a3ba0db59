"""How alike two voices are."""

import torch
from torch import Tensor

from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ
from taste.listening import SHORTEST_SOUND_SECONDS, resampled
from taste.speaker import SpeakerEncoder

# N samples


def speaker_similarity(encoder: SpeakerEncoder, first: Tensor, second: Tensor, rate_hz: int) -> float:
    """Say how alike two voices are.

    Args:
        encoder: of the model folder.
        first: [N] float, -1..1.
        second: [N'].
        rate_hz: of both.

    Returns:
        the cosine of the speaker vectors; 0 where one of the sounds is too short to have one, or is silent.
    """
    vectors = []
    for waveform in (first, second):
        samples = resampled(waveform, rate_hz)
        if len(samples) < SHORTEST_SOUND_SECONDS * SPEECH_SAMPLE_RATE_HZ or not samples.abs().max() > 0:
            return 0.0
        vectors.append(encoder.embed(samples))
    return float(torch.cosine_similarity(vectors[0], vectors[1], dim=0))
