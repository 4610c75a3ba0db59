"""Write the flow's estimator and a model's three encoders as ONNX files, for runtimes other than PyTorch.

In:   a model folder with cosyvoice.yaml, llm.pt and flow.pt
Out:  <output_dir>/flow.decoder.estimator.fp32.onnx   x, mask, mu, t, spks, cond -> estimator_out; two rows, any length
      <output_dir>/llm.text_encoder.fp32.onnx         xs [B, L, C], xs_lens [B] -> ys [B, L, D], masks [B, 1, L]
      <output_dir>/flow.encoder.fp32.onnx             likewise
      <output_dir>/llm.llm.fp32.onnx                  xs [1, L, C], att_cache [N, H, K - L, 2 W], att_mask [1, L, K] ->
                                                      ys [1, L, D], next_att_cache [N, H, K, 2 W]
      Each is compared with the model on random inputs of several lengths; one that differs is not written.

    python CosyVoice/cosyvoice/bin/export_onnx.py --model_dir pretrained_models/CosyVoice-300M
    python CosyVoice/cosyvoice/bin/export_onnx.py --model_dir CosyVoice-tiny --output_dir /tmp/tiny-onnx

The second takes seconds. llm.llm is one step: it starts with a cache of no frames (K - L = 0), and att_mask says which
of the K frames each new one may see. Exit codes: 0 all good, 1 error, 2 wrong usage.

Source: FunAudioLLM/CosyVoice cosyvoice/bin/export_onnx.py @ ace7c47 (the estimator's file, names and axes; the encoders
are not exported there).
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cosyvoice.flow.decoder import ConditionalDecoder
from cosyvoice.transformer.encoder import BaseEncoder
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
OUTPUT_DIR = None  # str: where to write; none: into the model folder
PARTS = ("llm.text_encoder", "llm.llm", "flow.encoder", "flow.decoder.estimator")  # which files

_OPSET = 18
_ROWS = 2  # the estimator's rows are fixed at two, as published: with and without its condition
_PAST = 4  # frames in the cache of llm.llm while it is traced


class Graph(NamedTuple):
    """A module as ONNX shall hold it."""

    module: nn.Module  # takes and gives tensors only
    inputs: dict[str, dict[int, str]]  # {name: {axis: what varies there}}, in order
    outputs: dict[str, dict[int, str]]
    example: Callable[[int], tuple[Tensor, ...]]  # frames -> random inputs, in order
    comparable: Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]  # inputs, outputs -> what must agree


class _WholeSequence(nn.Module):
    """`PortableEncoder.forward` without its numbers."""

    def __init__(self, encoder: BaseEncoder) -> None:
        super().__init__()
        self.encoder = PortableEncoder(encoder)

    def forward(self, xs: Tensor, xs_lens: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(xs, xs_lens)


class _Step(nn.Module):
    """`PortableEncoder.forward_chunk` with the whole cache kept, whose length is then the offset."""

    def __init__(self, encoder: BaseEncoder) -> None:
        super().__init__()
        self.encoder = PortableEncoder(encoder)

    def forward(self, xs: Tensor, att_cache: Tensor, att_mask: Tensor) -> tuple[Tensor, Tensor]:
        frames = xs.size(1)
        hidden, cache = self.encoder.advance(
            xs, att_cache.unsqueeze(1), att_mask, att_cache.size(2) + frames - 1, frames
        )
        return hidden, cache.squeeze(1)


def describe(name: str, module: nn.Module) -> Graph:
    """Say how a part goes into ONNX.

    Args:
        name: one of `PARTS`.
        module: the part, in eval mode.

    Returns:
        Its graph.
    """
    if isinstance(module, ConditionalDecoder):
        return _estimator(module)
    assert isinstance(module, BaseEncoder), f"{name} is a {type(module).__name__}"
    return _step(module) if name == "llm.llm" else _whole_sequence(module)


def _estimator(estimator: ConditionalDecoder) -> Graph:
    bands = estimator.out_channels

    def example(frames: int) -> tuple[Tensor, ...]:
        x, mu, cond = torch.randn(3, _ROWS, bands, frames).unbind()
        return x, torch.ones(_ROWS, 1, frames), mu, torch.rand(_ROWS), torch.randn(_ROWS, bands), cond

    time = {2: "seq_len"}
    return Graph(
        estimator,
        {"x": time, "mask": time, "mu": time, "t": {}, "spks": {}, "cond": time},
        {"estimator_out": time},
        example,
        lambda inputs, outputs: outputs,
    )


def _whole_sequence(encoder: BaseEncoder) -> Graph:
    channels = cast(nn.Linear, encoder.embed.out[0]).in_features

    def example(frames: int) -> tuple[Tensor, ...]:
        return torch.randn(_ROWS, frames, channels), torch.tensor([frames, (frames + 1) // 2])

    def comparable(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        hidden, valid = outputs
        return hidden * valid.transpose(1, 2), valid  # padding is unspecified

    return Graph(
        _WholeSequence(encoder),
        {"xs": {0: "batch", 1: "frames"}, "xs_lens": {0: "batch"}},
        {"ys": {0: "batch", 1: "frames"}, "masks": {0: "batch", 2: "frames"}},
        example,
        comparable,
    )


def _step(encoder: BaseEncoder) -> Graph:
    step = _Step(encoder)
    layers, heads, head_width = len(step.encoder.layers), step.encoder.heads, step.encoder.head_width
    channels = cast(nn.Linear, encoder.embed.out[0]).in_features

    def example(frames: int) -> tuple[Tensor, ...]:
        past = _PAST if frames == TRACED_LENGTH else frames % 7  # 7 is one of the checked lengths: no past then
        return (
            torch.randn(1, frames, channels),
            torch.randn(layers, heads, past, 2 * head_width),
            torch.ones(1, frames, past + frames, dtype=torch.bool).tril(past),
        )

    return Graph(
        step,
        {"xs": {1: "frames"}, "att_cache": {2: "past"}, "att_mask": {1: "frames", 2: "seen"}},
        {"ys": {1: "frames"}, "next_att_cache": {2: "seen"}},
        example,
        lambda inputs, outputs: outputs,
    )


@torch.no_grad()
def write_onnx(graph: Graph, path: Path) -> None:
    """Write a graph with all its weights in one file.

    Args:
        graph: what to write.
        path: the file.
    """
    axes = {**graph.inputs, **graph.outputs}
    with quiet_tracing():
        torch.onnx.export(
            graph.module.eval(),
            graph.example(TRACED_LENGTH),
            str(path),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_axes={name: varying for name, varying in axes.items() if varying},
            opset_version=_OPSET,
            dynamo=False,  # the other exporter needs the package onnxscript
        )


@torch.no_grad()
def compare(graph: Graph, path: Path) -> list[Pair]:
    """Run a module and its ONNX file on the same random inputs, on the CPU.

    Args:
        graph: the source.
        path: what was made of it.

    Returns:
        What must agree, for every length of `CHECKED_LENGTHS`.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pairs: list[Pair] = []
    for frames in CHECKED_LENGTHS:
        inputs = graph.example(frames)
        wanted = graph.module(*inputs)
        feeds = {name: tensor.numpy() for name, tensor in zip(graph.inputs, inputs, strict=True)}
        got = [torch.from_numpy(output) for output in session.run(list(graph.outputs), feeds)]
        wanted = graph.comparable(inputs, wanted if isinstance(wanted, tuple) else (wanted,))
        pairs += map(Pair, wanted, graph.comparable(inputs, got))
    return pairs


def run(settings: Settings) -> None:
    """Export all that was asked for.

    Raises:
        OSError, ValueError: the message is for the person at the keyboard.
    """
    if settings.model_dir is None:
        raise ValueError("--model_dir is missing: name the folder with cosyvoice.yaml, llm.pt and flow.pt")
    output_dir = Path(settings.output_dir or settings.model_dir)
    torch.manual_seed(0)
    failures = []
    for name, module in load_modules(settings.model_dir, settings.parts, PARTS):
        graph = describe(name, module)
        path = output_dir / f"{name}.fp32.onnx"
        try:
            with atomic_path(path) as temporary:
                write_onnx(graph, temporary)
                difference = check_agreement(path.name, compare(graph, temporary), torch.float32)
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, largest difference {difference:.1e} (relative)")
        except ExportError as error:  # the other files may be good all the same
            failures.append(str(error))
    if failures:
        raise ExportError("; ".join(failures))


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    return run_script(__file__, globals(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
