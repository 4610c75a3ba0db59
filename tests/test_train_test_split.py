import pytest

from taste.data import open_dataset
from taste.train_test_split import hold_out
from tests.small_stage3 import SIZES, random_examples, small_dataset, write_features


def test_a_tenth_is_held_out_when_there_is_no_test_set(tmp_path):
    dataset = small_dataset(tmp_path, "train", [(2, 5)] * 40)
    train, test, sentence = hold_out(dataset, seed=3)
    assert sorted(train.utt_ids + test.utt_ids) == dataset.utt_ids
    assert 1 <= len(test) <= 8
    assert f"{len(test)} of 40" in sentence
    assert hold_out(dataset, seed=3)[1].utt_ids == test.utt_ids
    assert hold_out(dataset, seed=4)[1].utt_ids != test.utt_ids


def test_what_is_held_out_stays_so_when_the_data_grows(tmp_path):
    few, many = (small_dataset(tmp_path / str(count), "train", [(2, 5)] * count) for count in (40, 100))
    (learned, tested, _), (learned_later, tested_later, _) = (hold_out(dataset, seed=0) for dataset in (few, many))
    assert set(learned.utt_ids) <= set(learned_later.utt_ids)
    assert set(tested.utt_ids) <= set(tested_later.utt_ids)
    assert 0.03 * len(many) < len(tested_later) < 0.2 * len(many)


def test_known_speakers_are_held_out_whole(tmp_path):
    speakers = [f"speaker-{number % 8}" for number in range(40)]
    paths = write_features(tmp_path, "train", random_examples([(2, 5)] * 40), speakers)
    train, test, sentence = hold_out(open_dataset(paths, SIZES), seed=0)
    in_train, in_test = ({part.info(utt_id)["speaker"] for utt_id in part.utt_ids} for part in (train, test))
    assert not in_train & in_test and in_train | in_test == set(speakers)
    assert f"{len(in_test)} of 8 speakers" in sentence


def test_few_speakers_are_not_held_out_whole(tmp_path):
    speakers = [f"speaker-{number % 2}" for number in range(40)]
    paths = write_features(tmp_path, "train", random_examples([(2, 5)] * 40), speakers)
    _, test, sentence = hold_out(open_dataset(paths, SIZES), seed=0)
    assert len(test) >= 1 and "speakers" not in sentence


def test_a_single_utterance_cannot_be_split(tmp_path):
    with pytest.raises(ValueError, match="cannot be split"):
        hold_out(small_dataset(tmp_path, "train", [(2, 5)]), seed=0)
