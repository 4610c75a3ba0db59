"""The utterances of a data set as a released TASTE reads them: with its own tokens, text embeddings and Whisper."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cosyvoice.utils.abridge import abridge
from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ, WHISPER_FRAMES_PER_SECOND
from taste.audio import read_audio
from taste.data import UtteranceDataset
from taste.feature_set import Features
from taste.official import OfficialTaste, tokenize
from taste.unit_sequence import EXTRA_POSITIONS
from taste.utterance_selection import Selection
from taste.whisper_encoder import SAMPLES_PER_FRAME

# A Whisper frames, 50 Hz   D channels

NEEDED = ("text", "audio_path")  # of utt2info
SHOWN_IDS = 3


class ReleasedDataset(UtteranceDataset):
    """Utterances whose units, texts, speakers and recordings are known; all else is computed when it is asked for.

    What stage 1 wrote of the text and of the recording is not looked at: a released TASTE puts a space before the first
    word, has text embeddings of its own, and looks at the silence that fills up Whisper's window.

    Args:
        taste: the released model, on its device.
        features: `units` and `info`, whose `text_token` and `word_id` are those of the released model.
        selection: ids and lengths of the utterances.
    """

    def __init__(self, taste: OfficialTaste, features: Features, selection: Selection) -> None:
        super().__init__(features, selection)
        self.taste = taste

    @classmethod
    def of(cls, dataset: UtteranceDataset, taste: OfficialTaste, tokenizer: Any) -> "ReleasedDataset":
        """Take the utterances of a data set.

        Args:
            dataset: units, and what stage 1 noted about each utterance.
            taste: the released model, on its device.
            tokenizer: of the model folder.

        Returns:
            the same utterances in the same order.

        Raises:
            ValueError: the text or the recording of an utterance was not noted.
        """
        lacking = [utt_id for utt_id in dataset.utt_ids if not all(dataset.info(utt_id).get(name) for name in NEEDED)]
        if lacking:
            raise ValueError(
                f"a released TASTE reads texts and hears recordings, and {len(lacking)} of {len(dataset)} utterances "
                f"have no {' or no '.join(NEEDED)} in their utt2info file: {abridge(lacking, SHOWN_IDS)}. Make it "
                "again: python utt2text_and_feature.py --model-dir <folder> --jsonl <manifest>"
            )
        info, lengths = {}, []
        for utt_id in dataset.utt_ids:
            own = dict(dataset.info(utt_id))
            text = tokenize(tokenizer, own["text"])
            info[utt_id] = own | {"text_token": text.tokens, "word_id": text.word_ids}
            lengths.append(len(text.tokens) + len(dataset.features.units[utt_id]) + EXTRA_POSITIONS)
        selection = Selection(list(dataset.utt_ids), lengths, with_words=True)
        return cls(taste, replace(dataset.features, speech=None, info=info), selection)

    @property
    def has_speech(self) -> bool:
        """Whether each utterance has Whisper features: they are computed."""
        return True

    def text_embedding(self, utt_id: str) -> Tensor:
        """The released model's own embeddings of its tokens of a text.

        Args:
            utt_id: its id.

        Returns:
            [T, D_text] float32.
        """
        table = self.taste.model.llm.text_embedding.weight
        return table[self._of_tokens(utt_id, "text_token").to(table.device)].detach().cpu()

    def speech(self, utt_id: str) -> tuple[Tensor, Tensor]:
        """Listen to the recording of an utterance.

        Args:
            utt_id: its id.

        Returns:
            the last layer's and the middle layer's features of Whisper's whole window, both [A, D] float32.

        Raises:
            ValueError: the recording cannot be read, is empty or too long.
        """
        return self.hear(read_audio(self.info(utt_id)["audio_path"], SPEECH_SAMPLE_RATE_HZ).waveform)

    @torch.inference_mode()
    def hear(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """What the released Whisper says about a recording.

        Args:
            waveform: [N] float32 at 16 kHz.

        Returns:
            as `speech`.

        Raises:
            ValueError: it is empty or too long.
        """
        device = self.taste.model.llm.llm_embedding.weight.device
        with torch.autocast(device.type, enabled=False):  # whoever asks may be computing in half precision
            final, mid = self.taste.listen(waveform)
        return final[0].cpu(), mid[0].cpu()

    def silence(self) -> tuple[Tensor, Tensor]:
        """What it says about silence.

        Returns:
            as `speech`.
        """
        return self.hear(torch.zeros(self.taste.window_samples))

    @property
    def speech_width(self) -> int:
        """Channels of the Whisper features."""
        return self.taste.whisper.config.d_model

    def speech_frames(self, utt_id: str) -> int:
        """How many Whisper frames an utterance has: those of the whole window.

        Args:
            utt_id: without effect.

        Returns:
            frames, 50 a second.
        """
        return self.taste.window_samples // SAMPLES_PER_FRAME

    def recording_frames(self, utt_id: str) -> int:
        """How many of the Whisper frames are the recording, and not silence behind it.

        Args:
            utt_id: its id.

        Returns:
            frames, 50 a second.
        """
        seconds = self.duration_seconds(utt_id)
        frames = len(self.features.units[utt_id]) if seconds is None else math.ceil(seconds * WHISPER_FRAMES_PER_SECOND)
        return max(1, min(frames, self.speech_frames(utt_id)))

    def subset(self, indices: Sequence[int]) -> "ReleasedDataset":
        """Some of the utterances.

        Args:
            indices: their numbers.

        Returns:
            a data set over the same files.
        """
        return ReleasedDataset(self.taste, self.features, super().subset(indices).selection)
