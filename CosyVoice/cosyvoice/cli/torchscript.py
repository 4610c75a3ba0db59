"""Lets the released TorchScript archives (llm.llm.fp16.zip ...) stand where our own encoders stand."""

from pathlib import Path

import torch
from torch import Tensor, nn


class ScriptedCache:
    """The growing cache of `ScriptedEncoder.step`."""

    def __init__(self, device: torch.device) -> None:
        self.frames = 0
        self.attention = torch.zeros(0, 0, 0, 0, device=device)
        self.convolution = torch.zeros(0, 0, 0, 0, device=device)


class ScriptedEncoder(nn.Module):
    """A released archive behind the interface of `cosyvoice.transformer.encoder.BaseEncoder`.

    Args:
        path: a TorchScript archive that `export_jit.py` made.
        width: its output's channels, D.
        device: where to load it.

    Raises:
        FileNotFoundError: there is no such archive.
        ValueError: the file is none.

    Source: FunAudioLLM/CosyVoice cosyvoice/bin/export_jit.py and llm/llm.py @ ace7c47.
    """

    def __init__(self, path: str | Path, width: int, device: torch.device) -> None:
        super().__init__()
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"load_jit needs {path}, which is not there; make it: python CosyVoice/cosyvoice/bin/export_jit.py "
                f"--model_dir {Path(path).parent}, or load the model with load_jit=False"
            )
        try:
            self.script = torch.jit.load(str(path), map_location=device)
        except RuntimeError as error:
            raise ValueError(f"{path} is no TorchScript archive: {error}") from error
        self.width = width

    def output_size(self) -> int:
        """Width of the output, D."""
        return self.width

    def forward(
        self, xs: Tensor, xs_lens: Tensor, decoding_chunk_size: int = 0, num_decoding_left_chunks: int = -1
    ) -> tuple[Tensor, Tensor]:
        """Encode a right-padded batch.

        Args:
            xs: [B, L, input_size].
            xs_lens: valid frames of each row, [B].
            decoding_chunk_size: as the archive takes it.
            num_decoding_left_chunks: likewise.

        Returns:
            The output [B, L, D] and a bool mask [B, 1, L], True where valid.
        """
        return self.script(xs, xs_lens, decoding_chunk_size, num_decoding_left_chunks)

    def forward_chunk(
        self,
        xs: Tensor,
        offset: int,
        required_cache_size: int,
        att_cache: Tensor,
        cnn_cache: Tensor,
        att_mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the next frames of one sequence, as the published encoder does.

        Args:
            xs: [1, L, input_size].
            offset: frames before these.
            required_cache_size: frames to keep; < 0 keeps all.
            att_cache: keys beside values of the frames before.
            cnn_cache: the convolutions' cache, empty.
            att_mask: bool, [1, L, L] or [1, 1, 1], True where a frame may look.

        Returns:
            The output [1, L, D] and both caches.
        """
        return self.script.forward_chunk(xs, offset, required_cache_size, att_cache, cnn_cache, att_mask)

    def new_cache(self, batch_size: int, max_frames: int, device: torch.device) -> ScriptedCache:
        """Start the state of `step`.

        Args:
            batch_size: must be 1: the archive decodes one sequence.
            max_frames: without effect, as the cache grows.
            device: where the weights are.

        Returns:
            An empty cache.

        Raises:
            ValueError: `batch_size` is not 1.
        """
        if batch_size != 1:
            raise ValueError(f"a TorchScript archive decodes one sequence; got {batch_size}: load with load_jit=False")
        return ScriptedCache(device)

    def step(self, xs: Tensor, cache: ScriptedCache) -> Tensor:
        """Encode the next frames of the sequence.

        Args:
            xs: [1, L, input_size].
            cache: made by `new_cache`; the new frames are added to it.

        Returns:
            [1, L, D].
        """
        frames = xs.shape[1]
        visible = torch.ones(1, frames, frames, dtype=torch.bool, device=xs.device).tril()
        hidden, cache.attention, cache.convolution = self.forward_chunk(
            xs, cache.frames, -1, cache.attention, cache.convolution, visible
        )
        cache.frames += frames
        return hidden
