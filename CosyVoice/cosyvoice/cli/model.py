"""Turns a front end's output into sound: language model, flow, vocoder, whole or in overlapping chunks.

S S3 tokens, 50 Hz   F mel frames, 86.13 Hz   N samples, 22.05 kHz
"""

import importlib.util
import uuid as uuid_module
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cosyvoice.cli.token_stream import Emit, TokenStream
from cosyvoice.cli.torchscript import ScriptedEncoder
from cosyvoice.flow.flow import MaskedDiffWithXvec
from cosyvoice.hifigan.generator import HiFTGenerator
from cosyvoice.llm.llm import TransformerLM
from cosyvoice.utils.common import fade_in_out
from cosyvoice.utils.model_dir import load_weights
from cosyvoice.utils.rates import MEL_FRAMES_PER_SECOND, MEL_HOP_SAMPLES

MEL_BINS = 80
SPEAKER_WIDTH = 192
MAX_SPEED = 8.0  # up to here a chunk of two seconds keeps more mel frames than the vocoder's cache

Speech = dict[str, Tensor]  # {"tts_speech": [1, N] float32 on the CPU}, the published shape of a result


class VocoderCache(NamedTuple):
    """The end of the chunk before, from which the vocoder goes on."""

    mel: Tensor  # [1, 80, 20]
    source: Tensor  # [1, 1, 20 * 256]
    speech: Tensor  # [1, 20 * 256], not handed out yet


class FlowPrompt(NamedTuple):
    """The voice that the flow speaks with."""

    token: Tensor  # [1, P], S3 tokens; P may be 0
    feat: Tensor  # [1, F_p, 80]; F_p may be 0
    embedding: Tensor  # [1, 192]


@dataclass
class Session:
    """What one utterance carries from chunk to chunk."""

    mel_overlap: Tensor | None = None  # [1, 80, 34]: the end of the flow's last chunk, not vocoded yet
    flow_cache: Tensor | None = None  # noise and hidden states of the prompt and of the overlap
    vocoder_cache: VocoderCache | None = None


def even_window(length: int) -> np.ndarray:
    """A Hamming window whose rising half and falling half add up to 1.

    Args:
        length: of both halves together, even.

    Returns:
        weights, [length], float64.
    """
    rise, fall = np.hamming(length).reshape(2, -1)
    return np.concatenate([rise, fall]) / np.tile(rise + fall, 2)


class CosyVoiceModel:
    """Language model, flow and vocoder.

    Args:
        llm: text and prompt -> S3 tokens.
        flow: S3 tokens and prompt -> mel.
        hift: mel -> sound.
        fp16: run the language model in half precision; CUDA only. The flow and the vocoder stay in float32, as the
            300M flow gives NaN in fp16 (FunAudioLLM/CosyVoice issues 999 and 1113).
        device: where to run; None takes CUDA if there is one.
        even_seams: cross-fade streamed chunks by weights that add up to 1. The published ones, Hamming windows, which
            False gives, add up to as much as 1.08: log-mels at a seam become that much larger in size, so quieter.

    Source: FunAudioLLM/CosyVoice cosyvoice/cli/model.py @ ace7c47.
    """

    def __init__(
        self,
        llm: TransformerLM,
        flow: MaskedDiffWithXvec,
        hift: HiFTGenerator,
        fp16: bool = False,
        *,
        device: str | torch.device | None = None,
        even_seams: bool = True,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if fp16 and self.device.type != "cuda":
            warnings.warn(f"fp16 needs CUDA; running on {self.device} in float32", stacklevel=2)
            fp16 = False
        self.fp16 = fp16
        self.llm = llm.to(self.device).eval()
        self.flow = flow.to(self.device).eval()
        self.hift = hift.to(self.device).eval()
        # One for all utterances: PyTorch's allocator keeps memory for each stream, and shares none of it between them.
        self.llm_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

        # A chunk is `hop` new tokens and an overlap; both ends of every seam are cross-faded, first the mel, then the
        # sound. The vocoder sees the last 20 mel frames of the chunk before again.
        self.token_min_hop_len = 2 * self.flow.input_frame_rate
        self.token_max_hop_len = 4 * self.flow.input_frame_rate
        self.stream_scale_factor = 1  # >= 1; above 1 chunks grow up to the maximum
        self.token_overlap_len = 20
        self.mel_overlap_len = int(self.token_overlap_len / self.flow.input_frame_rate * MEL_FRAMES_PER_SECOND)
        window = even_window if even_seams else np.hamming
        self.mel_window = window(2 * self.mel_overlap_len)
        self.mel_cache_len = 20
        self.source_cache_len = self.mel_cache_len * MEL_HOP_SAMPLES
        self.speech_window = window(2 * self.source_cache_len)
        self.sessions: dict[str, Session] = {}

    def load(self, llm_model: str | Path, flow_model: str | Path, hift_model: str | Path) -> None:
        """Load the three state dicts, strictly.

        Args:
            llm_model: llm.pt.
            flow_model: flow.pt.
            hift_model: hift.pt, or the checkpoint of a whole HiFi-GAN.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file cannot be read, or does not fit its module.
        """
        for module, path in ((self.llm, llm_model), (self.flow, flow_model), (self.hift, hift_model)):
            load_weights(module, path)

    def load_jit(
        self, llm_text_encoder_model: str | Path, llm_llm_model: str | Path, flow_encoder_model: str | Path
    ) -> None:
        """Put the released TorchScript archives in the place of the three encoders.

        Args:
            llm_text_encoder_model: llm.text_encoder.fp32.zip or .fp16.zip.
            llm_llm_model: llm.llm.fp32.zip or .fp16.zip.
            flow_encoder_model: flow.encoder.fp32.zip.

        Raises:
            FileNotFoundError: an archive is missing.
            ValueError: a file is no TorchScript archive.
        """
        for owner, name, path in (
            (self.llm, "text_encoder", llm_text_encoder_model),
            (self.llm, "llm", llm_llm_model),
            (self.flow, "encoder", flow_encoder_model),
        ):
            setattr(owner, name, ScriptedEncoder(path, getattr(owner, name).output_size(), self.device))

    def load_trt(self, flow_decoder_onnx_model: str | Path) -> None:
        """Refuse, and say what TensorRT would need.

        Args:
            flow_decoder_onnx_model: flow.decoder.estimator.fp32.onnx, from which an engine would be built.

        Raises:
            NotImplementedError: always.
        """
        needs = {
            "a CUDA device": self.device.type == "cuda",
            "the package tensorrt": importlib.util.find_spec("tensorrt") is not None,
            str(flow_decoder_onnx_model): Path(flow_decoder_onnx_model).is_file(),
        }
        found = ", ".join(f"{need} ({'found' if there else 'not found'})" for need, there in needs.items())
        raise NotImplementedError(
            f"load_trt: this project runs the flow in PyTorch. A TensorRT engine would need {found}, and code that "
            "feeds it, which is not part of this project; use load_trt=False"
        )

    def token2wav(
        self,
        token: Tensor,
        prompt_token: Tensor,
        prompt_feat: Tensor,
        embedding: Tensor,
        uuid: str,
        finalize: bool = False,
        speed: float = 1.0,
    ) -> Tensor:
        """Turn one chunk of S3 tokens into sound; what the next chunk needs is kept under `uuid`.

        Args:
            token: S3 tokens, [1, S], with those that overlap the next chunk at the end.
            prompt_token: the prompt's S3 tokens, [1, P].
            prompt_feat: the prompt's mel, [1, F_p, 80].
            embedding: speaker vector, [1, 192].
            uuid: which utterance; a name not seen before starts one.
            finalize: this is the last chunk, or the whole: nothing is held back, and the utterance is forgotten.
            speed: 2.0 speaks twice as fast.

        Returns:
            The sound that is final, [1, N], float32 on the CPU.

        Raises:
            ValueError: there is no token, or `speed` is out of range.
        """
        _check_speed(speed)
        session = self.sessions.setdefault(uuid, Session())
        if finalize:
            del self.sessions[uuid]
        with torch.inference_mode():
            mel = self._mel(session, token, prompt_token, prompt_feat, embedding, finalize)
            if speed != 1.0:
                mel = F.interpolate(mel, size=max(1, int(mel.shape[2] / speed)), mode="linear")
            speech = self._vocode(session, mel, finalize).cpu()
        return speech.clone()  # made outside inference mode, so that the caller may change it in place

    def _mel(
        self,
        session: Session,
        token: Tensor,
        prompt_token: Tensor,
        prompt_feat: Tensor,
        embedding: Tensor,
        finalize: bool,
    ) -> Tensor:
        """The chunk's mel [1, 80, F], cross-faded with the one before, the overlap with the next one held back."""
        mel, session.flow_cache = self.flow.inference(
            token=token.to(self.device, torch.int32),
            token_len=self._length(token),
            prompt_token=prompt_token.to(self.device),
            prompt_token_len=self._length(prompt_token),
            prompt_feat=prompt_feat.to(self.device),
            prompt_feat_len=self._length(prompt_feat),
            embedding=embedding.to(self.device),
            flow_cache=session.flow_cache,
        )
        if session.mel_overlap is not None:
            mel = fade_in_out(mel, session.mel_overlap, self.mel_window)
        if finalize:
            return mel
        session.mel_overlap = mel[:, :, -self.mel_overlap_len :]
        return mel[:, :, : -self.mel_overlap_len]

    def _vocode(self, session: Session, mel: Tensor, finalize: bool) -> Tensor:
        """The chunk's sound [1, N], cross-faded with the one before, the end held back for the next one."""
        before = session.vocoder_cache
        if before is not None:
            mel = torch.cat([before.mel, mel], dim=2)
        speech, source = self.hift.inference(speech_feat=mel, cache_source=before.source if before else None)
        if before is not None:
            speech = fade_in_out(speech, before.speech, self.speech_window)
        if finalize:
            return speech
        session.vocoder_cache = VocoderCache(
            mel[:, :, -self.mel_cache_len :],
            source[:, :, -self.source_cache_len :],
            speech[:, -self.source_cache_len :],
        )
        return speech[:, : -self.source_cache_len]

    def tts(
        self,
        text: Tensor | None = None,
        flow_embedding: Tensor | None = None,
        llm_embedding: Tensor | None = None,
        prompt_text: Tensor | None = None,
        llm_prompt_speech_token: Tensor | None = None,
        flow_prompt_speech_token: Tensor | None = None,
        prompt_speech_feat: Tensor | None = None,
        source_speech_token: Tensor | None = None,
        stream: bool = False,
        speed: float = 1.0,
        *,
        text_len: Tensor | None = None,
        prompt_text_len: Tensor | None = None,
        llm_prompt_speech_token_len: Tensor | None = None,
        flow_prompt_speech_token_len: Tensor | None = None,
        prompt_speech_feat_len: Tensor | None = None,
        source_speech_token_len: Tensor | None = None,
    ) -> Iterator[Speech]:
        """Speak one sentence, or re-voice one recording.

        Args:
            text: tokens of what to say, [1, T].
            flow_embedding: speaker vector for the flow, [1, 192]; required.
            llm_embedding: speaker vector for the language model, [1, 192]; None leaves it out.
            prompt_text: tokens of what the prompt says, or of an instruction, [1, T].
            llm_prompt_speech_token: the prompt's S3 tokens for the language model, [1, S].
            flow_prompt_speech_token: the same for the flow, [1, S].
            prompt_speech_feat: the prompt's mel, [1, F, 80].
            source_speech_token: S3 tokens to re-voice, [1, S]; the language model is then not asked.
            stream: yield chunks of about two seconds while the language model goes on.
            speed: 2.0 speaks twice as fast.
            text_len: T of `text`, [1]. Rows are not padded, so each length repeats its tensor's shape.
            prompt_text_len: likewise.
            llm_prompt_speech_token_len: likewise.
            flow_prompt_speech_token_len: likewise.
            prompt_speech_feat_len: likewise.
            source_speech_token_len: likewise.

        Yields:
            {"tts_speech": [1, N] float32 on the CPU}: one whole, or one for each chunk.

        Raises:
            ValueError: an argument is missing or empty, a length disagrees with its tensor, or `speed` is out of range.
            Exception: whatever the language model raised, in its own thread or not.
        """
        _check_speed(speed)
        if flow_embedding is None:
            raise ValueError("tts needs flow_embedding, the speaker vector")
        for name, tensor, length in (
            ("text", text, text_len),
            ("prompt_text", prompt_text, prompt_text_len),
            ("llm_prompt_speech_token", llm_prompt_speech_token, llm_prompt_speech_token_len),
            ("flow_prompt_speech_token", flow_prompt_speech_token, flow_prompt_speech_token_len),
            ("prompt_speech_feat", prompt_speech_feat, prompt_speech_feat_len),
            ("source_speech_token", source_speech_token, source_speech_token_len),
        ):
            if tensor is not None and length is not None and int(length) != tensor.shape[1]:
                raise ValueError(f"{name} has {tensor.shape[1]} places but {name}_len says {int(length)}")

        write = self._writer(text, source_speech_token, prompt_text, llm_prompt_speech_token, llm_embedding)
        prompt = FlowPrompt(
            _or_empty(flow_prompt_speech_token),
            prompt_speech_feat if prompt_speech_feat is not None else torch.zeros(1, 0, MEL_BINS),
            flow_embedding,
        )
        uuid = str(uuid_module.uuid4())
        try:
            if stream:
                yield from self._speak_in_chunks(write, prompt, uuid, speed)
            else:
                written: list[int] = []
                write(written.append)
                yield self._speech(written, prompt, uuid, finalize=True, speed=speed)
        finally:
            self.sessions.pop(uuid, None)

    def _writer(
        self,
        text: Tensor | None,
        source_speech_token: Tensor | None,
        prompt_text: Tensor | None,
        prompt_speech_token: Tensor | None,
        embedding: Tensor | None,
    ) -> Callable[[Emit], None]:
        """What will write the S3 tokens: the language model, or the recording that has them already."""
        for name, tokens in (("text", text), ("source_speech_token", source_speech_token)):
            if tokens is not None and tokens.shape[1] == 0:
                raise ValueError(f"{name} is empty: there is nothing to say")
        if text is None and source_speech_token is not None:
            return partial(_write_all, source_speech_token.flatten().tolist())
        if text is not None and source_speech_token is None:
            if self.llm_stream is not None:  # the inputs were made in the stream of this thread, not of the writer's
                self.llm_stream.wait_stream(torch.cuda.current_stream(self.device))
            speaker = embedding if embedding is not None else torch.zeros(0, SPEAKER_WIDTH)
            return partial(self._write_tokens, text, _or_empty(prompt_text), _or_empty(prompt_speech_token), speaker)
        raise ValueError("tts needs either text or source_speech_token")

    def _speak_in_chunks(
        self, write: Callable[[Emit], None], prompt: FlowPrompt, uuid: str, speed: float
    ) -> Iterator[Speech]:
        """Yield a chunk whenever its tokens and the overlap are there, then the rest."""
        start, hop = 0, int(self.token_min_hop_len)
        with TokenStream(write) as tokens:
            while tokens.has(start + hop + self.token_overlap_len):
                chunk = tokens[start : start + hop + self.token_overlap_len]
                yield self._speech(chunk, prompt, uuid, finalize=False, speed=speed)
                start += hop
                hop = min(self.token_max_hop_len, int(hop * self.stream_scale_factor))
            yield self._speech(tokens[start:], prompt, uuid, finalize=True, speed=speed)

    def _speech(self, tokens: list[int], prompt: FlowPrompt, uuid: str, finalize: bool, speed: float) -> Speech:
        token = torch.tensor([tokens], dtype=torch.int32)
        return {"tts_speech": self.token2wav(token, *prompt, uuid=uuid, finalize=finalize, speed=speed)}

    def _write_tokens(
        self, text: Tensor, prompt_text: Tensor, prompt_speech_token: Tensor, embedding: Tensor, emit: Emit
    ) -> None:
        """Run the language model to its end, in whatever thread calls this."""
        with self._own_cuda_stream(), torch.autocast(self.device.type, torch.float16, enabled=self.fp16):
            for token in self.llm.inference(
                text=text.to(self.device),
                text_len=self._length(text),
                prompt_text=prompt_text.to(self.device),
                prompt_text_len=self._length(prompt_text),
                prompt_speech_token=prompt_speech_token.to(self.device),
                prompt_speech_token_len=self._length(prompt_speech_token),
                embedding=embedding.to(self.device),
            ):
                emit(token)

    def _own_cuda_stream(self) -> AbstractContextManager[object]:
        """The language model's CUDA stream, so that the flow's kernels do not queue up behind it."""
        return nullcontext() if self.llm_stream is None else torch.cuda.stream(self.llm_stream)

    def _length(self, tensor: Tensor) -> Tensor:
        return torch.tensor([tensor.shape[1]], dtype=torch.int32, device=self.device)


def _write_all(tokens: list[int], emit: Emit) -> None:
    for token in tokens:
        emit(token)


def _or_empty(tokens: Tensor | None) -> Tensor:
    return tokens if tokens is not None else torch.zeros(1, 0, dtype=torch.int32)


def _check_speed(speed: float) -> None:
    if not 0 < speed <= MAX_SPEED:
        raise ValueError(f"speed must be over 0 and at most {MAX_SPEED:g}; got {speed}")
