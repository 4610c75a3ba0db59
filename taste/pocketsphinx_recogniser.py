"""Recognises English speech by pocketsphinx."""

from functools import cached_property
from typing import Any

from torch import Tensor

from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ
from taste.listening import import_listener, speech_samples
from taste.text_normalisation import normalise
from taste.word_timing import Word, timed_words

# N samples
INSTALL_POCKETSPHINX = "pip install 'pocketsphinx>=5.1,<6'"
NO_BEAM = 0.0  # keeps every hypothesis
LETTER_PHONES = dict(  # how pocketsphinx's phones say a letter, roughly, in a word that nobody told it
    zip(
        "abcdefghijklmnopqrstuvwxyz",
        "AE B K D EH F G HH IH JH K L M N AA P K R S T AH V W K Y Z".split(),
        strict=True,
    )
)
SILENCE_MARKS = ("<", "[", "+")  # how pocketsphinx's names of pauses and noises begin


class Pocketsphinx:
    """Pocketsphinx with its own English model, which is inside its wheel.

    Args:
        install: the command that gets it, for the error's message.

    Raises:
        ListenerMissingError: it is not installed.
    """

    def __init__(self, install: str = INSTALL_POCKETSPHINX) -> None:
        self._module = import_listener("pocketsphinx", install)
        self._decoder = self._module.Decoder(samprate=SPEECH_SAMPLE_RATE_HZ, loglevel="FATAL")
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
        return self._module.Decoder(samprate=SPEECH_SAMPLE_RATE_HZ, loglevel="FATAL", bestpath=False, **wide)

    def _has_pronunciation(self, word: str) -> bool:
        """Whether the aligner can say a word; one that its dictionary lacks is given a guess, letter by letter."""
        if self._aligner.lookup_word(word) is None:
            phones = [LETTER_PHONES[letter] for letter in word if letter in LETTER_PHONES]
            if len(phones) < len(word.replace("'", "")):
                return False
            self._aligner.add_word(word, " ".join(phones), True)
        return True

    def _listen(self, waveform: Tensor, rate_hz: int, decoder: Any) -> list[Word]:
        samples = (speech_samples(waveform, rate_hz).clamp(-1, 1) * 32767).round().short().numpy()
        if not len(samples):
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
