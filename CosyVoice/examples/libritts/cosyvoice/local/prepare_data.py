"""List one part of LibriTTS as wav.scp, text, utt2spk and spk2utt.

In:   <src_dir>/<speaker>/<chapter>/<speaker>_<chapter>_*.wav, and beside each its .normalized.txt
Out:  <des_dir>/{wav.scp,text,utt2spk,spk2utt}: `utterance-id value` a line, in the order of the ids; `instruct` where
      --instruct is given; unusable.jsonl where recordings have no text

    python local/prepare_data.py --src_dir corpus/LibriTTS/dev-clean --des_dir data/dev-clean

It takes a second. Exit codes: 0 all good, 1 error, 2 wrong usage, 3 done, but some recordings have no text.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from cosyvoice.utils.atomic import write_text
from cosyvoice.utils.interrupt import SOME_FAILED_EXIT_CODE
from cosyvoice.utils.settings import parse_settings

SRC_DIR = None  # str: a part of LibriTTS, e.g. LibriTTS/dev-clean
DES_DIR = None  # str: folder of the lists
INSTRUCT = None  # str: one instruction for every utterance, in place of none

_TEXT_SUFFIX = ".normalized.txt"


class Spoken(NamedTuple):
    """One recording with its text."""

    utt_id: str
    wav: Path  # absolute
    text: str  # one line
    speaker: str


def list_part(folder: Path) -> tuple[list[Spoken], dict[str, str]]:
    """Find a part's recordings and their texts.

    Args:
        folder: the part; its subfolders are speakers, and theirs chapters.

    Returns:
        what can be used, in the order of the ids, and {path: reason} of what cannot.

    Raises:
        FileNotFoundError: the folder is missing or holds no recording of that layout.
        ValueError: two recordings have one id.
    """
    recordings: dict[str, Spoken] = {}
    unusable: dict[str, str] = {}
    for wav in sorted(folder.resolve().glob("*/*/*.wav"), key=lambda path: path.stem):
        text_path = wav.with_suffix(_TEXT_SUFFIX)
        if not text_path.is_file():
            unusable[str(wav)] = f"there is no {text_path.name} beside it"
            continue
        text = " ".join(text_path.read_text(encoding="utf-8").split())
        if not text:
            unusable[str(wav)] = f"{text_path.name} is empty"
            continue
        if wav.stem in recordings:
            raise ValueError(f"{recordings[wav.stem].wav} and {wav} are both utterance {wav.stem!r}; rename one")
        recordings[wav.stem] = Spoken(wav.stem, wav, text, wav.stem.split("_")[0])
    if not recordings:
        raise FileNotFoundError(
            f"{folder} holds no recording with a text ({len(unusable)} without one); expected "
            f"<speaker>/<chapter>/<speaker>_<chapter>_*.wav and {_TEXT_SUFFIX} beside each: run.sh --stage -1 gets it"
        )
    return list(recordings.values()), unusable


def write_lists(folder: Path, recordings: Sequence[Spoken], instruct: str | None) -> None:
    """Write the four lists, and `instruct` where there is one.

    Args:
        folder: where they go; it is made.
        recordings: of one part.
        instruct: what every utterance is told to be like.
    """
    speakers: dict[str, list[str]] = {}
    for recording in recordings:
        speakers.setdefault(recording.speaker, []).append(recording.utt_id)
    tables = {
        "text": {recording.utt_id: recording.text for recording in recordings},
        "utt2spk": {recording.utt_id: recording.speaker for recording in recordings},
        "spk2utt": {speaker: " ".join(utterances) for speaker, utterances in sorted(speakers.items())},
    }
    if instruct is not None:
        tables["instruct"] = {recording.utt_id: instruct for recording in recordings}
    else:
        (folder / "instruct").unlink(missing_ok=True)
    tables["wav.scp"] = {recording.utt_id: str(recording.wav) for recording in recordings}
    for name, table in tables.items():
        write_text(folder / name, "".join(f"{key} {value}\n" for key, value in table.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    settings = parse_settings(__file__, globals(), argv)
    if settings.src_dir is None or settings.des_dir is None:
        print("error: give --src_dir (a part of LibriTTS) and --des_dir (folder of the lists)", file=sys.stderr)
        return 2
    folder = Path(settings.des_dir)
    try:
        recordings, unusable = list_part(Path(settings.src_dir))
        write_lists(folder, recordings, settings.instruct)
        (folder / "unusable.jsonl").unlink(missing_ok=True)
        if unusable:
            lines = [json.dumps({"audio_path": path, "reason": reason}) + "\n" for path, reason in unusable.items()]
            write_text(folder / "unusable.jsonl", "".join(lines))
            print(f"{len(unusable)} recordings have no text; they are listed in {folder / 'unusable.jsonl'}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {len(recordings)} utterances of {len({item.speaker for item in recordings})} speakers")
    return SOME_FAILED_EXIT_CODE if unusable else 0


if __name__ == "__main__":
    sys.exit(main())
