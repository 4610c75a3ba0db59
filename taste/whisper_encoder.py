"""Whisper's encoder: one middle layer and the last one, for a batch of recordings."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.utils.abridge import abridge
from cosyvoice.utils.provenance import DIGEST_DIGITS, changed_models, digest
from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ, WHISPER_FRAMES_PER_SECOND
from cosyvoice.utils.state_difference import state_difference
from taste.transformers_folder import read_model_config, weight_files

if TYPE_CHECKING:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as TransformersEncoder

# B batch   N samples, 16 kHz   A Whisper frames, 50 Hz   D channels
SAMPLES_PER_FRAME = SPEECH_SAMPLE_RATE_HZ // WHISPER_FRAMES_PER_SECOND
KEY_PREFIXES = ("model.encoder.", "encoder.")  # of a whole Whisper with its output layer, and without
SHOWN_KEYS = 5


class WhisperFeatures(NamedTuple):
    """What the encoder says about one recording, over its real length only."""

    mid: Tensor  # [A, D] output of block `mid_layer`, not normalised
    final: Tensor  # [A, D] output of the last block, after the last LayerNorm


class WhisperEncoder:
    """The encoder of a Whisper model in transformers' format; the decoder is never read from the disk.

    Every recording is padded with zeros to Whisper's window (30 s), as in Whisper's training, since its log-mel
    spectrum is cut relative to the loudest point of that window.

    Args:
        folder: holds config.json with model.safetensors, or its shards and their index.
        mid_layer: the block to tap, from 1 to one less than there are; `hidden_states[mid_layer]` of transformers.
        device: where to compute; the spectrum is computed there too.
        dtype: of the weights and the computation.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: it is no Whisper, the weights do not fit, or there is no such middle layer.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        mid_layer: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        folder = Path(folder)
        config = _read_config(folder)
        if not 1 <= mid_layer < config.encoder_layers:
            raise ValueError(
                f"MID_LAYER is {mid_layer}, but the Whisper in {folder} has {config.encoder_layers} encoder layers; "
                f"choose 1 to {config.encoder_layers - 1}"
            )
        self.device = torch.device(device)
        self.dtype = dtype
        self.mid_layer = mid_layer
        self.width: int = config.d_model
        self.max_frames: int = config.max_source_positions
        self.window_seconds = self.max_frames / WHISPER_FRAMES_PER_SECOND
        weights, self.digest = _read_encoder_weights(folder, self.device, dtype)
        self.module = _build_encoder(folder, config, weights)
        self._mel_bins: int = config.num_mel_bins
        self._tapped: list[Tensor] = []
        self.module.layers[mid_layer - 1].register_forward_hook(self._tap)

    @torch.inference_mode()
    def encode(self, waveforms: Sequence[Tensor]) -> list[WhisperFeatures]:
        """Encode several recordings in one pass.

        Args:
            waveforms: each [N] float32 at 16 kHz, 1 sample to 30 s.

        Returns:
            for each recording mid and final, [A, D] with A = ceil(N / 320), on the encoder's device and in its dtype.

        Raises:
            ValueError: a recording is empty or longer than Whisper's window.
        """
        window_samples = self.max_frames * SAMPLES_PER_FRAME
        for waveform in waveforms:
            if waveform.dim() != 1 or not 0 < len(waveform) <= window_samples:
                raise ValueError(
                    f"expected waveforms [N] of 1 to {window_samples} samples ({self.window_seconds:g} s at 16 kHz), "
                    f"got {list(waveform.shape)}"
                )
        self._tapped.clear()
        final = self.module(self._spectrum(waveforms, window_samples)).last_hidden_state
        mid = self._tapped.pop()
        lengths = [-(-len(waveform) // SAMPLES_PER_FRAME) for waveform in waveforms]
        return [WhisperFeatures(mid[row, :length], final[row, :length]) for row, length in enumerate(lengths)]

    def _spectrum(self, waveforms: Sequence[Tensor], window_samples: int) -> Tensor:
        """Log-mel spectra of the padded recordings, [B, mel bins, 2 A]."""
        from cosyvoice.utils.audio import whisper_log_mel

        padded = [F.pad(waveform, (0, window_samples - len(waveform))) for waveform in waveforms]
        return whisper_log_mel(torch.stack(padded).to(self.device), self._mel_bins).to(self.dtype)

    def _tap(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        self._tapped.append(output if isinstance(output, Tensor) else output[0])


def encoder_weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The weight files of a Whisper folder: one, or the shards that its index names.

    Args:
        folder: in transformers' format.

    Returns:
        existing files.

    Raises:
        FileNotFoundError: the folder has no safetensors weights, or a shard is missing.
    """
    return weight_files(Path(folder), _fetch(Path(folder)))


def check_same_whisper(made_with: Mapping[str, Any] | None, whisper: WhisperEncoder) -> None:
    """Refuse to listen with another Whisper than features were made with.

    Args:
        made_with: what stage 1 noted about the features; None where nobody did.
        whisper: who is to listen.

    Raises:
        ValueError: its weights or its middle layer differ.
    """
    if changed := changed_models(made_with, {"whisper": whisper.digest, "mid_layer": whisper.mid_layer}):
        raise ValueError(
            f"the model was trained on features of another Whisper ({changed}); "
            "set WHISPER_DIR and MID_LAYER to those of the training features"
        )


def _read_config(folder: Path) -> "WhisperConfig":
    # transformers would take a folder that is not there for the name of a model to download
    content = read_model_config(folder, "Whisper", _fetch(folder))
    from transformers import WhisperConfig

    return WhisperConfig.from_dict(content)


def _build_encoder(folder: Path, config: "WhisperConfig", weights: dict[str, Tensor]) -> "TransformersEncoder":
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as TransformersEncoder

    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        encoder = TransformersEncoder(config)
    problems = state_difference(encoder.state_dict(), weights).phrases()
    if problems:
        shown = abridge(problems, SHOWN_KEYS, "; ")
        raise ValueError(f"the weights in {folder} do not fit its config.json, {len(problems)} keys: {shown}")
    encoder.load_state_dict(weights, assign=True)
    return encoder.eval().requires_grad_(False)


def _read_encoder_weights(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Tensor], str]:
    """The encoder's tensors by their names inside it, and their digest; the files are mapped: nothing else is read."""
    from safetensors import SafetensorError, safe_open

    weights = {}
    digests = []
    for path in encoder_weight_files(folder):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for key in file.keys():
                    prefix = next((prefix for prefix in KEY_PREFIXES if key.startswith(prefix)), None)
                    if prefix is not None:
                        tensor = file.get_tensor(key)
                        digests.append(digest([tensor]))  # of what the file holds, whatever `dtype` is
                        weights[key.removeprefix(prefix)] = tensor.to(device=device, dtype=dtype, copy=True)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: truncated, or no safetensors file ({error}); {_fetch(folder)}") from error
    return weights, hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:DIGEST_DIGITS]


def _fetch(folder: Path) -> str:
    return f"get it with: python setup_cosyvoice.py, or name the right folder instead of {folder}"
