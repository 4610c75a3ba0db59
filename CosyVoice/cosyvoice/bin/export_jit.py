"""Write a model's three encoders as TorchScript archives, which CosyVoice(..., load_jit=True) reads.

In:   a model folder with cosyvoice.yaml, llm.pt and flow.pt
Out:  <output_dir>/llm.text_encoder.{fp32,fp16}.zip, llm.llm.{fp32,fp16}.zip, flow.encoder.{fp32,fp16}.zip
      Each is compared with the model on random inputs of several lengths; one that differs is not written.

    python CosyVoice/cosyvoice/bin/export_jit.py --model_dir pretrained_models/CosyVoice-300M
    python CosyVoice/cosyvoice/bin/export_jit.py --model_dir CosyVoice-tiny --output_dir /tmp/tiny-jit

The second takes seconds. Exit codes: 0 all good, 1 error, 2 wrong usage.

Source: FunAudioLLM/CosyVoice cosyvoice/bin/export_jit.py @ ace7c47 (names of the files and what they take).
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cosyvoice.transformer.encoder import BaseEncoder
from cosyvoice.transformer.options import CAUSAL
from cosyvoice.transformer.portable import PortableEncoder
from cosyvoice.utils.atomic import atomic_path
from cosyvoice.utils.export import (
    CHECKED_LENGTHS,
    TRACED_LENGTH,
    ExportError,
    Pair,
    check_agreement,
    load_modules,
    quiet_tracing,
)
from cosyvoice.utils.settings import Settings, run_script

MODEL_DIR = None  # str: model folder to export (required)
OUTPUT_DIR = None  # str: where to write; none: into the model folder, where load_jit looks
PARTS = ("llm.text_encoder", "llm.llm", "flow.encoder")  # which encoders
PRECISIONS = ("fp32", "fp16")  # which archives of each

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_ROWS = 3  # of the random batches; the encoders' input layers take one row as well
_PAST = 4  # frames in the cache while a layer is traced


class PublishedEncoder(PortableEncoder):
    """The two methods that callers of the archives know."""

    @torch.jit.export
    def forward_chunk(
        self,
        xs: Tensor,
        offset: int,
        required_cache_size: int,
        att_cache: Tensor,
        cnn_cache: Tensor,
        att_mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the next frames of one sequence, as `BaseEncoder.forward_chunk` does.

        Args:
            xs: [1, L, input_size]; converted to the weights' dtype.
            offset: frames before these, normally the number in the cache.
            required_cache_size: frames to return in the cache: < 0 all, else this many of the last ones.
            att_cache: keys beside values of the frames before, [N, H, K - L, 2 * W]; empty at the start.
            cnn_cache: without effect.
            att_mask: bool [1, L, K] or broadcastable, True where a frame may look; empty: everywhere.

        Returns:
            The output [1, L, D], the next `att_cache`, and an empty `cnn_cache`.

        Raises:
            ValueError: an offset that does not match the cache.
        """
        frames = xs.size(1)
        if att_cache.size(0) == 0:
            att_cache = xs.new_zeros(len(self.layers), self.heads, 0, 2 * self.head_width)
        if att_mask.numel() == 0:
            att_mask = torch.ones(1, 1, 1, dtype=torch.bool, device=xs.device)
        keys, positioned = frames + att_cache.size(2), offset + frames
        if positioned != keys and positioned != 1:
            raise ValueError("offset does not match the frames in att_cache: keep the whole cache and add every chunk")
        hidden, cache = self.advance(xs, att_cache.unsqueeze(1), att_mask[:, :, :keys], positioned - 1, frames)
        cache = cache.squeeze(1)
        if required_cache_size >= 0:
            cache = cache[:, :, max(keys - required_cache_size, 0) :]
        return hidden, cache, xs.new_zeros(len(self.layers), 0, 0, 0)


@torch.no_grad()
def compile_encoder(encoder: BaseEncoder, dtype: torch.dtype) -> torch.jit.ScriptModule:
    """Turn an encoder into TorchScript.

    Its layers are traced, and the loop around them is compiled: a trace alone would fix the device and the first step.

    Args:
        encoder: in eval mode; left as it is.
        dtype: of the archive's weights.

    Returns:
        A module with `forward` and `forward_chunk` as published.
    """
    portable = PublishedEncoder(copy.deepcopy(encoder)).eval()
    heads, head_width = portable.heads, portable.head_width
    x = torch.randn(_ROWS, TRACED_LENGTH, portable.width)
    distances = torch.randn(_PAST + 2 * TRACED_LENGTH, portable.width)
    visible = torch.ones(_ROWS, TRACED_LENGTH, _PAST + TRACED_LENGTH, dtype=torch.bool)
    past = torch.randn(2, _ROWS, heads, _PAST, head_width).unbind()
    with quiet_tracing():
        portable.embed = torch.jit.trace(portable.embed, torch.randn(_ROWS, TRACED_LENGTH, input_size(encoder)))
        portable.layers = nn.ModuleList(
            torch.jit.trace(layer, (x, distances, visible, *past), check_trace=False) for layer in portable.layers
        )
        return torch.jit.freeze(torch.jit.script(portable.to(dtype)), preserved_attrs=["forward_chunk"])


@torch.no_grad()
def compare(encoder: BaseEncoder, script: torch.jit.ScriptModule) -> Iterator[Pair]:
    """Run an encoder and its archive on the same random inputs.

    Args:
        encoder: the source.
        script: what was made of it.

    Yields:
        Outputs of padded batches, and where the encoder is causal those of a prefix, of single frames and their caches.
    """
    random = torch.Generator().manual_seed(0)
    for frames in CHECKED_LENGTHS:
        xs = torch.randn(_ROWS, frames, input_size(encoder), generator=random)
        lengths = torch.tensor([frames, max(frames // 2, 1), 1])
        wanted, valid = encoder(xs, lengths)
        got, got_valid = script(xs, lengths, 0, -1)
        yield Pair(valid, got_valid)
        inside = valid.transpose(1, 2)
        yield Pair(wanted * inside, got * inside)
    if encoder.static_chunk_size != CAUSAL:
        return
    nothing = torch.zeros(0, 0, 0, 0)
    wanted_cache = got_cache = nothing
    offset = 0
    for frames in (7, 1, 1, 3):
        xs = torch.randn(1, frames, input_size(encoder), generator=random)
        visible = torch.ones(1, frames, offset + frames, dtype=torch.bool).tril(offset)
        wanted, wanted_cache, _ = encoder.forward_chunk(xs, offset, -1, wanted_cache, nothing, visible)
        got, got_cache, _ = script.forward_chunk(xs, offset, -1, got_cache, nothing, visible)
        yield Pair(wanted, got)
        yield Pair(wanted_cache, got_cache)
        offset += frames


def input_size(encoder: BaseEncoder) -> int:
    """Channels that an encoder takes."""
    return cast(nn.Linear, encoder.embed.out[0]).in_features


def run(settings: Settings) -> None:
    """Export all that was asked for.

    Raises:
        OSError, ValueError: the message is for the person at the keyboard.
    """
    if settings.model_dir is None:
        raise ValueError("--model_dir is missing: name the folder with cosyvoice.yaml, llm.pt and flow.pt")
    unknown = [name for name in settings.precisions if name not in _DTYPES]
    if unknown:
        raise ValueError(f"PRECISIONS has {', '.join(unknown)}; expected some of {', '.join(_DTYPES)}")
    output_dir = Path(settings.output_dir or settings.model_dir)
    failures = []
    for name, encoder in load_modules(settings.model_dir, settings.parts, PARTS):
        assert isinstance(encoder, BaseEncoder), f"{name} is a {type(encoder).__name__}"
        for precision in settings.precisions:
            path = output_dir / f"{name}.{precision}.zip"
            try:
                with atomic_path(path) as temporary, quiet_tracing():
                    # Given a path instead, it would put the temporary name into the archive.
                    temporary.write_bytes(compile_encoder(encoder, _DTYPES[precision]).save_to_buffer())
                    pairs = compare(encoder, torch.jit.load(str(temporary)))
                    difference = check_agreement(path.name, pairs, _DTYPES[precision])
                print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, largest difference {difference:.1e} (relative)")
            except ExportError as error:  # the other archives may be good all the same
                failures.append(str(error))
    if failures:
        raise ExportError("; ".join(failures))


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    return run_script(__file__, globals(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
