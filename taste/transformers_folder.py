"""Reads a folder in transformers' format: its configuration, and which files hold its weights."""

import json
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
WEIGHT_FILE = "model.safetensors"
SHARD_INDEX_FILE = "model.safetensors.index.json"


def read_model_config(folder: Path, name: str, remedy: str) -> dict[str, Any]:
    """Read a model's configuration; nothing is ever downloaded.

    Args:
        folder: in transformers' format.
        name: of the kind of model that is wanted; in small letters it is its `model_type`.
        remedy: what to do where the folder is no such model, for the message.

    Returns:
        what config.json holds.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is no JSON, or describes another kind of model.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no {name} folder: there is no {path}; {remedy}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {remedy}") from error
    found = content.get("model_type") if isinstance(content, dict) else type(content).__name__
    if found != name.lower():
        raise ValueError(f"{path} describes {found!r}, expected a {name} model; {remedy}")
    return content


def weight_files(folder: Path, remedy: str) -> list[Path]:
    """The weight files of a model: one, or the shards that its index names.

    Args:
        folder: in transformers' format.
        remedy: what to do where a file is missing, for the message.

    Returns:
        existing files.

    Raises:
        FileNotFoundError: the folder has no safetensors weights, or a shard is missing.
    """
    whole, index = folder / WEIGHT_FILE, folder / SHARD_INDEX_FILE
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has neither {WEIGHT_FILE} nor {SHARD_INDEX_FILE}; {remedy}")
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which {SHARD_INDEX_FILE} names; {remedy}")
    return [folder / name for name in shards]
