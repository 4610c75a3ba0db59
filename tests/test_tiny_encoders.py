"""The trained encoders of the tiny model: what their training scripts write, and what they promise about it."""

import json
import math
import random
import shutil
import stat
from pathlib import Path

import onnx
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import train_s3_tokenizer
import train_speaker_encoder
import train_whisper
import whisper_batches
import whisper_start
from corpus_reader import read_split
from s3tokenizer.model import ModelConfig, S3Tokenizer
from small_recordings import RATE_HZ, write_corpus, write_tokenizer
from speaker_net import MarginClassifier, SpeakerNet
from speaker_onnx import export_speaker_encoder
from unit_codes import CODE_WIDTH, unit_codes
from whisper_batches import Batch, Example
from whisper_training import IGNORED, FrameTeacher, States, encode
from word_times import Span, align, pronounce, share_out, token_spans

from cosyvoice.utils.audio import whisper_log_mel
from cosyvoice.utils.interrupt import StopRequest
from cosyvoice.utils.onnx_session import OnnxSession
from taste.audio import read_audio
from taste.speaker import SpeakerEncoder
from taste.threads import torch_threads_kept
from taste.whisper_encoder import WhisperEncoder

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> None:
    with torch_threads_kept():
        torch.set_num_threads(1)
        yield


def worn_net() -> SpeakerNet:
    """A network whose batch normalisations have seen something."""
    torch.manual_seed(0)
    net = SpeakerNet()
    for _ in range(3):
        net(2.0 * torch.randn(4, 60, 80) + 0.5)
    for parameter in net.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return net.eval()


# ---- speaker encoder


def test_exported_speaker_encoder_is_the_network_at_any_length(tmp_path: Path) -> None:
    net = worn_net()
    path = tmp_path / "campplus.onnx"
    onnx.save(export_speaker_encoder(net), path)
    session = OnnxSession(path)
    for shape in ((1, 1, 80), (1, 7, 80), (3, 200, 80)):
        fbank = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            expected = net(fbank)
        torch.testing.assert_close(torch.from_numpy(session.run(fbank.numpy())), expected, atol=1e-4, rtol=1e-4)


def test_margin_makes_only_the_right_speaker_harder() -> None:
    torch.manual_seed(0)
    plain, strict = MarginClassifier(5, margin=0.0, scale=10.0), MarginClassifier(5, margin=0.3, scale=10.0)
    strict.load_state_dict(plain.state_dict())
    vectors, speakers = torch.randn(4, 192), torch.tensor([0, 4, 2, 2])
    cosines = plain.cosines(vectors)
    torch.testing.assert_close(plain(vectors, speakers), F.cross_entropy(10.0 * cosines, speakers))
    angles = cosines.gather(1, speakers[:, None]).arccos() + 0.3
    expected = F.cross_entropy(10.0 * cosines.scatter(1, speakers[:, None], angles.cos()), speakers)
    torch.testing.assert_close(strict(vectors, speakers), expected)
    assert strict(vectors, speakers) > plain(vectors, speakers)


def test_equal_error_rate_of_known_cases() -> None:
    rate = train_speaker_encoder.equal_error_rate
    same = torch.linspace(0.5, 1.0, 100)
    assert rate(same, torch.linspace(-1.0, 0.4, 50)) == 0.0
    assert rate(same, same.clone()) == pytest.approx(0.5, abs=0.01)
    assert rate(same, torch.linspace(0.0, 0.6, 121)) == pytest.approx(100 * 0.1 / 1.1 / 100, abs=0.02)
    assert math.isnan(rate(same, torch.empty(0)))


def test_speaker_training_writes_what_the_readers_open(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    arguments = ["--work-dir", str(tmp_path), "--epochs", "3", "--batch-size", "3", "--longest-seconds", "1.0"]
    assert train_speaker_encoder.main(arguments) == 0
    folder = tmp_path / "speaker_encoder"
    assert {file.name for file in folder.iterdir()} == {
        ".done",
        "campplus.onnx",
        "last.pt",
        "metrics.json",
        "settings.json",
    }
    assert (folder / "campplus.onnx").stat().st_size < 1_000_000
    graph = onnx.load(folder / "campplus.onnx").graph
    assert ([value.name for value in graph.input], [value.name for value in graph.output]) == (["input"], ["output"])
    vector = SpeakerEncoder(folder / "campplus.onnx").embed(torch.randn(RATE_HZ, generator=torch.Generator()))
    assert vector.shape == (192,)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["test"]) == {"utterances", "cosine_within", "cosine_between", "equal_error_rate", "accuracy"}


def test_stopped_speaker_training_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--epochs", "2", "--batch-size", "3", "--longest-seconds", "1.0", "--work-dir"]
    straight, stopped = write_corpus(tmp_path / "a"), write_corpus(tmp_path / "b")
    assert train_speaker_encoder.main([*arguments, str(straight)]) == 0

    run = train_speaker_encoder.run
    asked = iter([False, False, False, True])  # in the second epoch, which has two batches
    monkeypatch.setattr(train_speaker_encoder, "run", lambda settings, stop: run(settings, lambda: next(asked)))
    monkeypatch.setattr(StopRequest, "exit_code", 130)
    assert train_speaker_encoder.main([*arguments, str(stopped)]) == 130
    assert not (stopped / "speaker_encoder" / ".done").exists()
    monkeypatch.undo()
    assert train_speaker_encoder.main([*arguments, str(stopped)]) == 0
    files = [folder / "speaker_encoder" / "campplus.onnx" for folder in (straight, stopped)]
    assert files[0].read_bytes() == files[1].read_bytes()

    capsys.readouterr()
    assert train_speaker_encoder.main([*arguments, str(stopped), "--lr", "0.1"]) == 1
    assert "other settings (lr)" in capsys.readouterr().err


# ---- when words are spoken


LEXICON = {"the": ("dh", "ax"), "cat": ("k", "ae", "t"), "sat": ("s", "ae", "t")}


def test_alignment_gives_each_phone_to_the_nearest_expected_one() -> None:
    assert align(["dh", "ax", "k"], ["dh", "ax", "k"]) == [0, 1, 2]
    assert align(["dh", "ax", "k", "ae"], ["dh", "iy", "k", "ae"]) == [0, 1, 2, 3]  # another vowel
    assert align(["dh", "ax", "k", "ae"], ["dh", "k", "ae"]) == [0, 2, 3]  # one is left out
    assert align(["dh", "ax", "k"], ["dh", "ax", "hh", "k"]) == [0, 1, 1, 2]  # one too many
    assert align(["dh", "ax"], []) == []


def test_tokens_share_their_words_time_and_punctuation_takes_the_pause() -> None:
    phones = [("pau", 0.1), ("dh", 0.2), ("iy", 0.3), ("k", 0.4), ("ae", 0.5), ("t", 0.6), ("pau", 0.8)]
    phones += [("s", 0.9), ("ae", 1.0), ("t", 1.1), ("pau", 1.3)]
    pieces, word_ids = ["The", " c", "at", ",", " sat", "."], [0, 1, 1, 1, 2, 2]
    word_of_phone = share_out(["The", " cat,", " sat."], phones, LEXICON)
    assert word_of_phone == [None, 0, 0, 1, 1, 1, None, 2, 2, 2, None]
    spans = token_spans(pieces, word_ids, phones, word_of_phone)
    assert spans == [Span(0.1, 0.3), Span(0.3, 0.4), Span(0.4, 0.6), Span(0.6, 0.8), Span(0.8, 1.1), Span(1.1, 1.3)]
    assert token_spans([*pieces, " xyz"], [*word_ids, 3], phones, word_of_phone)[-1] is None  # flite did not speak it


@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")
def test_flite_says_the_phones_of_single_words() -> None:
    assert pronounce({"the", "cat"}, "flite") == {"cat": ("k", "ae", "t"), "the": ("dh", "ax")}


# ---- S3 tokenizer

SMALL_TOKENIZER = ["--width", "64", "--layers", "1", "--recogniser-layers", "1", "--codes", "16", "--epochs", "2"]
SMALL_TOKENIZER += ["--open-epochs", "1", "--reader-epochs", "3", "--reader-frames-per-batch", "300"]


def test_a_stopped_recogniser_goes_on_to_the_same_weights_and_is_no_other_tokenizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, stopped = write_corpus(tmp_path / "a"), write_corpus(tmp_path / "b")
    assert train_s3_tokenizer.main([*SMALL_TOKENIZER, "--work-dir", str(straight)]) == 0
    reader = straight / "s3_tokenizer" / "reader.pt"
    learned = torch.load(reader, weights_only=True)["reader"]
    time = reader.stat().st_mtime_ns
    assert train_s3_tokenizer.main([*SMALL_TOKENIZER, "--work-dir", str(straight)]) == 0
    assert reader.stat().st_mtime_ns == time  # the same command again

    with monkeypatch.context() as stopping:
        asked = iter([False, False, True])  # after two epochs and the recogniser's first pass
        stopping.setattr(StopRequest, "requested", property(lambda self: next(asked)))
        stopping.setattr(StopRequest, "exit_code", 130)
        assert train_s3_tokenizer.main([*SMALL_TOKENIZER, "--work-dir", str(stopped)]) == 130
    assert not (stopped / "s3_tokenizer" / "metrics.json").exists()
    assert train_s3_tokenizer.main([*SMALL_TOKENIZER, "--work-dir", str(stopped)]) == 0
    again = torch.load(stopped / "s3_tokenizer" / "reader.pt", weights_only=True)["reader"]
    assert all(torch.equal(value, again[name]) for name, value in learned.items())

    (straight / "s3_tokenizer" / "last.pt").unlink()
    assert train_s3_tokenizer.main([*SMALL_TOKENIZER, "--seed", "1", "--work-dir", str(straight)]) == 0
    other = torch.load(reader, weights_only=True)["reader"]
    assert any(not torch.equal(value, other[name]) for name, value in learned.items())


def test_a_tokenizer_needs_epochs_for_its_codes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert train_s3_tokenizer.main(["--work-dir", str(tmp_path), "--epochs", "7"]) == 2
    assert "none would be left for the codes" in capsys.readouterr().err


# ---- Whisper encoder


@pytest.fixture
def prepared(tmp_path: Path) -> list[Example]:
    write_corpus(tmp_path)

    class Letters:
        """A tokenizer with one token a word."""

        encoding = None

        def encode(self, text: str, allowed_special: str) -> list[int]:
            return [7, 9, 8]

        def decode_single_token_bytes(self, token: int) -> bytes:
            return {7: b"The", 9: b" cat", 8: b"."}[token]

    tokenizer = Letters()
    tokenizer.encoding = tokenizer
    spoken = read_split(tmp_path / "corpus", "dev")
    units = train_whisper.unit_classes(torch.tensor([4, 6]))[[4, 8, 6] * 16]
    return [train_whisper.prepare(item, units, tokenizer, [7, 9], LEXICON) for item in spoken]


def test_frames_are_labelled_with_what_is_spoken_there(prepared: list[Example]) -> None:
    example = prepared[0]
    assert example.tokens.tolist() == [0] * 5 + [1] * 10 + [2] * 30 + [IGNORED] * 5  # "." is no class here
    assert len(example.phones) == 50
    assert example.units.tolist() == [0, IGNORED, 1] * 16 + [IGNORED] * 2  # 8 is none; two frames have no unit
    frames = [1.5, 5.5, 6, 1.5, 10.5, 11]  # of "dh" and of "The"
    assert example.timing[5].exp().tolist() == pytest.approx(frames)


def test_training_mel_is_that_of_the_whole_window(prepared: list[Example], tmp_path: Path) -> None:
    batch = whisper_batches.collate([[prepared[0]], [prepared[1], prepared[0]]])
    waveform = read_audio(sorted((tmp_path / "corpus").glob("dev-*.flac"))[0], RATE_HZ).waveform
    whole = whisper_log_mel(F.pad(waveform, (0, 30 * RATE_HZ - len(waveform))), 128)
    torch.testing.assert_close(batch.mels[0].float(), whole[:, : batch.mels.shape[2]], atol=2e-3, rtol=0)  # float16
    for labels in (batch.tokens, batch.phones, batch.units):
        assert (labels[0, 50:] == IGNORED).all()
        assert labels[1, 50:100].tolist() == labels[0, :50].tolist()


def test_with_all_silence_drawn_the_encoder_is_transformers_own() -> None:
    torch.manual_seed(0)
    encoder = whisper_start.build_whisper().model.encoder.eval()
    for layer in encoder.layers:
        layer.self_attn.k_proj.weight.data *= 4.0  # so that attention prefers some frames
    mels = torch.full((2, 128, 3000), -0.7)
    mels[:, :, :120] = torch.randn(2, 128, 120, generator=torch.Generator().manual_seed(1)) * 0.5
    taps = []
    encoder.layers[5].register_forward_hook(lambda *call: taps.append(call[2]))
    with torch.inference_mode():
        whole = encoder(mels).last_hidden_state[:, :62]
        states = encode(encoder, mels[:, :, : 2 * (62 + 4)], 6, 10_000, None)
        few = encode(encoder, mels[:, :, : 2 * (62 + 4)], 6, 64, torch.Generator().manual_seed(0))
        alone = encode(encoder, mels[:, :, : 2 * (62 + 4)], 6, 0, None)
    mid = taps[0] if isinstance(taps[0], torch.Tensor) else taps[0][0]
    torch.testing.assert_close(states.final, whole, atol=1e-2, rtol=0)  # the window's last frame ends in no silence
    torch.testing.assert_close(states.mid, mid[:, :62], atol=1e-2, rtol=0)
    distance = [(other.final - whole).abs().mean().item() for other in (few, alone)]
    assert distance[0] < 0.3 * distance[1]  # some of the silence stands for all of it


def test_the_encoder_begins_with_the_states_of_the_tokenizer(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "speech_tokenizer_v1.onnx")
    tokenizer = S3Tokenizer("speech_tokenizer_v1", ModelConfig(n_audio_state=128, n_audio_head=2, n_audio_layer=2))
    tokenizer.init_from_onnx(str(path))
    encoder = whisper_start.begin_as_tokenizer(path).model.encoder
    mels = torch.randn(1, 128, 2 * (50 + 4))
    with torch.inference_mode():
        expected, _ = tokenizer.eval().encoder(mels, torch.tensor([108]))
        second, middle = (encode(encoder, mels, block, 0, None).mid for block in (2, 6))
    torch.testing.assert_close(second[:, :40], expected[:, :40], atol=0.3, rtol=0)  # which sees four frames more
    assert torch.equal(middle, second)  # up to the middle block nothing is added
    assert len(encoder.layers[0].fc1.weight[512:].unique()) > 1000  # what is new listens
    frozen = {name for name, weight in encoder.named_parameters() if not weight.requires_grad}
    assert frozen == {"embed_positions.weight"}
    for other in ({"width": 64}, {"blocks": 7}):
        with pytest.raises(ValueError, match="expected a tokenizer of width 128 with at most 6 blocks"):
            whisper_start.begin_as_tokenizer(write_tokenizer(path, **other))
    with pytest.raises(FileNotFoundError, match="run stage 1"):
        whisper_start.begin_as_tokenizer(tmp_path / "other.onnx")


def test_an_earlier_model_with_narrower_layers_is_gone_on_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whisper_start, "_HIDDEN", 512)
        earlier = whisper_start.build_whisper(heads=4)
        earlier.save_pretrained(tmp_path / "narrow")
        patch.setattr(whisper_start, "WIDTH", 64)
        whisper_start.build_whisper().save_pretrained(tmp_path / "thin")
    whisper, teacher = whisper_start.begin_as_earlier(tmp_path / "narrow")
    assert teacher is None and whisper.config.encoder_attention_heads == 4
    assert whisper.model.encoder.layers[0].fc1.weight.shape == (768, 128)
    mels = torch.randn(1, 128, 108)
    with torch.no_grad():
        first, second = (encode(model.model.encoder, mels, 6, 0, None) for model in (earlier, whisper))
    torch.testing.assert_close(second.mid, first.mid)
    torch.testing.assert_close(second.final, first.final)
    with pytest.raises(ValueError, match="expected 8 blocks of width 128"):
        whisper_start.begin_as_earlier(tmp_path / "thin")
    for missing in (tmp_path, tmp_path / "last.pt"):
        with pytest.raises(FileNotFoundError, match=r"expected last\.pt of train_whisper\.py, or a folder"):
            whisper_start.begin_as_earlier(missing)


def test_every_utterance_stands_in_one_row_of_a_batch_that_is_not_too_large() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(50, 300) for _ in range(200)]
    batches = whisper_batches.plan_batches(lengths, 2_000, 0.3, random.Random(1))
    assert sorted(i for batch in batches for row in batch for i in row) == list(range(200))
    assert any(len(row) > 1 for batch in batches for row in batch)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(sum(lengths[i] for i in row) for row in batch) <= 2_000
    assert batches == whisper_batches.plan_batches(lengths, 2_000, 0.3, random.Random(1))
    assert batches != whisper_batches.plan_batches(lengths, 2_000, 0.3, random.Random(2))


def test_disturbed_rows_keep_digital_silence_behind_them(prepared: list[Example]) -> None:
    batch = whisper_batches.collate([[prepared[0]], [prepared[1], prepared[0]]])
    mels, lengths = batch.mels.float(), (batch.phones != IGNORED).sum(dim=1)
    for seed in range(5):
        disturbed = whisper_batches.disturb(mels.clone(), lengths, 0.0, torch.Generator().manual_seed(seed))
        for row, clean, length in zip(disturbed, mels, (2 * lengths + 4).tolist(), strict=True):
            assert row[:, length:].unique().numel() == 1
            assert row[0, -1] == pytest.approx(max(row.max().item() - 2.0, -1.5), abs=0.3)  # masks may hide the loudest
            assert row.min() == row[0, -1]
            assert not torch.equal(row, clean)
    kept = whisper_batches.disturb(mels.clone(), lengths, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(kept, mels)


def test_batches_depend_on_their_place_only(prepared: list[Example]) -> None:
    def batches(first: tuple[int, int], workers: int) -> list[Batch]:
        plan = [[[0], [1]], [[1, 0]], [[1], [0]]]
        made = whisper_batches.open_batches(prepared, lambda epoch: plan, first, 0.0, 0, workers, pinned=False)
        return [next(made) for _ in range(5 - 3 * first[0] - first[1])]

    straight = batches((0, 0), 0)
    assert not torch.equal(straight[0].mels, straight[3].mels)  # the next epoch
    for others in (batches((0, 0), 2), batches((0, 2), 0)):
        for own, other in zip(reversed(straight), reversed(others), strict=False):
            assert all(torch.equal(*parts) for parts in zip(own, other, strict=True))


def test_teacher_knows_a_token_by_its_embedding() -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(20, 16)
    teacher = FrameTeacher(16, embeddings, phones=3, prosody=2, units=torch.arange(5))
    with torch.no_grad():
        teacher.to_text.weight.copy_(torch.eye(16))
        teacher.to_text.bias.zero_()
    tokens = torch.arange(1, 21)[None]
    phones = torch.zeros(1, 20, dtype=torch.long)
    units = torch.arange(20)[None] % 5
    for labels in (tokens, phones, units):
        labels[0, 15:] = IGNORED
    states = States(torch.randn(1, 20, 16), 5.0 * embeddings[None])
    prosody = torch.randn(1, 20, 2)
    losses = teacher(states, tokens, phones, units, prosody)
    assert losses.text_accuracy == 1.0
    mid, final = states.mid[:, :15], states.final[:, :15]
    labels = (labels[:, :15] for labels in (tokens, phones, units, prosody))
    torch.testing.assert_close(teacher(States(mid, final), *labels), losses)  # nothing counts behind a recording's end


def test_teacher_asks_for_units_and_their_codes() -> None:
    torch.manual_seed(0)
    occurring = torch.arange(30) * 100
    teacher = FrameTeacher(CODE_WIDTH, torch.randn(4, 16), phones=3, prosody=2, units=occurring)
    codes = unit_codes()[occurring]
    with torch.no_grad():
        for head, weight in ((teacher.code_head, torch.eye(CODE_WIDTH)), (teacher.unit_head, codes)):
            head.weight.copy_(weight)
            head.bias.zero_()
    units = torch.arange(30)[None]
    mid = codes[units]
    units[0, 3] = IGNORED
    nothing = torch.zeros(1, 30, dtype=torch.long)
    final, prosody = torch.randn(1, 30, CODE_WIDTH), torch.zeros(1, 30, 2)
    losses = teacher(States(mid, final), nothing, nothing, units, prosody)
    assert losses.unit_accuracy == 1.0 and losses.code == 0
    losses = teacher(States(mid.roll(1, dims=1), final), nothing, nothing, units, prosody)
    assert losses.unit_accuracy == 0.0
    assert losses.code.item() == pytest.approx(2.0, rel=0.2)  # two that know nothing of each other


def test_stopped_whisper_training_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(train_whisper, "find_flite", lambda: "no flite")
    monkeypatch.setattr(train_whisper, "pronounce_texts", lambda texts, flite: LEXICON)
    arguments = [
        "--steps",
        "4",
        "--frames-per-batch",
        "160",
        "--joined-share",
        "0",
        "--splits",
        "train",
        "--s3-tokenizer",
    ]
    arguments += [str(write_tokenizer(tmp_path / "speech_tokenizer_v1.onnx")), "--device", "cpu", "--work-dir"]
    straight, stopped = write_corpus(tmp_path / "a"), write_corpus(tmp_path / "b")
    assert train_whisper.main([*arguments, str(straight)]) == 0

    run = train_whisper.run
    asked = iter([False, False, False, True])  # in the second epoch, which has two batches
    with monkeypatch.context() as patch:
        patch.setattr(train_whisper, "run", lambda settings, stop: run(settings, lambda: next(asked)))
        patch.setattr(StopRequest, "exit_code", 130)
        assert train_whisper.main([*arguments, str(stopped)]) == 130
    assert not (stopped / "whisper" / ".done").exists()
    assert train_whisper.main([*arguments, str(stopped)]) == 0
    files = [folder / "whisper" / "model.safetensors" for folder in (straight, stopped)]
    assert files[0].read_bytes() == files[1].read_bytes()

    assert files[0].stat().st_size < 5_600_000
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o644
    (features,) = WhisperEncoder(straight / "whisper", mid_layer=6).encode([torch.zeros(RATE_HZ)])
    assert features.mid.shape == features.final.shape == (50, 128)
    metrics = json.loads((straight / "whisper" / "metrics.json").read_text())
    assert {"phone_accuracy", "text_accuracy", "unit_accuracy", "code_r2", "looks_right", "consistency"} <= set(metrics)

    start = ["--start-from", str(straight / "whisper" / "last.pt"), "--lr", "0"]
    assert train_whisper.main([*arguments, str(write_corpus(tmp_path / "c")), *start]) == 0
    assert (tmp_path / "c" / "whisper" / "model.safetensors").read_bytes() == files[0].read_bytes()
    start[1] = str(straight / "whisper")  # whose encoder is in half precision
    assert train_whisper.main([*arguments, str(write_corpus(tmp_path / "d")), *start]) == 0
    first, second = (safetensors.torch.load_file(f / "whisper/model.safetensors") for f in (straight, tmp_path / "d"))
    encoder = {name for name in first if ".encoder." in name}
    assert encoder and all(torch.equal(first[name], second[name]) for name in encoder)

    capsys.readouterr()
    torch.save({"text_embedding.weight": torch.randn(51_866, 16)}, tmp_path / "llm.pt")
    assert train_whisper.main([*arguments, str(stopped), "--text-embedding", str(tmp_path / "llm.pt")]) == 1
    assert "other settings (text_embedding)" in capsys.readouterr().err
    torch.save({"other": torch.zeros(1)}, tmp_path / "flow.pt")
    assert train_whisper.main([*arguments, str(stopped), "--text-embedding", str(tmp_path / "flow.pt")]) == 1
    assert "holds no text_embedding.weight" in capsys.readouterr().err
