import pytest
import torch

from taste.controls import OtherRecording, Silence, controls_of
from taste.data import open_dataset
from taste.whisper_encoder import WhisperEncoder
from tests.small_stage3 import SIZES, SPEECH_WIDTH, random_examples, small_dataset, write_features
from tests.small_whisper import WIDTH, write_small_whisper

LENGTHS = [(3, 20), (5, 12), (2, 31), (4, 8)]


def whisper_and_features(tmp_path):
    """A Whisper's folder, and utterances with features as wide as its."""
    examples = [
        example._replace(speech_final=torch.ones(units, WIDTH), speech_mid=torch.ones(units, WIDTH))
        for example, (_, units) in zip(random_examples(LENGTHS), LENGTHS, strict=True)
    ]
    dataset = open_dataset(write_features(tmp_path, "test", examples), SIZES)
    return write_small_whisper(tmp_path / "whisper"), dataset


def test_each_text_hears_the_recording_of_another_one(tmp_path):
    dataset = small_dataset(tmp_path, "test", LENGTHS)
    wrong = OtherRecording(dataset)
    assert len(wrong) == 4 and wrong.lengths == dataset.lengths
    for index in range(4):
        right, heard = dataset[index], wrong[index]
        assert torch.equal(heard.text, right.text) and torch.equal(heard.units, right.units)
        assert torch.equal(heard.speaker, right.speaker)
        others = [number for number in range(4) if torch.equal(dataset[number].speech_mid, heard.speech_mid)]
        assert others and index not in others
        assert len(heard.speech_mid) == len(heard.speech_final)


def test_a_silent_recording_is_as_long_as_the_right_one(tmp_path):
    dataset = small_dataset(tmp_path, "test", LENGTHS)
    silence = Silence(dataset, torch.zeros(31, SPEECH_WIDTH), torch.ones(31, SPEECH_WIDTH))
    for index, (_, frames) in enumerate(LENGTHS):
        assert silence[index].speech_final.shape == silence[index].speech_mid.shape == (frames, SPEECH_WIDTH)
        assert silence[index].speech_mid.eq(1).all()


class Unread:
    """Features whose shape is known, and which nobody may read."""

    def __init__(self, features: torch.Tensor) -> None:
        self.shape = features.shape

    def __len__(self) -> int:
        return self.shape[0]


@pytest.mark.parametrize("control", ["shuffled", "silenced"])
def test_ones_own_whisper_features_are_not_read(tmp_path, control):
    dataset = small_dataset(tmp_path, "test", LENGTHS)
    silence = torch.zeros(31, SPEECH_WIDTH)
    wrong = OtherRecording(dataset) if control == "shuffled" else Silence(dataset, silence, silence)
    expected, speech = wrong[0], dataset.features.speech
    speech["utt-00"] = {name: Unread(features) for name, features in speech["utt-00"].items()}
    for one, other in zip(expected, wrong[0], strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_silence_is_what_whisper_hears_of_it(tmp_path):
    folder, dataset = whisper_and_features(tmp_path)
    heard = {}
    controls_of(dataset, lambda data: heard.update({type(data): data}) or {}, str(folder), 2)
    expected = WhisperEncoder(folder, 2).encode([torch.zeros(8 * 320)])[0]
    torch.testing.assert_close(heard[Silence][3].speech_mid, expected.mid)
    torch.testing.assert_close(heard[Silence][3].speech_final, expected.final)


def test_a_whisper_of_another_width_is_refused(tmp_path):
    dataset = small_dataset(tmp_path, "test", LENGTHS)
    results = controls_of(dataset, lambda data: {"top5": len(data)}, str(write_small_whisper(tmp_path / "whisper")), 2)
    assert results["shuffled"] == {"top5": 4}
    assert f"is {WIDTH} wide, the features {SPEECH_WIDTH}" in results["silenced"]


def test_silence_is_not_heard_by_another_layer_than_the_recordings(tmp_path):
    folder, dataset = whisper_and_features(tmp_path)
    made_with = {"whisper": WhisperEncoder(folder, 2).digest, "mid_layer": 1}
    results = controls_of(dataset, lambda data: {}, str(folder), 2, made_with)
    assert results["shuffled"] == {} and "mid_layer: 1 then, 2 now" in results["silenced"]


def test_what_cannot_be_measured_is_said(tmp_path):
    dataset = small_dataset(tmp_path, "test", LENGTHS[:1])
    results = controls_of(dataset, lambda data: {}, str(tmp_path / "nowhere"), 6)
    assert "one utterance cannot hear" in results["shuffled"]
    assert "no Whisper folder" in results["silenced"]
    with pytest.raises(ValueError, match="one utterance"):
        OtherRecording(dataset)
