"""The network that teaches a small Whisper encoder what is spoken at each moment.

Whisper learns this from a decoder that writes text. On three hours of speech whose phones have known times, frames can
be told directly: the last states name the text token that is being spoken, in the terms of a language model's text
embeddings, as Whisper's output layer is tied to its own; those of a middle block name the phone, how it is spoken, and
the S3 unit: a released Whisper has room to keep there whatever a recording holds, this one keeps what is asked for. An
aggregator can only average such states over a word. Therefore units are also asked for as codes, see unit_codes.py.
"""

# B recordings   W mel frames, 100 Hz   A Whisper frames, 50 Hz   L frames of the longest recording   M sampled frames
# D channels   E text embedding's channels   V classes: silence, then the corpus' tokens   R numbers about prosody
# K classes of S3 units   C channels of a unit's code

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder, WhisperEncoderLayer
from unit_codes import unit_codes

CLEAR_FRAMES = 4  # behind the longest recording: the convolutions' edge, then pure silence
IGNORED = -100  # label of frames that say nothing about the loss
_SHARPNESS = 40.0  # of a unit's name at first: the two nearest codes differ by about .03


class States(NamedTuple):
    """What the encoder makes of a batch, over the frames of its longest recording."""

    mid: Tensor  # [B, L, D] output of block `mid_layer`, not normalised
    final: Tensor  # [B, L, D] after the last LayerNorm
    early: Tensor | None = None  # [B, L, D] output of block `early_layer`, not normalised


class Losses(NamedTuple):
    """Means over the labelled frames, and shares of them that are right."""

    text: Tensor  # cross-entropy, nats
    phone: Tensor  # cross-entropy, nats
    prosody: Tensor  # mean squared error
    unit: Tensor  # cross-entropy, nats
    code: Tensor  # mean squared error; 1 tells nothing
    text_accuracy: Tensor
    phone_accuracy: Tensor
    unit_accuracy: Tensor


def encode(
    encoder: WhisperEncoder,
    mels: Tensor,
    mid_layer: int,
    sampled_frames: int,
    generator: torch.Generator | None,
    early_layer: int = 0,
) -> States:
    """Run a Whisper encoder as if each recording were followed by silence up to the end of its window.

    Whisper looks at 30 s, whatever a recording's length, and every frame attends to the silence as well. Its frames
    differ in their position only, so a few of them, drawn at random and each counted as often as there are frames per
    drawn one, stand for all: 20 times less work for a recording of four seconds. With all of them drawn the result is
    that of the encoder itself.

    Args:
        encoder: transformers' own.
        mels: log-mels, [B, 128, 2 (L + 4)], filled with each row's silence behind its end.
        mid_layer: the block whose output is wanted too.
        sampled_frames: M; as many as there are, or more, takes every one in order.
        generator: draws them, on the CPU; None: torch's global one.
        early_layer: a block before that whose output is wanted as well; 0: none.

    Returns:
        the states of the first L frames.
    """
    x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mels)))).transpose(1, 2)  # [B, L + 4, D]
    length = x.shape[1] - CLEAR_FRAMES
    positions = encoder.embed_positions.weight
    silent_frames = len(positions) - length
    count = min(sampled_frames, silent_frames)
    if count < silent_frames:
        drawn = length + torch.randperm(silent_frames, generator=generator)[:count].to(x.device, non_blocking=True)
    else:
        drawn = torch.arange(length, len(positions), device=x.device)
    silence = x[:, length + 1 : length + 2].expand(-1, count, -1)
    x = torch.cat([x[:, :length], silence], dim=1) + torch.cat([positions[:length], positions[drawn]])
    weights = x.new_zeros(length + count)
    if count:
        weights[length:] = math.log(silent_frames / count)
    mid, early = x, None
    for number, layer in enumerate(encoder.layers, 1):
        x = _block(layer, x, weights)
        if number == mid_layer:
            mid = x[:, :length]
        if number == early_layer:
            early = x[:, :length]
    return States(mid, encoder.layer_norm(x[:, :length]), early)


def _block(layer: WhisperEncoderLayer, x: Tensor, weights: Tensor) -> Tensor:
    """One pre-norm block, with `weights` [L + M] added to the scores of the frames that are attended to."""
    attention = layer.self_attn
    y = layer.self_attn_layer_norm(x)
    query, key, value = (
        part(y).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    # written out: at these lengths the backward pass of PyTorch's fused attention takes twice the time on a CPU
    scores = (query * attention.head_dim**-0.5) @ key.transpose(2, 3) + weights.to(query.dtype)
    y = scores.softmax(dim=-1) @ value
    x = x + attention.out_proj(y.transpose(1, 2).flatten(2))
    return x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))


class FrameTeacher(nn.Module):
    """Reads text tokens from the last states, and phones, prosody and S3 units from the middle ones.

    Args:
        width: D.
        embeddings: text embeddings of the tokens that are classes, [V - 1, E]; they do not learn.
        phones: classes of the middle states.
        prosody: R.
        units: the S3 units that are classes, [K] int64.
    """

    def __init__(self, width: int, embeddings: Tensor, phones: int, prosody: int, units: Tensor) -> None:
        super().__init__()
        self.register_buffer("embeddings", embeddings)
        self.register_buffer("codes", unit_codes()[units])
        self.to_text = nn.Linear(width, embeddings.shape[1])
        self.silence = nn.Parameter(torch.randn(1, embeddings.shape[1]) * embeddings.std())
        self.phone_head = nn.Linear(width, phones)
        self.prosody_head = nn.Linear(width, prosody)
        self.unit_head = nn.Linear(width, len(units))
        self.code_head = nn.Linear(width, self.codes.shape[1])

    def text_logits(self, final: Tensor) -> Tensor:
        """Compare states [..., D] with silence and every token, [..., V]."""
        classes = torch.cat([self.silence, self.embeddings])
        return self.to_text(final).float() @ classes.T / math.sqrt(classes.shape[1])

    def forward(self, states: States, tokens: Tensor, phones: Tensor, units: Tensor, prosody: Tensor) -> Losses:
        """Hold the states against what was spoken.

        Args:
            states: of the encoder.
            tokens: classes [B, L], int64; `IGNORED` where there is none.
            phones: classes [B, L], int64; `IGNORED` behind a recording's end.
            units: classes [B, L], int64; `IGNORED` where there is none.
            prosody: [B, L, R], float32.
        """
        mid = states.mid
        told = self.text_logits(states.final), self.phone_head(mid), self.unit_head(mid)
        text, phone, unit = (
            _named(logits.flatten(0, 1), classes.flatten())
            for logits, classes in zip(told, (tokens, phones, units), strict=True)
        )
        prosody_errors = (self.prosody_head(mid).float() - prosody).square().mean(dim=2)
        code_errors = (self.code_head(mid).float() - self.codes[units.clamp(min=0)]).square().mean(dim=2)
        return Losses(
            text[0],
            phone[0],
            _mean(prosody_errors, phones != IGNORED),
            unit[0],
            _mean(code_errors, units != IGNORED),
            text[1],
            phone[1],
            unit[1],
        )


class UnitNames(nn.Module):
    """Names S3 units by the codebook that they were made with.

    The tokenizer takes the code nearest to the direction of its last state. So do these logits, as sharply as they have
    learned to; the states may differ from the tokenizer's by a linear map.

    Args:
        codes: of the units that are classes, [K, D] float32.
    """

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.to_direction = nn.Linear(codes.shape[1], codes.shape[1])
        self.sharpness = nn.Parameter(torch.tensor(_SHARPNESS))
        nn.init.eye_(self.to_direction.weight)
        nn.init.zeros_(self.to_direction.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Compare states [..., D] with every unit's code, [..., K] float32."""
        directions = F.normalize(self.to_direction(states).float(), dim=-1)
        return self.sharpness * (directions @ self.codes.T - self.codes.square().sum(dim=1) / 2)


def _named(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the frames that have a class, and the share of them that are right."""
    right = (logits.detach().argmax(dim=-1) == classes).float()
    return F.cross_entropy(logits.float(), classes, ignore_index=IGNORED), _mean(right, classes != IGNORED)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of those that are counted; no boolean index, for which a GPU would have to be waited for."""
    return (values * counted).sum() / counted.sum().clamp(min=1)
