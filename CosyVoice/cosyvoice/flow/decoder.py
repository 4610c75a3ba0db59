"""Estimates the velocity of the mel at one flow time: a 1-D U-Net of residual and transformer blocks.

Axes: B batch  F mel frames, 86.13 Hz (halved below the first stage)  C channels  H heads  E time-embedding channels.
Masks are float, 1 where valid: [B, 1, F].

Attribute names and indices of nested modules are the checkpoint's (Matcha-TTS's decoder, diffusers' transformer block).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_SCALE = 1000.0  # flow time 0..1 is embedded as if it were 1000 diffusion steps
LONGEST_TIME_PERIOD = 10_000.0
MASKED_LOGIT = -1.0e10  # finite, so that a row without any valid frame gives no NaN


class SinusoidalPosEmb(nn.Module):
    """Sines and cosines of a flow time at geometrically spaced frequencies.

    Args:
        dim: size of the embedding, even.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"the time embedding needs an even size, got {dim}")
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        """Embed times [B] in 0..1 as [B, dim]."""
        half = self.dim // 2
        steps = torch.arange(half, device=t.device, dtype=torch.float32)
        frequencies = torch.exp(steps * -(math.log(LONGEST_TIME_PERIOD) / (half - 1)))
        angles = TIME_SCALE * t[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1).to(t.dtype)


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between them, [B, in_channels] -> [B, time_embed_dim]."""

    def __init__(self, in_channels: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, sample: Tensor) -> Tensor:
        """Project a sinusoidal embedding."""
        return self.linear_2(F.silu(self.linear_1(sample)))


class Block1D(nn.Module):
    """Convolution, group norm and Mish on masked frames, [B, dim, F] -> [B, dim_out, F]."""

    def __init__(self, dim: int, dim_out: int, groups: int = 8) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv1d(dim, dim_out, 3, padding=1), nn.GroupNorm(groups, dim_out), nn.Mish())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Apply the block to valid frames; padding is zero before and after."""
        return self.block(x * mask) * mask


class ResnetBlock1D(nn.Module):
    """Two blocks with the flow time added between them, around a 1x1 shortcut."""

    def __init__(self, dim: int, dim_out: int, time_emb_dim: int, groups: int = 8) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time_emb_dim, dim_out))
        self.block1 = Block1D(dim, dim_out, groups)
        self.block2 = Block1D(dim_out, dim_out, groups)
        self.res_conv = nn.Conv1d(dim, dim_out, 1)

    def forward(self, x: Tensor, mask: Tensor, time_emb: Tensor) -> Tensor:
        """Map frames [B, dim, F] and a time embedding [B, E] to [B, dim_out, F]."""
        shifted = self.block1(x, mask) + self.mlp(time_emb).unsqueeze(-1)
        return self.block2(shifted, mask) + self.res_conv(x * mask)


class Downsample1D(nn.Module):
    """Halve the frame rate by a strided convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, dim, F] to [B, dim, ceil(F / 2)]."""
        return self.conv(x)


class Upsample1D(nn.Module):
    """Double the frame rate by a transposed convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, F] to [B, channels, 2 F]."""
        return self.conv(x)


class Attention(nn.Module):
    """Multi-head self-attention whose inner width need not be the outer one.

    Args:
        query_dim: channels outside.
        heads: number of heads.
        dim_head: channels of one head.
        dropout: on the output.
    """

    def __init__(self, query_dim: int, heads: int, dim_head: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(query_dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(query_dim, heads * dim_head, bias=False)
        self.to_v = nn.Linear(query_dim, heads * dim_head, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(heads * dim_head, query_dim), nn.Dropout(dropout)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Attend over frames.

        Args:
            x: frames, [B, F, C].
            bias: added to the logits, broadcastable to [B, H, F, F].

        Returns:
            frames, [B, F, C].
        """
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v)
        )
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # [B, H, F, C / H]
        out, dropout = self.to_out
        return dropout(out(heads.transpose(1, 2).flatten(2)))


class GELUProjection(nn.Module):
    """Linear layer followed by the exact GELU."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, F, dim_in] to [B, F, dim_out]."""
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    """Widen by `mult`, GELU, narrow."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(GELUProjection(dim, mult * dim), nn.Dropout(dropout), nn.Linear(mult * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Transform every frame of [B, F, dim] by itself."""
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Pre-norm self-attention and feed-forward; `norm2` belongs to a cross-attention that CosyVoice leaves out."""

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, num_attention_heads, attention_head_dim, dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, dropout=dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Transform frames [B, F, C]; `bias` is added to the attention logits."""
        x = x + self.attn1(self.norm1(x), bias)
        return x + self.ff(self.norm3(x))


class Stage(nn.ModuleList):
    """One resolution of the U-Net; as a list it gives its children the checkpoint's names 0, 1 and 2.

    Args:
        resnet: residual block that brings in the flow time.
        transformers: transformer blocks at this resolution.
        resample: leads to the next resolution; middle stages have none.
    """

    def __init__(self, resnet: ResnetBlock1D, transformers: nn.ModuleList, resample: nn.Module | None = None) -> None:
        super().__init__([resnet, transformers] if resample is None else [resnet, transformers, resample])

    def forward(self, x: Tensor, mask: Tensor, time_emb: Tensor) -> Tensor:
        """Map frames [B, C, F] to [B, C', F] without changing the resolution."""
        x = self[0](x, mask, time_emb).transpose(1, 2).contiguous()  # [B, F, C']
        bias = (1.0 - mask.to(x.dtype)).unsqueeze(1) * MASKED_LOGIT  # [B, 1, 1, F]: every frame sees the valid ones
        for transformer in cast(nn.ModuleList, self[1]):
            x = transformer(x, bias)
        return x.transpose(1, 2).contiguous()

    def resample(self, x: Tensor) -> Tensor:
        """Lead masked frames to the next resolution."""
        return self[2](x)


class ConditionalDecoder(nn.Module):
    """Velocity estimator over noisy mel, encoder output, speaker and known mel, all stacked along the channels.

    Args:
        in_channels: channels of the stacked input (noisy mel + mu + speaker + cond).
        out_channels: mel bands.
        channels: channels of each resolution on the way down.
        dropout: inside the transformer blocks.
        attention_head_dim: channels of one head.
        n_blocks: transformer blocks a stage.
        num_mid_blocks: stages at the lowest resolution.
        num_heads: attention heads.
        act_fn: feed-forward activation; the released models use "gelu" and nothing else is implemented.

    Source: FunAudioLLM/CosyVoice cosyvoice/flow/decoder.py @ ace7c47.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (256, 256),
        dropout: float = 0.05,
        attention_head_dim: int = 64,
        n_blocks: int = 1,
        num_mid_blocks: int = 2,
        num_heads: int = 4,
        act_fn: str = "gelu",
    ) -> None:
        super().__init__()
        if act_fn != "gelu":
            raise ValueError(f"act_fn is {act_fn!r}, expected 'gelu', the released models' activation")
        widths = tuple(channels)
        time_dim = 4 * widths[0]
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.time_embeddings = SinusoidalPosEmb(in_channels)
        self.time_mlp = TimestepEmbedding(in_channels, time_dim)

        def stage(dim: int, dim_out: int, resample: nn.Module | None = None) -> Stage:
            transformers = [
                BasicTransformerBlock(dim_out, num_heads, attention_head_dim, dropout) for _ in range(n_blocks)
            ]
            return Stage(ResnetBlock1D(dim, dim_out, time_dim), nn.ModuleList(transformers), resample)

        # The last stage of either side keeps its resolution: a plain convolution stands where others resample.
        lowest = len(widths) - 1
        down_blocks = [
            stage(dim, dim_out, _plain(dim_out) if level == lowest else Downsample1D(dim_out))
            for level, (dim, dim_out) in enumerate(itertools.pairwise((in_channels, *widths)))
        ]
        self.down_blocks = cast(Sequence[Stage], nn.ModuleList(down_blocks))
        mid_blocks = [stage(widths[-1], widths[-1]) for _ in range(num_mid_blocks)]
        self.mid_blocks = cast(Sequence[Stage], nn.ModuleList(mid_blocks))
        up_blocks = [
            stage(2 * dim, dim_out, _plain(dim_out) if level == lowest else Upsample1D(dim_out))
            for level, (dim, dim_out) in enumerate(itertools.pairwise((*widths[::-1], widths[0])))
        ]
        self.up_blocks = cast(Sequence[Stage], nn.ModuleList(up_blocks))
        self.final_block = Block1D(widths[0], widths[0])
        self.final_proj = nn.Conv1d(widths[0], out_channels, 1)
        self.apply(_initialize)

    def forward(
        self, x: Tensor, mask: Tensor, mu: Tensor, t: Tensor, spks: Tensor | None = None, cond: Tensor | None = None
    ) -> Tensor:
        """Estimate the velocity at flow time `t`.

        Args:
            x: noisy mel, [B, out_channels, F], float32.
            mask: 1 at valid frames, [B, 1, F].
            mu: encoder output at the mel-frame rate, [B, 80, F].
            t: flow time of each row, 0 (noise) to 1 (mel), [B].
            spks: projected speaker vectors, [B, 80], or None where the model has none.
            cond: mel that is known, zero elsewhere, [B, 80, F], or None where the model has none.

        Returns:
            velocity, [B, out_channels, F], zero at invalid frames.
        """
        time_emb = self.time_mlp(self.time_embeddings(t))
        inputs = [x, mu]
        if spks is not None:
            inputs.append(spks.unsqueeze(-1).expand(-1, -1, x.size(-1)))
        if cond is not None:
            inputs.append(cond)
        hidden = torch.cat(inputs, dim=1)

        passed: list[tuple[Tensor, Tensor]] = []  # (hidden, mask) of each resolution on the way down
        stage_mask = mask
        for stage in self.down_blocks:
            if passed:
                stage_mask = stage_mask[:, :, ::2]
            hidden = stage(hidden, stage_mask, time_emb)
            passed.append((hidden, stage_mask))
            hidden = stage.resample(hidden * stage_mask)
        for stage in self.mid_blocks:
            hidden = stage(hidden, stage_mask, time_emb)
        for stage in self.up_blocks:
            skip, stage_mask = passed.pop()
            hidden = torch.cat([hidden[:, :, : skip.size(-1)], skip], dim=1)  # 2 ceil(F / 2) may exceed F by one
            hidden = stage(hidden, stage_mask, time_emb)
            hidden = stage.resample(hidden * stage_mask)
        hidden = self.final_block(hidden, stage_mask)
        return self.final_proj(hidden * stage_mask) * mask


def _plain(dim: int) -> nn.Conv1d:
    return nn.Conv1d(dim, dim, 3, padding=1)


def _initialize(module: nn.Module) -> None:
    """Draw He-normal weights and zero biases, as the published estimator starts from."""
    if isinstance(module, nn.Conv1d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
