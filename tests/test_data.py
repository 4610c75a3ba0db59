import pytest
import torch

from cosyvoice.utils.common import IGNORE_ID
from taste.batch import NO_WORD, collate
from taste.data import open_dataset, real_frames
from taste.feature_reader import FeatureFileError
from taste.feature_set import FeaturePaths, features_exist
from taste.feature_writer import FeatureWriter
from tests.small_stage3 import SIZES, random_examples, small_dataset, write_features

LENGTHS = [(3, 20), (5, 12), (2, 31), (4, 8)]


def rewrite(path, change) -> None:
    """Load a feature file, let `change` edit it, and save it again."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.fixture
def paths(tmp_path) -> FeaturePaths:
    return write_features(tmp_path, "train", random_examples(LENGTHS))


def test_an_utterance_comes_back_as_it_was_stored(paths):
    dataset = open_dataset(paths, SIZES)
    assert dataset.utt_ids == ["utt-00", "utt-01", "utt-02", "utt-03"]
    assert dataset.lengths == [tokens + units + 3 for tokens, units in LENGTHS]
    for example, stored in zip(random_examples(LENGTHS), dataset, strict=True):
        assert stored.utt_id == example.utt_id
        assert torch.equal(stored.units, example.units)
        assert torch.equal(stored.text, example.text)
        assert torch.equal(stored.speaker, example.speaker)
        assert torch.equal(stored.speech_mid, example.speech_mid.half().float())
        assert torch.equal(stored.speech_final, example.speech_final.half().float())
        assert stored.speech_mid.dtype == stored.text.dtype == torch.float32


def test_words_come_back_with_the_utterance_and_padding_is_no_word(paths):
    dataset = open_dataset(paths, SIZES)
    assert dataset.has_words and dataset.subset([1, 2]).has_words
    for example, stored in zip(random_examples(LENGTHS), dataset, strict=True):
        assert torch.equal(stored.word_ids, example.word_ids) and torch.equal(stored.text_tokens, example.text_tokens)
    batch = collate(list(dataset))
    assert batch.word_ids.tolist()[2] == [0, 0, NO_WORD, NO_WORD, NO_WORD]
    assert batch.text_tokens.tolist()[2] == [20, 21, 0, 0, 0]
    assert batch.word_count == sum(len(set(example.word_ids.tolist())) for example in dataset)


def test_features_of_other_scripts_have_no_words(paths):
    rewrite(paths.info, lambda content: content["utt-01"].pop("word_id"))
    dataset = open_dataset(paths, SIZES)
    assert not dataset.has_words
    assert collate(list(dataset)).word_ids is None and collate(list(dataset)).word_count == 0


def test_collate_pads_on_the_right_and_notes_the_lengths(paths):
    batch = collate(list(open_dataset(paths, SIZES)))
    assert batch.text.shape == (4, 5, 24) and batch.text_lengths.tolist() == [3, 5, 2, 4]
    assert batch.units.shape == (4, 31) and batch.unit_lengths.tolist() == [20, 12, 31, 8]
    assert batch.speech_mid.shape == (4, 31, 20) and batch.speech_lengths.tolist() == [20, 12, 31, 8]
    assert batch.units[3, 8:].eq(IGNORE_ID).all() and not batch.units[3, :8].eq(IGNORE_ID).any()
    assert batch.target_count == sum(units + 1 for _, units in LENGTHS)


def test_chunks_are_read_like_the_one_file(tmp_path, paths):
    examples = random_examples(LENGTHS)
    with FeatureWriter(tmp_path / "chunked_text_emb.pt", chunk_utterances=3) as writer:
        for example in examples:
            writer.add(example.utt_id, example.text)
            if writer.is_full:
                writer.flush()
        writer.finish("chunks")
    chunked = FeaturePaths(paths.units, tmp_path / "chunked_text_emb.pt", paths.speech, paths.info)
    assert not chunked.text.exists() and features_exist(chunked.text)
    dataset = open_dataset(chunked, SIZES)
    assert torch.equal(dataset[2].text, examples[2].text)


def test_features_without_units_and_the_reverse_are_left_out_and_counted(paths):
    rewrite(paths.units, lambda content: content.pop("utt-01"))
    rewrite(paths.text, lambda content: content.pop("utt-02"))
    dataset = open_dataset(paths, SIZES)
    assert dataset.utt_ids == ["utt-00", "utt-03"]
    assert dataset.selection.left_out == {"without S3 units": ["utt-01"], "without text embeddings": ["utt-02"]}
    told = dataset.selection.describe("training set")
    assert "2 utterances, 2 left out" in told and "1 without S3 units: utt-01" in told


def test_units_that_are_none_or_empty_are_left_out(paths):
    rewrite(paths.units, lambda content: content.update({"utt-00": None, "utt-03": []}))
    dataset = open_dataset(paths, SIZES)
    assert dataset.utt_ids == ["utt-01", "utt-02"]
    assert dataset.selection.left_out["without S3 units"] == ["utt-00", "utt-03"]


def test_an_utterance_without_a_speaker_vector_is_left_out(paths):
    rewrite(paths.info, lambda content: content["utt-01"].pop("spk_embedding"))
    dataset = open_dataset(paths, SIZES)
    assert dataset.selection.left_out == {"without a speaker vector": ["utt-01"]}


def test_an_utterance_longer_than_the_language_model_reads_is_left_out(paths):
    rewrite(paths.units, lambda content: content.update({"utt-02": [1] * 4996}))
    rewrite(paths.info, lambda content: content["utt-02"].update(duration_s=99.9))
    dataset = open_dataset(paths, SIZES)
    assert dataset.selection.left_out == {"longer than the 5000 positions of the language model": ["utt-02"]}
    rewrite(paths.units, lambda content: content.update({"utt-02": [1] * 4995}))
    assert "utt-02" in open_dataset(paths, SIZES).utt_ids


def test_units_of_another_recording_are_left_out(paths):
    rewrite(paths.info, lambda content: content["utt-01"].update(duration_s=content["utt-01"]["duration_s"] + 0.1))
    rewrite(paths.info, lambda content: content["utt-02"].update(duration_s=content["utt-02"]["duration_s"] + 0.06))
    dataset = open_dataset(paths, SIZES)
    ((reason, left_out),) = dataset.selection.left_out.items()
    assert left_out == ["utt-01"] and "with other S3 units than 50 a second" in reason


def test_no_common_utterance_is_an_error_that_shows_the_key_schemes(paths):
    rewrite(paths.units, lambda content: [content.update({f"{key}x": content.pop(key)}) for key in list(content)])
    rewrite(paths.text, lambda content: [content.update({f"a/b/{key}.wav": content.pop(key)}) for key in list(content)])
    with pytest.raises(ValueError) as caught:
        open_dataset(paths, SIZES)
    assert "S3 units: 4 keys, keyed by id, such as 'utt-00x'" in str(caught.value)


def test_keys_of_other_schemes_are_brought_together(tmp_path):
    examples = [example._replace(utt_id=f"103-1240-{n:04d}") for n, example in enumerate(random_examples(LENGTHS))]
    paths = write_features(tmp_path, "train", examples)
    folders = "LibriSpeech/train-clean-100/103/1240"
    rewrite(paths.units, lambda c: [c.update({f"{folders}/{key}.flac": c.pop(key)}) for key in list(c)])
    rewrite(paths.text, lambda c: [c.update({f"103-1240-{key}": c.pop(key)}) for key in list(c)])
    assert open_dataset(paths, SIZES).utt_ids == [example.utt_id for example in examples]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("text", lambda c: c.update({"utt-01": torch.zeros(5, 512)}), "text embedding is 512 wide, the model's is 24"),
        ("units", lambda c: c["utt-01"].append(64), "to 64, the model knows 0 to 63"),
        ("units", lambda c: c["utt-01"].append(-1), "units reach from -1 to"),
        ("info", lambda c: c["utt-01"].update(spk_embedding=torch.zeros(512)), "speaker vector has 512 numbers"),
        (
            "info",
            lambda c: c["utt-01"].update(word_id=torch.zeros(9)),
            "its word_id is for 9 text tokens, its text embe",
        ),
        ("speech", lambda c: c["mid"].update({"utt-01": torch.zeros(9, 20)}), "mid [9, 20], final [12, 20]"),
        (
            "speech",
            lambda c: [c[layer].update({"utt-01": torch.zeros(12, 33)}) for layer in c],
            "Whisper features are 33 wide, those of utt-00 20",
        ),
    ],
)
def test_features_of_another_model_are_an_error_that_names_the_sizes(paths, file, change, message):
    rewrite(getattr(paths, file), change)
    with pytest.raises(ValueError) as caught:
        open_dataset(paths, SIZES)
    assert message in str(caught.value) and "utt-01" in str(caught.value)


def test_missing_files_are_all_named_with_the_command_that_makes_them(tmp_path):
    paths = FeaturePaths(tmp_path / "u.pt", tmp_path / "t.pt", tmp_path / "w.pt", None)
    with pytest.raises(FileNotFoundError, match=r"u\.pt.*t\.pt.*w\.pt[\s\S]*bash s3\.sh"):
        open_dataset(paths, SIZES)


def test_a_file_cut_short_by_a_crash_is_named(paths):
    content = paths.speech.read_bytes()
    paths.speech.write_bytes(content[: len(content) // 2])
    with pytest.raises(FeatureFileError, match=r"train_whisper_feats\.pt"):
        open_dataset(paths, SIZES)


@pytest.mark.parametrize("with_info", [True, False])
def test_frames_of_whispers_padding_are_cut_off(tmp_path, with_info):
    (example,) = random_examples([(3, 20)])
    padded = {
        name: torch.nn.functional.pad(getattr(example, name), (0, 0, 0, 1480), value=9.0)
        for name in ("speech_mid", "speech_final")
    }
    paths = write_features(tmp_path, "train", [example._replace(**padded)])
    dataset = open_dataset(paths if with_info else FeaturePaths(paths.units, paths.text, paths.speech), SIZES)
    assert dataset[0].speech_mid.shape == dataset[0].speech_final.shape == (20, 20)
    assert torch.equal(dataset[0].speech_mid, example.speech_mid.half().float())


@pytest.mark.parametrize(
    ("stored", "units", "seconds", "kept"),
    [
        (1500, 200, 4.001, 201),
        (1500, 200, None, 200),
        (198, 200, 4.2, 198),
        (1500, 1600, 31.0, 1500),
        (1500, 3, 0.0, 1),
    ],
)
def test_as_many_frames_are_kept_as_the_recording_is_long(stored, units, seconds, kept):
    assert real_frames(stored, units, seconds) == kept


def test_without_utterance_info_there_are_no_speakers(paths):
    dataset = open_dataset(FeaturePaths(paths.units, paths.text, paths.speech), SIZES)
    assert not dataset.has_speakers
    assert dataset[0].speaker is None
    assert collate([dataset[0], dataset[1]]).speaker is None


def test_text_only_needs_no_whisper_features(paths):
    dataset = open_dataset(FeaturePaths(paths.units, paths.text, None, paths.info), SIZES)
    assert dataset.speech_width is None
    assert collate(list(dataset)).speech_mid is None


def test_the_fingerprint_tells_other_data_apart(tmp_path):
    dataset = small_dataset(tmp_path, "train", LENGTHS)
    assert dataset.fingerprint() == small_dataset(tmp_path, "again", LENGTHS).fingerprint()
    assert dataset.fingerprint() != dataset.subset([0, 1, 2]).fingerprint()
