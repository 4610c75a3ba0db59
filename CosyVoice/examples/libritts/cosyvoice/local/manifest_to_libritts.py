"""Lay the recordings of a manifest out as a part of LibriTTS, so that the recipe can be run on them.

In:   a .jsonl manifest (`audio_path` and `text` a line, and `speaker`), recordings of any format and rate
Out:  <root>/LibriTTS/<part>/<speaker>/<chapter>/<speaker>_<chapter>_<utterance>.wav and .normalized.txt

    python local/manifest_to_libritts.py --manifest my/train.jsonl --root corpus --part train-clean-100
    python local/manifest_to_libritts.py --manifest my/test.jsonl --root corpus --part dev-clean --stop 18

Seconds for a hundred recordings. The part's folder appears when it is complete; one that is there is left alone.
"""

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))
sys.path.insert(0, str(Path(__file__).resolve().parents[5]))

from cosyvoice.utils.settings import parse_settings
from taste.audio import AudioError
from taste.manifest import Utterance, read_manifest

MANIFEST = None  # str: .jsonl manifest
ROOT = "corpus"  # folder that holds LibriTTS/
PART = "train-clean-100"  # name of the part to make
START = 0  # first utterance of the manifest to take, from 0
STOP = None  # int: the first not to take; none takes all

_CHAPTER = "0"


def libritts_name(utterance: Utterance) -> tuple[str, str]:
    """Name an utterance as LibriTTS would, whose readers split names at the underscores.

    Args:
        utterance: with any id and speaker.

    Returns:
        the speaker, and the utterance's name `<speaker>_<chapter>_<id>`.
    """
    speaker = re.sub(r"[\s_/]+", "-", utterance.speaker or "unknown")
    return speaker, f"{speaker}_{_CHAPTER}_" + re.sub(r"[\s_]+", "-", utterance.utt_id)


def lay_out(utterances: Sequence[Utterance], folder: Path) -> None:
    """Write every recording as 16-bit wav at its own rate, and its text beside it.

    Args:
        utterances: what the part shall hold.
        folder: the part's folder, which is not there yet.

    Raises:
        AudioError: a recording is missing or cannot be read.
        ValueError: two utterances get one name, or one has no text.
    """
    names: dict[str, Utterance] = {}
    for utterance in utterances:
        speaker, name = libritts_name(utterance)
        if names.setdefault(name, utterance) is not utterance:
            raise ValueError(f"{names[name].utt_id!r} and {utterance.utt_id!r} would both be {name!r}; rename one")
        if not utterance.text.strip():
            raise ValueError(f"{utterance.utt_id!r} has no text")
        place = folder / speaker / _CHAPTER
        place.mkdir(parents=True, exist_ok=True)
        try:
            samples, rate_hz = soundfile.read(utterance.audio_path, dtype="int16")
        except (OSError, soundfile.LibsndfileError) as error:
            raise AudioError(f"{utterance.audio_path} cannot be read ({error})") from error
        soundfile.write(place / f"{name}.wav", samples, rate_hz, subtype="PCM_16")
        (place / f"{name}.normalized.txt").write_text(utterance.text + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    settings = parse_settings(__file__, globals(), argv)
    if settings.manifest is None:
        print("error: give --manifest FILE", file=sys.stderr)
        return 2
    folder = Path(settings.root) / "LibriTTS" / settings.part
    if folder.exists():
        print(f"{folder} is there already; remove it to make it again")
        return 0
    unfinished = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        utterances = read_manifest(settings.manifest)[settings.start : settings.stop]
        if not utterances:
            raise ValueError(f"{settings.manifest} has nothing from {settings.start} to {settings.stop}")
        lay_out(utterances, unfinished)
        (unfinished / ".complete").touch()
        unfinished.rename(folder)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{folder}: {len(utterances)} utterances")
    return 0


if __name__ == "__main__":
    sys.exit(main())
