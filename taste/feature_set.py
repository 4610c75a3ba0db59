"""The feature files of one split of the data, as they lie on the disk and as open maps."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from taste.feature_files import stored_bytes
from taste.feature_reader import open_features, open_units

WORD_FIELDS = ("text_token", "word_id")  # of utt2info: a number for each text token


@dataclass(frozen=True)
class FeaturePaths:
    """Where the features of one split lie."""

    units: Path
    text: Path
    speech: Path | None = None  # not needed by text_only
    info: Path | None = None  # speaker vectors and durations; the model goes without when the file is absent


@dataclass(frozen=True)
class Features:
    """The open maps from utterance id to feature; values are read when they are asked for."""

    units: Mapping[str, list[int]]
    text: Mapping[str, Tensor]
    speech: Mapping[str, Mapping[str, Tensor]] | None  # "mid" and "final" of each
    info: Mapping[str, Mapping[str, Any]] | None


def open_split(paths: FeaturePaths) -> Features:
    """Open the feature files of a split; values are read when they are asked for.

    Args:
        paths: the files; `speech` and `info` may be None.

    Returns:
        the maps.

    Raises:
        FileNotFoundError: a file is absent (all absent ones are named).
        FeatureFileError: a file cannot be read.
    """
    needed = [path for path in (paths.units, paths.text, paths.speech, paths.info) if path is not None]
    absent = [path for path in needed if not features_exist(path)]
    if absent:
        raise FileNotFoundError(
            "missing feature files: "
            + ", ".join(str(path) for path in absent)
            + "\nS3 units are made by `bash s3.sh --model-dir <folder>`, "
            "the others by `python utt2text_and_feature.py --model-dir <folder> --jsonl <manifest>`"
        )
    text = open_features(paths.text)
    return Features(
        units=open_units(paths.units, known_ids=text),
        text=text,
        speech=None if paths.speech is None else open_features(paths.speech, known_ids=text),
        info=None if paths.info is None else open_features(paths.info, known_ids=text),
    )


def features_exist(path: Path) -> bool:
    """Whether a feature file is there, as one `.pt` or as its chunks.

    Args:
        path: the `.pt`.

    Returns:
        True where `open_features` would find something.
    """
    return stored_bytes(path) > 0
