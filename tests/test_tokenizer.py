import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import model_code
from cosyvoice.utils.file_utils import write_wav
from taste.audio import read_audio
from taste.build import TasteSizes, build_model
from taste.checkpoint import Checkpoint, frozen_fingerprint, save_checkpoint
from taste.code_files import read_codes, write_codes
from taste.fitted_taste import start_quantizer
from taste.generation import Sampling, generate
from taste.learned_state import learned_state
from taste.text import tokenize
from taste.tokenizer import OtherModelError, SpeechCodes, TasteTokenizer
from taste.whisper_encoder import WhisperEncoder
from taste.whisper_recogniser import WhisperRecogniser
from tests.small_model_folder import write_small_model_folder
from tests.small_stage3 import TASTE_SIZES, random_examples
from tests.small_whisper import WIDTH, write_small_whisper, write_writing_whisper
from tests.sounds import voice_like

TEXT = "Extraordinarily unquiet, the river ran"
WORDS = ["Extraordinarily", "unquiet,", "the", "river", "ran"]
MID_LAYER = 2
QUICK = Sampling("greedy", max_units_per_token=4)


class Workplace:
    """A model folder with a Whisper, and the checkpoint of a run of variant `taste`."""

    def __init__(self, folder: Path, golden_dir: Path) -> None:
        self.model_dir = write_small_model_folder(folder / "model", golden_dir)
        write_small_whisper(self.model_dir / "whisper")
        self.checkpoint = self.save(folder / "best.pt")
        self.wav = folder / "one.wav"
        write_wav(self.wav, torch.from_numpy(voice_like(1.2, 16_000, seed=3)).float(), 16_000)

    def save(self, path: Path, seed: int = 0, **settings) -> Path:
        options = {"freeze_llm": False, "use_speaker": True, "lora_rank": 0}
        torch.manual_seed(seed)
        model = build_model(self.model_dir, "taste", speech_width=WIDTH, taste_sizes=TASTE_SIZES, **options)
        for layer in model.aggregator.layers:  # who has learned nothing hardly listens
            layer.encoder_attn.q_proj.weight.data.mul_(10.0)
            layer.encoder_attn.out_proj.weight.data.mul_(10.0)
        whisper = WhisperEncoder(self.model_dir / "whisper", MID_LAYER)
        sounds = whisper.encode([torch.from_numpy(voice_like(1.2, 16_000, seed=n)).float() for n in range(8)])
        examples = [
            example._replace(speech_final=sound.final, speech_mid=sound.mid)
            for example, sound in zip(random_examples([(6, 20)] * 8, seed=9), sounds, strict=True)
        ]
        start_quantizer(model, examples)
        noted = {"variant": "taste", **asdict(TASTE_SIZES), **options, **settings}
        notes = {
            "settings": noted,
            "use_speaker": True,
            "frozen_weights": frozen_fingerprint(model, learned_state(model)),
            "features_made_with": {"whisper": whisper.digest, "mid_layer": MID_LAYER, "speaker_model": "x"},
        }
        save_checkpoint(path, Checkpoint(learned_state(model), None, notes))
        return path

    def open(self, **changes) -> TasteTokenizer:
        words = {"checkpoint_path": self.checkpoint, "model_dir": self.model_dir, "mid_layer": MID_LAYER} | changes
        return TasteTokenizer.open(**words)


@pytest.fixture(scope="module")
def work(tmp_path_factory, golden_dir) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("tokenizer"), golden_dir)


@pytest.fixture(scope="module")
def tokenizer(work) -> TasteTokenizer:
    return work.open()


@pytest.fixture(scope="module")
def spoken(work, tokenizer) -> SpeechCodes:
    return tokenizer.encode(work.wav, TEXT)


def test_a_recording_becomes_a_row_of_codes_for_each_word(tokenizer, spoken):
    assert spoken.words == WORDS and spoken.text == TEXT
    assert spoken.codes.shape == (len(WORDS), TASTE_SIZES.num_quantizers) and spoken.codes.dtype == torch.int64
    assert 0 <= int(spoken.codes.min()) <= int(spoken.codes.max()) < TASTE_SIZES.codebook_size
    assert spoken.speaker.shape == (192,) and spoken.seconds == pytest.approx(1.2)
    assert (tokenizer.levels, tokenizer.codebook_size) == (TASTE_SIZES.num_quantizers, TASTE_SIZES.codebook_size)


def test_a_file_and_its_waveform_have_the_same_codes(work, tokenizer, spoken):
    waveform = read_audio(work.wav, 16_000).waveform
    assert torch.equal(tokenizer.encode(waveform, TEXT).codes, spoken.codes)
    other = torch.from_numpy(voice_like(0.9, 16_000, seed=6)).float()
    assert not torch.equal(tokenizer.encode(other, TEXT).codes, spoken.codes)


def test_codes_decode_to_the_sound_of_their_units(tokenizer, spoken):
    waveform = tokenizer.decode(spoken.codes, TEXT, spoken.speaker, QUICK)
    again = tokenizer.decode(spoken.codes.tolist(), TEXT, spoken.speaker, QUICK)
    assert waveform.dim() == 1 and torch.equal(waveform, again)
    units = tokenizer.units(spoken.codes, TEXT, spoken.speaker, QUICK)
    seconds = len(waveform) / tokenizer.sample_rate_hz
    assert seconds == pytest.approx(len(units) / 50, abs=0.03)


def test_what_codes_say_is_what_the_recording_says(work, tokenizer, spoken):
    tokens = tokenize(tokenizer._text_tokenizer, TEXT)
    waveform = read_audio(work.wav, 16_000).waveform
    heard = tokenizer._reader.batch(tokens, waveform=waveform, speaker=spoken.speaker)
    coded = tokenizer._reader.batch(tokens, codes=spoken.codes, speaker=spoken.speaker)
    assert torch.equal(coded.codes, tokenizer.model.encode(heard))
    torch.testing.assert_close(tokenizer.model.prefix(coded).vectors, tokenizer.model.prefix(heard).vectors)
    assert generate(tokenizer.model, heard, QUICK).units[0] == tokenizer.units(
        spoken.codes, TEXT, spoken.speaker, QUICK
    )


def test_sampling_repeats_with_its_seed_and_leaves_the_global_generator_alone(tokenizer, spoken):
    state = torch.get_rng_state()
    drawn = [tokenizer.units(spoken.codes, TEXT, spoken.speaker, Sampling("top_k", 10), seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_file_of_codes_is_readable_and_comes_back(tmp_path, tokenizer, spoken):
    path = tmp_path / "codes" / "one.json"
    write_codes(path, spoken)
    content = json.loads(path.read_text())
    assert [word["word"] for word in content["words"]] == WORDS
    assert sum('{"word": ' in line for line in path.read_text().splitlines()) == len(WORDS)  # a line a word
    back = read_codes(path)
    assert torch.equal(back.codes, spoken.codes) and torch.equal(back.speaker, spoken.speaker)
    assert replace(back, codes=None, speaker=None) == replace(spoken, codes=None, speaker=None)
    tokenizer.check_mine(back)


@pytest.mark.parametrize("content", ["{", "[]", '{"text": "a"}', '{"text": "a", "words": [{}]}'])
def test_a_file_that_holds_no_codes_is_named(tmp_path, content):
    path = tmp_path / "one.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"one\.json is no file of codes.*--mode encode"):
        read_codes(path)


def test_codes_of_another_model_are_refused(work, tmp_path, spoken):
    other = work.open(checkpoint_path=work.save(tmp_path / "best.pt", seed=1))
    with pytest.raises(OtherModelError, match=f"written by model {spoken.model}, this one is {other.fingerprint}"):
        other.check_mine(spoken)


def test_the_command_refuses_a_folder_with_one_file_of_another_model_before_it_speaks(work, tmp_path, spoken, capsys):
    mine = work.open(checkpoint_path=work.save(tmp_path / "mine.pt", seed=1))
    codes, run = tmp_path / "codes", tmp_path / "exp" / "run"
    words = ["--mode", "decode", "--variant", "taste", "--exp-dir", str(run.parent), "--run-name", run.name]
    words += ["--cosyvoice-model-dir", str(work.model_dir), "--mid-layer", str(MID_LAYER), "--codes-dir", str(codes)]
    words += ["--resume", str(tmp_path / "mine.pt"), "--device", "cpu", "--sampling", "greedy"]
    words += ["--max-units-per-token", "4"]
    write_codes(codes / "a.json", mine.encode(work.wav, TEXT))
    write_codes(codes / "b.json", spoken)
    assert model_code.main(words) == 1
    told = f"b.json: these codes were written by model {spoken.model}, this one is {mine.fingerprint}"
    assert told in capsys.readouterr().err
    assert not list(run.rglob("*.wav"))

    (codes / "b.json").unlink()
    assert model_code.main(words) == 0
    assert [path.name for path in run.rglob("*.wav")] == ["a.wav"]


@pytest.mark.parametrize("part", ["aggregator", "quantizer", "audio_branch", "llm"])
def test_codes_of_a_model_that_differs_in_one_number_are_refused(work, spoken, part):
    reader = work.open()._reader
    TasteTokenizer(reader, work.model_dir).check_mine(spoken)
    *_, last = (value for name, value in reader.model.state_dict().items() if name.startswith(f"{part}."))
    last.view(-1)[-1] += 1
    with pytest.raises(OtherModelError):
        TasteTokenizer(reader, work.model_dir).check_mine(spoken)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(4, 3), r"has 5 words, 3 codes each; got codes of shape \[4, 3\]"),
        (torch.zeros(5, 4), r"got codes of shape \[5, 4\]"),
        (torch.full((5, 3), 8), "codes from 8 to 8; this model has 0 to 7"),
        (torch.full((5, 3), -1), "codes from -1 to -1"),
    ],
)
def test_codes_that_do_not_fit_text_or_model_are_refused(tokenizer, spoken, codes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.units(codes, TEXT, spoken.speaker)


def test_a_speaker_that_the_model_reads_must_be_given(tokenizer, spoken):
    with pytest.raises(ValueError, match="reads a speaker vector"):
        tokenizer.decode(spoken.codes, TEXT)


def test_more_words_than_there_is_sound_for_raise_a_doubt_and_codes_all_the_same(tokenizer):
    waveform = torch.from_numpy(voice_like(0.05, 16_000, seed=3)).float()
    spoken = tokenizer.encode(waveform, TEXT)
    assert "5 words in 3 frames" in spoken.doubts[0]
    assert spoken.codes.shape == (5, TASTE_SIZES.num_quantizers)


@pytest.mark.parametrize(
    ("text", "make", "message"),
    [
        (" ", lambda folder: torch.ones(16_000), "the transcript is empty"),
        (TEXT, lambda folder: torch.zeros(0), "a speaker vector needs a longer recording"),
        (TEXT, lambda folder: torch.ones(60_000), "expected waveforms"),
        (TEXT, lambda folder: folder / "none.wav", "there is no such file"),
    ],
)
def test_what_cannot_be_encoded_is_told(tmp_path, tokenizer, text, make, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(make(tmp_path), text)


def test_a_device_is_looked_for_where_none_is_given(work, monkeypatch):
    asked = []
    monkeypatch.setattr("taste.tokenizer.pick_device", lambda name: asked.append(name) or torch.device("cpu"))
    assert work.open().device == torch.device("cpu") and asked == ["auto"]
    assert work.open(device="cpu").device == torch.device("cpu") and asked == ["auto"]


def test_another_whisper_than_the_training_features_is_refused(work, tmp_path):
    with pytest.raises(ValueError, match="mid_layer: 2 then, 3 now"):
        work.open(mid_layer=3)
    with pytest.raises(ValueError, match="features of another Whisper"):
        work.open(whisper_dir=write_small_whisper(tmp_path / "whisper", seed=5))


def test_a_checkpoint_of_another_variant_is_no_tokenizer(work, tmp_path):
    path = work.save(tmp_path / "best.pt", variant="taste_novq")
    with pytest.raises(ValueError, match="'taste_novq', which has no codes"):
        work.open(checkpoint_path=path)


def test_the_default_sizes_are_the_papers():
    sizes = TasteSizes()
    assert (sizes.num_quantizers, sizes.codebook_size, sizes.codebook_dim) == (4, 512, 256)
    assert (sizes.aggregator_layers, sizes.aggregator_heads, sizes.audio_layers, sizes.audio_heads) == (2, 20, 2, 8)


def test_a_recording_without_a_text_is_written_down_by_whisper(work, tokenizer, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no text, and nobody to write down what is said"):
        tokenizer.encode(work.wav)
    writing = WhisperRecogniser(write_writing_whisper(tmp_path / "whisper"))
    monkeypatch.setattr(tokenizer, "_recogniser", writing)
    monkeypatch.setattr(writing, "transcript", lambda *_: TEXT)  # its weights are random
    found = tokenizer.encode(work.wav)
    assert found.text == TEXT and found.words == WORDS
    monkeypatch.setattr(writing, "transcript", lambda *_: "")
    with pytest.raises(ValueError, match="Whisper heard nothing"):
        tokenizer.encode(work.wav)
