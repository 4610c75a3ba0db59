"""Write a manifest for LibriSpeech, or for any folder of recordings with a text file beside each.

In:   a folder in the LibriSpeech layout: <speaker>/<chapter>/<speaker>-<chapter>.trans.txt beside the recordings; or
      with FOLDER recordings at any depth, each with what is said in it in a .txt of the same name.
Out:  a manifest, one {"utt_id", "audio_path", "text", "speaker", "language"} a line, sorted by id.

    python json/make_manifest.py --librispeech LibriSpeech/train-clean-100 --output json/train.jsonl
    python json/make_manifest.py --librispeech LibriSpeech/test-clean --output json/test.jsonl
    python json/make_manifest.py --folder recordings --output json/train.jsonl

LibriSpeech's texts are capitals without punctuation, of which Whisper's tokenizer makes other and more tokens than of a
sentence, and CosyVoice has learned from sentences: so "CHAPTER ONE" becomes "Chapter one." (SENTENCE_CASE).
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taste.atomic import atomic_path
from taste.settings import parse_settings

LIBRISPEECH = "LibriSpeech/train-clean-100"  # folder to read, with its speakers' folders inside
OUTPUT = "json/train.jsonl"  # manifest to write
FOLDER = None  # str: folder of recordings with a .txt beside each, in place of LIBRISPEECH
LANGUAGE = "en"  # noted with each utterance
SENTENCE_CASE = True  # write English texts that are all in capitals as sentences
OVERWRITE = False  # replace OUTPUT where it exists

_AUDIO_SUFFIXES = (".flac", ".wav", ".mp3", ".ogg")


def read_transcripts(folder: Path) -> list[dict[str, str]]:
    """Find every transcribed utterance of a LibriSpeech folder.

    Args:
        folder: searched at every depth for `*.trans.txt`; each line is an utterance id, white space, its text.

    Returns:
        manifest entries without language, sorted by utterance id; audio paths are as `folder` was given.

    Raises:
        FileNotFoundError: the folder or any transcript is missing, or recordings are (the first few are named).
        ValueError: a line has no text.
    """
    transcripts = sorted(folder.rglob("*.trans.txt"))
    if not transcripts:
        raise FileNotFoundError(
            f"{folder}: no *.trans.txt below this folder; expected LibriSpeech's layout. "
            "Unpack it first: tar xzf train-clean-100.tar.gz"
        )
    entries, absent = [], []
    for transcript in transcripts:
        for line_number, line in enumerate(transcript.read_text(encoding="utf-8").splitlines(), 1):
            utt_id, _, text = line.strip().partition(" ")
            if not text.strip():
                raise ValueError(
                    f"{transcript}, line {line_number}: expected an utterance id and its text, got {line!r}"
                )
            recordings = [transcript.with_name(utt_id + suffix) for suffix in _AUDIO_SUFFIXES]
            present = [recording for recording in recordings if recording.is_file()]
            if not present:
                absent.append(str(recordings[0]))
                continue
            speaker = utt_id.partition("-")[0]
            entries.append({"utt_id": utt_id, "audio_path": str(present[0]), "text": text.strip(), "speaker": speaker})
    if absent:
        raise FileNotFoundError(
            f"{len(absent)} recordings that the transcripts list are missing, {', '.join(absent[:3])} first; "
            "unpack the archive again"
        )
    return sorted(entries, key=lambda entry: entry["utt_id"])


def read_folder(folder: Path) -> list[dict[str, str]]:
    """Find every recording of a folder, with its text.

    Args:
        folder: searched at every depth for recordings; `a/b.wav` has its text in `a/b.txt`.

    Returns:
        manifest entries without language, sorted by utterance id. The id is the path below `folder`, with `-` between
        its parts; where there are folders below, the first one is taken for the speaker.

    Raises:
        FileNotFoundError: there is no recording, or one has no text file (the first few are named).
        ValueError: a text file is empty or no UTF-8, or two recordings would have one id.
    """
    recordings = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _AUDIO_SUFFIXES)
    if not recordings:
        raise FileNotFoundError(f"{folder}: no recordings below this folder; expected {', '.join(_AUDIO_SUFFIXES)}")
    silent = [str(path) for path in recordings if not path.with_suffix(".txt").is_file()]
    if silent:
        raise FileNotFoundError(
            f"{len(silent)} of {len(recordings)} recordings have no text, {', '.join(silent[:3])} first; write what is "
            "said into a file of the same name that ends in .txt"
        )
    entries: dict[str, dict[str, str]] = {}
    for path in recordings:
        try:
            text = " ".join(path.with_suffix(".txt").read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.with_suffix('.txt')}: not UTF-8 text ({error})") from error
        if not text:
            raise ValueError(f"{path.with_suffix('.txt')}: expected what is said in {path.name}, the file is empty")
        parts = path.relative_to(folder).with_suffix("").parts
        entry = {"utt_id": "-".join(parts), "audio_path": str(path), "text": text}
        if len(parts) > 1:
            entry["speaker"] = parts[0]
        earlier = entries.setdefault(entry["utt_id"], entry)
        if earlier is not entry:
            raise ValueError(f"{earlier['audio_path']} and {path} would both be {entry['utt_id']}; rename one of them")
    return [entries[utt_id] for utt_id in sorted(entries)]


def as_sentence(text: str) -> str:
    """Write an English text of several words in capitals as a sentence; another one stays as it is.

    Args:
        text: such as "I SAID HE'D COME".

    Returns:
        such as "I said he'd come."; names lose their capitals, which nothing in the text tells.
    """
    if not text.isupper() or " " not in text:  # one word may be an acronym
        return text
    lower = re.sub(r"\bi\b", "I", text.lower())
    return lower[0].upper() + lower[1:] + ("" if lower[-1] in ".?!" else ".")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the manifest; returns the exit code."""
    settings = parse_settings(__file__, globals(), argv)
    output = Path(settings.output)
    if output.exists() and not settings.overwrite:
        print(f"error: {output} exists; add --overwrite, or choose another --output", file=sys.stderr)
        return 1
    try:
        entries = (
            read_folder(Path(settings.folder)) if settings.folder else read_transcripts(Path(settings.librispeech))
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if settings.sentence_case and settings.language == "en":
        entries = [entry | {"text": as_sentence(entry["text"])} for entry in entries]
    lines = [json.dumps(entry | {"language": settings.language}, ensure_ascii=False) for entry in entries]
    with atomic_path(output) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    speakers = {entry["speaker"] for entry in entries if "speaker" in entry}
    print(f"{output}: {len(entries)} utterances of {len(speakers) or 'unknown'} speakers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
