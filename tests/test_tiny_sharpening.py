"""A Whisper encoder that learns to hear S3 units as the tokenizer does, its states staying what they were."""

import json
from pathlib import Path

import pytest
import sharpen_whisper
import torch
import whisper_start
from s3tokenizer.model import ModelConfig, S3Tokenizer
from small_recordings import RATE_HZ, write_corpus, write_tokenizer
from whisper_training import UnitNames, encode

from cosyvoice.utils.interrupt import StopRequest
from taste.threads import torch_threads_kept
from taste.whisper_encoder import WhisperEncoder

BLOCKS = 2  # of the tokenizer


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> None:
    with torch_threads_kept():
        torch.set_num_threads(1)
        yield


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "speech_tokenizer_v1.onnx", blocks=BLOCKS)


def test_units_are_named_as_the_tokenizer_names_them(tokenizer: Path) -> None:
    model = S3Tokenizer("speech_tokenizer_v1", ModelConfig(n_audio_state=128, n_audio_head=2, n_audio_layer=BLOCKS))
    model.init_from_onnx(str(tokenizer))
    mels, lengths = torch.randn(1, 128, 400), torch.tensor([400])
    with torch.no_grad():
        model.quantizer.codebook.normal_(std=0.1)
        units, _ = model.eval().quantize(mels, lengths)
        states, _ = model.encoder(mels, lengths)
        logits = UnitNames(model.quantizer.codebook)(states)
    assert torch.equal(logits.argmax(dim=-1), units)
    assert len(units.unique()) > 20


def test_graft_gives_the_next_block_the_states_it_knows(tokenizer: Path) -> None:
    torch.manual_seed(0)
    lower, upper = (whisper_start.begin_as_tokenizer(tokenizer) for _ in range(2))
    sizes = whisper_start.tokenizer_sizes(tokenizer)
    assert sizes == (BLOCKS, 512)
    with torch.no_grad():
        for layer in upper.model.encoder.layers[BLOCKS:]:
            layer.fc2.weight.normal_(std=0.1)
        layer = upper.model.encoder.layers[BLOCKS - 1]  # gives another sum of what it computes, and a linear map
        layer.fc2.weight[:, : sizes.hidden].normal_(std=0.1)
        turn = torch.randn(128, 128) / 8
        for sign, part in ((1.0, slice(512, 640)), (-1.0, slice(640, 768))):
            layer.fc1.weight[part], layer.fc1.bias[part] = sign * torch.eye(128), 0.0
            layer.fc2.weight[:, part] = sign * turn
    batches = [torch.randn(4, 128, 2 * (150 + 4)) for _ in range(3)]
    told = whisper_start.graft(lower, upper, sizes, batches, sampled_frames=8)
    assert told > 0.9999
    mels = torch.randn(2, 128, 2 * (60 + 4))
    with torch.inference_mode():
        ours, theirs = (
            encode(model.model.encoder, mels, 6, 8, torch.Generator().manual_seed(1), BLOCKS)
            for model in (lower, upper)
        )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0)
    assert theirs.early.std() > 1.0


def test_graft_refuses_encoders_that_do_not_match(tokenizer: Path) -> None:
    lower = whisper_start.begin_as_tokenizer(tokenizer)
    sizes = whisper_start.tokenizer_sizes(tokenizer)
    for upper, size in ((whisper_start.build_whisper(heads=4), sizes), (lower, sizes._replace(hidden=513))):
        with pytest.raises(ValueError, match="expected at most 512 and as many heads in both"):
            whisper_start.graft(lower, upper, size, [], sampled_frames=8)


def test_corrected_states_tell_the_codes_and_change_no_more_than_that() -> None:
    torch.manual_seed(0)
    mid, codes, to_code, bias = torch.randn(50, 16), torch.randn(50, 4), torch.randn(16, 4), torch.randn(4)
    corrected = sharpen_whisper.correct(mid, codes, to_code, bias)
    torch.testing.assert_close(corrected @ to_code + bias, codes, atol=1e-4, rtol=0)
    untold = torch.linalg.svd(to_code.T).Vh[4:].T  # directions in which no code is told
    torch.testing.assert_close(corrected @ untold, mid @ untold, atol=1e-4, rtol=0)


def test_knowing_nothing_of_the_states_costs_one() -> None:
    torch.manual_seed(0)
    states = torch.randn(4000, 8) @ torch.randn(8, 8) * 5.0
    scale = sharpen_whisper.comparing(states)
    missed = ((states - states.mean(dim=0)) @ scale).square().mean()
    assert missed.item() == pytest.approx(1.0, rel=0.01)
    narrow, wide = ((states - states.mean(dim=0)) @ scale).var(dim=0).aminmax()
    assert wide < 4 * narrow < 4 * states.var(dim=0).max()


def test_stopped_sharpening_goes_on_to_the_same_weights(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    torch.manual_seed(1)
    whisper_start.build_whisper().save_pretrained(tmp_path / "earlier")
    work = write_corpus(tmp_path)
    arguments = ["--work-dir", str(work), "--s3-tokenizer", str(tokenizer), "--earlier", str(tmp_path / "earlier")]
    arguments += ["--splits", "train", "--dev", "dev", "--steps", "4", "--naming-steps", "6", "--threads", "1"]
    arguments += ["--frames-per-batch", "160", "--clean-share", "0.5", "--device", "cpu", "--dtype", "float32", "--out"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert sharpen_whisper.main([*arguments, str(straight)]) == 0

    run = sharpen_whisper.run
    for asked, saved in (([False] * 2 + [True], False), ([False] * 9 + [True], True)):
        answers = iter(asked)
        with monkeypatch.context() as patch:
            patch.setattr(
                sharpen_whisper, "run", lambda settings, stop, answers=answers: run(settings, lambda: next(answers))
            )
            patch.setattr(StopRequest, "exit_code", 130)
            assert sharpen_whisper.main([*arguments, str(stopped)]) == 130
        assert (stopped / "last.pt").exists() == saved
    assert "begins anew" in capsys.readouterr().err
    assert sharpen_whisper.main([*arguments, str(stopped)]) == 0
    assert "resuming from step 3" in capsys.readouterr().out
    files = [folder / "model.safetensors" for folder in (straight, stopped)]
    assert files[0].read_bytes() == files[1].read_bytes()
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (straight, stopped)]
    for name in ("mid", "final", "code", "unit", "unit_accuracy"):
        assert metrics[0][name] == metrics[1][name]
    (features,) = WhisperEncoder(straight, mid_layer=6).encode([torch.zeros(RATE_HZ)])
    assert features.mid.shape == (50, 128)
    assert sharpen_whisper.main([*arguments, str(straight), "--lr", "1e-3"]) == 1
    assert "other settings (lr)" in capsys.readouterr().err
