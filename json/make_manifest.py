"""Write a manifest for LibriSpeech, or for any folders of recordings with a text file beside each.

In:   folders in the LibriSpeech layout: <speaker>/<chapter>/<speaker>-<chapter>.trans.txt beside the recordings; or
      with FOLDER recordings at any depth, each with what is said in it in a .txt of the same name.
Out:  a manifest, one {"utt_id", "audio_path", "text"} a line, with "speaker" and "language" where they are known,
      sorted by id.

    python json/make_manifest.py --librispeech LibriSpeech/train-clean-100 --output json/train.jsonl
    python json/make_manifest.py --librispeech LibriSpeech/train-clean-100,LibriSpeech/train-clean-360
    python json/make_manifest.py --librispeech LibriSpeech/test-clean --output json/test.jsonl
    python json/make_manifest.py --folder recordings --output json/train.jsonl

LibriSpeech's texts are capitals without punctuation, of which Whisper's tokenizer makes other and more tokens than of a
sentence, and CosyVoice has learned from sentences: so "CHAPTER ONE" becomes "Chapter one." (SENTENCE_CASE).
"""

import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import taste  # noqa: F401 -- makes cosyvoice importable
from cosyvoice.utils.atomic import write_text
from cosyvoice.utils.settings import parse_settings

LIBRISPEECH = ("LibriSpeech/train-clean-100",)  # folders to read, with their speakers' folders inside
OUTPUT = "json/train.jsonl"  # manifest to write
FOLDER = ()  # folders of recordings with a .txt beside each, in place of LIBRISPEECH
LANGUAGE = None  # str: noted with each utterance, as en; none: en for LIBRISPEECH, nothing for a FOLDER
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
        ValueError: a text file is empty or no UTF-8.
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
    entries = []
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
        entries.append(entry)
    return sorted(entries, key=lambda entry: entry["utt_id"])


def joined(parts: Iterable[Sequence[dict[str, str]]]) -> list[dict[str, str]]:
    """Make one manifest of those of several folders.

    Args:
        parts: the entries of each folder.

    Returns:
        all entries, sorted by utterance id.

    Raises:
        ValueError: two recordings have one id (the first few such pairs are named), or there is none.
    """
    entries: dict[str, dict[str, str]] = {}
    twice = []
    for entry in (entry for part in parts for entry in part):
        earlier = entries.setdefault(entry["utt_id"], entry)
        if earlier is not entry:
            twice.append(f"{earlier['audio_path']} and {entry['audio_path']} would both be {entry['utt_id']}")
    if not entries:
        raise ValueError("no folder to read; give --librispeech or --folder")
    if twice:
        raise ValueError(
            f"{len(twice)} recordings have the utterance id of another one: {'; '.join(twice[:3])}. Give each folder "
            "once and none inside another; rename what still has one name"
        )
    return [entries[utt_id] for utt_id in sorted(entries)]


def as_sentence(text: str) -> str:
    """Write a text of several words in Latin capitals as an English sentence; another one stays as it is.

    Args:
        text: such as "I SAID HE'D COME".

    Returns:
        such as "I said he'd come."; names lose their capitals, which nothing in the text tells.
    """
    is_latin = all(unicodedata.name(character, "").startswith("LATIN") for character in text if character.isalpha())
    if not (text.isupper() and is_latin) or " " not in text:  # one word may be an acronym
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
    read = read_folder if settings.folder else read_transcripts
    folders = settings.folder or settings.librispeech
    if isinstance(folders, str):  # the constant was edited to a single name
        folders = folders.split(",")
    try:
        entries = joined([read(Path(folder)) for folder in folders])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    language = settings.language or (None if settings.folder else "en")
    if settings.sentence_case and language in ("en", None):
        entries = [entry | {"text": as_sentence(entry["text"])} for entry in entries]
    if language is not None:
        entries = [entry | {"language": language} for entry in entries]
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    write_text(output, "\n".join(lines) + "\n")
    speakers = {entry["speaker"] for entry in entries if "speaker" in entry}
    print(f"{output}: {len(entries)} utterances of {len(speakers) or 'unknown'} speakers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
