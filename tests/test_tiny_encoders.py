"""The trained encoders of the tiny model: what their training scripts write, and what they promise about it."""

import json
import math
import sys
from pathlib import Path

import onnx
import pytest
import soundfile
import torch
import torch.nn.functional as F

from cosyvoice.utils.onnx_session import OnnxSession
from taste.speaker import SpeakerEncoder

REPOSITORY = Path(__file__).resolve().parents[1]
TINY_EXAMPLE = REPOSITORY / "CosyVoice" / "examples" / "tiny"
sys.path.insert(0, str(TINY_EXAMPLE))

import train_speaker_encoder  # noqa: E402
from speaker_net import MarginClassifier, SpeakerNet  # noqa: E402
from speaker_onnx import export_speaker_encoder  # noqa: E402

RATE_HZ = 16_000


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_corpus(work_dir: Path) -> Path:
    """Two "speakers", buzzes of two pitches, who say "the cat" in a few ways."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("dev", 2), ("test", 2)):
        folder = work_dir / "corpus" / split
        folder.mkdir(parents=True)
        lines: dict[str, list[str]] = {"wav.scp": [], "text": [], "utt2spk": [], "phones": []}
        for number in range(count):
            name, pitch_hz = ("low", 90.0) if number % 2 else ("high", 210.0)
            utt_id = f"{split}-{name}-{number}"
            time = torch.arange(RATE_HZ) / RATE_HZ
            wave = sum(torch.sin(2 * math.pi * pitch_hz * k * time) / k for k in range(1, 12)) * 0.2
            path = work_dir / "corpus" / f"{utt_id}.flac"
            soundfile.write(path, (wave + 0.01 * torch.randn(RATE_HZ, generator=generator)).numpy(), RATE_HZ)
            lines["wav.scp"].append(f"{utt_id} {path}")
            lines["text"].append(f"{utt_id} The cat.")
            lines["utt2spk"].append(f"{utt_id} {name}")
            lines["phones"].append(f"{utt_id} pau:0.100 dh:0.200 ax:0.300 k:0.450 ae:0.700 t:0.900 pau:1.000")
        for name, content in lines.items():
            (folder / name).write_text("\n".join(content) + "\n")
    return work_dir


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
    asked = iter([False, False, False, True])  # in the middle of the second epoch
    monkeypatch.setattr(train_speaker_encoder, "run", lambda settings, stop: run(settings, lambda: next(asked)))
    monkeypatch.setattr(train_speaker_encoder.StopRequest, "exit_code", 130)
    assert train_speaker_encoder.main([*arguments, str(stopped)]) == 130
    assert not (stopped / "speaker_encoder" / ".done").exists()
    monkeypatch.undo()
    assert train_speaker_encoder.main([*arguments, str(stopped)]) == 0
    files = [folder / "speaker_encoder" / "campplus.onnx" for folder in (straight, stopped)]
    assert files[0].read_bytes() == files[1].read_bytes()

    capsys.readouterr()
    assert train_speaker_encoder.main([*arguments, str(stopped), "--lr", "0.1"]) == 1
    assert "other settings (lr)" in capsys.readouterr().err
