"""Refuses features that were made with other models than the model folder of a run: they would mean something else."""

from collections.abc import Sequence
from pathlib import Path

from cosyvoice.utils.model_dir import SPEAKER_MODEL_FILE, SPEECH_TOKENIZER_FILE, ModelDir, text_embedding_table
from cosyvoice.utils.provenance import changed_models, digest, file_digest, noted_models
from taste.feature_set import FeaturePaths

# by their names in the notes
_FILES = {"speech_tokenizer": SPEECH_TOKENIZER_FILE, "speaker_model": SPEAKER_MODEL_FILE}
_OF_WHISPER = ("whisper", "mid_layer")


def check_origin(splits: Sequence[FeaturePaths], model_dir: str | Path) -> None:
    """Hold what stages 1 and 2 noted beside their features against a model folder.

    S3 units of another tokenizer have the same numbers, and text embeddings of another language model the same width,
    but another meaning: a training on them goes well and learns nonsense.

    Args:
        splits: the features of each. Those without a note, as of other scripts, are taken as they are.
        model_dir: the model folder.

    Raises:
        ValueError: they were made with other models (all are named, with the commands that make new ones).
        FileNotFoundError: the folder lacks its language model.
    """
    folder = ModelDir(model_dir)
    notes = [_noted(paths) for paths in splits]
    now: dict[str, object] = {
        name: file_digest(folder.file(file))
        for name, file in _FILES.items()
        if any(name in noted for noted in notes) and folder.file(file).is_file()
    }
    if any("text_embedding" in noted for noted in notes):
        now["text_embedding"] = digest([text_embedding_table(folder)])
    for paths, noted in zip(splits, notes, strict=True):
        if changed := changed_models(noted, now):
            raise ValueError(
                f"the features {paths.units} and {paths.text} were not made with {model_dir} ({changed}); make them "
                "again, to other places or after removing these: python utt2text_and_feature.py --model-dir "
                f"{model_dir} --jsonl <manifest>, and bash s3.sh --model-dir {model_dir}"
            )


def check_same_hearing(train_paths: FeaturePaths, test_paths: FeaturePaths) -> None:
    """Refuse Whisper features of two splits that were made in two ways.

    Args:
        train_paths: one split.
        test_paths: the other one.

    Raises:
        ValueError: both have notes, and they differ.
    """
    if train_paths.speech is None or train_paths.info is None or test_paths.info is None:
        return
    notes = [
        {name: value for name, value in (noted_models(info) or {}).items() if name in _OF_WHISPER}
        for info in (train_paths.info, test_paths.info)
    ]
    if changed := changed_models(*notes):
        raise ValueError(
            f"Whisper features for training and for test were made differently ({changed}: training, test); make "
            f"{test_paths.speech} again as {train_paths.speech} was made"
        )


def _noted(paths: FeaturePaths) -> dict[str, object]:
    """What both stages noted; empty where neither did."""
    of_others = noted_models(paths.info) if paths.info else None
    return (noted_models(paths.units) or {}) | (of_others or {})
