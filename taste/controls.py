"""Data sets that tell a model something wrong about how a text was spoken: what it gains by listening must go."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from taste.batch import Example
from taste.data import UtteranceDataset

# A Whisper frames, 50 Hz   D channels


class OtherRecording(Dataset[Example]):
    """The utterances of a data set, each with the Whisper features of another one.

    Args:
        dataset: at least two utterances.

    Raises:
        ValueError: there is only one.
    """

    def __init__(self, dataset: UtteranceDataset) -> None:
        if len(dataset) < 2:
            raise ValueError("one utterance cannot hear another one's recording")
        self.dataset = dataset
        self.lengths = dataset.lengths

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        other = self.dataset.utt_ids[(index + len(self) // 2) % len(self)]  # half-way round: often of another speaker
        final, mid = self.dataset.speech(other)
        return self.dataset.without_speech(index)._replace(speech_final=final, speech_mid=mid)


class Silence(Dataset[Example]):
    """The utterances of a data set, each with Whisper features of as much silence.

    Args:
        dataset: the utterances.
        final: Whisper's last features of silence, [A, D], as long as the longest recording.
        mid: a middle layer's, [A, D].
    """

    def __init__(self, dataset: UtteranceDataset, final: Tensor, mid: Tensor) -> None:
        self.dataset, self.final, self.mid = dataset, final, mid
        self.lengths = dataset.lengths

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        example = self.dataset.without_speech(index)
        frames = self.dataset.speech_frames(example.utt_id)
        return example._replace(speech_final=self.final[:frames], speech_mid=self.mid[:frames])


def controls_of(
    dataset: UtteranceDataset,
    score: Callable[[Any], dict[str, float]],
    whisper_dir: str,
    mid_layer: int,
    made_with: Mapping[str, Any] | None = None,
    silence: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Any]:
    """Score a data set with wrong recordings.

    Args:
        dataset: the utterances, with Whisper features.
        score: gives the scores of a data set.
        whisper_dir: Whisper in transformers' format, which listens to silence.
        mid_layer: the layer that the features were taken from.
        made_with: what stage 1 noted about them; silence must be heard by the same Whisper.
        silence: features of it, last layer's and middle layer's, where another Whisper made the data set's.

    Returns:
        `shuffled` and `silenced`: what `score` gave, or why it could not be asked, as text.
    """
    results: dict[str, Any] = {}
    for name, make in (
        ("shuffled", lambda: OtherRecording(dataset)),
        (
            "silenced",
            lambda: Silence(dataset, *silence) if silence else _silence(dataset, whisper_dir, mid_layer, made_with),
        ),
    ):
        try:
            results[name] = score(make())
        except (ValueError, OSError) as error:
            results[name] = f"not measured: {error}"
    return results


def _silence(
    dataset: UtteranceDataset, whisper_dir: str, mid_layer: int, made_with: Mapping[str, Any] | None
) -> Silence:
    from taste.whisper_encoder import SAMPLES_PER_FRAME, WhisperEncoder, check_same_whisper

    frames = max(dataset.speech_frames(utt_id) for utt_id in dataset.utt_ids)
    whisper = WhisperEncoder(whisper_dir, mid_layer, torch.device("cpu"), torch.float32)
    if whisper.width != dataset.speech_width:
        raise ValueError(f"the Whisper in {whisper_dir} is {whisper.width} wide, the features {dataset.speech_width}")
    check_same_whisper(made_with, whisper)
    # whatever a recording's length, Whisper hears it at the head of a window of silence: so this fits all of them
    (features,) = whisper.encode([torch.zeros(frames * SAMPLES_PER_FRAME)])
    return Silence(dataset, features.final.float(), features.mid.float())
