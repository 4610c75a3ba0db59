"""The files in which values by utterance id lie.

`train_text_emb.pt` is written as `train_text_emb.chunks/000000.pt`, `000001.pt` ..., which may be merged into the one
file in the end, or left; a reader takes either, or both at once. Flat files are `{utt_id: value}`; nested ones are
`{"mid": {utt_id: value}, "final": {utt_id: value}}`.
"""

import os
from pathlib import Path

NESTED_FIELDS = ("mid", "final")


def chunk_folder(output_path: str | os.PathLike[str]) -> Path:
    """Where the chunks of an output lie.

    Args:
        output_path: the .pt file.

    Returns:
        `train_text_emb.chunks` beside `train_text_emb.pt`.
    """
    return Path(output_path).with_suffix(".chunks")


def chunk_files(output_path: str | os.PathLike[str]) -> list[Path]:
    """The chunks of an output.

    Args:
        output_path: the .pt file.

    Returns:
        those that there are, in order.
    """
    return sorted(file for file in chunk_folder(output_path).glob("*.pt") if file.stem.isdigit())


def stored_files(output_path: str | os.PathLike[str]) -> list[Path]:
    """Everything that an output consists of.

    Args:
        output_path: the .pt file.

    Returns:
        that file if it is there, and then its chunks.
    """
    path = Path(output_path)
    return ([path] if path.is_file() else []) + chunk_files(path)


def stored_bytes(output_path: str | os.PathLike[str]) -> int:
    """The size on the disk of an output, merged or in chunks.

    Args:
        output_path: the .pt file.

    Returns:
        bytes; 0 where there is nothing yet.
    """
    return sum(source.stat().st_size for source in stored_files(output_path))
