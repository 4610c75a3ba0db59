"""The list of recordings that a stage could not use."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cosyvoice.utils.atomic import write_text


@dataclass(frozen=True)
class Failure:
    """One utterance that cannot be used, as the failures file lists it."""

    utt_id: str
    audio_path: str
    reason: str


def list_failures(output_path: Path, failures: Sequence[Failure]) -> None:
    """Write `<output>.failures.jsonl`, one object a line, and say so; where nothing failed, remove an earlier list.

    Args:
        output_path: the .pt file that lacks these utterances.
        failures: all of them.
    """
    path = output_path.with_suffix(".failures.jsonl")
    path.unlink(missing_ok=True)
    if failures:
        lines = [json.dumps(asdict(failure), ensure_ascii=False) + "\n" for failure in failures]
        write_text(path, "".join(lines))
        print(f"{len(failures)} utterances failed; they are listed in {path}")
