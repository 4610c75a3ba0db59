"""The tokenizer that a trained `taste` model is: recordings to a few codes a word, and back to sound."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosyvoice.utils.model_dir import ModelDir, get_tokenizer, sizes, text_embedding_table
from taste.audio import read_audio
from taste.batch import Batch, Example, collate
from taste.build import TasteSizes, build_model
from taste.checkpoint import load_checkpoint, weights_fingerprint
from taste.generation import Sampling, generate
from taste.model import CosyVoiceS3Model
from taste.speaker import SpeakerEncoder
from taste.synthesis import UnitDecoder
from taste.text import tokenize
from taste.transcript_fit import misfits
from taste.whisper_encoder import SAMPLE_RATE_HZ, WhisperEncoder
from taste.words import word_spans

# T text tokens   W words   L codes a word   N samples   A Whisper frames, 50 Hz

SPEAKER_MODEL = "campplus.onnx"


class OtherModelError(ValueError):
    """Codes were written by another model than the one that shall read them."""


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
    """Encodes recordings, and decodes codes, with a trained model of variant `taste`.

    Args:
        model: the trained model; it is moved to the device and left in eval mode.
        model_dir: the model folder it was trained on.
        whisper_dir: Whisper in transformers' format, the one that made the training features.
        mid_layer: the Whisper block that was tapped for them.
        made_with: what stage 1 noted about the models of the training features; None: that cannot be checked.
        device: where to compute.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the model has no quantizer, or the training features came from other models.
    """

    def __init__(
        self,
        model: CosyVoiceS3Model,
        model_dir: str | Path,
        whisper_dir: str | Path | None = None,
        mid_layer: int = 6,
        made_with: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if model.quantizer is None:
            raise ValueError(f"variant {model.variant!r} has no codes; only a 'taste' model is a tokenizer")
        folder = ModelDir(model_dir)
        self.device = torch.device(device)
        self.fingerprint = weights_fingerprint(model.state_dict())
        self.model = model.to(self.device).eval()
        self._folder = folder
        self._text_tokenizer = get_tokenizer(folder)
        self._text_embedding = text_embedding_table(folder)
        self._whisper = WhisperEncoder(whisper_dir or folder.file("whisper"), mid_layer, self.device)
        self._speaker = SpeakerEncoder(folder.file(SPEAKER_MODEL), self.device) if model.use_speaker else None
        self._decoder: UnitDecoder | None = None
        _check_features(made_with, self._whisper, mid_layer)

    @classmethod
    def open(
        cls,
        checkpoint_path: str | Path,
        model_dir: str | Path,
        whisper_dir: str | Path | None = None,
        mid_layer: int = 6,
        device: torch.device | str = "cpu",
    ) -> "TasteTokenizer":
        """Open what a run of variant `taste` has trained.

        Args:
            checkpoint_path: its best.pt.
            model_dir: the model folder it was trained on.
            whisper_dir: Whisper in transformers' format; None: `<model_dir>/whisper`.
            mid_layer: the Whisper block that was tapped for its features.
            device: where to compute.

        Returns:
            the tokenizer.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the checkpoint is of another variant, or does not fit the folders.
        """
        checkpoint = load_checkpoint(Path(checkpoint_path))
        settings = checkpoint.notes["settings"]
        if settings["variant"] != "taste":
            raise ValueError(
                f"{checkpoint_path} is of variant {settings['variant']!r}, which has no codes; expected a run with "
                "--variant taste"
            )
        model = build_model(
            model_dir,
            "taste",
            speech_width=checkpoint.weights["aggregator.layer_norm.weight"].shape[0],
            freeze_llm=settings["freeze_llm"],
            use_speaker=checkpoint.notes["use_speaker"],
            lora_rank=settings["lora_rank"],
            taste_sizes=TasteSizes.from_dict(settings),
        )
        model.load_learned_state(checkpoint.weights)
        made_with = checkpoint.notes["features_made_with"]
        return cls(model, model_dir, whisper_dir, mid_layer, made_with, device)

    @property
    def levels(self) -> int:
        """L, codes a word."""
        return self.model.quantizer.levels

    @property
    def codebook_size(self) -> int:
        """Different codes of each level."""
        return self.model.quantizer.codes

    @property
    def sample_rate_hz(self) -> int:
        """Rate of the sound that `decode` makes."""
        return sizes(self._folder).sample_rate

    @torch.inference_mode()
    def encode(self, recording: str | Path | Tensor, text: str) -> SpeechCodes:
        """Write down how a text is spoken.

        Args:
            recording: an audio file, or a waveform [N] float32 at 16 kHz; at most 30 s.
            text: what is said.

        Returns:
            the words with their codes.

        Raises:
            ValueError: the text is empty, or the recording cannot be read, is empty or too long.
        """
        waveform = recording
        if not isinstance(recording, Tensor):
            waveform = read_audio(recording, SAMPLE_RATE_HZ).waveform
        (features,) = self._whisper.encode([waveform])
        speaker = None if self._speaker is None else self._speaker.embed(waveform)
        example = self._example(text, speaker, features.final.float().cpu(), features.mid.float().cpu())
        batch = collate([example]).to(self.device)
        spans = word_spans(example.word_ids)
        return SpeechCodes(
            text=text,
            words=self._spell(example.text_tokens, spans),
            codes=self.model.encode(batch)[0, [start for start, _ in spans]].cpu(),
            speaker=speaker,
            seconds=len(waveform) / SAMPLE_RATE_HZ,
            model=self.fingerprint,
            doubts=misfits(example.word_ids, len(features.final), self.model.attention(batch)[0].cpu()),
        )

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
            sampling: how units are chosen; None: CosyVoice's repetition-aware sampling.
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
        example = self._example(text, speaker)
        spans = word_spans(example.word_ids)
        codes = self._checked(codes, text, len(spans))
        token_codes = codes.repeat_interleave(torch.tensor([end - start for start, end in spans]), dim=0)  # [T, L]
        batch = collate([example])
        with_codes = Batch(**(vars(batch) | {"codes": token_codes[None]}))
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            made = generate(self.model, with_codes.to(self.device), sampling or Sampling())
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

    def _example(
        self, text: str, speaker: Tensor | None, final: Tensor | None = None, mid: Tensor | None = None
    ) -> Example:
        """A text as the model reads it, with no units yet."""
        if self.model.use_speaker and speaker is None:
            raise ValueError("this model reads a speaker vector; give one (the codes' file has the recording's)")
        tokens = tokenize(self._text_tokenizer, text)
        return Example(
            utt_id="",
            text=self._text_embedding[torch.tensor(tokens.tokens)].float(),
            speech_final=final,
            speech_mid=mid,
            speaker=speaker,
            units=torch.zeros(0, dtype=torch.int64),
            text_tokens=torch.tensor(tokens.tokens),
            word_ids=torch.tensor(tokens.word_ids),
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

    def _spell(self, tokens: Tensor, spans: Sequence[tuple[int, int]]) -> list[str]:
        return [self._text_tokenizer.decode(tokens[start:end].tolist()).strip() for start, end in spans]


def _check_features(made_with: dict[str, Any] | None, whisper: WhisperEncoder, mid_layer: int) -> None:
    """Refuse to listen with another Whisper than the model was trained with."""
    now = {"whisper": whisper.digest, "mid_layer": mid_layer}
    changed = [
        f"{name}: {made_with[name]} then, {value} now"
        for name, value in now.items()
        if made_with and name in made_with and made_with[name] != value
    ]
    if changed:
        raise ValueError(
            f"the model was trained on features of another Whisper ({'; '.join(changed)}); "
            "set WHISPER_DIR and MID_LAYER to those of the training features"
        )
