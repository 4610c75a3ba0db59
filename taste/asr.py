"""Chooses who writes down what is said in a recording."""

from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from taste.listening import ListenerMissingError
from taste.pocketsphinx_recogniser import INSTALL_POCKETSPHINX, Pocketsphinx
from taste.whisper_recogniser import WhisperRecogniser, whisper_lacks
from taste.word_timing import Word

# N samples


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
    found = find_aligner()
    return found if found.recogniser else Found(None, f"{found.reason}, or a whole Whisper in {folder} ({lacking})")


def find_aligner() -> Found:
    """Choose who finds the words of a text in a recording: pocketsphinx, as Whisper cannot.

    Returns:
        the recogniser and its name, or None and what is needed.
    """
    try:
        return _found(Pocketsphinx())
    except ListenerMissingError:
        return Found(None, f"skipped: needs pocketsphinx ({INSTALL_POCKETSPHINX})")


def _found(recogniser: Recogniser) -> Found:
    return Found(recogniser, recogniser.name)
