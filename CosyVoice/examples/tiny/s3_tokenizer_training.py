"""The network that teaches an S3 tokenizer: its encoder, a vector quantizer, and what reads text back from the codes.

As published for CosyVoice, the quantizer sits inside a speech recogniser: what survives it is what is needed
to recognise the text. Here the recogniser ends in CTC over characters, and a second head reads the phone of each unit,
whose times flite gives.
"""

# B recordings  T mel frames, 100 Hz  S S3 units, 50 Hz  N units of all rows together  D channels  C characters

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from corpus_reader import CHARACTERS, PHONES
from s3tokenizer.model import AudioEncoder, ModelConfig, ResidualAttentionBlock, sinusoids
from s3tokenizer.utils import make_non_pad_mask, mask_to_bias
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

BLANK = 0


class Recognised(NamedTuple):
    """What the recogniser makes of a batch."""

    character_logits: Tensor  # [B, S, 1 + characters]
    phone_logits: Tensor  # [N, phones]
    unit_lengths: Tensor  # [B]
    commitment: Tensor  # scalar, zero without the quantizer
    codes: Tensor | None  # [N]; None without the quantizer


class TokenizerTeacher(nn.Module):
    """S3 tokenizer inside a recogniser.

    Args:
        config: the tokenizer's sizes; `n_codebook_size` is what the exported file has.
        learned_codes: codes that the quantizer learns; the published tokenizer uses 963 of its 4096 (CosyVoice 2,
            table 4), and the rest of the exported codebook stays unused here as well.
        recogniser_layers: transformer blocks after the quantizer, which are not exported.
        decay: of the codebook's moving averages.
    """

    def __init__(self, config: ModelConfig, learned_codes: int, recogniser_layers: int, decay: float) -> None:
        super().__init__()
        width = config.n_audio_state
        self.config = config
        self.encoder = AudioEncoder(
            config.n_mels, config.n_audio_ctx, width, config.n_audio_head, config.n_audio_layer, 1, use_sdpa=True
        )
        self.quantizer = VectorQuantize(
            dim=width,
            codebook_size=learned_codes,
            decay=decay,
            kmeans_init=False,
            commitment_weight=1.0,
            rotation_trick=False,
        )
        self.phone_head = nn.Linear(width, len(PHONES))
        self.after_codes = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            ResidualAttentionBlock(width, config.n_audio_head, use_sdpa=True) for _ in range(recogniser_layers)
        )
        self.final_norm = nn.LayerNorm(width)
        self.character_head = nn.Linear(width, 1 + len(CHARACTERS))
        self.register_buffer("positions", sinusoids(config.n_audio_ctx, width).float(), persistent=False)
        # unit vectors have small entries; the heads want a scale near one
        self.code_scale = nn.Parameter(torch.tensor(width**0.5))

    def directions(self, mels: Tensor, mel_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode log-mels [B, 128, T] to unit vectors [B, S, D] float32, with their lengths [B]."""
        hidden, unit_lengths = self.encoder(mels, mel_lengths)
        return F.normalize(hidden.float(), dim=-1), unit_lengths

    def forward(self, mels: Tensor, mel_lengths: Tensor, quantize: bool) -> Recognised:
        """Recognise a batch.

        Args:
            mels: Whisper log-mels, [B, 128, T], zero after each row's end.
            mel_lengths: [B], int64.
            quantize: pass through the codebook; otherwise the unit vectors go on as they are.
        """
        directions, unit_lengths = self.directions(mels, mel_lengths)
        valid = make_non_pad_mask(unit_lengths)
        codes, commitment = None, directions.new_zeros(())
        rows = directions[valid]
        if quantize:
            quantized, codes, commitment = self.quantizer(rows[None])
            rows, codes = quantized[0], codes[0]
        characters, phones = self.read(rows, valid)
        return Recognised(characters, phones, unit_lengths, commitment.squeeze(), codes)

    def read(self, rows: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Recognise the text from what the quantizer lets through.

        Args:
            rows: the code of each unit, rows of the batch joined, [N, D].
            valid: where the batch has units, [B, S], N of them true.

        Returns:
            logits of the characters [B, S, 1 + characters] and of the phones [N, phones], float32.
        """
        rows = rows * self.code_scale
        hidden = rows.new_zeros(*valid.shape, rows.shape[1], dtype=torch.float32)
        hidden = hidden.masked_scatter(valid[..., None], self.after_codes(rows).float())
        hidden = hidden + self.positions[: hidden.shape[1]]
        bias = mask_to_bias(valid[:, None], hidden.dtype)[:, None]
        for block in self.blocks:
            hidden = block(hidden, mask=bias)
        logits = self.character_head(self.final_norm(hidden))
        return logits.float(), self.phone_head(rows).float()

    @torch.no_grad()
    def place_codes(self, codebook: Tensor) -> None:
        """Start the quantizer from these codes [K, D], each with the weight of one observation."""
        state = self.quantizer._codebook
        state.embed.copy_(codebook[None])
        state.embed_avg.copy_(codebook[None])
        state.cluster_size.fill_(1.0)

    def reader(self) -> nn.ModuleList:
        """What comes after the codes: learns on when the tokenizer is finished."""
        return nn.ModuleList([self.after_codes, self.blocks, self.final_norm, self.character_head, self.phone_head])

    @property
    def codebook(self) -> Tensor:
        """The learned codes, [K, D]."""
        return self.quantizer.codebook


def recogniser_loss(
    out: Recognised, characters: Tensor, character_lengths: Tensor, phones: Tensor, commitment_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """Add up CTC per character, phone cross-entropy per unit, and the distance of states to their codes.

    Args:
        out: of the teacher.
        characters: CTC classes of all rows joined, [sum of lengths], int64.
        character_lengths: [B].
        phones: phone of each unit, [N].
        commitment_weight: factor on the quantizer's own loss.

    Returns:
        the loss, and its parts as numbers.
    """
    log_probs = out.character_logits.log_softmax(dim=-1).transpose(0, 1)
    ctc = F.ctc_loss(
        log_probs, characters, out.unit_lengths, character_lengths, blank=BLANK, reduction="sum", zero_infinity=True
    )
    ctc = ctc / character_lengths.sum()
    phone = F.cross_entropy(out.phone_logits, phones)
    loss = ctc + phone + commitment_weight * out.commitment
    accuracy = (out.phone_logits.argmax(dim=-1) == phones).float().mean()
    parts = {"ctc": ctc.item(), "phone": phone.item(), "phone_accuracy": accuracy.item()}
    return loss, parts | {"commitment": out.commitment.item()}


def read_characters(character_logits: Tensor, unit_lengths: Tensor) -> list[str]:
    """Greedy CTC: the best class of each unit, repeats joined, blanks dropped."""
    texts = []
    for row, length in zip(character_logits.argmax(dim=-1), unit_lengths.tolist(), strict=True):
        classes = torch.unique_consecutive(row[:length]).tolist()
        texts.append("".join(CHARACTERS[index - 1] for index in classes if index != BLANK))
    return texts
