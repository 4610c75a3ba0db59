"""Recognises speech by a whole Whisper."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ
from taste.listening import speech_samples
from taste.whisper_encoder import encoder_weight_files
from taste.word_timing import Word, timed_words

# N samples
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # either makes transformers' Whisper tokenizer
DECODER_KEY = "model.decoder.layers.0.encoder_attn.q_proj.weight"


def whisper_lacks(folder: Path) -> str | None:
    """Say what keeps a Whisper folder from writing down speech.

    Args:
        folder: in transformers' format, perhaps with the encoder alone.

    Returns:
        what is missing, in words; None where it can write.
    """
    if not (folder / "config.json").is_file():
        return "it has no config.json"
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        return "it has no tokenizer: tokenizer.json of the same Whisper, which setup_cosyvoice.py fetches"
    try:
        if not _has_decoder(folder):
            return "its weights have no decoder"
    except FileNotFoundError:
        return "it has no weights"
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not generation.get("alignment_heads"):
        return "its generation_config.json names no alignment_heads, which tell when a word is said"
    return None


class WhisperRecogniser:
    """A whole Whisper in a folder, through transformers.

    Args:
        folder: in transformers' format, with decoder, tokenizer and alignment heads (`whisper_lacks` gives None).
        device: where to compute.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import WhisperForConditionalGeneration, WhisperProcessor, pipeline

        processor = WhisperProcessor.from_pretrained(folder, local_files_only=True)
        model = WhisperForConditionalGeneration.from_pretrained(folder, local_files_only=True)
        self._languages = getattr(model.generation_config, "lang_to_id", None)
        self._pipeline: Any = pipeline(
            "automatic-speech-recognition",
            model=model.float(),
            tokenizer=processor.tokenizer,
            feature_extractor=processor.feature_extractor,
            device=device,
        )
        self.name = f"Whisper in {folder}"

    def hears(self, language: str) -> bool:
        """Whether it knows a language.

        Args:
            language: as a manifest notes it.

        Returns:
            True for those that its generation_config.json lists, and for English where it lists none.
        """
        return f"<|{language}|>" in self._languages if self._languages else language == "en"

    def words(self, waveform: Tensor, rate_hz: int, language: str = "en") -> list[Word]:
        """Write down one recording.

        Args:
            waveform: [N] float, -1..1.
            rate_hz: its rate.
            language: of the speech.

        Returns:
            the words, those without an end in time left out; may be none.
        """
        with self._dividing_as(language):
            heard = self._hear(waveform, rate_hz, language, return_timestamps="word")
        return timed_words(heard.get("chunks", ()))

    def transcript(self, waveform: Tensor, rate_hz: int, language: str | None = None) -> str:
        """Write down one recording as a text, with capitals and punctuation.

        Args:
            waveform: [N] float, -1..1.
            rate_hz: its rate.
            language: of the speech; None: Whisper finds out.

        Returns:
            the text; empty where nothing was heard.
        """
        return self._hear(waveform, rate_hz, language)["text"].strip()

    def align(self, waveform: Tensor, rate_hz: int, text: str) -> list[Word] | None:
        """Give None: Whisper tells the times of words that it writes itself only.

        Args:
            waveform: [N] float, -1..1.
            rate_hz: its rate.
            text: the transcript.

        Returns:
            None.
        """
        return None

    def _hear(self, waveform: Tensor, rate_hz: int, language: str | None, **how: Any) -> dict[str, Any]:
        """What the pipeline, called in this way, gives of a recording."""
        samples = speech_samples(waveform, rate_hz).numpy()
        if not len(samples):
            return {"text": ""}
        sound = {"raw": samples, "sampling_rate": SPEECH_SAMPLE_RATE_HZ}
        options = {"language": language, "task": "transcribe"} if self._languages else {}
        return self._pipeline(sound, generate_kwargs=options, **how)

    @contextmanager
    def _dividing_as(self, language: str) -> Iterator[None]:
        """Have transformers divide what is written as a language is: at blanks, or at characters where it has none.

        The pipeline is not told the language: what Whisper gives no longer names it, and then transformers asks the
        tokenizer, and takes English where that knows none either.
        """
        from transformers.models.whisper.tokenization_whisper import LANGUAGES

        tokenizer = self._pipeline.tokenizer
        before = tokenizer.language
        tokenizer.language = LANGUAGES.get(language, before)
        try:
            yield
        finally:
            tokenizer.language = before


def _has_decoder(folder: Path) -> bool:
    from safetensors import safe_open

    for path in encoder_weight_files(folder):
        with safe_open(path, framework="pt", device="cpu") as file:
            if DECODER_KEY in file.keys():
                return True
    return False
