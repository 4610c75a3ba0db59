"""Remembers which models and settings made an output, so that a resumed run cannot mix two kinds of features."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from cosyvoice.utils.atomic import write_json

DIGEST_DIGITS = 16


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """A short fingerprint of some weights.

    Args:
        tensors: on any device, of any dtype.

    Returns:
        DIGEST_DIGITS hexadecimal digits.
    """
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()[:DIGEST_DIGITS]


def file_digest(path: str | os.PathLike[str]) -> str:
    """A short fingerprint of a file.

    Args:
        path: the file.

    Returns:
        DIGEST_DIGITS hexadecimal digits.
    """
    state = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            state.update(block)
    return state.hexdigest()[:DIGEST_DIGITS]


def check_made_with(path: str | os.PathLike[str], made_with: Mapping[str, object], outputs: Iterable[Path]) -> None:
    """Refuse to add to outputs that something else made; note what makes new ones.

    Args:
        path: the small JSON file beside the outputs.
        made_with: everything that the values depend on.
        outputs: those with content already.

    Raises:
        ValueError: there are outputs, and they were made with other models or settings, or nobody noted with which.
    """
    path = Path(path)
    outputs = list(outputs)
    if outputs:
        names = " ".join(str(output) for output in outputs)
        remedy = f"choose other outputs, or start again after: rm -r {names}"
        if not path.is_file():
            raise ValueError(f"{names} exist, but {path}, which says what made them, does not; {remedy}")
        earlier = json.loads(path.read_text(encoding="utf-8"))
        changes = [
            f"  {name}: {earlier.get(name)} then, {made_with.get(name)} now"
            for name in sorted(set(earlier) | set(made_with))
            if earlier.get(name) != made_with.get(name)
        ]
        if changes:
            raise ValueError("the outputs were made differently:\n" + "\n".join(changes) + f"\n{remedy}")
    write_json(path, dict(made_with))


def changed_models(then: Mapping[str, object] | None, now: Mapping[str, object] | None) -> str:
    """Say which models made features then and now, where both are known and differ.

    Args:
        then: a note of `noted_models`; None where there was none.
        now: likewise.

    Returns:
        the differences in words; '' where there are none.
    """
    then, now = then or {}, now or {}
    both = then.keys() & now.keys()
    return "; ".join(f"{name}: {then[name]} then, {now[name]} now" for name in sorted(both) if then[name] != now[name])


def noted_models(info_path: str | os.PathLike[str]) -> dict[str, object] | None:
    """What stage 1 noted about the models that made its features.

    Args:
        info_path: the utt2info file; the note lies beside it.

    Returns:
        the note; None where there is none, as beside features of other scripts.
    """
    path = Path(info_path).with_suffix(".made_with.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
