"""Turns S3 tokens and a speaker vector into a mel spectrogram.

Axes: B batch  S S3 tokens, 50 Hz  F mel frames, 86.13 Hz  M mel bands, 80  D encoder channels.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.flow.flow_matching import ConditionalCFM
from cosyvoice.flow.length_regulator import InterpolateRegulator, mel_frames_of_tokens
from cosyvoice.transformer.encoder import BaseEncoder
from cosyvoice.utils.mask import make_pad_mask
from cosyvoice.utils.precision import full_precision

EULER_STEPS = 10  # solver steps of the released models
KNOWN_MEL_PROBABILITY = 0.5  # of a training row to see the beginning of its own mel, as a prompt would give it
KNOWN_MEL_SHARE = 0.3  # at most this share of it


class GeneratedMel(NamedTuple):
    """The mel of the speech, without the prompt's, and what the next chunk of a stream needs."""

    mel: Tensor  # [1, M, F], float32
    flow_cache: Tensor  # [1, M, prompt + 34, 2]


class MaskedDiffWithXvec(nn.Module):
    """S3 tokens -> conformer -> mel rate -> flow matching, conditioned on a speaker vector.

    Args:
        input_size: channels of the token embedding.
        output_size: mel bands.
        spk_embed_dim: size of the speaker vector.
        output_type: recorded as published; always "mel".
        vocab_size: S3 codes.
        input_frame_rate: S3 tokens a second.
        only_mask_loss: recorded as published; the loss always covers valid frames only.
        encoder: `(x [B, S, input_size], lengths [B]) -> (hidden [B, S, D], mask)`, with `output_size()`.
        length_regulator: an InterpolateRegulator.
        decoder: a ConditionalCFM.
        decoder_conf: recorded as published; the decoder arrives built.

    Raises:
        ValueError: encoder, length_regulator or decoder is missing.

    Source: FunAudioLLM/CosyVoice cosyvoice/flow/flow.py @ ace7c47.
    """

    def __init__(
        self,
        input_size: int = 512,
        output_size: int = 80,
        spk_embed_dim: int = 192,
        output_type: Literal["mel"] = "mel",
        vocab_size: int = 4096,
        input_frame_rate: int = 50,
        only_mask_loss: bool = True,
        encoder: BaseEncoder | None = None,
        length_regulator: InterpolateRegulator | None = None,
        decoder: ConditionalCFM | None = None,
        decoder_conf: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if encoder is None or length_regulator is None or decoder is None:
            parts = {"encoder": encoder, "length_regulator": length_regulator, "decoder": decoder}
            missing = [name for name, part in parts.items() if part is None]
            raise ValueError(f"MaskedDiffWithXvec got no {', '.join(missing)}: name each in the configuration")
        self.input_size = input_size
        self.vocab_size = vocab_size
        self.input_frame_rate = input_frame_rate
        self.output_size = output_size
        self.output_type = output_type
        self.only_mask_loss = only_mask_loss
        self.decoder_conf = decoder_conf
        self.input_embedding = nn.Embedding(vocab_size, input_size)
        self.spk_embed_affine_layer = nn.Linear(spk_embed_dim, output_size)
        self.encoder = encoder
        self.encoder_proj = nn.Linear(encoder.output_size(), output_size)
        self.decoder = decoder
        self.length_regulator = length_regulator

    @full_precision
    def forward(self, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Compute the training loss of a padded batch.

        Half of the rows (drawn with Python's `random`, as published) see a random beginning of their own mel.

        Args:
            batch: `speech_token` [B, S] int64, `speech_token_len` [B], `speech_feat` [B, F, M] float32,
                `speech_feat_len` [B] and `embedding` [B, spk_embed_dim] float32.
            device: where to compute.

        Returns:
            `{"loss": scalar}`.
        """
        token, token_lengths = batch["speech_token"].to(device), batch["speech_token_len"].to(device)
        mel, mel_lengths = batch["speech_feat"].to(device), batch["speech_feat_len"]  # a GPU is not waited for
        speaker = self._project_speaker(batch["embedding"].to(device))

        hidden = self._encode(token, token_lengths)
        hidden, _ = self.length_regulator(hidden, mel_lengths)

        known_mel = torch.zeros_like(mel)
        for row, length in enumerate(mel_lengths.tolist()):
            if random.random() < KNOWN_MEL_PROBABILITY:
                continue
            known = random.randint(0, int(KNOWN_MEL_SHARE * length))
            known_mel[row, :known] = mel[row, :known]

        mask = (~make_pad_mask(mel_lengths.to(device), mel.size(1))).to(hidden.dtype).unsqueeze(1)
        target, hidden, known_mel = (_bands_first(frames) for frames in (mel, hidden, known_mel))
        loss, _ = self.decoder.compute_loss(target, mask, hidden, speaker, cond=known_mel)
        return {"loss": loss}

    @torch.no_grad()
    @full_precision
    def inference(
        self,
        token: Tensor,
        token_len: Tensor,
        prompt_token: Tensor,
        prompt_token_len: Tensor,
        prompt_feat: Tensor,
        prompt_feat_len: Tensor,
        embedding: Tensor,
        flow_cache: Tensor | None,
    ) -> GeneratedMel:
        """Generate the mel of S3 tokens, in the voice of a prompt and a speaker vector.

        Args:
            token: S3 tokens to speak, [1, S], int64 or int32, S >= 1.
            token_len: S, [1].
            prompt_token: S3 tokens of the prompt, [1, P]; P may be 0.
            prompt_token_len: P, [1].
            prompt_feat: mel of the prompt, [1, F_p, M]; F_p may be 0.
            prompt_feat_len: F_p, [1]; recorded by the published signature, the shape says it already.
            embedding: speaker vector, [1, spk_embed_dim].
            flow_cache: `flow_cache` of the chunk before, or None (or zero frames) for the first.

        Returns:
            the mel [1, M, F] of `token` alone, F = int(S / 50 * 86.13), and the cache for the next chunk.

        Raises:
            ValueError: more than one row, or too few tokens for one mel frame.
        """
        rows, tokens = token.shape
        speech_frames = mel_frames_of_tokens(tokens, self.input_frame_rate)
        if rows != 1 or speech_frames < 1:
            raise ValueError(f"expected token of shape [1, S] with S >= 1, got {tuple(token.shape)}")
        prompt_tokens, prompt_frames = prompt_token.size(1), prompt_feat.size(1)
        speaker = self._project_speaker(embedding)

        hidden = self._encode(torch.cat([prompt_token, token], dim=1), prompt_token_len + token_len)
        frames, mel_length = self.length_regulator.inference(
            hidden[:, :prompt_tokens], hidden[:, prompt_tokens:], prompt_frames, speech_frames, self.input_frame_rate
        )
        known_mel = F.pad(prompt_feat.to(frames), (0, 0, 0, speech_frames))
        solved = self.decoder(
            mu=_bands_first(frames),
            mask=frames.new_ones(1, 1, mel_length),
            n_timesteps=EULER_STEPS,
            spks=speaker,
            cond=_bands_first(known_mel),
            prompt_len=prompt_frames,
            cache=flow_cache,
        )
        return GeneratedMel(solved.mel[:, :, prompt_frames:].float(), solved.cache)

    def _project_speaker(self, embedding: Tensor) -> Tensor:
        """Map speaker vectors [B, spk_embed_dim], scaled to length 1, to [B, M]."""
        direction = F.normalize(embedding.to(self.spk_embed_affine_layer.weight.dtype), dim=1)
        return self.spk_embed_affine_layer(direction)

    def _encode(self, token: Tensor, lengths: Tensor) -> Tensor:
        """Map padded S3 tokens [B, S] to hidden states [B, S, M]; negative (padding) ids count as 0 and are masked."""
        valid = ~make_pad_mask(lengths, token.size(1))
        embedded = self.input_embedding(token.clamp(min=0)) * valid.unsqueeze(-1)
        hidden, _ = self.encoder(embedded, lengths)
        return self.encoder_proj(hidden)


def _bands_first(frames: Tensor) -> Tensor:
    """Turn [B, F, M] into [B, M, F] in memory too: noise drawn in a tensor's likeness fills it in memory order."""
    return frames.transpose(1, 2).contiguous()
