"""S3 units back to sound, through CosyVoice's flow and HiFT."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cosyvoice.utils.config import load_config
from cosyvoice.utils.model_dir import CONFIG_FILE, ModelDir, load_part, sizes

# S S3 units, 50 Hz   F mel frames, 86.13 Hz   N samples, 22.05 kHz

LEAST_UNITS = 2  # 40 ms: one unit gives a single mel frame, which is a click


class Speech(NamedTuple):
    """What was made of a row of units."""

    waveform: Tensor  # [N] float32, on the CPU
    mel: Tensor  # [80, F] float32, on the CPU; natural logarithm


class UnitDecoder:
    """Turns S3 units into speech.

    The flow runs in float32 whatever the device: in half precision the released one gives NaN.

    Args:
        model_dir: a model folder in the released layout.
        device: where to compute.

    Raises:
        FileNotFoundError: flow or HiFT is missing from the folder.
    """

    def __init__(self, model_dir: str | Path | ModelDir, device: torch.device) -> None:
        self.device = device
        self.flow = load_part(model_dir, "flow", device)
        self.hift = load_part(model_dir, "hift", device)
        self._mel_spectrogram = load_config(ModelDir(model_dir).file(CONFIG_FILE), ["feat_extractor"])["feat_extractor"]
        model_sizes = sizes(model_dir)
        self.sample_rate_hz = model_sizes.sample_rate
        self.speaker_width = model_sizes.spk_width

    @torch.inference_mode()
    def decode(self, units: Sequence[int], speaker: Tensor | None, seed: int = 0) -> Speech:
        """Speak a row of units.

        Args:
            units: S3 units, 50 Hz, at least LEAST_UNITS of them.
            speaker: speaker vector [D_speaker], float; None speaks with no voice in particular.
            seed: of the noise that the flow starts from and HiFT adds; torch's global generator is left as it was.

        Returns:
            waveform and mel.

        Raises:
            ValueError: there are too few units to make a sound of.
        """
        if len(units) < LEAST_UNITS:
            raise ValueError(f"{len(units)} units make no sound; expected {LEAST_UNITS} or more")
        tokens = torch.tensor([units], dtype=torch.int32, device=self.device)
        if speaker is None:
            speaker = torch.zeros(self.speaker_width)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            mel, _ = self.flow.inference(
                token=tokens,
                token_len=self._length(len(units)),
                prompt_token=tokens[:, :0],
                prompt_token_len=self._length(0),
                prompt_feat=torch.zeros(1, 0, self.flow.output_size, device=self.device),
                prompt_feat_len=self._length(0),
                embedding=speaker.to(self.device)[None],
                flow_cache=None,
            )
            waveform, _ = self.hift.inference(mel)
        return Speech(waveform[0].float().cpu(), mel[0].cpu())

    def mel(self, waveform: Tensor) -> Tensor:
        """The mel spectrogram that the flow was trained on, of a recording.

        Args:
            waveform: [N] float32 at the model's rate.

        Returns:
            [80, F] float32, natural logarithm.
        """
        return self._mel_spectrogram(waveform[None])[0]

    def _length(self, value: int) -> Tensor:
        return torch.tensor([value], dtype=torch.int32, device=self.device)
