"""An encoder in the form that leaves Python: tensors and whole numbers only, any length, any device.

`export_jit.py` compiles it to TorchScript and `export_onnx.py` to ONNX. The layers are the encoder's own; what is said
anew here is only the loop around them, where `encoder.py` keeps tables and caches that neither format can hold.

# B batch  L frames given  K frames looked at  P distances  N layers  H heads  W head width  D channels
"""

import math

import torch
from torch import Tensor, nn

from cosyvoice.transformer.decoding import KeysValues
from cosyvoice.transformer.embedding import LONGEST_WAVELENGTH
from cosyvoice.transformer.encoder import BaseEncoder
from cosyvoice.transformer.encoder_layer import EncoderLayer
from cosyvoice.transformer.options import CAUSAL


class PortableLayer(nn.Module):
    """One layer of an encoder, its keys and values as plain tensors.

    Args:
        layer: the layer; its weights are shared.
    """

    def __init__(self, layer: EncoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, x: Tensor, distances: Tensor, visible: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer.

        Args:
            x: [B, L, D].
            distances: sinusoids of the distances K - 1, K - 2, ..., [P, D] with P > K.
            visible: bool, [B or 1, L or 1, K or 1], True where a frame may look.
            keys: those of the frames before, [B, H, K - L, W]; K - L may be 0.
            values: likewise.

        Returns:
            The output [B, L, D], and the keys and values of all K frames.
        """
        output, present = self.layer(x, distances, visible, KeysValues(keys, values))
        return output, present.keys, present.values


class PortableEncoder(nn.Module):
    """An encoder that `torch.jit.script` and `torch.onnx.export` can read once its parts are traced.

    Args:
        encoder: shares its weights; should be in eval mode.
    """

    def __init__(self, encoder: BaseEncoder) -> None:
        super().__init__()
        attention = encoder.encoders[0].self_attn
        self.causal: bool = encoder.static_chunk_size == CAUSAL
        self.width: int = encoder.output_size()
        self.heads: int = attention.heads
        self.head_width: int = attention.head_width
        self.angle_step: float = -math.log(LONGEST_WAVELENGTH) / self.width
        self.embed = encoder.embed
        self.layers = nn.ModuleList(PortableLayer(layer) for layer in encoder.encoders)
        self.after_norm = encoder.after_norm

    def forward(
        self, xs: Tensor, xs_lens: Tensor, decoding_chunk_size: int = 0, num_decoding_left_chunks: int = -1
    ) -> tuple[Tensor, Tensor]:
        """Encode a right-padded batch, as `BaseEncoder.forward` does.

        Args:
            xs: [B, L, input_size]; converted to the weights' dtype.
            xs_lens: valid frames of each row, [B], integer.
            decoding_chunk_size: without effect.
            num_decoding_left_chunks: without effect.

        Returns:
            The output [B, L, D], unspecified at padding, and a bool mask [B, 1, L], True where valid.
        """
        batch, frames = xs.size(0), xs.size(1)
        place = torch.arange(frames, device=xs.device)
        valid = (place < xs_lens.to(xs.device).unsqueeze(1)).unsqueeze(1)
        visible, furthest_ahead = valid, frames
        if self.causal:
            visible, furthest_ahead = valid & (place <= place.unsqueeze(1)), 1
        visible = visible | ~visible.any(dim=-1, keepdim=True)  # an empty row sees its padding: nothing would be nan
        nothing = xs.new_zeros(len(self.layers), batch, self.heads, 0, 2 * self.head_width)
        hidden, _ = self.advance(xs, nothing, visible, frames - 1, furthest_ahead)
        return hidden, valid

    def advance(
        self, xs: Tensor, cache: Tensor, visible: Tensor, furthest_back: int, furthest_ahead: int
    ) -> tuple[Tensor, Tensor]:
        """Run all layers over new frames.

        Args:
            xs: [B, L, input_size].
            cache: keys beside values of the frames before, [N, B, H, K - L, 2 * W].
            visible: bool, [B or 1, L or 1, K or 1], True where a frame may look.
            furthest_back: largest distance back in time, in frames.
            furthest_ahead: largest distance ahead, >= 1: scores are brought in line by a column more than there are
                keys.

        Returns:
            The output [B, L, D] and the cache with the new frames.
        """
        dtype = self.after_norm.weight.dtype
        x = self.embed(xs.to(dtype))
        cache = cache.to(dtype)
        distances = self.sinusoids(furthest_back, furthest_back + furthest_ahead + 1, x).to(dtype)
        kept: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            past = cache[index]
            x, keys, values = layer(x, distances, visible, past[..., : self.head_width], past[..., self.head_width :])
            kept.append(torch.cat([keys, values], dim=-1))
        return self.after_norm(x), torch.stack(kept)

    def sinusoids(self, oldest: int, count: int, like: Tensor) -> Tensor:
        """Sinusoids of the distances `oldest`, `oldest - 1`, ..., made anew: a table would end somewhere.

        Args:
            oldest: in frames.
            count: P.
            like: a tensor whose device is wanted.

        Returns:
            [P, D], float32.
        """
        distance = oldest - torch.arange(count, device=like.device, dtype=torch.float32)
        channel = torch.arange(0, self.width, 2, device=like.device, dtype=torch.float32)
        angle = distance.unsqueeze(1) * torch.exp(channel * self.angle_step)
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # sine, cosine, sine, ...
