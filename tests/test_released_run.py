"""A released TASTE is scored on a test set by what it reads itself, and not by what stage 1 wrote for another model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import model_code
from cosyvoice.utils.file_utils import write_wav
from cosyvoice.utils.model_dir import get_tokenizer
from taste.audio import read_audio
from taste.batch import collate
from taste.data import UtteranceDataset, open_dataset
from taste.official import load_taste_checkpoint, tokenize
from taste.released_data import ReleasedDataset
from taste.scores import Totals
from taste.tokenizer import TasteTokenizer
from tests.small_model_folder import write_small_model_folder
from tests.small_stage3 import SIZES, random_examples, write_features
from tests.small_taste import write_speaking_taste
from tests.sounds import voice_like

TEXTS = ["A quiet river ran.", "Two words", "Extraordinarily unquiet, it went on"]
SECONDS = [0.8, 1.0, 0.6]
WINDOW_FRAMES = 200  # of the small released Whisper


class Workplace:
    """A released TASTE, the CosyVoice it was trained with, and the features and recordings of a test set."""

    def __init__(self, folder: Path, golden_dir: Path) -> None:
        cases = torch.load(golden_dir / "taste" / "small_taste_cases.pt", weights_only=True)
        self.folder = folder
        self.model_dir = write_small_model_folder(folder / "model", golden_dir)
        self.released = write_speaking_taste(folder / "released", cases["end_to_end"]["hf_port"])
        weights = load_file(self.released / "model.safetensors")
        for name, value in weights.items():  # random weights hardly listen
            if ".decoder." in name and name.endswith((".encoder_attn.q_proj.weight", ".encoder_attn.out_proj.weight")):
                value.mul_(30.0)
        save_file(weights, self.released / "model.safetensors")
        examples = random_examples([(4, int(50 * seconds)) for seconds in SECONDS])
        self.paths = replace(write_features(folder, "test", examples), speech=None)  # those of stage 1 are of no use
        info = torch.load(self.paths.info, weights_only=True)
        for own, text, seconds in zip(info.values(), TEXTS, SECONDS, strict=True):
            path = folder / f"{text[:3].strip()}.wav"
            write_wav(path, torch.from_numpy(voice_like(seconds, 16_000, seed=len(text))).float(), 16_000)
            own.update(text=text, audio_path=str(path), duration_s=seconds)
        torch.save(info, self.paths.info)

    def run(self, **options: Any) -> int:
        values = {
            "variant": "taste",
            "num_epochs": 0,
            "taste_checkpoint": self.released,
            "cosyvoice_model_dir": self.model_dir,
            "exp_dir": self.folder / "exp",
            "run_name": "released",
            "test_utt2_s3_path": self.paths.units,
            "test_utt2_text_emb_path": self.paths.text,
            "test_utt2_whisper_path": self.folder / "none.pt",
            "test_utt2info_path": self.paths.info,
            "device": "cpu",
            "generate_utterances": 2,
            "decode_wavs": 1,
            "max_units_per_token": 4,
        }
        return model_code.main(
            [word for name, value in (values | options).items() for word in (f"--{name}", str(value))]
        )

    def dataset(self) -> UtteranceDataset:
        return open_dataset(self.paths, SIZES)


@pytest.fixture(scope="module")
def work(tmp_path_factory, golden_dir) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("released_run"), golden_dir)


@pytest.fixture(scope="module")
def taste(work):
    return load_taste_checkpoint(work.released)


@pytest.fixture(scope="module")
def test_set(work, taste) -> ReleasedDataset:
    return ReleasedDataset.of(work.dataset(), taste, get_tokenizer(work.model_dir))


def expected_batch(work: Workplace, taste, dataset: UtteranceDataset, utt_id: str):
    """An utterance as the released tokenizer reads it, with its true units."""
    info, units = dataset.info(utt_id), torch.tensor(dataset.features.units[utt_id])
    waveform = read_audio(info["audio_path"], 16_000).waveform
    text = tokenize(get_tokenizer(work.model_dir), info["text"])
    batch = taste.batch(text, waveform=waveform, speaker=dataset.speaker(utt_id))
    return replace(batch, units=units[None], unit_lengths=torch.tensor([len(units)]))


@torch.inference_mode()
def test_an_utterance_is_read_as_the_released_tokenizer_reads_it(work, taste, test_set):
    assert len(test_set) == 3 and test_set.speech_width == 32
    for index, utt_id in enumerate(test_set.utt_ids):
        ours, theirs = collate([test_set[index]]), expected_batch(work, taste, work.dataset(), utt_id)
        for name in ("text", "text_tokens", "word_ids", "speech_final", "speech_mid", "speech_lengths", "units"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert test_set.lengths[index] == theirs.text_tokens.shape[1] + len(theirs.units[0]) + 3
        assert test_set.speech_frames(utt_id) == WINDOW_FRAMES
        assert test_set.recording_frames(utt_id) == 50 * SECONDS[index]


def test_a_subset_hears_its_own_utterances(test_set):
    part = test_set.subset([2])
    assert part.utt_ids == ["utt-02"] and part.lengths == [test_set.lengths[2]]
    assert torch.equal(part[0].speech_mid, test_set[2].speech_mid)
    assert not torch.equal(part[0].speech_mid, test_set[1].speech_mid)


@torch.inference_mode()
def test_a_run_scores_codes_and_sounds_of_a_released_taste(work, taste, capsys):
    assert work.run() == 0
    run = work.folder / "exp" / "released"
    metrics = json.loads((run / "metrics.json").read_text())
    dataset = work.dataset()
    totals = Totals()
    for utt_id in dataset.utt_ids:
        totals += Totals.of(taste.model(expected_batch(work, taste, dataset, utt_id)))
    assert metrics["test"] == pytest.approx(totals.averages(), rel=1e-5)
    assert metrics["checkpoint"] == str(work.released) and "history" not in metrics
    words = sum(len(text.split()) for text in TEXTS)
    assert metrics["codes"]["words"] == words
    assert metrics["codes"]["bits_per_second"] == pytest.approx(words / sum(SECONDS) * 4 * 4)  # 4 codes of 16
    for control in ("shuffled", "silenced"):
        assert metrics["controls"][control]["loss"] != pytest.approx(metrics["test"]["loss"], rel=1e-6)
    assert metrics["generation"]["utterances"] == 2
    assert metrics["attention"]["chance_width_seconds"] < 0.4  # of a recording, not of the window
    assert {"true_units", "taste", "original"} <= set(metrics["sounds"]["measures"])
    (shown,) = torch.load(run / "shown.pt", weights_only=True).values()
    spoken = TasteTokenizer.open_released(work.released, work.model_dir, "cpu").encode(
        next(own["audio_path"] for own in map(dataset.info, dataset.utt_ids) if own["text"] == shown["text"]),
        shown["text"],
    )
    assert shown["codes"].tolist() == spoken.codes.tolist() and shown["words"] == spoken.words
    assert "data:audio" in (run / "report.html").read_text()
    assert json.loads((run / "settings.json").read_text())["taste_checkpoint"] == str(work.released)
    assert "codes: bits a second" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_epochs": 1}, "NUM_EPOCHS is 1, expected 0: it is evaluated, not trained"),
        ({"variant": "taste_novq"}, "VARIANT is 'taste_novq', expected 'taste'"),
        ({"variant": "all"}, "VARIANT is 'all', expected 'taste'"),
        ({"init_from": "text_only"}, "INIT_FROM is 'text_only', expected none"),
        ({"resume": "exp/taste/checkpoints/best.pt"}, "RESUME is 'exp/taste/checkpoints/best.pt', expected auto"),
    ],
)
def test_what_a_released_taste_would_ignore_is_refused(work, capsys, options, told):
    assert work.run(**options) == 1
    error = capsys.readouterr().err
    assert f"TASTE_CHECKPOINT is '{work.released}'" in error and told in error and "--num-epochs 0" in error


def test_a_run_that_was_trained_is_not_written_over(work, capsys):
    (work.folder / "exp" / "taste" / "checkpoints").mkdir(parents=True)
    assert work.run(run_name="taste") == 1
    assert "exp/taste holds what was trained" in capsys.readouterr().err


def test_another_cosyvoice_is_refused(work, tmp_path, capsys):
    for file in work.model_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = (tmp_path / "cosyvoice.yaml").read_text()
    (tmp_path / "cosyvoice.yaml").unlink()
    (tmp_path / "cosyvoice.yaml").write_text(config.replace("\nllm_input_size: 32\n", "\nllm_input_size: 64\n"))
    assert work.run(cosyvoice_model_dir=tmp_path, run_name="other") == 1
    assert f"{tmp_path} is not the CosyVoice that {work.released} was trained with" in capsys.readouterr().err
    assert not (work.folder / "exp" / "other").exists()


def test_texts_and_recordings_must_be_known(work, taste):
    dataset = work.dataset()
    info = {utt_id: dict(dataset.info(utt_id)) for utt_id in dataset.utt_ids}
    del info["utt-01"]["audio_path"]
    other = UtteranceDataset(replace(dataset.features, info=info), dataset.selection)
    with pytest.raises(ValueError, match=r"1 of 3 utterances have no text or no audio_path .*: utt-01\. Make it again"):
        ReleasedDataset.of(other, taste, get_tokenizer(work.model_dir))
