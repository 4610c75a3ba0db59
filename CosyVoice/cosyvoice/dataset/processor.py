"""The steps that the configuration's data_pipeline chains: each takes an iterator of utterances and gives one.

Axes: N samples  F mel frames, 86.13 Hz  B batch.

Steps after which an utterance depends on the epoch (truncate) or stands in a batch (shuffle, sort, batch, padding) are
in `batching`; all of them are reached through this module, by the published names.

Source of names, arguments and defaults: FunAudioLLM/CosyVoice cosyvoice/dataset/processor.py @ ace7c47.
"""

from __future__ import annotations

import functools
import io
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor

from cosyvoice.dataset.batching import batch, padding, shuffle, sort, truncate
from cosyvoice.dataset.pitch import pitch
from cosyvoice.dataset.sample import (
    REMAKE_EMBEDDINGS,
    REMAKE_SHARDS,
    REMAKE_TOKENS,
    DataError,
    Sample,
    utterance_error,
)
from cosyvoice.utils.audio import resampling_rates
from cosyvoice.utils.rates import S3_UNITS_PER_SECOND

log = logging.getLogger(__name__)

__all__ = [
    "batch",
    "compute_f0",
    "compute_fbank",
    "filter",
    "frames_of_tokens",
    "padding",
    "parquet_opener",
    "parse_embedding",
    "resample",
    "shuffle",
    "sort",
    "tokenize",
    "truncate",
]

REQUIRED_COLUMNS = ("utt", "audio_data", "text", "utt_embedding", "spk_embedding", "speech_token")
ROWS_AT_ONCE = 64
LENGTH_UNITS_PER_SECOND = 100  # max_length and min_length count 10 ms
S3_CODES = 4096
TOKEN_SLACK_SECONDS = 0.1  # tokens and sound may differ by this much, and by TOKEN_SLACK_SHARE of the sound
TOKEN_SLACK_SHARE = 0.02
MOST_MISTAKEN, MOST_MISTAKEN_SHARE = 10, 0.1  # of a shard (each epoch judges alike); more than both is no accident
MOST_WITHOUT_SHARE = 0.5  # of a shard may have no speech tokens, as recordings over 30 s in published ones
NO_TOKENS, ANOTHER_LENGTH = "no speech tokens", "speech tokens of another length"  # reasons to drop an utterance


def parquet_opener(data: Iterable[Sample], mode: str = "train") -> Iterator[Sample]:
    """Read the rows of Parquet shards.

    Args:
        data: `{"src": path of a shard}` and whatever else its utterances should carry.
        mode: not used.

    Yields:
        one dict a row: the shard's columns beside what `data` gave.

    Raises:
        DataError: a shard is missing, truncated, corrupt or lacks a column.
    """
    for shard in data:
        path = shard["src"]
        if not Path(path).is_file():
            raise DataError(f"{path}: data.list names this shard, and there is no such file; {REMAKE_SHARDS}")
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                absent = [name for name in REQUIRED_COLUMNS if name not in file.schema_arrow.names]
                if absent:
                    next_step = REMAKE_TOKENS if absent == ["speech_token"] else REMAKE_EMBEDDINGS
                    raise DataError(f"{path}: the shard has no column {', '.join(absent)}; {next_step}")
                for rows in file.iter_batches(batch_size=ROWS_AT_ONCE):
                    for row in rows.to_pylist():
                        yield {**shard, **row}
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: no readable Parquet shard, truncated or corrupt ({error}); {REMAKE_SHARDS}"
            ) from error


def tokenize(
    data: Iterable[Sample], get_tokenizer: Callable[[], Any], allowed_special: str | set[str], mode: str = "train"
) -> Iterator[Sample]:
    """Turn `text` into `text_token`, a list of ids.

    Args:
        data: utterances.
        get_tokenizer: gives an object with `encode(text, allowed_special=...)`.
        allowed_special: special tokens that may stand in a text.
        mode: not used.

    Yields:
        the utterances.
    """
    tokenizer = get_tokenizer()
    for sample in data:
        sample["text_token"] = tokenizer.encode(sample["text"], allowed_special=allowed_special)
        yield sample


def filter(  # the published name
    data: Iterable[Sample],
    max_length: int = 10240,
    min_length: int = 10,
    token_max_length: int = 200,
    token_min_length: int = 1,
    min_output_input_ratio: float = 0.0005,
    max_output_input_ratio: float = 1,
    mode: str = "train",
    speech_token_size: int = S3_CODES,
    dropped: Counter[str] | None = None,
) -> Iterator[Sample]:
    """Decode `audio_data` into `speech` and `sample_rate`, check the speech tokens, and drop what is too long or short.

    Without speech tokens are recordings over 30 s in published shards; they are dropped too, as published.

    Args:
        data: utterances with `text_token`.
        max_length: longest sound kept, in 10 ms.
        min_length: shortest sound kept, in 10 ms.
        token_max_length: most text tokens kept.
        token_min_length: fewest text tokens kept.
        min_output_input_ratio: fewest text tokens for 10 ms of sound.
        max_output_input_ratio: most text tokens for 10 ms of sound.
        mode: not used.
        speech_token_size: S3 codes; every token is below.
        dropped: counts, by reason, what is dropped.

    Yields:
        the utterances kept, `speech` [1, N] float32, channels averaged.

    Raises:
        DataError: sound that cannot be decoded, speech tokens out of range, or over 10, and over half, of a shard
            without any.
    """
    dropped = Counter() if dropped is None else dropped
    for sample in _with_speech_tokens(data, speech_token_size, dropped):
        sample["speech"], sample["sample_rate"] = _decoded(sample)
        del sample["audio_data"]
        length = sample["speech"].size(1) / sample["sample_rate"] * LENGTH_UNITS_PER_SECOND
        tokens = len(sample["text_token"])
        if length > max_length:
            dropped[f"sound over {max_length / LENGTH_UNITS_PER_SECOND:g} s"] += 1
        elif length < min_length:
            dropped[f"sound under {min_length / LENGTH_UNITS_PER_SECOND:g} s"] += 1
        elif tokens > token_max_length:
            dropped[f"over {token_max_length} text tokens"] += 1
        elif tokens < token_min_length:
            dropped[f"under {token_min_length} text tokens"] += 1
        elif tokens < min_output_input_ratio * length:
            dropped["too little text for the sound"] += 1
        elif tokens > max_output_input_ratio * length:
            dropped["too much text for the sound"] += 1
        else:
            yield sample


def frames_of_tokens(
    data: Iterable[Sample], sample_rate: int, hop_size: int, mode: str = "train", dropped: Counter[str] | None = None
) -> Iterator[Sample]:
    """Stand in for filter, resample and compute_fbank where only the language model learns, which hears no sound.

    Decoding and mels take most of the first epoch. What is left of them is their length, by which utterances are
    sorted and batched; it follows from the number of speech tokens. Only what has none is dropped.

    Args:
        data: utterances with `text_token`.
        sample_rate: of the sound that the mel would be made from, Hz.
        hop_size: samples from one mel frame to the next.
        mode: not used.
        dropped: counts what is dropped.

    Yields:
        the utterances without `audio_data`, with `speech_feat` [F, 0].

    Raises:
        DataError: speech tokens are out of range, or over 10, and over half, of a shard have none.
    """
    frames_per_token = sample_rate / hop_size / S3_UNITS_PER_SECOND
    for sample in _with_speech_tokens(data, S3_CODES, Counter() if dropped is None else dropped):
        del sample["audio_data"]
        sample["speech_feat"] = torch.empty(round(len(sample["speech_token"]) * frames_per_token), 0)
        yield sample


def resample(
    data: Iterable[Sample],
    resample_rate: int = 22050,
    min_sample_rate: int = 16000,
    mode: str = "train",
    dropped: Counter[str] | None = None,
) -> Iterator[Sample]:
    """Bring `speech` to the model's rate, and below full scale where it is over.

    Args:
        data: utterances with `speech` and `sample_rate`.
        resample_rate: wanted, Hz.
        min_sample_rate: lowest rate kept, unless it is the wanted one, Hz.
        mode: not used.
        dropped: counts what is dropped.

    Yields:
        the utterances.
    """
    dropped = Counter() if dropped is None else dropped
    for sample in data:
        rate = sample["sample_rate"]
        if rate != resample_rate:
            if rate < min_sample_rate:
                dropped[f"sample rate under {min_sample_rate} Hz"] += 1
                continue
            sample["speech"] = _resampler(rate, resample_rate)(sample["speech"])
            sample["sample_rate"] = resample_rate
        peak = sample["speech"].abs().max()
        if peak > 1:
            sample["speech"] = sample["speech"] / peak
        yield sample


def compute_fbank(
    data: Iterable[Sample],
    feat_extractor: Callable[[Tensor], Tensor],
    num_frames: int = -1,
    mode: str = "train",
    dropped: Counter[str] | None = None,
) -> Iterator[Sample]:
    """Compute `speech_feat`, the log-mel that flow learns to make, and hold its length against the speech tokens.

    The flow stretches its tokens to whatever number of frames the mel has (as published), so a token file of another
    recording would train without complaint; here such an utterance is dropped, and many of one shard are an error. A
    crop has no tokens of its own and is not checked.

    Args:
        data: utterances with `speech` [1, N].
        feat_extractor: waveforms [1, N] -> [1, 80, F].
        num_frames: pad the sound to a multiple of so many samples first; -1 does not (CosyVoice-300M).
        mode: not used.
        dropped: counts what is dropped; the first one (of each shard, where shards are kept) is named in a warning.

    Yields:
        the utterances with `speech_feat` [F, 80], float32.

    Raises:
        DataError: at the end of a shard of which over 10, and over a tenth, have speech tokens that last clearly longer
            or shorter than the sound.
    """
    for sample in _with_tokens_of_its_length(data, Counter() if dropped is None else dropped):
        if num_frames != -1:
            sample["speech"] = F.pad(sample["speech"], (0, -sample["speech"].size(1) % num_frames))
        sample["speech_feat"] = feat_extractor(sample["speech"]).squeeze(0).T.contiguous()
        yield sample


def compute_f0(data: Iterable[Sample], sample_rate: int, hop_size: int, mode: str = "train") -> Iterator[Sample]:
    """Compute `pitch_feat` [F] in Hz, float32, one value a frame of `speech_feat`, 0 where there is no voice.

    Args:
        data: utterances with `speech` and `speech_feat`.
        sample_rate: of `speech`, Hz.
        hop_size: samples between frames.
        mode: not used.

    Yields:
        the utterances.

    Raises:
        ValueError: the sound has another rate than the configuration says.

    Source: the published step calls WORLD's harvest; see `cosyvoice.dataset.pitch` for what is used here.
    """
    for sample in data:
        if sample["sample_rate"] != sample_rate:
            raise ValueError(f"compute_f0 has sample_rate {sample_rate} and got sound of {sample['sample_rate']} Hz")
        f0 = pitch(sample["speech"].squeeze(0), sample_rate, hop_size)
        frames = sample["speech_feat"].size(0)
        sample["pitch_feat"] = F.pad(f0, (0, max(0, frames - f0.numel())))[:frames]
        yield sample


def parse_embedding(
    data: Iterable[Sample], normalize: bool, mode: str = "train", spk_embed_dim: int = 192
) -> Iterator[Sample]:
    """Turn `utt_embedding` and `spk_embedding` into tensors [spk_embed_dim], float32.

    Args:
        data: utterances.
        normalize: scale both to length 1.
        mode: not used.
        spk_embed_dim: values expected.

    Yields:
        the utterances.

    Raises:
        DataError: an embedding is missing, has another size, or holds no numbers.
    """
    for sample in data:
        for name in ("utt_embedding", "spk_embedding"):
            values = sample.get(name)
            size = 0 if values is None else len(values)
            if size != spk_embed_dim:
                raise utterance_error(sample, f"{name} has {size} values, expected {spk_embed_dim}", REMAKE_EMBEDDINGS)
            vector = torch.tensor(values, dtype=torch.float32)
            if not torch.isfinite(vector).all() or not vector.any():
                raise utterance_error(sample, f"{name} holds only zeros, or no finite numbers", REMAKE_EMBEDDINGS)
            sample[name] = F.normalize(vector, dim=0) if normalize else vector
        yield sample


def _with_speech_tokens(data: Iterable[Sample], codes: int, dropped: Counter[str]) -> Iterator[Sample]:
    """The utterances with speech tokens, as an array; ids that are none of `codes`, and too many without, raise."""
    for shard, samples in itertools.groupby(data, key=lambda sample: sample.get("src")):
        seen = without = 0
        for sample in samples:
            seen += 1
            tokens = sample.get("speech_token")
            if tokens is None or len(tokens) == 0:
                without += 1
                dropped[NO_TOKENS] += 1
                continue
            tokens = np.asarray(tokens)
            if tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= codes:
                problem = f"speech tokens run from {tokens.min()} to {tokens.max()}, expected integers 0..{codes - 1}"
                raise utterance_error(sample, problem, REMAKE_TOKENS)
            sample["speech_token"] = tokens
            yield sample
        if without > max(MOST_MISTAKEN, MOST_WITHOUT_SHARE * seen):
            raise DataError(f"{shard}: {without} of {seen} utterances have {NO_TOKENS}; {REMAKE_TOKENS}")


def _with_tokens_of_its_length(data: Iterable[Sample], dropped: Counter[str]) -> Iterator[Sample]:
    """The utterances whose speech tokens last as long as their sound; too many others of one shard are an error."""
    for shard, samples in itertools.groupby(data, key=lambda sample: sample.get("src")):
        seen, mistaken = 0, []
        for sample in samples:
            seen += 1
            mistake = None if sample.get("is_crop", False) else _mistaken_duration(sample)
            if mistake is None:
                yield sample
                continue
            if not dropped[ANOTHER_LENGTH]:
                log.warning("left out, as are others like it, which are counted: %s", mistake)
            dropped[ANOTHER_LENGTH] += 1
            mistaken.append(mistake)
        if len(mistaken) > max(MOST_MISTAKEN, MOST_MISTAKEN_SHARE * seen):
            raise DataError(
                f"{shard}: {len(mistaken)} of {seen} utterances have {ANOTHER_LENGTH} than their sound, which is no "
                f"accident; the first: {mistaken[0]}"
            )


def _mistaken_duration(sample: Sample) -> DataError | None:
    """What is wrong where speech tokens and sound differ in length."""
    sound_seconds = sample["speech"].size(1) / sample["sample_rate"]
    token_seconds = len(sample["speech_token"]) / S3_UNITS_PER_SECOND
    if abs(sound_seconds - token_seconds) <= TOKEN_SLACK_SECONDS + TOKEN_SLACK_SHARE * sound_seconds:
        return None
    problem = (
        f"its {len(sample['speech_token'])} speech tokens last {token_seconds:.2f} s and its sound "
        f"{sound_seconds:.2f} s, so they were made from another recording"
    )
    return utterance_error(sample, problem, REMAKE_TOKENS)


def _decoded(sample: Sample) -> tuple[Tensor, int]:
    """Decode a wav, flac, ogg or mp3 in memory: [1, N] float32 and its rate in Hz."""
    try:
        samples, rate = soundfile.read(io.BytesIO(sample["audio_data"] or b""), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        problem = f"its sound cannot be decoded ({error})"
        raise utterance_error(
            sample, problem, f"repair {sample.get('wav', 'the recording')}, then {REMAKE_SHARDS}"
        ) from error
    if len(samples) == 0 or not np.isfinite(samples).all():
        problem = f"its sound has {len(samples)} samples; expected at least one, all of them finite"
        raise utterance_error(sample, problem, f"repair {sample.get('wav', 'the recording')}, then {REMAKE_SHARDS}")
    return torch.from_numpy(samples).mean(dim=1).unsqueeze(0), rate


@functools.lru_cache(maxsize=16)
def _resampler(rate: int, wanted: int) -> torchaudio.transforms.Resample:
    orig_freq, new_freq = resampling_rates(rate, wanted)
    return torchaudio.transforms.Resample(orig_freq, new_freq)
