"""What travels through the data pipeline, and how its errors name it."""

from __future__ import annotations

from typing import Any

# One utterance. From the shard: src, utt, audio_data, wav, text, spk, utt_embedding, spk_embedding, speech_token.
# Added on the way: text_token, speech [1, N], sample_rate, speech_feat [F, 80], pitch_feat [F].
Sample = dict[str, Any]

# what a user does about a shard that cannot be used
REMAKE_SHARDS = "make the shards again (stage 3: tools/make_parquet_list.py keeps the good ones)"
REMAKE_TOKENS = "extract its speech tokens (stage 2: tools/extract_speech_token.py), then " + REMAKE_SHARDS
REMAKE_EMBEDDINGS = "extract its embeddings (stage 1: tools/extract_embedding.py), then " + REMAKE_SHARDS


class DataError(ValueError):
    """Training data that cannot be used; the message names the file, the utterance and the next command."""


def utterance_error(sample: Sample, problem: str, next_step: str) -> DataError:
    """Make the error of one utterance.

    Args:
        sample: the utterance.
        problem: what is wrong and what was expected.
        next_step: what to do about it.

    Returns:
        the error, to be raised by the caller.
    """
    return DataError(f"{sample.get('src', '?')}: utterance {sample.get('utt', '?')!r}: {problem}; {next_step}")
