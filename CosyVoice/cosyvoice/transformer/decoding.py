"""The state that step-by-step decoding keeps: keys, values and projected positions, allocated once.

Every row of a batch writes to the same place of the cache, whatever the length of its prefix: prefixes are moved to
the right so that they *end* together, and what stands before a shorter one is hidden from that row. Attention here
knows only distances between frames, so a row cannot tell that it was moved. One place for all rows means one slice
for the keys, one for the positions and no gathering.

A step reads only the part that is filled, which is what a CPU wants. The tensors themselves keep their shapes and
addresses (until rows are dropped), so a captured CUDA graph could read all of them behind a mask instead.

# N layers  B batch  L new frames  K frames held and new  C capacity in frames  H heads  W head width  D channels
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

POSITIONS_BLOCK_FRAMES = 256  # distances projected at a time: the first token need not wait for all of them


class KeysValues(NamedTuple):
    """What attention looks at, and what it mixes."""

    keys: Tensor  # [B, H, K, W]
    values: Tensor  # [B, H, K, W]


class LayerWindow(NamedTuple):
    """Views of what one layer needs for one step."""

    seen: KeysValues  # the last L places are for the new frames
    positions: Tensor  # [H, K + 1, W], projections of the distances K - 1 .. -1


class DecodingCache:
    """Keys, values and projected relative positions of up to `max_frames` frames a row.

    Made by `TransformerEncoder.new_cache`, filled by `TransformerEncoder.step`. The projections belong to the
    weights of that moment: make a new cache after the weights have changed.

    A row whose text has ended can be handled in two ways. Keep stepping it and ignore what it gives: that costs its
    share of a step. Or drop it with `keep_rows`: that copies what the cache holds of the other rows, about the cost of
    the attention of one or two steps.

    Args:
        layers: N.
        batch_size: B.
        heads: H.
        head_width: W.
        max_frames: C, the longest prefix included.
        device: where the cache lives.
        dtype: what the layers compute in.

    Raises:
        ValueError: a size is < 1.
    """

    def __init__(
        self,
        layers: int,
        batch_size: int,
        heads: int,
        head_width: int,
        max_frames: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if min(batch_size, max_frames) < 1:
            raise ValueError(f"a cache needs at least one row of one frame, got {batch_size} rows of {max_frames}")
        shape = (layers, batch_size, heads, max_frames, head_width)
        # Usable in and out of inference mode. Zeroed memory is not touched before its first use on Linux.
        with torch.inference_mode(False), torch.no_grad():
            self.keys = torch.zeros(shape, device=device, dtype=dtype)
            self.values = torch.zeros(shape, device=device, dtype=dtype)
            # The distances C - 1 .. -1: those of a window are the last columns, whatever its length.
            self.positions = torch.zeros(layers, heads, max_frames + 1, head_width, device=device, dtype=dtype)
            self.left_padding = torch.zeros(batch_size, device=device, dtype=torch.int64)  # [B], hidden frames
        self.filled = 0  # frames held, left padding included; the same for all rows
        self.projected = 0  # columns of `positions` that are filled, counted from the last
        self.ragged = False  # whether any row has left padding

    @property
    def batch_size(self) -> int:
        """Number of rows, B."""
        return self.keys.size(1)

    @property
    def max_frames(self) -> int:
        """Capacity, C."""
        return self.keys.size(3)

    @property
    def lengths(self) -> Tensor:
        """Frames held of each row, without padding, [B], int64."""
        return self.filled - self.left_padding

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with these rows only, in this order; a row may be repeated, to continue one prefix in several ways.

        Args:
            rows: indices, [new B], int64.
        """
        with torch.inference_mode(False), torch.no_grad():
            rows = rows.to(self.left_padding.device).clone()  # a normal tensor, whatever mode made the argument
            self.keys = self._copy_rows(self.keys, rows)
            self.values = self._copy_rows(self.values, rows)
            self.left_padding = self.left_padding[rows]

    def missing_distances(self, new_frames: int) -> tuple[int, int] | None:
        """Which distances must be projected before the next step; each is asked for once, in blocks.

        Args:
            new_frames: L of that step.

        Returns:
            The oldest and the newest distance, for `store_positions`; None where nothing is missing.
        """
        needed = self.filled + new_frames + 1  # the distances K - 1 .. -1
        if needed <= self.projected:
            return None
        columns = min(max(needed, self.projected + POSITIONS_BLOCK_FRAMES), self.max_frames + 1)
        return columns - 2, self.projected - 1

    def store_positions(self, projections: Iterable[Tensor]) -> None:
        """Take in the projections of the missing distances.

        Args:
            projections: of each layer, [H, P, W], from the oldest distance to the newest.
        """
        end = self.max_frames + 1 - self.projected
        for positions, projection in zip(self.positions, projections, strict=True):
            positions[:, end - projection.size(1) : end] = projection
        self.projected += projection.size(1)

    def window(self, layer: int, new_frames: int) -> LayerWindow:
        """What layer number `layer` needs to take in `new_frames` frames.

        Args:
            layer: index of the layer, from 0.
            new_frames: L.

        Returns:
            Views into the cache.
        """
        end = self.filled + new_frames
        seen = KeysValues(self.keys[layer, :, :, :end], self.values[layer, :, :, :end])
        return LayerWindow(seen, self.positions[layer, :, -end - 1 :])

    def visible(self, new_frames: int) -> Tensor | None:
        """Which of the held and new frames each new frame may see.

        Args:
            new_frames: L.

        Returns:
            bool [B or 1, L, K], True where it may; None where all may see everything.
        """
        if new_frames == 1 and not self.ragged:
            return None
        slot = torch.arange(self.filled + new_frames, device=self.keys.device)
        own = slot[self.filled :, None]  # [L, 1]
        seen = (slot <= own).unsqueeze(0)
        if self.ragged:
            # Padding sees itself: attention over nothing would be nan.
            seen = (seen & (slot >= self.left_padding[:, None, None])) | (slot == own)
        return seen

    def _copy_rows(self, cached: Tensor, rows: Tensor) -> Tensor:
        """Rows of `keys` or `values` at full capacity; only what is filled is copied."""
        copied = cached.new_zeros(cached.size(0), len(rows), *cached.shape[2:])
        copied[..., : self.filled, :] = cached[:, rows, :, : self.filled]
        return copied


def end_together(xs: Tensor, lengths: Tensor) -> Tensor:
    """Move the padding of a right-padded batch to the left.

    Args:
        xs: [B, L, D].
        lengths: valid frames of each row, [B], int64.

    Returns:
        [B, L, D]; every row's last valid frame is the last one.
    """
    return _roll_rows(xs, xs.size(1) - lengths)


def start_together(xs: Tensor, lengths: Tensor) -> Tensor:
    """Move the padding of a left-padded batch to the right, and set it to zero; undoes `end_together`.

    Args:
        xs: [B, L, D].
        lengths: valid frames of each row, [B], int64.

    Returns:
        [B, L, D]; every row's first valid frame is the first one.
    """
    padding = torch.arange(xs.size(1), device=xs.device) >= lengths[:, None]
    return _roll_rows(xs, lengths).masked_fill(padding.unsqueeze(-1), 0.0)


def _roll_rows(xs: Tensor, shifts: Tensor) -> Tensor:
    """Like torch.roll along the frames, by `shifts` [B] frames, one for each row."""
    source = (torch.arange(xs.size(1), device=xs.device) - shifts[:, None]) % xs.size(1)
    return xs.gather(1, source.unsqueeze(-1).expand_as(xs))
