"""Writes down what is said in a recording, and when each word is."""

import importlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torchaudio.functional
from torch import Tensor

from taste.text import SPELLED_BY_CHARACTER

# N samples
RECOGNISER_RATE_HZ = 16_000
SHORTEST_SECONDS = 0.1  # of sound that a recogniser is given: less holds no word
INSTALL_POCKETSPHINX = "pip install 'pocketsphinx>=5.1,<6'"
SPELLINGS = {"grey": "gray", "harbour": "harbor", "colours": "colors", "mr": "mister", "mrs": "missus"}
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # either makes transformers' Whisper tokenizer
DECODER_KEY = "model.decoder.layers.0.encoder_attn.q_proj.weight"
NO_BEAM = 0.0  # keeps every hypothesis
LETTER_PHONES = dict(  # how pocketsphinx's phones say a letter, roughly, in a word that nobody told it
    zip(
        "abcdefghijklmnopqrstuvwxyz",
        "AE B K D EH F G HH IH JH K L M N AA P K R S T AH V W K Y Z".split(),
        strict=True,
    )
)
COMMA_OF_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
SILENCE_MARKS = ("<", "[", "+")  # how pocketsphinx's names of pauses and noises begin


class Word(NamedTuple):
    """A word that was heard, or looked for, in a recording."""

    text: str  # as `normalise` leaves it
    start_s: float
    end_s: float


class ListenerMissingError(ImportError):
    """A package that listens is not installed; the message says how to get it."""


class Recogniser(Protocol):
    """What every recogniser can do."""

    name: str  # for a table's footnote

    def hears(self, language: str) -> bool:
        """Whether it knows a language, given as `en`, `zh` ...; False too where nobody noted one."""

    def words(self, waveform: Tensor, rate_hz: int, language: str = "en") -> list[Word]:
        """Write down a recording [N] with the times of its words; what was heard before has no influence."""

    def align(self, waveform: Tensor, rate_hz: int, text: str) -> list[Word] | None:
        """Find the words of a known text in a recording [N]; None where it cannot (an unknown word, too short)."""


class Found(NamedTuple):
    """A recogniser, or why there is none."""

    recogniser: Recogniser | None
    reason: str  # its name; or "skipped: needs ..."


def find_recogniser(model_dir: str | Path, device: str = "cpu") -> Found:
    """Choose who listens: the model folder's Whisper where it can write, else pocketsphinx where it is installed.

    Args:
        model_dir: a model folder; its `whisper/` is looked at.
        device: where Whisper computes.

    Returns:
        the recogniser and its name, or None and what is needed.
    """
    folder = Path(model_dir) / "whisper"
    lacking = whisper_lacks(folder)
    if lacking is None:
        return _found(WhisperRecogniser(folder, device))
    try:
        return _found(Pocketsphinx())
    except ListenerMissingError:
        return Found(
            None, f"skipped: needs pocketsphinx ({INSTALL_POCKETSPHINX}), or a whole Whisper in {folder} ({lacking})"
        )


def find_aligner() -> Found:
    """Choose who finds the words of a text in a recording: pocketsphinx, as Whisper cannot.

    Returns:
        the recogniser and its name, or None and what is needed.
    """
    try:
        return _found(Pocketsphinx())
    except ListenerMissingError:
        return Found(None, f"skipped: needs pocketsphinx ({INSTALL_POCKETSPHINX})")


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


def normalise(text: str) -> str:
    """Reduce a text to what can be heard, for counting wrong words.

    Args:
        text: a transcript, or what a recogniser wrote.

    Returns:
        words of small letters, digits and apostrophes, in one spelling, with a blank between two; where a language
        writes no blanks, each character is a word.
    """
    text = re.sub(r"\(\d+\)", "", _plain(text))  # (2): pronunciations
    characters = []
    for character in text:
        if _is_spelled(character):
            characters.append(f" {character} ")
        else:
            characters.append(character if _is_heard(character) else " ")
    words = (word.strip("'") for word in "".join(characters).split())
    return " ".join(SPELLINGS.get(word, word) for word in words if word)


def timed_words(pieces: Sequence[Mapping[str, Any]]) -> list[Word]:
    """Make words of the timed pieces that a recogniser divides what it wrote into.

    Where a language writes no blanks, a piece is a character, or a token of a few, and so is each part of a foreign
    word among them: the parts of a word are put together again.

    Args:
        pieces: in order, each with `text`, blanks included, and `timestamp`, (start, end) in seconds or None.

    Returns:
        the words as `normalise` leaves them; several in one piece share its time evenly, and what has no start or no
        end is left out.
    """
    whole: list[tuple[str, float | None, float | None]] = []
    for piece in pieces:
        text, (start, end) = piece["text"], piece["timestamp"]
        if whole and _is_one_word(whole[-1][0], text):
            before, start, _ = whole.pop()
            text = before + text
        whole.append((text, start, end))
    words = []
    for text, start, end in whole:
        parts = normalise(text).split()
        if start is not None and end is not None:
            times = [start + (end - start) * number / max(len(parts), 1) for number in range(len(parts) + 1)]
            words += [Word(part, *times[number : number + 2]) for number, part in enumerate(parts)]
    return words


class Pocketsphinx:
    """Pocketsphinx with its own English model, which is inside its wheel.

    Args:
        install: the command that gets it, for the error's message.

    Raises:
        ListenerMissingError: it is not installed.
    """

    def __init__(self, install: str = INSTALL_POCKETSPHINX) -> None:
        self._module = import_listener("pocketsphinx", install)
        self._decoder = self._module.Decoder(samprate=RECOGNISER_RATE_HZ, loglevel="FATAL")
        self.name = "pocketsphinx"

    def hears(self, language: str) -> bool:
        """Whether it knows a language.

        Args:
            language: as a manifest notes it.

        Returns:
            True for English.
        """
        return language == "en"

    def words(self, waveform: Tensor, rate_hz: int, language: str = "en") -> list[Word]:
        """Write down one recording; what was heard before has no influence.

        Args:
            waveform: [N] float, -1..1.
            rate_hz: its rate.
            language: English is all that it hears.

        Returns:
            the words; may be none.

        Raises:
            ValueError: another language.
        """
        if not self.hears(language):
            raise ValueError(f"pocketsphinx hears English only, got the language {language!r}")
        return self._listen(waveform, rate_hz, self._decoder)

    def align(self, waveform: Tensor, rate_hz: int, text: str) -> list[Word] | None:
        """Find the words of a known English text in a recording.

        Args:
            waveform: [N] float, -1..1.
            rate_hz: its rate.
            text: the transcript.

        Returns:
            every word of `normalise(text)`, whatever the sound; None where the text holds something other than Latin
            letters, or the sound is too short for its phones.
        """
        wanted = normalise(text).split()
        if not wanted or not all(self._has_pronunciation(word) for word in wanted):
            return None
        self._aligner.set_align_text(" ".join(wanted))
        words = self._listen(waveform, rate_hz, self._aligner)
        return words if [word.text for word in words] == wanted else None

    @cached_property
    def _aligner(self) -> Any:
        """A decoder that goes through a whole text, at any price.

        No hypothesis is dropped, because a sound that hardly resembles its text shall be aligned too; and the search
        for a better path afterwards is left out, because it may end before the text does.
        """
        wide = dict.fromkeys(("beam", "pbeam", "wbeam"), NO_BEAM)
        return self._module.Decoder(samprate=RECOGNISER_RATE_HZ, loglevel="FATAL", bestpath=False, **wide)

    def _has_pronunciation(self, word: str) -> bool:
        """Whether the aligner can say a word; one that its dictionary lacks is given a guess, letter by letter."""
        if self._aligner.lookup_word(word) is None:
            phones = [LETTER_PHONES[letter] for letter in word if letter in LETTER_PHONES]
            if len(phones) < len(word.replace("'", "")):
                return False
            self._aligner.add_word(word, " ".join(phones), True)
        return True

    def _listen(self, waveform: Tensor, rate_hz: int, decoder: Any) -> list[Word]:
        samples = (resampled(waveform, rate_hz).clamp(-1, 1) * 32767).round().short().numpy()
        if len(samples) < SHORTEST_SECONDS * RECOGNISER_RATE_HZ:
            return []
        decoder.reinit_feat()  # else its estimate of the noise goes from one recording to the next
        decoder.start_utt()
        decoder.process_raw(samples.tobytes(), no_search=False, full_utt=True)
        decoder.end_utt()
        frames_per_second = decoder.config["frate"]
        pieces = []
        for piece in decoder.seg() or ():
            if not piece.word.startswith(SILENCE_MARKS):
                times = (piece.start_frame / frames_per_second, (piece.end_frame + 1) / frames_per_second)
                pieces.append({"text": f" {piece.word}", "timestamp": times})
        return timed_words(pieces)  # its dictionary has twenty-one and so-called


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
        self._pipeline = pipeline(
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
        samples = resampled(waveform, rate_hz).numpy()
        if len(samples) < SHORTEST_SECONDS * RECOGNISER_RATE_HZ:
            return []
        options = {"language": language, "task": "transcribe"} if self._languages else {}
        with self._dividing_as(language):
            heard: Any = self._pipeline(
                {"raw": samples, "sampling_rate": RECOGNISER_RATE_HZ}, return_timestamps="word", generate_kwargs=options
            )
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
        samples = resampled(waveform, rate_hz).numpy()
        if len(samples) < SHORTEST_SECONDS * RECOGNISER_RATE_HZ:
            return ""
        options = {"language": language, "task": "transcribe"} if self._languages else {}
        sound = {"raw": samples, "sampling_rate": RECOGNISER_RATE_HZ}
        heard: Any = self._pipeline(sound, generate_kwargs=options)
        return heard["text"].strip()

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

    @contextmanager
    def _dividing_as(self, language: str) -> Iterator[None]:
        """Have transformers divide what is written as a language is: at blanks, or at characters where it has none.

        The pipeline is not told the language: what Whisper gives no longer names it, and then transformers asks the
        tokenizer, and takes English where that knows none either.
        """
        from transformers.models.whisper.tokenization_whisper import LANGUAGES

        tokenizer: Any = self._pipeline.tokenizer
        before = tokenizer.language
        tokenizer.language = LANGUAGES.get(language, before)
        try:
            yield
        finally:
            tokenizer.language = before


def resampled(waveform: Tensor, rate_hz: int) -> Tensor:
    """Bring a waveform to the rate that recognisers and speaker encoders hear.

    Args:
        waveform: [N] float.
        rate_hz: its rate.

    Returns:
        [N'] float32 at 16 kHz, on the CPU.
    """
    waveform = waveform.detach().to("cpu").float()
    if rate_hz == RECOGNISER_RATE_HZ:
        return waveform
    return torchaudio.functional.resample(waveform, rate_hz, RECOGNISER_RATE_HZ)


def import_listener(name: str, install: str) -> ModuleType:
    """Import a package that listens.

    Args:
        name: of the module.
        install: the command that gets it.

    Returns:
        the module.

    Raises:
        ListenerMissingError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ListenerMissingError(
            f"measuring needs the package {name} ({error}); install it with: {install}"
        ) from error


def _plain(text: str) -> str:
    """A text in one form of its characters and numbers, small letters, one kind of apostrophe."""
    return COMMA_OF_THOUSANDS.sub("", unicodedata.normalize("NFKC", text).lower().replace("’", "'"))


def _is_spelled(character: str) -> bool:
    """Whether a character is a word by itself."""
    return unicodedata.name(character, "").startswith(SPELLED_BY_CHARACTER)


def _is_heard(character: str) -> bool:
    """Whether a character stands for a sound: letters, their marks, digits, and the apostrophe."""
    return character == "'" or unicodedata.category(character)[0] in "LMN"


def _is_one_word(before: str, after: str) -> bool:
    """Whether a word goes on from the end of one piece to the beginning of the next."""
    if _plain(before + after) != _plain(before) + _plain(after):  # 3 | ,000; a letter | its mark
        return True
    meeting = _plain(before)[-1:], _plain(after)[:1]
    return all(character and _is_heard(character) and not _is_spelled(character) for character in meeting)


def _found(recogniser: Recogniser) -> Found:
    return Found(recogniser, recogniser.name)


def _has_decoder(folder: Path) -> bool:
    from safetensors import safe_open

    from taste.whisper_encoder import encoder_weight_files

    for path in encoder_weight_files(folder):
        with safe_open(path, framework="pt", device="cpu") as file:
            if DECODER_KEY in file.keys():
                return True
    return False
