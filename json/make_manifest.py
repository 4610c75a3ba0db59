"""Write a manifest for a LibriSpeech folder: one line for each utterance that its `*.trans.txt` files list.

In:   a folder in the LibriSpeech layout: <speaker>/<chapter>/<speaker>-<chapter>.trans.txt beside the recordings.
Out:  a manifest, one {"utt_id", "audio_path", "text", "speaker", "language"} a line, sorted by id.

    python json/make_manifest.py --librispeech LibriSpeech/train-clean-100 --output json/train.jsonl
    python json/make_manifest.py --librispeech LibriSpeech/test-clean --output json/test.jsonl
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from taste.atomic import atomic_path
from taste.settings import parse_settings

LIBRISPEECH = "LibriSpeech/train-clean-100"  # folder to read, with its speakers' folders inside
OUTPUT = "json/train.jsonl"  # manifest to write
LANGUAGE = "en"  # noted with each utterance
OVERWRITE = False  # replace OUTPUT where it exists

_AUDIO_SUFFIXES = (".flac", ".wav")


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


def main(argv: Sequence[str] | None = None) -> int:
    """Write the manifest; returns the exit code."""
    settings = parse_settings(__file__, globals(), argv)
    output = Path(settings.output)
    if output.exists() and not settings.overwrite:
        print(f"error: {output} exists; add --overwrite, or choose another --output", file=sys.stderr)
        return 1
    try:
        entries = read_transcripts(Path(settings.librispeech))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    lines = [json.dumps(entry | {"language": settings.language}, ensure_ascii=False) for entry in entries]
    with atomic_path(output) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{output}: {len(entries)} utterances of {len({entry['speaker'] for entry in entries})} speakers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
