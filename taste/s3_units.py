"""Turns recordings into S3 units with a model folder's `speech_tokenizer_v1.onnx`.

Two backends read the same file and give the same units: `s3tokenizer` (its PyTorch model, batched, the default) and
`onnxruntime` (the published way, one window at a time, the reference).

A recording of N samples at 16 kHz has `ceil(floor(N / 160) / 2)` units. The model takes 30 s at most: longer recordings
go through it in windows of 30 s that overlap by 4 s, and each of two neighbours keeps its half of the overlap.
"""

# B windows in a batch   N samples, 16 kHz   T mel frames, 100 Hz   S S3 units, 50 Hz   D channels   K codes

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cosyvoice.utils.rates import S3_UNITS_PER_SECOND, SPEECH_SAMPLE_RATE_HZ
from taste.audio import AudioError, read_audio

if TYPE_CHECKING:
    from s3tokenizer.model import ModelConfig, S3Tokenizer

HOP_SAMPLES = 160
FRAMES_PER_UNIT = SPEECH_SAMPLE_RATE_HZ // HOP_SAMPLES // S3_UNITS_PER_SECOND
SHORTEST_SAMPLES = HOP_SAMPLES  # one mel frame, one unit
WINDOW_FRAMES = 3000  # 30 s, the model's positions
OVERLAP_FRAMES = 400  # 4 s
HEAD_WIDTH = 64  # channels of an attention head in every Whisper encoder, which the tokenizer is; no weight tells it
BACKENDS = ("s3tokenizer", "onnxruntime")
MODEL_NAME = "speech_tokenizer_v1"


class Window(NamedTuple):
    """A stretch of a recording's mel, and which of its units count."""

    first_frame: int
    end_frame: int  # exclusive
    first_unit: int  # of those kept, counted from the window's own first
    end_unit: int  # exclusive


def count_units(num_samples: int) -> int:
    """The number of units of a recording.

    Args:
        num_samples: its length at 16 kHz.

    Returns:
        ceil(floor(num_samples / 160) / 2).
    """
    return _units_of(num_samples // HOP_SAMPLES)


def split_into_windows(num_frames: int) -> list[Window]:
    """Cut a recording's mel into windows that the model can take, and say what to keep of each.

    As in s3tokenizer 0.3.0, with one difference: it starts one more window wherever the next would begin before the end
    of the recording, even if the last one has reached that end already, and then drops up to 2 s of units between the
    two (recordings whose last window would be shorter than the overlap). Here the last window is the first that reaches
    the end, and the kept units always number ceil(num_frames / 2).

    Args:
        num_frames: length of the mel, 100 Hz.

    Returns:
        the windows in order; the kept units of all of them, joined, are the recording's.

    Source: xingchensong/S3Tokenizer s3tokenizer/model.py and utils.py @ 2abe1c5.
    """
    stride = WINDOW_FRAMES - OVERLAP_FRAMES
    dropped_units = OVERLAP_FRAMES // 2 // FRAMES_PER_UNIT
    windows = []
    first_frame = 0
    while True:
        end_frame = min(first_frame + WINDOW_FRAMES, num_frames)
        is_last = end_frame == num_frames
        num_units = _units_of(end_frame - first_frame)
        windows.append(
            Window(
                first_frame,
                end_frame,
                first_unit=dropped_units if first_frame else 0,
                end_unit=num_units if is_last else num_units - dropped_units,
            )
        )
        if is_last:
            return windows
        first_frame += stride


def read_recording(path: str | os.PathLike[str]) -> Tensor:
    """Read a recording as the extractors want it.

    Args:
        path: wav, flac, mp3 or ogg, any rate, any number of channels.

    Returns:
        waveform [N], float32, 16 kHz.

    Raises:
        AudioError: as `taste.audio.read_audio`, or the recording is shorter than 160 samples (10 ms).
    """
    waveform = read_audio(path, SPEECH_SAMPLE_RATE_HZ).waveform
    if len(waveform) < SHORTEST_SAMPLES:
        raise AudioError(f"{path}: {len(waveform)} samples at 16 kHz are too few; expected {SHORTEST_SAMPLES} or more")
    return waveform


class UnitExtractor(ABC):
    """Recordings in, units out; what the two backends share."""

    device: torch.device

    def extract(self, waveforms: Sequence[Tensor]) -> list[list[int]]:
        """Give each recording its units.

        The mel is scaled by its own recording's loudest point before anything is cut or padded, so a recording's units
        do not depend on what else is in the batch.

        Args:
            waveforms: recordings [N], float32, 16 kHz, N >= 160.

        Returns:
            for each recording `count_units(N)` codes.
        """
        from cosyvoice.utils.audio import whisper_log_mel

        pieces: list[Tensor] = []
        windows_of = []
        for waveform in waveforms:
            mel = whisper_log_mel(waveform.to(self.device), self.num_mels)  # [128, T]
            windows = split_into_windows(mel.shape[1])
            windows_of.append(windows)
            pieces += [mel[:, window.first_frame : window.end_frame] for window in windows]
        encoded = iter(self._encode(pieces))
        return [_join(windows, encoded) for windows in windows_of]

    @property
    @abstractmethod
    def num_mels(self) -> int:
        """Mel bins that the model wants."""

    @abstractmethod
    def _encode(self, mels: Sequence[Tensor]) -> list[list[int]]:
        """Give each mel [128, T], T <= 3000, its ceil(T / 2) units."""


class TorchUnitExtractor(UnitExtractor):
    """s3tokenizer's PyTorch model, several windows at once.

    Args:
        onnx_path: `speech_tokenizer_v1.onnx` of a model folder, of any size.
        device: where the model runs, in float32.
        batch_size: windows at once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no S3 tokenizer v1.
    """

    def __init__(self, onnx_path: str | os.PathLike[str], device: torch.device, batch_size: int) -> None:
        self.device = device
        self.batch_size = batch_size
        self.model = load_s3_tokenizer(onnx_path).to(device)

    @property
    def num_mels(self) -> int:
        """Mel bins that the model wants."""
        return self.model.config.n_mels

    @torch.inference_mode()
    def _encode(self, mels: Sequence[Tensor]) -> list[list[int]]:
        from s3tokenizer import padding

        units: list[list[int]] = []
        for start in range(0, len(mels), self.batch_size):
            batch, lengths = padding(list(mels[start : start + self.batch_size]))
            # cuDNN's TF32 convolutions, its default, would move units away from the reference's.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                codes, code_lengths = self.model.quantize(batch, lengths.to(self.device))
            rows = zip(codes.tolist(), code_lengths.tolist(), strict=True)
            units += [row[:length] for row, length in rows]
        return units


class OnnxUnitExtractor(UnitExtractor):
    """onnxruntime on the file itself, one window at a time.

    Args:
        onnx_path: `speech_tokenizer_v1.onnx` of a model folder.
        device: "cuda" uses onnxruntime's CUDA provider where it has one.
        num_threads: windows at work at the same time, each on one CPU thread.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no ONNX model.
    """

    device = torch.device("cpu")  # of the mel

    def __init__(self, onnx_path: str | os.PathLike[str], device: torch.device, num_threads: int) -> None:
        from cosyvoice.utils.onnx_session import OnnxSession

        self.num_threads = num_threads
        self.session = OnnxSession(Path(onnx_path), device, threads=1)
        _ = self.session.provider  # opens the file: a bad one is an error here, not in the middle of a run

    @property
    def num_mels(self) -> int:
        """Mel bins that the model wants: the first version of the tokenizer has one size."""
        return 128

    def _encode(self, mels: Sequence[Tensor]) -> list[list[int]]:
        with ThreadPoolExecutor(self.num_threads) as pool:
            return list(pool.map(self._encode_one, mels))

    def _encode_one(self, mel: Tensor) -> list[int]:
        length = np.array([mel.shape[1]], dtype=np.int32)
        return self.session.run(mel[None].numpy(), length).flatten().tolist()


def open_extractor(
    onnx_path: str | os.PathLike[str],
    *,
    backend: str = "s3tokenizer",
    device: torch.device | None = None,
    batch_size: int = 16,
    num_threads: int = 1,
) -> UnitExtractor:
    """Open a speech tokenizer.

    Args:
        onnx_path: `speech_tokenizer_v1.onnx` of a model folder, of any size.
        backend: `s3tokenizer` or `onnxruntime`.
        device: where it runs; None is the CPU.
        batch_size: windows at once (s3tokenizer).
        num_threads: windows at work at the same time (onnxruntime).

    Returns:
        the extractor.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no S3 tokenizer v1, or there is no such backend.
    """
    device = device or torch.device("cpu")
    if backend == "s3tokenizer":
        return TorchUnitExtractor(onnx_path, device, batch_size)
    if backend == "onnxruntime":
        return OnnxUnitExtractor(onnx_path, device, num_threads)
    raise ValueError(f"there is no backend {backend!r}; expected one of {', '.join(BACKENDS)}")


def load_s3_tokenizer(onnx_path: str | os.PathLike[str]) -> "S3Tokenizer":
    """Read an ONNX file into s3tokenizer's model, whatever its size.

    `s3tokenizer.load_model` is not used: it knows the released size only, and takes the version from the path.

    Args:
        onnx_path: `speech_tokenizer_v1.onnx`.

    Returns:
        the model in eval mode, float32, on the CPU, loaded strictly.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no S3 tokenizer v1 (what is wrong is in the message).
    """
    from google.protobuf.message import DecodeError
    from s3tokenizer.model import S3Tokenizer
    from s3tokenizer.utils import onnx2torch

    if not Path(onnx_path).is_file():
        raise FileNotFoundError(f"{onnx_path}: there is no such file; fetch it with: python setup_cosyvoice.py")
    try:
        weights = onnx2torch(os.fspath(onnx_path))
        model = S3Tokenizer(MODEL_NAME, _infer_config(weights))
        model.load_state_dict(weights, strict=True)
    except (DecodeError, AssertionError, KeyError, RuntimeError) as error:  # what s3tokenizer raises for other files
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{onnx_path}: not an S3 tokenizer v1 ({problem}); verify the model folder") from error
    return model.eval()


def _infer_config(weights: Mapping[str, Tensor]) -> "ModelConfig":
    """The sizes of the model that these weights belong to."""
    from s3tokenizer.model import ModelConfig

    width, num_mels, _ = weights["encoder.conv1.weight"].shape
    return ModelConfig(
        n_mels=num_mels,
        n_audio_ctx=weights["encoder.positional_embedding"].shape[0],
        n_audio_state=width,
        n_audio_head=max(1, width // HEAD_WIDTH),
        n_audio_layer=len({key.split(".")[2] for key in weights if key.startswith("encoder.blocks.")}),
        n_codebook_size=weights["quantizer._codebook.embed"].shape[0],
        use_sdpa=True,
    )


def _units_of(num_frames: int) -> int:
    return -(-num_frames // FRAMES_PER_UNIT)


def _join(windows: Sequence[Window], encoded: Iterator[list[int]]) -> list[int]:
    """Take as many encoded windows as the recording has, and string together what is kept of each."""
    units: list[int] = []
    for window in windows:
        units += next(encoded)[window.first_unit : window.end_unit]
    return units
