"""Writing a `.pt` file so that it is either whole or not there."""

import os
from pathlib import Path
from typing import Any

import torch

from cosyvoice.utils.atomic import atomic_path


def save_tensors(path: str | os.PathLike[str], content: Any) -> None:
    """Write a value with `torch.save`, atomically.

    Args:
        path: the file; its folder is made if it is missing.
        content: tensors and plain values.

    Raises:
        OSError: it cannot be written, the disk being full, say; what stood there before is untouched.
    """
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise OSError(
            f"cannot write {Path(path)} ({error}); what was saved before is untouched. Free some space"
        ) from error
