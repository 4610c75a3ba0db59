import torch

from taste.subsample import finite_examples, spread_evenly
from tests.small_stage3 import small_dataset


def test_utterances_to_show_come_from_all_parts_of_the_data():
    assert spread_evenly(15, 4) == [1, 5, 9, 13]
    assert spread_evenly(5, 5) == spread_evenly(5, 9) == [0, 1, 2, 3, 4]
    assert spread_evenly(5, 0) == []


def test_utterances_that_are_no_numbers_are_named_and_not_given(tmp_path):
    dataset, told = small_dataset(tmp_path, "train", [(2, 5)] * 6), []
    dataset.features.text["utt-03"].fill_(torch.nan)
    found = list(finite_examples(dataset, 3, told.append, "nothing is made of it"))
    assert [(index, example.utt_id) for index, example in found] == [(1, "utt-01"), (5, "utt-05")]
    assert told == ["warning: utt-03 has features that are no numbers; nothing is made of it"]
