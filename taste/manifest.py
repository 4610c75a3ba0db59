"""Reading a manifest: one JSON object a line, with at least `audio_path` and `text`."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from taste.utterance_ids import normalise_key

SHOWN_CHARACTERS = 80


class ManifestError(ValueError):
    """A manifest cannot be used; the message lists every problem with its line number and text."""


class Utterance(NamedTuple):
    """One line of a manifest."""

    utt_id: str
    audio_path: Path  # not checked: a missing recording is a failure of that recording, not of the manifest
    text: str  # may be empty, which is for the stage that needs words to refuse
    speaker: str | None
    language: str | None
    line_number: int  # from 1


class _BadLineError(ValueError):
    """What is wrong with one line."""


def read_manifest(path: str | os.PathLike[str], *, needs_text: bool = True) -> list[Utterance]:
    """Read every line of a manifest.

    A relative `audio_path` is tried against the working directory, then against the manifest's folder. The utterance id
    is `utt_id`, else the recording's file name without its suffix. Empty lines are skipped.

    Args:
        path: the .jsonl file.
        needs_text: False takes lines without `text`, and gives them an empty one.

    Returns:
        the utterances in the file's order, at least one.

    Raises:
        ManifestError: the file is missing, is no UTF-8 text or holds no utterance, or lines are malformed or share an
            id; every bad line is listed.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: text may hold U+2028
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ManifestError(
            f"{path}: there is no such manifest; expected a .jsonl file with one object a line: "
            '{"audio_path": "a.wav", "text": "what is said"}'
        ) from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: the manifest is not UTF-8 text ({error})") from error

    utterances: dict[str, Utterance] = {}
    problems = []
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            utterance = _read_line(line, line_number, path.parent, needs_text)
        except _BadLineError as error:
            problems.append(f"  line {line_number}: {error}: {_shorten(line)}")
            continue
        earlier = utterances.setdefault(utterance.utt_id, utterance)
        if earlier is not utterance:
            problems.append(
                f"  lines {earlier.line_number} and {line_number} have one id, {utterance.utt_id!r}: "
                f"{_shorten(lines[earlier.line_number - 1])} and {_shorten(line)}"
            )
    if problems:
        raise ManifestError(f"{path}: {len(problems)} problems; correct these lines:\n" + "\n".join(problems))
    if not utterances:
        raise ManifestError(f"{path}: the manifest holds no utterance")
    return list(utterances.values())


def _read_line(line: str, line_number: int, folder: Path, needs_text: bool) -> Utterance:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise _BadLineError(f"not JSON ({error.msg}, column {error.colno})") from error
    if not isinstance(entry, dict):
        raise _BadLineError(f"expected an object, got {type(entry).__name__}")
    audio_path = _text(entry, "audio_path")
    if not audio_path:
        raise _BadLineError("audio_path is missing or empty")
    text = _text(entry, "text")
    if text is None and needs_text:
        raise _BadLineError("text is missing")
    return Utterance(
        utt_id=_utterance_id(entry, audio_path),
        audio_path=_resolve(Path(audio_path), folder),
        text=text or "",
        speaker=_text(entry, "speaker"),
        language=_text(entry, "language"),
        line_number=line_number,
    )


def _text(entry: dict[str, Any], field: str) -> str | None:
    value = entry.get(field)
    if value is not None and not isinstance(value, str):
        raise _BadLineError(f"{field} must be text, got {type(value).__name__}")
    return value


def _utterance_id(entry: dict[str, Any], audio_path: str) -> str:
    value = entry.get("utt_id")
    if value is None:
        return normalise_key(Path(audio_path).stem)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise _BadLineError(f"utt_id must be text, got {value!r}")
    if "/" in value or "\\" in value:
        raise _BadLineError(f"utt_id must not hold a slash, since files are named by it, got {value!r}")
    return normalise_key(value)


def _resolve(audio_path: Path, folder: Path) -> Path:
    if audio_path.is_absolute() or audio_path.exists():
        return audio_path
    return folder / audio_path


def _shorten(line: str) -> str:
    line = line.strip()
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 3] + "..."
