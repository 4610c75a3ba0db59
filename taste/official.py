"""Opens what the authors of TASTE released, and computes what their code computes (the preset `official`)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cosyvoice.utils.abridge import abridge
from cosyvoice.utils.state_difference import state_difference
from taste.batch import Batch
from taste.model import CosyVoiceS3Model
from taste.official_names import rename
from taste.official_preset import WHISPER_DEFAULT_HEADS, build_official_model, build_whisper, look_up
from taste.text import TextTokens
from taste.transformers_folder import read_model_config, weight_files
from taste.whisper_encoder import SAMPLES_PER_FRAME
from taste.words import word_spans

if TYPE_CHECKING:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

# B batch   T text tokens   W words   N samples, 16 kHz   A Whisper frames, 50 Hz   Q codes a word   D channels

MODEL_NAME = "TASTE"
DEFAULT_MID_LAYER = 6  # where the file names none
SHOWN_NAMES = 5  # weights a message lists before it only counts


class OfficialTaste(nn.Module):
    """The released tokenizer: Whisper's encoder, and a `taste` model under the preset `official`.

    Args:
        whisper: transformers' Whisper encoder.
        model: the model.
        mid_layer: the encoder's layer whose output the values are made of.
    """

    def __init__(self, whisper: "WhisperEncoder", model: CosyVoiceS3Model, mid_layer: int) -> None:
        super().__init__()
        self.whisper = whisper
        self.model = model
        self.mid_layer = mid_layer

    def hear(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Run Whisper's encoder; nothing is cut off, since the published attention reads the padding too.

        Args:
            mel: log-mel spectra, [B, bins, frames at 100 Hz], float; shorter ones than Whisper's window are filled up
                with zeros, as published.

        Returns:
            the last layer after its LayerNorm and the middle layer, [B, A, D] each, A that of Whisper's window.

        Raises:
            ValueError: the spectra are longer than Whisper's window.
        """
        frames = 2 * self.whisper.config.max_source_positions
        if mel.shape[-1] > frames:
            raise ValueError(f"spectra of {mel.shape[-1]} frames, Whisper's window has {frames}; cut the recording")
        tapped: list[Tensor] = []
        hook = self.whisper.layers[self.mid_layer - 1].register_forward_hook(
            lambda _, __, output: tapped.append(output if isinstance(output, Tensor) else output[0])
        )
        try:
            final = self.whisper(nn.functional.pad(mel, (0, frames - mel.shape[-1]))).last_hidden_state
        finally:
            hook.remove()
        return final, tapped[0]

    def listen(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """Run Whisper's encoder on a recording and the silence that fills up its window.

        Args:
            waveform: the recording, [N] float32 at 16 kHz.

        Returns:
            as for `hear`, [1, A, D] each, on the model's device.

        Raises:
            ValueError: the recording is empty or longer than Whisper's window.
        """
        return self.hear(self._spectrum(waveform.to(self.model.llm.llm_embedding.weight.device)))

    @property
    def window_samples(self) -> int:
        """Length of Whisper's window, at 16 kHz."""
        return self.whisper.config.max_source_positions * SAMPLES_PER_FRAME

    def batch(
        self,
        text: TextTokens,
        *,
        waveform: Tensor | None = None,
        codes: Tensor | None = None,
        speaker: Tensor | None = None,
    ) -> Batch:
        """One utterance as the model reads it, to be encoded or decoded.

        Args:
            text: tokens and words of the transcript, as `tokenize` gives them.
            waveform: the recording, [N] float32 at 16 kHz; or
            codes: what it was encoded to, [W, Q] int64.
            speaker: [D_speaker] float32, needed to decode.

        Returns:
            a batch of one, on the model's device.

        Raises:
            ValueError: the recording is longer than Whisper's window, or the codes are not one row a word.
        """
        device = self.model.llm.llm_embedding.weight.device
        tokens, word_ids = torch.tensor(text.tokens, device=device), torch.tensor(text.word_ids, device=device)
        length = torch.tensor([len(tokens)], device=device)
        final = mid = None
        if waveform is not None:
            final, mid = self.listen(waveform)
        return Batch(
            utt_ids=("",),
            text=self.model.llm.text_embedding(tokens)[None],
            text_lengths=length,
            speech_final=final,
            speech_mid=mid,
            speech_lengths=None if final is None else length.new_tensor([final.shape[1]]),
            speaker=None if speaker is None else speaker.to(device)[None],
            units=length.new_zeros(1, 0),
            unit_lengths=length.new_zeros(1),
            text_tokens=tokens[None],
            word_ids=word_ids[None],
            codes=None if codes is None else _spread(codes.to(device), word_ids)[None],
        )

    def _spectrum(self, waveform: Tensor) -> Tensor:
        from cosyvoice.utils.audio import whisper_log_mel

        window = self.window_samples
        if waveform.dim() != 1 or not 0 < len(waveform) <= window:
            raise ValueError(
                f"expected a recording [N] of 1 to {window} samples at 16 kHz, got {list(waveform.shape)}; split it"
            )
        padded = nn.functional.pad(waveform, (0, window - len(waveform)))
        return whisper_log_mel(padded[None], self.whisper.config.num_mel_bins)


def tokenize(tokenizer: Any, text: str) -> TextTokens:
    """Encode a transcript as the published code does: each word with a space before it, the first one too.

    Args:
        tokenizer: openai-whisper's.
        text: the transcript; words are what white space separates.

    Returns:
        tokens and word numbers.

    Raises:
        ValueError: the transcript is empty.
    """
    words = text.split()
    if not words:
        raise ValueError("the transcript is empty")
    tokens = [tokenizer.encode(f" {word}", allowed_special=set(), disallowed_special=()) for word in words]
    return TextTokens(
        [token for word in tokens for token in word],
        [number for number, word in enumerate(tokens) for _ in word],
    )


def load_taste_checkpoint(folder: str | os.PathLike[str]) -> OfficialTaste:
    """Open a released TASTE folder, strictly: every weight must be known and fit.

    Sizes come from the weights, everything else from config.json. The spoken LM's weights are not read.

    Args:
        folder: holds config.json with model.safetensors, or its shards and their index.

    Returns:
        the model in eval mode, float32, on the CPU.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: it is no TASTE folder, asks for what is not implemented, or its weights are not those expected.
    """
    folder = Path(folder)
    config = read_model_config(folder, MODEL_NAME, _fetch(folder))
    weights = _read_weights(folder)
    taste = build_official({name: list(value.shape) for name, value in weights.items()}, config)
    _check_fit(taste, weights, folder)
    taste.load_state_dict(weights, assign=True)  # Whisper's have no memory of their own yet
    return taste.eval()


def build_official(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> OfficialTaste:
    """Build what weights of these shapes belong to.

    Args:
        shapes: our name -> shape.
        config: the released config.json.

    Returns:
        the tokenizer; its weights are random, and Whisper's have no memory yet.

    Raises:
        ValueError: the configuration asks for what is not implemented, or a weight is missing that sizes come from.
    """
    model = build_official_model(shapes, config)
    whisper = build_whisper(shapes, look_up(config, "asr_config.encoder_attention_heads", WHISPER_DEFAULT_HEADS))
    mid_layer = look_up(config, "audio_tower_config.encoder__target_hidden_layer", DEFAULT_MID_LAYER)
    return OfficialTaste(whisper, model, mid_layer)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The tokenizer's weights by our names, float32."""
    from safetensors import SafetensorError, safe_open

    weights: dict[str, Tensor] = {}
    unknown: list[str] = []
    for path in weight_files(folder, _fetch(folder)):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                renamed = rename(list(file.keys()))
                weights |= {ours: file.get_tensor(theirs).float() for theirs, ours in renamed.ours.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: truncated, or no safetensors file ({error}); {_fetch(folder)}") from error
        unknown += renamed.unknown
    if unknown:
        shown = abridge(unknown, SHOWN_NAMES)
        raise ValueError(f"{folder} has {len(unknown)} weights that no TASTE model has: {shown}; {_fetch(folder)}")
    return {name: _as_kept_here(name, value) for name, value in weights.items()}


def _check_fit(taste: OfficialTaste, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse weights that are missing, unknown, or of another shape."""
    problems = state_difference(taste.state_dict(), weights).phrases()
    if problems:
        shown = abridge(problems, SHOWN_NAMES, "; ")
        raise ValueError(f"{len(problems)} weights in {folder} do not fit each other: {shown}. {_fetch(folder)}")


def _as_kept_here(name: str, value: Tensor) -> Tensor:
    """The one value of another shape: the published code keeps the flag that codes are there as a row of one."""
    return value.reshape(()).bool() if name.endswith("._codebook.initted") else value


def _spread(codes: Tensor, word_ids: Tensor) -> Tensor:
    """Codes of words [W, Q] on all their tokens, [T, Q]."""
    spans = word_spans(word_ids)
    if len(codes) != len(spans):
        raise ValueError(f"codes of {len(codes)} words, the text has {len(spans)}; use the text they were encoded with")
    return codes.repeat_interleave(torch.tensor([end - start for start, end in spans], device=codes.device), dim=0)


def _fetch(folder: Path) -> str:
    return f"get MediaTek-Research/Llama-1B-TASTE-V0 from Hugging Face, or name the right folder instead of {folder}"
