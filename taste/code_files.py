"""Files with the words of an utterance and their codes: readable JSON, a line for each word."""

import json
from pathlib import Path

import torch

from cosyvoice.utils.atomic import write_text
from taste.tokenizer import SpeechCodes

# W words   L codes a word

FIELDS = ("text", "model", "seconds", "doubts", "words", "speaker")


def write_codes(path: Path, spoken: SpeechCodes) -> None:
    """Write the codes of an utterance, atomically.

    Args:
        path: the .json file.
        spoken: what `TasteTokenizer.encode` gave.
    """
    head = {"text": spoken.text, "model": spoken.model, "seconds": round(spoken.seconds, 3), "doubts": spoken.doubts}
    words = [
        json.dumps({"word": word, "codes": row}, ensure_ascii=False)
        for word, row in zip(spoken.words, spoken.codes.tolist(), strict=True)
    ]
    lines = [f'"{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in head.items()]
    lines.append('"words": [\n    ' + ",\n    ".join(words) + "\n  ]")
    lines.append(f'"speaker": {json.dumps(None if spoken.speaker is None else spoken.speaker.tolist())}')
    write_text(path, "{\n  " + ",\n  ".join(lines) + "\n}\n")


def read_codes(path: Path) -> SpeechCodes:
    """Read the codes of an utterance.

    Args:
        path: the .json file.

    Returns:
        what was written.

    Raises:
        ValueError: the file is no such JSON (the message says what is wrong).
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in FIELDS if name not in content]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        codes = torch.tensor([word["codes"] for word in content["words"]], dtype=torch.int64)
        speaker = content["speaker"]
        return SpeechCodes(
            text=content["text"],
            words=[word["word"] for word in content["words"]],
            codes=codes,
            speaker=None if speaker is None else torch.tensor(speaker, dtype=torch.float32),
            seconds=content["seconds"],
            model=content["model"],
            doubts=content["doubts"],
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no file of codes ({error}); they are made by `python model_code.py --mode encode`"
        ) from error
