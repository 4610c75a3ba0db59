"""Read a split of the synthesised corpus: recordings, texts, and the phones that flite spoke with their end times."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cosyvoice.utils.rates import S3_UNITS_PER_SECOND

PLAN_FILE = "plan.sha256"  # of a corpus folder: names what make_corpus.py planned
PAUSE = "pau"
# flite's US English phones; the pause is class 0
PHONES = (
    PAUSE, "aa", "ae", "ah", "ao", "aw", "ax", "ay", "b", "ch", "d", "dh", "eh", "er", "ey", "f", "g", "hh", "ih", "iy",
    "jh", "k", "l", "m", "n", "ng", "ow", "oy", "p", "r", "s", "sh", "t", "th", "uh", "uw", "v", "w", "y", "z", "zh",
)  # fmt: skip
CHARACTERS = " 'abcdefghijklmnopqrstuvwxyz"  # a CTC class each, after the blank, which is class 0


class Spoken(NamedTuple):
    """One utterance of the corpus."""

    utt_id: str
    audio_path: Path
    text: str  # as written
    speaker: str
    phones: list[tuple[str, float]]  # phone, end in seconds of the recording


def plan_of(corpus: Path) -> str:
    """What names the plan that a corpus was made by: the same utterances from the same settings and grammar.

    Args:
        corpus: the folder, as make_corpus.py makes it.

    Returns:
        a fingerprint; '' where nobody noted it.
    """
    path = corpus / PLAN_FILE
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def read_split(corpus: Path, split: str) -> list[Spoken]:
    """Read the tables of one split.

    Args:
        corpus: the folder with `train/`, `dev/`, `test/`.
        split: one of them.

    Returns:
        the utterances in the order of `wav.scp`.

    Raises:
        FileNotFoundError: a table is missing.
        ValueError: an utterance lacks a line in a table, or has a phone that is not in `PHONES`.
    """
    tables = {}
    for name in ("wav.scp", "text", "utt2spk", "phones"):
        path = corpus / split / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file; make the corpus with stage 0 of run.sh")
        tables[name] = dict(line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").split("\n") if line)
    utterances, problems = [], []
    for utt_id, audio_path in tables["wav.scp"].items():
        missing = [name for name, table in tables.items() if utt_id not in table]
        if missing:
            problems.append(f"{utt_id} has no line in {', '.join(missing)}")
            continue
        phones = []
        for item in tables["phones"][utt_id].split():
            phone, _, end = item.partition(":")
            if phone not in PHONES:
                problems.append(f"{utt_id} has the unknown phone {phone!r}")
            phones.append((phone, float(end)))
        utterances.append(Spoken(utt_id, Path(audio_path), tables["text"][utt_id], tables["utt2spk"][utt_id], phones))
    if problems:
        raise ValueError(f"{corpus / split}: " + "; ".join(problems[:5]) + f" ({len(problems)} problems)")
    return utterances


def spell(text: str) -> str:
    """Reduce a transcript to what CTC learns to write: lower-case letters, apostrophes and single blanks."""
    return " ".join(re.sub(r"[^a-z' ]+", " ", text.lower()).split())


def character_classes(text: str) -> np.ndarray:
    """Give the CTC classes of a transcript, [C], int64; 0 is the blank and does not occur."""
    return np.array([CHARACTERS.index(letter) + 1 for letter in spell(text)], dtype=np.int64)


def phone_classes(phones: list[tuple[str, float]], num_units: int) -> np.ndarray:
    """Say which phone is heard at the middle of each 20 ms unit.

    Args:
        phones: phone and end in seconds, in order.
        num_units: S.

    Returns:
        indices into `PHONES`, [S], int64; what follows the last phone is a pause.
    """
    middles = (np.arange(num_units) + 0.5) / S3_UNITS_PER_SECOND
    ends = np.array([end for _, end in phones])
    names = np.array([PHONES.index(phone) for phone, _ in phones] + [0], dtype=np.int64)
    return names[np.searchsorted(ends, middles, side="right")]
