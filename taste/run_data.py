"""Opens the features of a run, or holds a part of them out."""

from collections.abc import Callable
from pathlib import Path

from cosyvoice.utils.abridge import abridge
from cosyvoice.utils.model_dir import ModelSizes
from cosyvoice.utils.settings import Settings
from taste.data import UtteranceDataset, open_dataset
from taste.feature_origin import check_origin, check_same_hearing
from taste.feature_set import FeaturePaths, features_exist
from taste.train_test_split import HELD_OUT_SEED, hold_out
from taste.transcript_check import misfits
from taste.variants import PARTS

SHOWN_IDS = 3


def open_data(
    settings: Settings, model_sizes: ModelSizes, say: Callable[[str], None], *, only_test: bool = False
) -> tuple[UtteranceDataset | None, UtteranceDataset]:
    """Open the training set and the test set, or split one off.

    Args:
        settings: paths, variant, model folder.
        model_sizes: what the features must fit.
        say: takes what a person should know.
        only_test: nothing is learned: the training set is opened only where the test set is split off it.

    Returns:
        training set and test set; None for the former where it was not opened.

    Raises:
        FileNotFoundError: a feature file is missing.
        ValueError: nothing usable, features of another model, or without the words that the variant needs.
    """
    train_paths, test_paths = _feature_paths(settings, "train"), _feature_paths(settings, "test")
    tested = has_test_set(settings)
    learned = not (only_test and tested)
    check_origin([*([train_paths] if learned else []), *([test_paths] if tested else [])], settings.cosyvoice_model_dir)
    train_set = None
    say("opening the features ...")  # many take a minute
    if learned:
        train_set = open_dataset(train_paths, model_sizes)
        say(train_set.selection.describe("training set"))
    if tested:
        if learned:
            check_same_hearing(train_paths, test_paths)
        test_set = open_dataset(test_paths, model_sizes)
        say(test_set.selection.describe("test set"))
        if train_set is not None and (warning := overlap(train_set, test_set)):
            say(warning)
    else:
        assert train_set is not None  # without a test set it was opened
        train_set, test_set, what_was_done = hold_out(train_set, HELD_OUT_SEED)
        say(what_was_done)
    if "fusion" in PARTS.get(settings.variant, ()):
        for dataset, path in ((train_set, settings.train_utt2info_path), (test_set, settings.test_utt2info_path)):
            if dataset is None:
                continue
            if not dataset.has_words:
                raise ValueError(
                    f"variant {settings.variant!r} averages over words, and not every utterance has text_token and "
                    f"word_id in {path}. They are made by `python utt2text_and_feature.py --jsonl <manifest>`; the "
                    "variants text_only and simple go without"
                )
            warn_of_misfits(dataset, say)
    return train_set, test_set


def overlap(train_set: UtteranceDataset, test_set: UtteranceDataset) -> str | None:
    """Say where utterances of the test set are learned from.

    Args:
        train_set: utterances to learn from.
        test_set: utterances to score.

    Returns:
        a warning, where they share a recording, or an id where nobody noted the recordings; None where they do not.
    """
    learned = {_recording(train_set, utt_id) for utt_id in train_set.utt_ids}
    shared = [utt_id for utt_id in test_set.utt_ids if _recording(test_set, utt_id) in learned]
    if not shared:
        return None
    return (
        f"warning: {len(shared)} of {len(test_set)} test utterances are in the training set too, {shared[0]} first: "
        "their scores say nothing of others"
    )


def has_test_set(settings: Settings) -> bool:
    """Whether some test features are there; else a part of the training set is held out.

    Args:
        settings: where they would be.

    Returns:
        True where units or text embeddings are there.
    """
    paths = _feature_paths(settings, "test")
    return features_exist(paths.units) or features_exist(paths.text)


def warn_of_misfits(dataset: UtteranceDataset, say: Callable[[str], None]) -> None:
    """Name the utterances whose recording is too short or too long for what it should say.

    Args:
        dataset: with words.
        say: takes what a person should know.
    """
    found = {}
    for utt_id in dataset.utt_ids:
        if doubts := misfits(dataset.word_ids(utt_id), len(dataset.features.units[utt_id])):
            found[utt_id] = doubts[0]
    if found:
        shown = abridge([f"{utt_id}: {doubt}" for utt_id, doubt in found.items()], SHOWN_IDS, "; ")
        say(f"warning: {len(found)} transcripts may not fit their recordings; they are used all the same: {shown}")


def _recording(dataset: UtteranceDataset, utt_id: str) -> str:
    return str(dataset.info(utt_id).get("audio_path") or utt_id)


def _feature_paths(settings: Settings, split: str) -> FeaturePaths:
    values = {name: Path(path) for name, path in settings.to_dict().items() if name.startswith(f"{split}_utt2")}
    info = values[f"{split}_utt2info_path"]
    return FeaturePaths(
        units=values[f"{split}_utt2_s3_path"],
        text=values[f"{split}_utt2_text_emb_path"],
        speech=None if settings.variant == "text_only" else values[f"{split}_utt2_whisper_path"],
        info=info if features_exist(info) else None,
    )
