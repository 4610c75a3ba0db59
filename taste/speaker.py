"""Speaker vectors by CAM++ (campplus.onnx)."""

import os

import torch
from torch import Tensor

# N samples, 16 kHz   K kaldi frames, 100 Hz
SPEAKER_WIDTH = 192
THREADS_A_RECORDING = 1  # recordings are embedded side by side


class SpeakerEncoder:
    """Embeds a recording's speaker; may be called from several threads.

    Args:
        onnx_path: campplus.onnx.
        device: "cuda" asks for onnxruntime's CUDA provider; `provider` says what is in use.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is no ONNX model.
    """

    def __init__(self, onnx_path: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        from cosyvoice.utils.onnx_session import OnnxSession

        self._session = OnnxSession(os.fspath(onnx_path), device, threads=THREADS_A_RECORDING)
        self.provider = self._session.provider  # opens it here, once, before threads come

    def embed(self, waveform_16k: Tensor) -> Tensor:
        """Embed one recording.

        Args:
            waveform_16k: [N] float32 at 16 kHz, at least 25 ms.

        Returns:
            [192] float32, not normalised.

        Raises:
            ValueError: the recording is shorter than one analysis window.

        Source: FunAudioLLM/CosyVoice cosyvoice/cli/frontend.py @ ace7c47, _extract_spk_embedding.
        """
        from cosyvoice.utils.audio import speaker_fbank

        frames = speaker_fbank(waveform_16k)[None]
        return torch.from_numpy(self._session.run(frames.cpu().numpy())).flatten().float()
