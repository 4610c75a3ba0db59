"""What happens to a sequence before the first layer: a linear input layer, and the table of relative positions.

# B batch  L frames  P distances  D channels
"""

import math

import torch
from torch import Tensor, nn

LONGEST_WAVELENGTH = 10_000.0  # of the sinusoids, over 2 pi, in frames
FIRST_REACH_FRAMES = 1024  # distances the table covers when it is first made, on either side of 0


class EspnetRelPositionalEncoding(nn.Module):
    """Sinusoids of the distance between two frames; the input is scaled, never added to.

    The table is no parameter and no buffer (released checkpoints have no key for it): it is made on first use, on
    the device and in the dtype asked for, and made longer whenever a longer sequence comes.

    Args:
        d_model: D, even.
        dropout_rate: dropout on the scaled input, and once more on the distances, as published.

    Raises:
        ValueError: `d_model` is odd.

    Source: FunAudioLLM/CosyVoice cosyvoice/transformer/embedding.py @ ace7c47.
    """

    def __init__(self, d_model: int, dropout_rate: float) -> None:
        super().__init__()
        if d_model % 2:
            raise ValueError(f"d_model must be even to hold pairs of sine and cosine, got {d_model}")
        self.d_model = d_model
        self.xscale = math.sqrt(d_model)
        self.dropout = nn.Dropout(dropout_rate)
        self._table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Scale the input to the magnitude that the distances have.

        Args:
            x: [B, L, D].

        Returns:
            [B, L, D], times sqrt(D).
        """
        return self.dropout(x * self.xscale)

    def distances(self, oldest: int, newest: int, like: Tensor) -> Tensor:
        """Sinusoids of the distances `oldest`, `oldest - 1`, ..., `newest`.

        Args:
            oldest: largest distance back in time, in frames, >= newest.
            newest: smallest one; negative distances look ahead.
            like: a tensor whose device and dtype are wanted.

        Returns:
            [P, D] with P = oldest - newest + 1.
        """
        reach = max(oldest, -newest)
        table = self._table
        if table is None or len(table) // 2 < reach or table.device != like.device or table.dtype != like.dtype:
            self._table = table = self._make_table(max(FIRST_REACH_FRAMES, 2 * reach), like)
        zero = len(table) // 2  # the row of distance 0
        return table[zero - oldest : zero - newest + 1]

    def _make_table(self, reach: int, like: Tensor) -> Tensor:
        # Outside of inference mode, or the first training step after a generation could not save it for backward.
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            distance = torch.arange(reach, -reach - 1, -1, dtype=torch.float32)
            channel = torch.arange(0, self.d_model, 2, dtype=torch.float32)
            angle = distance[:, None] * torch.exp(channel * (-math.log(LONGEST_WAVELENGTH) / self.d_model))
            table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # sine, cosine, sine, ...
            return table.to(device=like.device, dtype=like.dtype)


class LinearInput(nn.Module):
    """Linear input layer, LayerNorm and dropout; the frame rate stays.

    Args:
        input_size: channels of the input.
        output_size: D.
        dropout_rate: dropout after the LayerNorm.
        positional_dropout_rate: see `EspnetRelPositionalEncoding`.
        relu: end with a ReLU (the published layer `linear_legacy`) or not (`linear`).

    Source: FunAudioLLM/CosyVoice cosyvoice/transformer/subsampling.py @ ace7c47.
    """

    def __init__(
        self, input_size: int, output_size: int, dropout_rate: float, positional_dropout_rate: float, relu: bool
    ) -> None:
        super().__init__()
        steps: list[nn.Module] = [nn.Linear(input_size, output_size), nn.LayerNorm(output_size, eps=1e-5)]
        steps += [nn.Dropout(dropout_rate), *([nn.ReLU()] if relu else [])]
        self.out = nn.Sequential(*steps)
        self.pos_enc = EspnetRelPositionalEncoding(output_size, positional_dropout_rate)

    def forward(self, xs: Tensor) -> Tensor:
        """Bring the input to the encoder's width and scale.

        Args:
            xs: [B, L, input_size].

        Returns:
            [B, L, D].
        """
        return self.pos_enc(self.out(xs))
