"""Turns one batch of utterances into the values that stage 1 stores."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ
from taste.audio import duration_seconds, read_audio
from taste.failures import Failure
from taste.feature_writer import FeatureWriter
from taste.manifest import Utterance
from taste.speaker import SpeakerEncoder
from taste.text import TextTokens, tokenize
from taste.whisper_encoder import WhisperEncoder

# N samples, 16 kHz   T text tokens   A Whisper frames, 50 Hz   D channels


class Models(NamedTuple):
    """Everything that turns an utterance into features."""

    tokenizer: Any
    text_embedding: Tensor  # [V, D_text] float32
    speaker: SpeakerEncoder
    whisper: WhisperEncoder


class Prepared(NamedTuple):
    """One utterance, ready for the encoder."""

    utterance: Utterance
    waveform: Tensor  # [N] float32, 16 kHz
    duration_seconds: float
    text: TextTokens
    speaker: Tensor  # [192] float32


class Outputs(NamedTuple):
    """The three files of one split."""

    text: FeatureWriter
    whisper: FeatureWriter
    info: FeatureWriter

    def done_ids(self) -> set[str]:
        """Utterances that all three files have: a kill can fall between two of them."""
        return self.text.done_ids & self.whisper.done_ids & self.info.done_ids

    def flush(self) -> None:
        """Write what is in memory."""
        for writer in reversed(self):  # utterance info first: it tells what transcript the others are of
            writer.flush()


def prepare(utterance: Utterance, models: Models, max_duration: float) -> Prepared | Failure:
    """Read one utterance; runs in a worker thread.

    Args:
        utterance: line of the manifest.
        models: tokenizer and speaker encoder are used.
        max_duration: in seconds; a longer recording is a failure and is not even decoded.

    Returns:
        the utterance, ready for the encoder, or why it cannot be used.
    """
    try:
        text = tokenize(models.tokenizer, utterance.text)
        _check_duration(duration_seconds(utterance.audio_path), max_duration)
        audio = read_audio(utterance.audio_path, SPEECH_SAMPLE_RATE_HZ)
        _check_duration(audio.duration_seconds, max_duration)  # the header of an mp3 only estimates it
        return Prepared(utterance, audio.waveform, audio.duration_seconds, text, models.speaker.embed(audio.waveform))
    except (ValueError, OSError) as error:  # what a recording or a transcript can cause; anything else is a bug
        return Failure(utterance.utt_id, str(utterance.audio_path), str(error))


def add_batch(batch: Sequence[Prepared], models: Models, outputs: Outputs, dtype: torch.dtype) -> list[Failure]:
    """Encode a batch and hand its features to the writers.

    Args:
        batch: utterances that could be read, perhaps none.
        models: text embedding and Whisper are used.
        outputs: where the features go; a file that has an utterance already keeps what it has.
        dtype: of the stored Whisper features.

    Returns:
        the utterances whose features do not fit into `dtype`.
    """
    if not batch:
        return []
    failures = []
    encoded = models.whisper.encode([item.waveform for item in batch])
    for item, features in zip(batch, encoded, strict=True):
        utterance = item.utterance
        whisper = {"mid": features.mid.to(dtype), "final": features.final.to(dtype)}
        if not all(part.isfinite().all() for part in whisper.values()):
            reason = f"its Whisper features are not finite in {dtype}; try --encoder-dtype and --feature-dtype float32"
            failures.append(Failure(utterance.utt_id, str(utterance.audio_path), reason))
            continue
        tokens = torch.tensor(item.text.tokens)
        info = {
            "text": utterance.text,
            "text_token": tokens,
            "word_id": torch.tensor(item.text.word_ids),
            "spk_embedding": item.speaker,
            "duration_s": item.duration_seconds,
            "audio_path": str(utterance.audio_path),
        }
        info |= {
            name: value
            for name, value in (("speaker", utterance.speaker), ("language", utterance.language))
            if value is not None
        }
        values = (models.text_embedding[tokens], whisper, info)
        for writer, value in zip(outputs, values, strict=True):
            if utterance.utt_id not in writer.done_ids:
                writer.add(utterance.utt_id, value)
    return failures


def _check_duration(seconds: float, max_duration: float) -> None:
    if seconds > max_duration:
        raise ValueError(f"lasts {seconds:.3f} s, over MAX_DURATION ({max_duration:g} s)")
