import torch

from taste.transcript_check import blurredness, misfits

WORDS = torch.tensor([0, 0, 1, 2, 3])


def test_a_recording_as_long_as_its_text_raises_no_doubt():
    assert misfits(WORDS, 60) == []
    assert misfits(WORDS, 60, torch.eye(5).repeat_interleave(12, dim=1) / 12) == []


def test_words_without_sound_of_their_own_are_counted():
    assert misfits(WORDS, 3) == ["4 words in 3 frames (50 a second): some words have no sound of their own"]


def test_too_short_and_too_long_recordings_are_told_with_their_ratio():
    assert "9 frames for 5 text tokens, 1.8 each" in misfits(WORDS, 9)[0]
    assert "500 frames for 5 text tokens, 100.0 each" in misfits(WORDS, 500)[0]


def test_attention_that_finds_nothing_is_told():
    (sign,) = misfits(WORDS, 60, torch.full((5, 60), 1 / 60))
    assert "found nowhere" in sign and "100%" in sign


def test_blurredness_is_0_at_one_frame_and_1_everywhere():
    assert blurredness(torch.eye(6)) == 0.0
    assert abs(blurredness(torch.full((3, 50), 0.02)) - 1) < 1e-6
    assert blurredness(torch.ones(2, 1)) == 0.0
