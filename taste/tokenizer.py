"""The tokenizer that a trained `taste` model is: recordings to a few codes a word, and back to sound."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cosyvoice.utils.model_dir import SPEAKER_MODEL_FILE, ModelDir, get_tokenizer, sizes
from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ
from cosyvoice.utils.settings import pick_device
from taste.audio import read_audio
from taste.batch import Batch
from taste.checkpoint import weights_fingerprint
from taste.generation import Sampling, generate
from taste.metrics import on_recording
from taste.model import CosyVoiceS3Model
from taste.released_folder import check_same_sizes, speaker_model_warning
from taste.speaker import SpeakerEncoder
from taste.synthesis import UnitDecoder
from taste.text import TextTokens, tokenize
from taste.trained_reader import TrainedReader
from taste.transcript_check import misfits
from taste.whisper_encoder import SAMPLES_PER_FRAME
from taste.whisper_recogniser import WhisperRecogniser, whisper_lacks
from taste.words import word_spans

# T text tokens   W words   L codes a word   N samples   A Whisper frames, 50 Hz


class OtherModelError(ValueError):
    """Codes were written by another model than the one that shall read them."""


class Reader(Protocol):
    """What turns a text, with its recording or its codes, into a batch of one that a `taste` model reads."""

    model: CosyVoiceS3Model

    def batch(
        self,
        text: TextTokens,
        *,
        waveform: Tensor | None = None,
        codes: Tensor | None = None,
        speaker: Tensor | None = None,
    ) -> Batch:
        """The batch, on the model's device; see `taste.trained_reader.TrainedReader`."""


@dataclass(frozen=True)
class SpeechCodes:
    """A spoken text, as codes."""

    text: str
    words: list[str]  # W
    codes: Tensor  # [W, L] int64
    speaker: Tensor | None  # [192] float32; None where the model reads none
    seconds: float
    model: str  # fingerprint of the model that wrote them
    doubts: list[str]  # signs that the text is not what the recording says; the codes are there all the same


class TasteTokenizer:
    """Encodes recordings, and decodes codes.

    Args:
        reader: the model, on its device, with what it reads with.
        model_dir: the model folder it was trained on, for text, speakers and sound.
        split: turns the text tokenizer and a transcript into tokens and words.
        device: where the model is.
        whisper_dir: a whole Whisper, which writes down what is said where nobody tells; None: `<model_dir>/whisper`.

    Raises:
        FileNotFoundError: a file is missing from the folder.
        ValueError: the model has no quantizer.
    """

    def __init__(
        self,
        reader: Reader,
        model_dir: str | Path,
        split: Callable[[Any, str], TextTokens] = tokenize,
        device: torch.device | str = "cpu",
        whisper_dir: str | Path | None = None,
    ) -> None:
        if reader.model.quantizer is None:
            raise ValueError(f"variant {reader.model.variant!r} has no codes; only a 'taste' model is a tokenizer")
        self._quantizer = reader.model.quantizer
        self.device = torch.device(device)
        self.model = reader.model.eval()
        self.fingerprint = weights_fingerprint(self.model.state_dict())
        self._reader = reader
        self._folder = ModelDir(model_dir)
        self._split = split
        self._text_tokenizer = get_tokenizer(self._folder)
        self._speaker: SpeakerEncoder | None = None
        if self.model.use_speaker:
            self._speaker = SpeakerEncoder(self._folder.file(SPEAKER_MODEL_FILE), self.device)
        self._decoder: UnitDecoder | None = None
        self._whisper_folder = Path(whisper_dir or self._folder.file("whisper"))
        self._recogniser: WhisperRecogniser | None = None

    @classmethod
    def open(
        cls,
        checkpoint_path: str | Path,
        model_dir: str | Path,
        whisper_dir: str | Path | None = None,
        mid_layer: int = 6,
        device: torch.device | str | None = None,
    ) -> "TasteTokenizer":
        """Open what a run of variant `taste` has trained.

        Args:
            checkpoint_path: its best.pt.
            model_dir: the model folder it was trained on.
            whisper_dir: Whisper in transformers' format; None: `<model_dir>/whisper`.
            mid_layer: the Whisper block that was tapped for its features.
            device: where to compute; None: the first CUDA device, else the CPU.

        Returns:
            the tokenizer.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: as for `taste.trained_reader.TrainedReader`.
        """
        device = pick_device("auto") if device is None else device
        reader = TrainedReader(checkpoint_path, model_dir, whisper_dir, mid_layer, device)
        return cls(reader, model_dir, device=device, whisper_dir=whisper_dir)

    @classmethod
    def open_released(
        cls, folder: str | Path, model_dir: str | Path, device: torch.device | str | None = None
    ) -> "TasteTokenizer":
        """Open what the authors of TASTE released.

        Args:
            folder: their TASTE-V0.
            model_dir: CosyVoice-300M, for speaker vectors and for flow and HiFT, which TASTE never trained.
            device: where to compute; None: the first CUDA device, else the CPU.

        Returns:
            the tokenizer.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a folder does not hold what it should, or the model folder is not of the released sizes.
        """
        from taste.official import load_taste_checkpoint
        from taste.official import tokenize as split_as_released

        device = pick_device("auto") if device is None else device
        taste = load_taste_checkpoint(folder)
        check_same_sizes(taste.model, folder, model_dir)
        if warning := speaker_model_warning(folder, model_dir):
            print(warning, flush=True)
        return cls(taste.to(device), model_dir, split_as_released, device)

    @property
    def levels(self) -> int:
        """L, codes a word."""
        return self._quantizer.levels

    @property
    def codebook_size(self) -> int:
        """Different codes of each level."""
        return self._quantizer.codes

    @property
    def sample_rate_hz(self) -> int:
        """Rate of the sound that `decode` makes."""
        return sizes(self._folder).sample_rate

    @torch.inference_mode()
    def encode(
        self, recording: str | Path | Tensor, text: str | None = None, language: str | None = None
    ) -> SpeechCodes:
        """Write down how a text is spoken.

        Args:
            recording: an audio file, or a waveform [N] float32 at 16 kHz; at most 30 s.
            text: what is said; None or empty: a whole Whisper, where the model folder has one, writes it down first.
            language: of the speech, as `en`, for that Whisper; None: it finds out.

        Returns:
            the words with their codes.

        Raises:
            ValueError: the recording cannot be read, is empty or too long; or there is no text, and nobody who writes
                it down, or nothing was heard.
        """
        waveform = recording if isinstance(recording, Tensor) else read_audio(recording, SPEECH_SAMPLE_RATE_HZ).waveform
        text = text or self._write_down(waveform, language)
        tokens = self._split(self._text_tokenizer, text)
        speaker = None if self._speaker is None else self._speaker.embed(waveform)
        batch = self._reader.batch(tokens, waveform=waveform, speaker=speaker)
        spans = word_spans(tokens.word_ids)
        frames = -(-len(waveform) // SAMPLES_PER_FRAME)  # a released TASTE looks at the silence behind them too
        attention = on_recording(self.model.attention(batch)[0].cpu(), frames)
        return SpeechCodes(
            text=text,
            words=[self._text_tokenizer.decode(tokens.tokens[start:end]).strip() for start, end in spans],
            codes=self.model.encode(batch)[0, [start for start, _ in spans]].cpu(),
            speaker=speaker,
            seconds=len(waveform) / SPEECH_SAMPLE_RATE_HZ,
            model=self.fingerprint,
            doubts=misfits(torch.tensor(tokens.word_ids), attention.shape[1], attention),
        )

    def _write_down(self, waveform: Tensor, language: str | None) -> str:
        """What is said in a recording [N] at 16 kHz."""
        if self._recogniser is None:
            if lacking := whisper_lacks(self._whisper_folder):
                raise ValueError(
                    "there is no text, and nobody to write down what is said: that takes a whole Whisper in "
                    f"{self._whisper_folder} ({lacking}); give the text, or fetch one with setup_cosyvoice.py"
                )
            self._recogniser = WhisperRecogniser(self._whisper_folder, str(self.device))
        text = self._recogniser.transcript(waveform, SPEECH_SAMPLE_RATE_HZ, language)
        if not text:
            raise ValueError("there is no text, and Whisper heard nothing in the recording; give the text")
        return text

    def decode(
        self,
        codes: Tensor | Sequence[Sequence[int]],
        text: str,
        speaker: Tensor | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Speak a text as its codes say.

        Args:
            codes: [W, L] integers, a row for each word of the text.
            text: what is to be said.
            speaker: speaker vector [192]; None where the model reads none.
            sampling: how units are chosen; None: CosyVoice's repetition-aware sampling (see `Sampling.tau_r`). The
                authors' package, which opens a released TASTE, draws from the 25 likeliest units,
                `Sampling("top_k", 25)`, 2 to 20 for each position of the whole prefix (speaker and marks too); the
                scripts of their first stage draw from 10, 3 to 30 for each text token.
            seed: of the sampling and of the decoder's noise.

        Returns:
            waveform [N] float32 at `sample_rate_hz`.

        Raises:
            ValueError: the codes do not fit the text or the quantizer, or the speaker's vector is missing.
        """
        units = self.units(codes, text, speaker, sampling, seed)
        if self._decoder is None:
            self._decoder = UnitDecoder(self._folder, self.device)
        return self._decoder.decode(units, speaker, seed).waveform

    @torch.inference_mode()
    def units(
        self,
        codes: Tensor | Sequence[Sequence[int]],
        text: str,
        speaker: Tensor | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> list[int]:
        """The S3 units that `decode` makes sound of.

        Args:
            codes: as for `decode`.
            text: as for `decode`.
            speaker: as for `decode`.
            sampling: as for `decode`.
            seed: of the sampling.

        Returns:
            units, 50 Hz.

        Raises:
            ValueError: as for `decode`.
        """
        if self.model.use_speaker and speaker is None:
            raise ValueError("this model reads a speaker vector; give one (the codes' file has the recording's)")
        tokens = self._split(self._text_tokenizer, text)
        codes = self._checked(codes, text, len(word_spans(tokens.word_ids)))
        batch = self._reader.batch(tokens, codes=codes, speaker=speaker)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            made = generate(self.model, batch, sampling or Sampling())
        return made.units[0]

    def check_mine(self, spoken: SpeechCodes) -> None:
        """Make sure that codes can be decoded by this model.

        Args:
            spoken: from a file, say.

        Raises:
            OtherModelError: another model wrote them.
        """
        if spoken.model != self.fingerprint:
            raise OtherModelError(
                f"these codes were written by model {spoken.model}, this one is {self.fingerprint}: they mean something"
                " else here. Decode them with the checkpoint that wrote them, or encode the recordings anew"
            )

    def _checked(self, codes: Tensor | Sequence[Sequence[int]], text: str, words: int) -> Tensor:
        codes = torch.as_tensor(codes, dtype=torch.int64)
        if codes.dim() != 2 or codes.shape != (words, self.levels):
            raise ValueError(
                f"the text {text!r} has {words} words, {self.levels} codes each; got codes of shape {list(codes.shape)}"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(
                f"codes from {int(codes.min())} to {int(codes.max())}; this model has 0 to {self.codebook_size - 1}"
            )
        return codes
