import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from accelerate.state import AcceleratorState, GradientState

import model_code
from cosyvoice.utils.file_utils import write_wav
from cosyvoice.utils.output_lock import OutputLock
from cosyvoice.utils.provenance import file_digest
from cosyvoice.utils.stops import RunStopped
from taste.checkpoint import load_checkpoint
from taste.data import UtteranceDataset, open_dataset
from taste.model import CosyVoiceS3Model
from taste.run_data import warn_of_misfits
from taste.run_evaluation import whole_history
from taste.training import Trainer
from taste.variant_run import run_variant
from tests.small_model_folder import write_small_model_folder
from tests.small_stage3 import SIZES, random_examples, write_features
from tests.small_whisper import WIDTH, write_small_whisper
from tests.sounds import voice_like

REPOSITORY = Path(__file__).parent.parent
LENGTHS = [(2 + number % 4, 5 + 3 * (number % 5)) for number in range(10)]
QUICK = {"num_epochs": 2, "batch_size": 4, "warmup_steps": 2, "generate_utterances": 0}
SMALL = {"num_quantizers": 2, "codebook_size": 16, "codebook_dim": 12, "audio_ffn_dim": 40, "audio_layers": 1}
SPEAKING = {"generate_utterances": 2, "decode_wavs": 1}
KILL_TIMEOUT_SECONDS = 120


class Workplace:
    """A small model folder with features beside it, and the command line that names them."""

    def __init__(self, folder: Path, golden_dir: Path) -> None:
        self.folder = folder
        write_small_model_folder(folder / "model", golden_dir)
        self.train = write_features(folder, "train", random_examples(LENGTHS))
        self.test = write_features(folder, "test", random_examples(LENGTHS[:3], seed=1))

    def words(self, **options) -> list[str]:
        values = {
            "cosyvoice_model_dir": self.folder / "model",
            "exp_dir": self.folder / "exp",
            "loss_curve_path": self.folder / "loss_curve.png",
            "device": "cpu",
            "evaluate_audio": False,
            "tensorboard": False,
            **QUICK,
            **SMALL,
        }
        for split, paths in (("train", self.train), ("test", self.test)):
            values |= {
                f"{split}_utt2_s3_path": paths.units,
                f"{split}_utt2_text_emb_path": paths.text,
                f"{split}_utt2_whisper_path": paths.speech,
                f"{split}_utt2info_path": paths.info,
            }
        return [word for name, value in (values | options).items() for word in (f"--{name}", str(value))]

    def run(self, **options) -> int:
        return model_code.main(self.words(**options))

    def metrics(self, run: str = "simple") -> dict:
        return json.loads((self.folder / "exp" / run / "metrics.json").read_text())

    def steps(self, run: str) -> list[dict[str, float]]:
        lines = map(json.loads, (self.folder / "exp" / run / "metrics.jsonl").read_text().splitlines())
        return [{name: value for name, value in line.items() if name != "kind"} for line in lines if "lr" in line]

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        return load_checkpoint(self.folder / "exp" / run / "checkpoints" / "last.pt").weights


class ListeningWorkplace(Workplace):
    """The same with a Whisper, features as wide as it is, and recordings."""

    def __init__(self, folder: Path, golden_dir: Path) -> None:
        super().__init__(folder, golden_dir)
        write_small_whisper(folder / "model" / "whisper")
        for split in ("train", "test"):
            examples = [
                example._replace(speech_final=torch.randn(units, WIDTH), speech_mid=torch.randn(units, WIDTH))
                for example, (_, units) in zip(random_examples(LENGTHS), LENGTHS, strict=True)
            ]
            write_features(folder, split, examples)
        self.manifest = folder / "recordings.jsonl"
        lines = []
        for name, text in (("first", "A quiet river."), ("second", "Two words"), ("missing", "No sound")):
            path = folder / f"{name}.wav"
            lines.append(json.dumps({"audio_path": str(path), "text": text}))
            if name != "missing":
                write_wav(path, torch.from_numpy(voice_like(0.8, 16_000, seed=len(text))).float(), 16_000)
        self.manifest.write_text("\n".join(lines))


@pytest.fixture
def work(tmp_path, golden_dir) -> Workplace:
    return Workplace(tmp_path, golden_dir)


def assert_same_run(work: Workplace, one: str, two: str) -> None:
    """Weights and results equal to the last bit."""
    first, second = work.weights(one), work.weights(two)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert work.metrics(one)["history"] == work.metrics(two)["history"]
    assert work.metrics(one)["generation"] == work.metrics(two)["generation"]


def test_both_classes_are_importable_from_the_script():
    from model_code import CosyVoiceS3Model, SimpleTextSpeechAggregator

    assert issubclass(CosyVoiceS3Model, torch.nn.Module) and issubclass(SimpleTextSpeechAggregator, torch.nn.Module)


def metrics_of_sounds(metrics: dict) -> set[str]:
    """Systems whose sounds were measured."""
    return {name for name, values in metrics["sounds"]["measures"].items() if "mcd_db" in values}


@pytest.mark.parametrize("variant", ["text_only", "simple", "taste_novq", "taste"])
def test_a_run_writes_all_that_it_promises(work, variant, capsys):
    assert work.run(variant=variant, evaluate_audio=True, tensorboard=True, **SPEAKING) == 0
    run = work.folder / "exp" / variant
    assert metrics_of_sounds(work.metrics(variant)) == {"true_units", variant}
    assert list((run / "tensorboard").iterdir())
    page = (run / "report.html").read_text()
    assert "utt-02" in page and "data:audio" in page
    assert (work.folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    for name in ("settings.json", "metrics.jsonl", "checkpoints/last.pt", "checkpoints/best.json", "figures/units.png"):
        assert (run / name).is_file(), name
    metrics = work.metrics(variant)
    assert [entry["epoch"] for entry in metrics["history"]] == [0, 1, 2]
    assert metrics["history"][2]["test"]["loss"] < metrics["history"][0]["test"]["loss"]
    assert metrics["generation"]["utterances"] == 2
    units = json.loads((run / "generated_units.json").read_text())
    assert units["utt-00"]["true"] == random_examples(LENGTHS[:1], seed=1)[0].units.tolist()
    for name in ("true_units", "predicted"):
        info = soundfile.info(run / "wavs" / f"utt-02_{name}.wav")
        assert info.samplerate == 22_050
    assert soundfile.info(run / "wavs" / "utt-02_true_units.wav").frames == int(11 / 50 * 22_050 / 256) * 256
    assert (run / "figures" / "utt-02_mel.png").is_file()
    hears = variant != "text_only"
    assert (run / "figures" / "utt-02_alignment.png").is_file() == hears
    assert ("attention" in metrics) == hears
    assert ("controls" in metrics) == hears
    if hears:
        assert metrics["controls"]["shuffled"].keys() == metrics["test"].keys()
        assert "no Whisper folder" in metrics["controls"]["silenced"]  # the small model folder has none
    assert ("codes" in metrics) == (variant == "taste")
    if variant == "taste":
        words = sum(len(set(example.word_ids.tolist())) for example in random_examples(LENGTHS[:3], seed=1))
        assert metrics["codes"]["words"] == words and len(metrics["codes"]["used"]) == 2
        assert metrics["codes"]["bits_per_second"] == pytest.approx(words / (24 / 50) * 2 * 4)  # 5 + 8 + 11 units
    told = capsys.readouterr().out
    assert "epoch   2" in told and "test top-1" in told and "generated: unit error rate" in told


def test_all_variants_are_trained_in_the_papers_stages_and_compared(work, capsys):
    assert work.run(variant="all", num_epochs=1) == 0
    folder = work.folder / "exp" / "all"
    measures = json.loads((folder / "comparison.json").read_text())["measures"]
    assert list(measures) == ["text_only", "simple", "taste_novq", "taste"]
    for variant, measured in measures.items():
        metrics = work.metrics(f"all/{variant}")
        assert measured["top5"] == metrics["test"]["top5"] and len(metrics["history"]) == 2
        started = metrics["started_from"]
        expected = {"text_only": None, "simple": "text_only", "taste_novq": "text_only", "taste": "taste_novq"}
        assert (started and started["variant"]) == expected[variant]
    assert "teacher-forced top-5" in capsys.readouterr().out
    for name in ("table.md", "comparison.png", "report.html"):
        assert (folder / name).is_file()
    before = {variant: work.weights(f"all/{variant}") for variant in measures}
    assert work.run(variant="all", num_epochs=1) == 0  # the same command again trains nothing more
    capsys.readouterr()
    assert work.run(variant="all", num_epochs=2) == 1  # later stages have begun with the weights after one epoch
    assert "simple has begun with the weights that text_only had after 1 epochs" in capsys.readouterr().err
    for variant, weights in before.items():
        assert all(torch.equal(value, work.weights(f"all/{variant}")[name]) for name, value in weights.items())


def test_a_comparison_begun_anew_and_stopped_goes_on_with_nothing_of_the_one_before(work, monkeypatch):
    options = {"variant": "all", "num_epochs": 1, "negative_controls": False}
    assert work.run(**options) == 0
    with monkeypatch.context() as stopping:
        stopping.setattr(model_code.StopRequest, "requested", property(lambda self: True))
        assert work.run(**options, resume="never") == 143
    assert work.run(**options, seed=1, resume="never") == 0
    expected = {variant: work.weights(f"all/{variant}") for variant in ("text_only", "simple", "taste_novq", "taste")}
    with monkeypatch.context() as stopping:
        stopping.setattr(model_code.StopRequest, "requested", property(lambda self: True))
        assert work.run(**options, seed=1, resume="never") == 143
    assert work.run(**options, seed=1) == 0
    for variant, weights in expected.items():
        assert all(torch.equal(value, work.weights(f"all/{variant}")[name]) for name, value in weights.items())


def test_a_comparison_looks_again_only_at_what_has_changed(work, capsys, monkeypatch):
    options = {"variant": "all", "num_epochs": 1, "negative_controls": False}
    finished = "already complete: "

    def again() -> int:
        capsys.readouterr()
        assert work.run(**options) == 0
        return capsys.readouterr().out.count(finished)

    assert again() == 0
    table = (work.folder / "exp" / "all" / "table.md").read_text()
    assert again() == 4
    assert (work.folder / "exp" / "all" / "table.md").read_text() == table
    (work.folder / "exp" / "all" / "taste_novq" / "metrics.json").unlink()  # stopped before its end
    assert again() == 3
    work.test.speech.touch()
    assert again() == 0
    options["top_k"] = 5
    assert again() == 0
    assert again() == 4
    one = {"variant": "simple", "run_name": "simple", "exp_dir": work.folder / "exp" / "all", "num_epochs": 0}
    assert work.run(**options | one) == 0
    assert again() == 3  # that may have been of another test set
    options["top_k"] = 6
    with monkeypatch.context() as dying:  # once it has noted its settings

        def killed(*_):
            raise OSError("killed here")

        dying.setattr("taste.variant_run.listen", killed)
        assert work.run(**options) == 1
    assert again() == 0
    metrics = work.folder / "exp" / "all" / "simple" / "metrics.json"
    content = json.loads(metrics.read_text())
    metrics.write_text(json.dumps(content | {"sounds": {"skipped": {"word_error": "skipped: needs pocketsphinx"}}}))
    assert again() == 3
    content = json.loads(metrics.read_text())
    unmoved = {"skipped": {"f0_correlation": "none: no system has a voice that moves"}}
    metrics.write_text(json.dumps(content | {"sounds": unmoved}))
    assert again() == 4


def test_a_comparison_stopped_in_any_variant_equals_one_left_alone(work, monkeypatch):
    options = {
        "variant": "all",
        "num_epochs": 1,
        "negative_controls": False,
        "generate_utterances": 2,
        "decode_wavs": 0,
    }
    asked = []
    with monkeypatch.context() as watching:
        watching.setattr(model_code.StopRequest, "requested", property(lambda self: bool(asked.append(0))))
        assert work.run(run_name="whole", **options) == 0
    for share in (0.3, 0.3, 0.3):  # in one variant after another
        times = iter([False] * round(share * len(asked)))
        with monkeypatch.context() as stopping:
            stopping.setattr(model_code.StopRequest, "requested", property(lambda self, times=times: next(times, True)))
            stopping.setattr(model_code.StopRequest, "exit_code", 130)
            assert work.run(run_name="parts", **options) == 130
    assert work.run(run_name="parts", **options) == 0
    for variant in ("text_only", "simple", "taste_novq", "taste"):
        one, other = work.weights(f"whole/{variant}"), work.weights(f"parts/{variant}")
        assert all(torch.equal(value, other[name]) for name, value in one.items())
        assert work.metrics(f"whole/{variant}")["history"] == work.metrics(f"parts/{variant}")["history"]
        assert work.metrics(f"whole/{variant}")["generation"] == work.metrics(f"parts/{variant}")["generation"]


def test_a_comparison_holds_one_model_at_a_time(work, monkeypatch):
    models, alive = weakref.WeakSet(), []

    def noted(self, *args, **kwargs):
        models.add(self)
        return begin(self, *args, **kwargs)

    def counted(*args):
        gc.collect()
        alive.append(len(models))
        return run_variant(*args)

    begin = CosyVoiceS3Model.__init__
    monkeypatch.setattr(CosyVoiceS3Model, "__init__", noted)
    monkeypatch.setattr("taste.comparison.run_variant", counted)
    assert work.run(variant="all", num_epochs=1, negative_controls=False) == 0
    assert alive == [0, 0, 0, 0]


def test_without_stages_each_variant_starts_from_the_model_folder(work):
    assert work.run(variant="all", num_epochs=1, staged_training=False, negative_controls=False) == 0
    for variant in ("text_only", "simple", "taste_novq", "taste"):
        assert work.metrics(f"all/{variant}")["started_from"] is None
        assert "controls" not in work.metrics(f"all/{variant}")


def test_a_frozen_comparison_still_trains_its_baseline(work):
    assert work.run(variant="all", num_epochs=1, freeze_llm=True) == 0
    assert work.metrics("all/text_only")["history"][1]["train"]
    folder = torch.load(work.folder / "model" / "llm.pt")
    base = load_checkpoint(work.folder / "exp/all/text_only/checkpoints/best.pt").weights
    assert any(not torch.equal(value, folder[name.removeprefix("llm.")]) for name, value in base.items())
    for variant in ("simple", "taste_novq", "taste"):  # which carry the baseline's language model on
        carried = {name: value for name, value in work.weights(f"all/{variant}").items() if name.startswith("llm.")}
        assert carried and all(torch.equal(value, base[name]) for name, value in carried.items())


def test_codebooks_never_start_from_the_test_set(work):
    assert work.run(variant="taste", data_dependent_init=False, num_epochs=1) == 0
    fitted = work.metrics("taste")["fitted"]
    assert fitted.keys() == {"utterances", "code_usage"}


def test_words_are_asked_for_by_the_variants_that_need_them_only(work, capsys):
    info = torch.load(work.train.info, weights_only=True)
    for entry in info.values():
        del entry["word_id"]
    torch.save(info, work.train.info)
    assert work.run(variant="taste", num_epochs=1) == 1
    told = capsys.readouterr().err
    assert "variant 'taste' averages over words" in told and "train_utt2info.pt" in told
    assert work.run(num_epochs=1) == 0


def test_transcripts_that_may_not_fit_are_named_and_used(work, capsys):
    examples = random_examples([(4, 20)] * 7 + [(9, 3)])
    write_features(work.folder, "train", examples)
    assert work.run(variant="taste_novq", num_epochs=1) == 0
    assert "warning: 1 transcripts may not fit their recordings; they are used all the same: utt-07: 6 words in 3" in (
        capsys.readouterr().out
    )


def test_transcripts_are_held_against_the_units_without_reading_whisper_features(tmp_path):
    dataset = open_dataset(write_features(tmp_path, "train", random_examples([(4, 20)] * 3 + [(9, 3)])), SIZES)
    said = []
    warn_of_misfits(UtteranceDataset(replace(dataset.features, speech={}), dataset.selection), said.append)
    assert len(said) == 1 and "1 transcripts may not fit" in said[0]


def test_recordings_are_encoded_and_decoded_by_the_run_that_was_trained(tmp_path, golden_dir, capsys):
    work = ListeningWorkplace(tmp_path, golden_dir)
    assert work.run(variant="taste") == 0
    listening = {"variant": "taste", "encode_jsonl": work.manifest, "mid_layer": 2, "max_units_per_token": 4}
    assert work.run(**listening, mode="encode") == 3
    run = work.folder / "exp" / "taste"
    codes = {path.stem: json.loads(path.read_text()) for path in sorted((run / "codes").glob("*.json"))}
    assert list(codes) == ["first", "second"]
    assert [word["word"] for word in codes["first"]["words"]] == ["A", "quiet", "river."]
    assert "2 of 3 recordings, 5 words" in capsys.readouterr().out
    assert "missing" in (run / "codes.failures.jsonl").read_text()
    written = (run / "codes" / "first.json").stat().st_mtime_ns
    (run / "codes" / "second.json").unlink()
    assert work.run(**listening, mode="encode") == 3
    assert "2 of 3 recordings (1 of them before), 5 words" in capsys.readouterr().out
    assert (run / "codes" / "first.json").stat().st_mtime_ns == written
    assert (run / "codes" / "second.json").is_file()
    assert work.run(**listening, mode="decode") == 0
    assert {path.name for path in (run / "decoded").glob("*.wav")} == {"first.wav", "second.wav"}
    first, second = (run / "decoded" / f"{name}.wav" for name in ("first", "second"))
    sound = first.read_bytes()
    first.unlink()
    second.write_bytes(b"kept")
    capsys.readouterr()
    assert work.run(**listening, mode="decode") == 0  # goes on
    assert "2 wav files (1 of them from before)" in capsys.readouterr().out
    assert first.read_bytes() == sound and second.read_bytes() == b"kept"
    assert work.run(**listening, mode="decode", seed=5) == 0  # spoken in another way: both anew
    assert "from before" not in capsys.readouterr().out and second.read_bytes() != b"kept"
    assert work.run(**listening, run_name="other", seed=1) == 0
    assert work.run(**listening, run_name="other", mode="decode", codes_dir=run / "codes") == 1
    told = capsys.readouterr().err
    assert "2 of 2 files" in told and "first.json: these codes were written by model" in told
    assert work.run(**listening, run_name="other", mode="decode") == 1
    assert "holds no codes; write some" in capsys.readouterr().err


def test_a_run_stopped_before_its_first_evaluation_goes_on(work, monkeypatch):
    with monkeypatch.context() as stopping:
        stopping.setattr(model_code.StopRequest, "requested", property(lambda self: True))
        assert work.run() == 143
    last = load_checkpoint(work.folder / "exp" / "simple" / "checkpoints" / "last.pt")
    assert last.notes["progress"]["history"] == []
    assert work.run() == 0
    assert [entry["epoch"] for entry in work.metrics()["history"]] == [0, 1, 2]


def test_a_run_that_goes_on_from_another_ones_checkpoint_takes_its_best_weights_along(work, capsys):
    assert work.run(run_name="one", num_epochs=1) == 0
    one = work.folder / "exp" / "one" / "checkpoints"
    assert work.run(run_name="two", num_epochs=1, resume=one / "last.pt") == 0
    two = work.folder / "exp" / "two" / "checkpoints"
    best = load_checkpoint(two / "best.pt").weights
    assert all(torch.equal(value, best[name]) for name, value in load_checkpoint(one / "best.pt").weights.items())
    assert work.metrics("two")["test"] == work.metrics("one")["test"]
    (one / "best.pt").unlink()
    assert work.run(run_name="three", num_epochs=2, resume=one / "last.pt") == 1
    assert f"are not in {one / 'best.pt'}" in capsys.readouterr().err


def test_another_test_set_or_other_features_are_refused(work, capsys):
    note = work.train.info.with_suffix(".made_with.json")
    note.write_text(json.dumps({"whisper": "one", "mid_layer": 6}))
    assert work.run(num_epochs=1) == 0
    note.write_text(json.dumps({"whisper": "one", "mid_layer": 16}))
    assert work.run() == 1
    assert "what made the features" in capsys.readouterr().err
    assert work.run(variant="text_only", run_name="deaf", num_epochs=1) == 0
    other = work.test.info.with_suffix(".made_with.json")
    other.write_text(json.dumps({"whisper": "two", "mid_layer": 6}))
    assert work.run(num_epochs=0) == 1
    assert "learned from features that were made otherwise: whisper: one then, two now" in capsys.readouterr().err
    other.unlink()
    note.unlink()
    write_features(work.folder, "test", random_examples(LENGTHS[:4], seed=1))
    assert work.run() == 1
    assert "the test utterances" in capsys.readouterr().err


def test_what_a_checkpoint_learned_from_is_not_held_out_to_evaluate_it(work, capsys):
    for path in (work.test.units, work.test.text, work.test.speech, work.test.info):
        path.unlink()
    assert work.run(num_epochs=1) == 0
    assert work.run(num_epochs=0) == 0
    write_features(work.folder, "train", random_examples([*LENGTHS, (3, 9)] * 2))
    assert work.run(num_epochs=0) == 1
    assert "what is held out may be among them" in capsys.readouterr().err


def test_a_checkpoint_is_not_evaluated_on_another_model_folder(work, capsys):
    assert work.run(freeze_llm=True) == 0
    path = work.folder / "model" / "llm.pt"
    weights = torch.load(path)
    weights["speech_embedding.weight"] += 0.5
    torch.save(weights, path)
    assert work.run(freeze_llm=True, num_epochs=0) == 1
    assert "was trained on another model folder" in capsys.readouterr().err


def test_the_report_shows_nothing_of_an_earlier_model(work):
    assert work.run(**SPEAKING) == 0
    page = work.folder / "exp" / "simple" / "report.html"
    assert "data:audio" in page.read_text()
    assert work.run(resume="never", seed=1, generate_utterances=2, decode_wavs=0) == 0
    assert "data:audio" not in page.read_text()


def test_a_launchers_configuration_changes_neither_precision_nor_gradients(work, monkeypatch):
    assert work.run(run_name="alone", num_epochs=1) == 0
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "16")
    AcceleratorState._reset_state()
    GradientState._reset_state()
    assert work.run(run_name="configured", num_epochs=1) == 0
    assert work.steps("configured") == work.steps("alone")


def test_the_same_command_again_trains_nothing_more(work):
    assert work.run() == 0
    weights, metrics = work.weights("simple"), work.metrics()
    (work.folder / "loss_curve.png").unlink()
    assert work.run() == 0
    assert (work.folder / "loss_curve.png").exists()
    assert all(torch.equal(value, work.weights("simple")[name]) for name, value in weights.items())
    assert work.metrics() == metrics


@pytest.mark.parametrize("variant", ["simple", "taste"])
def test_utterances_whose_features_are_no_numbers_are_left_out_and_named(work, capsys, variant):
    for split, examples, bad in (("train", random_examples(LENGTHS), 4), ("test", random_examples(LENGTHS[:3]), 1)):
        examples[bad].speech_final[1, 2] = torch.inf
        write_features(work.folder, split, examples)
    assert work.run(variant=variant, batch_size=5, **SPEAKING | {"generate_utterances": 3}) == 0
    metrics, told = work.metrics(variant), capsys.readouterr()
    assert all(entry["test"]["loss"] < 100 for entry in metrics["history"])
    assert "utt-04 has features that are no numbers; nothing is fitted to it" in told.out
    assert "utt-01 has features that are no numbers; nothing is generated of it" in told.out
    assert "the features of 1 of 3 utterances (utt-01) are no numbers; they are left out" in told.err
    assert metrics["generation"]["utterances"] == 2


def test_a_test_set_without_any_score_ends_the_run_before_its_first_step(work, capsys):
    examples = random_examples(LENGTHS[:3])
    for example in examples:
        example.text[0, 0] = torch.nan
    write_features(work.folder, "test", examples)
    assert work.run() == 1
    assert (
        "the features of 3 of 3 utterances (utt-00, utt-01, utt-02) are no numbers; make them again"
        in capsys.readouterr().err
    )
    assert not (work.folder / "exp" / "simple" / "checkpoints" / "last.pt").exists()


def test_a_full_disk_is_told_before_the_first_step(work, capsys, monkeypatch):
    monkeypatch.setattr("taste.checkpoint.shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    assert work.run(num_epochs=1) == 0
    told = capsys.readouterr().out
    assert told.index("opening the features") < told.index("training set: 10") < told.index("0.0 GB are free")
    assert told.index("0.0 GB are free") < told.index("epoch   0")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
    ],
)
def test_how_a_gpus_memory_is_shared_out_is_said_before_torch_is_there(given, expected):
    code = (
        "import os, sys\n"
        "sys.modules['torch'] = None  # importing it is an error\n"
        "try:\n"
        "    import model_code\n"
        "except ImportError:\n"
        "    print(os.environ['PYTORCH_ALLOC_CONF'])\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")} | given
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected


def test_more_epochs_go_on_from_the_last_checkpoint(work, capsys):
    assert work.run(num_epochs=1) == 0
    assert work.run(num_epochs=3) == 0
    out = capsys.readouterr().out
    assert "resuming from" in out
    assert "NUM_EPOCHS was 1, is 3: the learning rate goes on along the schedule of 3 epochs, from 9" in out
    assert "(where 1 epochs had it: 5%)" in out
    assert [entry["epoch"] for entry in work.metrics()["history"]] == [0, 1, 2, 3]


def test_a_trained_run_without_what_it_would_go_on_from_is_not_trained_over(work, capsys):
    assert work.run() == 0
    checkpoints = work.folder / "exp" / "simple" / "checkpoints"
    (checkpoints / "last.pt").unlink()
    best = (checkpoints / "best.pt").read_bytes()
    assert work.run() == 1
    assert (
        "best.pt was trained, and last.pt, from which a training goes on, is not beside it" in capsys.readouterr().err
    )
    assert (checkpoints / "best.pt").read_bytes() == best
    assert work.run(num_epochs=0) == 0
    assert work.run(resume="never") == 0


def test_a_run_killed_before_its_first_whole_checkpoint_begins_again(work, monkeypatch):
    def killed(trainer):
        raise RunStopped("killed")

    with monkeypatch.context() as killing:
        killing.setattr(Trainer, "_save_last", killed)
        assert work.run() == 143
    checkpoints = work.folder / "exp" / "simple" / "checkpoints"
    assert (checkpoints / "best.pt").is_file() and not (checkpoints / "last.pt").exists()
    assert work.run() == 0


def test_changed_settings_do_not_mix_with_an_earlier_run(work, capsys):
    assert work.run() == 0
    before = work.weights("simple")
    assert work.run(lr=0.5) == 1
    told = capsys.readouterr().err
    assert "LR was 3e-05, is 0.5" in told and "--run-name" in told and "--resume never" in told
    assert all(torch.equal(value, work.weights("simple")[name]) for name, value in before.items())
    assert work.run(lr=0.5, run_name="fast") == 0
    assert work.run(lr=0.01, resume="never") == 0


def test_new_parts_are_fitted_once_and_the_run_says_so(work, capsys):
    assert work.run(num_epochs=1) == 0
    fitted = work.metrics()["fitted"]
    assert fitted["utterances"] == len(LENGTHS) and 0 < fitted["text_explained"] <= 1
    assert "new modules fitted to 10 utterances" in capsys.readouterr().out
    assert work.run(num_epochs=2) == 0  # goes on, with the weights that it has
    assert work.metrics()["fitted"] == fitted
    assert "new modules fitted" not in capsys.readouterr().out
    assert work.run(num_epochs=1, run_name="next", init_from="simple") == 0  # all parts are another run's
    assert work.metrics("next")["fitted"] is None


@pytest.mark.parametrize("options", [{"variant": "text_only"}, {"variant": "simple", "data_dependent_init": False}])
def test_there_may_be_nothing_to_fit(work, options):
    assert work.run(num_epochs=1, run_name="plain", **options) == 0
    assert work.metrics("plain")["fitted"] is None


def test_starting_anew_takes_the_old_checkpoints_away_first(work, monkeypatch):
    assert work.run(num_epochs=1) == 0

    def stop_at_once(trainer):
        raise RunStopped("asked before anything was saved")

    monkeypatch.setattr("taste.training.Trainer.fit", stop_at_once)
    assert work.run(num_epochs=1, resume="never", lr=0.01) == 143
    assert not list((work.folder / "exp" / "simple" / "checkpoints").glob("*"))


@pytest.mark.parametrize("freeze_llm", [False, True])
def test_a_run_starts_from_another_goes_on_without_it_and_says_so(work, capsys, freeze_llm):
    assert work.run(variant="text_only") == 0
    options = {"init_from": "text_only", "freeze_llm": freeze_llm}
    assert work.run(run_name="whole", **options, num_epochs=0) == 0
    assert "starting from" in capsys.readouterr().out
    start = work.metrics("whole")["test"]
    assert work.run(run_name="whole", **options, num_epochs=3) == 0
    metrics = work.metrics("whole")
    assert metrics["history"][0]["test"] == pytest.approx(start)
    assert metrics["started_from"]["checkpoint"].endswith("text_only/checkpoints/best.pt")
    shutil.rmtree(work.folder / "exp" / "text_only")
    assert work.run(run_name="whole", **options, num_epochs=4) == 0
    assert work.metrics("whole")["started_from"] == metrics["started_from"]
    assert work.run(run_name="whole", **options, num_epochs=0) == 0
    assert work.run(run_name="whole", freeze_llm=freeze_llm, num_epochs=4) == 1
    assert "INIT_FROM was 'text_only', is None" in capsys.readouterr().err


def test_a_run_goes_on_where_the_run_it_began_with_has_moved(work, capsys):
    for variant in ("text_only", "simple"):
        start = str(work.folder / "exp" / "text_only") if variant == "simple" else None
        assert work.run(variant=variant, run_name=variant, init_from=start, num_epochs=1) == 0
    before = work.metrics("simple")["history"]
    (work.folder / "exp").rename(work.folder / "archive")
    moved = work.folder / "archive" / "text_only"
    options = {"exp_dir": work.folder / "archive", "run_name": "simple", "num_epochs": 2}
    assert work.run(**options, init_from=moved.with_name("simple")) == 1  # other weights
    assert "INIT_FROM was" in capsys.readouterr().err
    assert work.run(**options, init_from=moved.with_name("nowhere")) == 1
    assert "INIT_FROM was" in capsys.readouterr().err
    assert work.run(**options, init_from=moved) == 0
    history = json.loads((work.folder / "archive" / "simple" / "metrics.json").read_text())["history"]
    assert len(history) == 3 and history[:2] == before


def test_a_checkpoint_can_be_evaluated_without_training(work):
    spoken = {**SPEAKING, "decode_wavs": 0}
    assert work.run(**spoken) == 0
    trained = work.metrics()
    best = work.folder / "exp" / "simple" / "checkpoints" / "best.pt"
    assert work.run(num_epochs=0, resume=best, run_name="look", **spoken) == 0
    assert work.metrics("look")["test"]["loss"] == pytest.approx(trained["test"]["loss"], rel=1e-6)
    assert work.metrics("look")["generation"] == trained["generation"]
    assert not (work.folder / "exp" / "look" / "checkpoints").exists()
    assert work.run(num_epochs=0) == 0  # without a path: the best of the run itself
    assert work.metrics()["test"] == work.metrics("look")["test"]
    assert work.metrics()["history"] == trained["history"]
    assert work.metrics()["fitted"] == trained["fitted"]


def test_a_checkpoint_is_evaluated_on_another_test_set_with_what_it_was_trained_with(work, capsys):
    settings = work.folder / "exp" / "simple" / "settings.json"
    assert work.run(freeze_llm=True) == 0
    as_trained = settings.read_text()
    for path in (work.train.units, work.train.text, work.train.speech, work.train.info):
        path.unlink()  # nothing is learned
    other = write_features(work.folder, "other", random_examples(LENGTHS[:5], seed=2))
    options = {
        "test_utt2_s3_path": other.units,
        "test_utt2_text_emb_path": other.text,
        "test_utt2_whisper_path": other.speech,
        "test_utt2info_path": other.info,
    }
    best = settings.parent / "checkpoints" / "best.pt"
    assert work.run(num_epochs=0, freeze_llm=False, resume=best, run_name="other", **options) == 0
    assert "as it was trained: FREEZE_LLM = True" in capsys.readouterr().out
    assert work.metrics("other")["test"] != work.metrics()["test"]
    assert work.run(num_epochs=0) == 0
    assert settings.read_text() == as_trained
    assert work.run(num_epochs=0, resume=best, run_name="other", variant="text_only") == 1
    assert "give --variant simple" in capsys.readouterr().err


def test_features_of_another_model_folder_are_refused(work, capsys):
    tokenizer = work.folder / "model" / "speech_tokenizer_v1.onnx"
    tokenizer.write_bytes(b"a tokenizer")
    note = work.train.units.with_suffix(".made_with.json")
    note.write_text(json.dumps({"speech_tokenizer": file_digest(tokenizer)}))
    assert work.run() == 0
    note.write_text(json.dumps({"speech_tokenizer": "of the tiny model"}))
    assert work.run(run_name="again") == 1
    told = capsys.readouterr().err
    assert "speech_tokenizer: of the tiny model then" in told
    assert f"bash s3.sh --model-dir {work.folder / 'model'}" in told
    note.unlink()
    work.test.info.with_suffix(".made_with.json").write_text(json.dumps({"text_embedding": "another one"}))
    assert work.run(run_name="again") == 1
    assert "text_embedding: another one then" in capsys.readouterr().err


def test_whisper_features_of_both_splits_are_made_alike(work, capsys):
    for paths, layer in ((work.train, 6), (work.test, 16)):
        paths.info.with_suffix(".made_with.json").write_text(json.dumps({"whisper": "one", "mid_layer": layer}))
    assert work.run() == 1
    assert "mid_layer: 6 then, 16 now" in capsys.readouterr().err
    assert work.run(variant="text_only") == 0


def test_a_test_set_that_is_learned_from_is_told(work, capsys):
    def note(path, names):
        content = torch.load(path)
        for utt_id, name in zip(sorted(content), names, strict=False):
            content[utt_id]["audio_path"] = name
        torch.save(content, path)

    note(work.train.info, [f"train/{number}.wav" for number in range(len(LENGTHS))])
    note(work.test.info, [f"test/{number}.wav" for number in range(3)])
    assert work.run() == 0
    assert "in the training set too" not in capsys.readouterr().out
    note(work.test.info, ["train/4.wav"])
    assert work.run(run_name="again") == 0
    assert "warning: 1 of 3 test utterances are in the training set too" in capsys.readouterr().out


def test_a_look_at_the_best_epoch_keeps_those_behind_it(tmp_path):
    epochs = [{"epoch": number, "test": {"loss": loss}} for number, loss in enumerate((3.0, 2.0, 2.5))]
    best = tmp_path / "best.pt"
    assert whole_history(best, epochs[:2]) == epochs[:2]  # nothing lies beside it
    notes = tmp_path / "last.json"
    notes.write_text(json.dumps({"progress": {"history": epochs}}))
    assert whole_history(best, epochs[:2]) == epochs
    notes.write_text(json.dumps({"progress": {"history": epochs[::-1]}}))
    assert whole_history(best, epochs[:2]) == epochs[:2]  # another run's


def test_the_model_folder_can_be_evaluated_as_it_is(work):
    assert work.run(num_epochs=0, variant="text_only", freeze_llm=True) == 0
    assert work.metrics("text_only").keys() == {"checkpoint", "test"}


def test_without_a_test_set_some_training_utterances_are_held_out(work, capsys):
    for path in (work.test.units, work.test.text, work.test.speech, work.test.info):
        path.unlink()
    assert work.run() == 0
    assert "no test set: 1 of 10 training utterances are held out" in capsys.readouterr().out


def test_half_a_test_set_is_an_error(work, capsys):
    work.test.speech.unlink()
    assert work.run() == 1
    assert "missing feature files" in capsys.readouterr().err


def test_without_utterance_info_the_speaker_is_left_out(work, capsys):
    work.train.info.unlink()
    assert work.run() == 0
    assert "the speaker's position is left out" in capsys.readouterr().out
    assert not any(name.startswith("llm.spk_embed") for name in work.weights("simple"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_utt2_s3_path": "nowhere.pt"}, "missing feature files: nowhere.pt"),
        ({"cosyvoice_model_dir": "nowhere"}, "nowhere"),
        ({"variant": "taste_99"}, "VARIANT is 'taste_99'"),
        ({"variant": "text_only", "freeze_llm": True}, "nothing to learn"),
        ({"sampling": "beam"}, "SAMPLING is 'beam'"),
        ({"mode": "sing"}, "MODE is 'sing'"),
        ({"mode": "encode", "variant": "taste"}, "there is no tokenizer"),
        ({"variant": "taste", "fusion": "glue"}, "FUSION is 'glue'"),
        ({"variant": "taste", "aggregator_heads": 3}, "the width 20 cannot be split among 3"),
        ({"variant": "all", "init_from": "x"}, "leave INIT_FROM unset"),
        ({"variant": "taste", "lora_rank": 4}, "LORA_RANK is 4 and FREEZE_LLM False"),
        ({"init_from": "nowhere"}, "INIT_FROM is 'nowhere'"),
        ({"resume": "nowhere.pt"}, "RESUME is 'nowhere.pt'"),
        ({"device": "cuda:77"}, "cuda:77"),
        ({"lr": "-1"}, "LR is -1"),
    ],
)
def test_what_cannot_work_ends_with_a_message_and_code_1(work, capsys, options, message):
    assert work.run(**options) == 1
    told = capsys.readouterr().err
    assert told.startswith("model_code.py: error:") and message in told


def test_two_runs_do_not_share_a_folder(work, capsys):
    lock = OutputLock(work.folder / "exp" / "simple")
    assert work.run() == 1
    assert f"is being written by process {os.getpid()}" in capsys.readouterr().err
    lock.release()
    assert work.run(num_epochs=1) == 0
    assert [path.name for path in (work.folder / "exp").iterdir()] == ["simple"]


def test_an_unknown_flag_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        model_code.main(["--no-such-flag", "3"])
    assert caught.value.code == 2


def test_features_of_another_model_folder_are_an_error(work, capsys):
    torch.save({f"utt-{number:02d}": torch.zeros(3, 512) for number in range(10)}, work.train.text)
    assert work.run() == 1
    assert "text embedding is 512 wide, the model's is 24" in capsys.readouterr().err


def test_a_prediction_too_short_for_a_sound_is_reported(work, capsys, monkeypatch):
    monkeypatch.setattr("taste.results.LEAST_UNITS", 10_000)
    assert work.run(num_epochs=1, **SPEAKING) == 0
    assert "too short for a sound, no wav written: utt-02_true_units, utt-02_predicted" in capsys.readouterr().out
    assert work.metrics()["wavs"] == []


def start(work: Workplace, own_session: bool = False, **options) -> subprocess.Popen:
    """The script in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "model_code.py"), *work.words(**options)],
        cwd=work.folder,
        start_new_session=own_session,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_steps(work: Workplace, run: str, steps: int) -> None:
    """Until the record of the run has so many steps."""
    record = work.folder / "exp" / run / "metrics.jsonl"
    end = time.monotonic() + KILL_TIMEOUT_SECONDS
    while not record.exists() or record.read_text().count('"step", "step"') < steps:
        assert time.monotonic() < end, "the run never came so far"
        time.sleep(0.01)


UNTIL_THE_END = {"num_epochs": 6, "batch_size": 2, "checkpoint_every": 2, **SPEAKING, "decode_wavs": 0}  # 30 steps


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, golden_dir) -> Workplace:
    """A workplace where runs have come to their end."""
    work = Workplace(tmp_path_factory.mktemp("undisturbed"), golden_dir)
    for variant in ("simple", "taste"):
        assert work.run(run_name=f"{variant}_alone", variant=variant, **UNTIL_THE_END) == 0
    return work


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "number", "steps", "code"),
    [
        ("simple", signal.SIGKILL, 7, -signal.SIGKILL),
        ("simple", signal.SIGTERM, 11, 143),
        ("simple", signal.SIGINT, 3, 130),
        ("taste", signal.SIGKILL, 12, -signal.SIGKILL),
    ],
)
def test_a_run_ended_by_a_signal_and_started_again_equals_one_left_alone(undisturbed, variant, number, steps, code):
    work, name = undisturbed, f"{variant}_ended_by_{number}"
    options = {"variant": variant, **UNTIL_THE_END}
    process = start(work, run_name=name, **options)
    wait_for_steps(work, name, steps)
    process.send_signal(number)
    _, told = process.communicate(timeout=KILL_TIMEOUT_SECONDS)
    assert process.returncode == code, told
    if number != signal.SIGKILL:
        assert "The same command goes on from there" in told
    reached = load_checkpoint(work.folder / "exp" / name / "checkpoints" / "last.pt").notes["progress"]["step"]
    assert steps - 2 <= reached < 30
    assert work.run(run_name=name, **options) == 0
    assert_same_run(work, name, f"{variant}_alone")


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_run_saves_it_too(undisturbed):
    work, options = undisturbed, UNTIL_THE_END | {"num_workers": 1}
    process = start(work, own_session=True, run_name="group", **options)
    wait_for_steps(work, "group", 7)
    os.killpg(process.pid, signal.SIGTERM)
    _, told = process.communicate(timeout=KILL_TIMEOUT_SECONDS)
    assert process.returncode == 143, told
    assert told.count("stopping after this batch") == 1 and "The same command goes on from there" in told
    assert work.run(run_name="group", **options) == 0
    assert_same_run(work, "group", "simple_alone")


@pytest.mark.slow
def test_two_processes_train_like_one_that_accumulates_twice_as_much(work):
    write_features(work.folder, "train", random_examples(LENGTHS[:8]))  # 4 batches: none is left out
    frozen = {"freeze_llm": True, "batch_size": 2}  # without dropout
    assert work.run(run_name="one", accumulation_steps=2, **frozen) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*launcher, str(REPOSITORY / "model_code.py"), *work.words(run_name="two", **frozen)],
        cwd=work.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said, told = process.communicate(timeout=2 * KILL_TIMEOUT_SECONDS)
    finally:
        process.terminate()  # a launcher that is terminated ends its workers; one that is killed leaves them
        process.wait(KILL_TIMEOUT_SECONDS)
    assert process.returncode == 0, told
    assert said.count("epoch   2") == 1  # only one of them speaks
    for one, two in zip(work.metrics("one")["history"], work.metrics("two")["history"], strict=True):
        for part in ("train", "test"):
            assert two[part] == pytest.approx(one[part], rel=1e-5)
    for one, two in zip(work.steps("one"), work.steps("two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)  # the norm of the gradient among others


@pytest.mark.slow
def test_two_processes_train_the_quantizer_too(work):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(REPOSITORY / "model_code.py"), *work.words(variant="taste", batch_size=2, num_epochs=1)]
    for _ in range(2):  # and go on from there
        done = subprocess.run(
            command, cwd=work.folder, capture_output=True, text=True, timeout=2 * KILL_TIMEOUT_SECONDS
        )
        assert done.returncode == 0, done.stderr
        command[command.index("--num_epochs") + 1] = "2"
    history = work.metrics("taste")["history"]
    assert [entry["epoch"] for entry in history] == [0, 1, 2]
    assert history[2]["train"]["loss"] < history[0]["test"]["loss"] + 1  # a number, and no other training
    assert 0 < work.metrics("taste")["codes"]["usage"][0] <= 1


@pytest.mark.slow
def test_two_processes_leave_out_the_same_step(work):
    examples = random_examples(LENGTHS[:8])
    examples[5] = examples[5]._replace(text=torch.full_like(examples[5].text, torch.nan))
    write_features(work.folder, "train", examples)
    options = {"variant": "text_only", "num_epochs": 1, "batch_size": 1}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(REPOSITORY / "model_code.py"), *work.words(**options)]
    done = subprocess.run(command, cwd=work.folder, capture_output=True, text=True, timeout=2 * KILL_TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr
    record = (work.folder / "exp" / "text_only" / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, record) if line["kind"] != "epoch"]
    assert sorted(line["step"] for line in lines) == [1, 2, 3, 4]
    assert [line["utterances"] for line in lines if line["kind"] == "skipped"] == [["utt-05"]]
    assert done.stderr.count("is left out") == 1
    assert all(value.isfinite().all() for value in work.weights("text_only").values())


def test_features_loaded_by_other_processes_train_the_same(work):
    options = {"variant": "taste", "accumulation_steps": 2, "batch_size": 2, **SPEAKING, "decode_wavs": 0}
    assert work.run(run_name="alone", **options) == 0
    assert work.run(run_name="helped", num_workers=2, **options) == 0
    assert_same_run(work, "alone", "helped")


def test_a_checkpoint_of_before_settings_had_their_names_goes_on_only_with_the_same(work, capsys):
    assert work.run(num_epochs=1) == 0
    path = work.folder / "exp/simple/checkpoints/last.pt"
    content = torch.load(path, weights_only=True)
    notes = json.loads(content["notes"])
    notes["settings"]["new_parts_lr"] = notes["settings"].pop("new_modules_lr")
    torch.save(content | {"notes": json.dumps(notes)}, path)
    assert "new_modules_lr" in load_checkpoint(path).notes["settings"]
    assert work.run(num_epochs=1, new_modules_lr=0.5) == 1
    assert "NEW_MODULES_LR was 0.003, is 0.5" in capsys.readouterr().err
