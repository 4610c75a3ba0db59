import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small_whisper import LAYERS, WIDTH, WINDOW_FRAMES, write_small_whisper
from sounds import voice_like
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from taste.whisper_encoder import WhisperEncoder

# A Whisper frames, 50 Hz
MID_LAYER = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def waveforms() -> list[torch.Tensor]:
    return [torch.from_numpy(voice_like(seconds, 16_000, seed=1)).float() for seconds in (3.0, 1.234, 0.05)]


def test_both_taps_equal_those_of_the_whole_transformers_model(folder: Path, waveforms: list[torch.Tensor]) -> None:
    whole = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    # transformers' own spectrum of the padded recording, an implementation apart from ours
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=WINDOW_FRAMES // 50)
    spectrum = extractor([w.numpy() for w in waveforms], sampling_rate=16_000, return_tensors="pt").input_features
    with torch.no_grad():
        expected = whole.model.encoder(spectrum, output_hidden_states=True)
    encoded = WhisperEncoder(folder, MID_LAYER).encode(waveforms)
    for row, (features, frames) in enumerate(zip(encoded, [150, 62, 3], strict=True)):
        assert features.mid.shape == features.final.shape == (frames, WIDTH)
        torch.testing.assert_close(features.mid, expected.hidden_states[MID_LAYER][row, :frames], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.final, expected.last_hidden_state[row, :frames], atol=1e-5, rtol=1e-5)


def test_a_batch_equals_its_recordings_one_by_one(folder: Path, waveforms: list[torch.Tensor]) -> None:
    encoder = WhisperEncoder(folder, MID_LAYER)
    loud_and_soft = [waveforms[0], waveforms[1] / 1000]  # the spectrum's range is cut by each recording's own peak
    together = encoder.encode(loud_and_soft)
    for waveform, expected in zip(loud_and_soft, together, strict=True):
        alone = encoder.encode([waveform])[0]
        torch.testing.assert_close(alone.mid, expected.mid, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.final, expected.final, atol=1e-5, rtol=1e-5)


def test_zeros_behind_a_recording_change_nothing_but_the_length(folder: Path, waveforms: list[torch.Tensor]) -> None:
    encoder = WhisperEncoder(folder, MID_LAYER)
    short, padded = encoder.encode([waveforms[1], F.pad(waveforms[1], (0, 5_000))])
    assert len(padded.final) == -(-(len(waveforms[1]) + 5_000) // 320) > len(short.final)
    torch.testing.assert_close(short.final, padded.final[: len(short.final)])


def test_shards_and_half_precision_load_the_same_encoder(
    tmp_path: Path, folder: Path, waveforms: list[torch.Tensor]
) -> None:
    write_small_whisper(tmp_path / "shards", shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    write_small_whisper(tmp_path / "half", dtype=torch.float16)
    whole = WhisperEncoder(folder, MID_LAYER)
    expected = whole.encode(waveforms)
    for name, tolerance in (("shards", 0.0), ("half", 0.02)):
        encoder = WhisperEncoder(tmp_path / name, MID_LAYER)
        assert (encoder.digest == whole.digest) == (name == "shards")
        for found, wanted in zip(encoder.encode(waveforms), expected, strict=True):
            torch.testing.assert_close(found.final, wanted.final, atol=tolerance, rtol=0)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for key, change, message in (
        ("model.encoder.layers.3.fc2.bias", None, "layers.3.fc2.bias is missing"),
        ("model.encoder.extra", torch.zeros(1), "extra is unknown"),
        ("model.encoder.conv1.bias", torch.zeros(5), r"conv1.bias is \[5\], expected \[32\]"),
    ):
        changed = {name: tensor for name, tensor in weights.items() if name != key}
        if change is not None:
            changed[key] = change
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            WhisperEncoder(tmp_path, MID_LAYER)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated"):
        WhisperEncoder(tmp_path, MID_LAYER)


def test_the_decoder_is_not_needed(tmp_path: Path, folder: Path, waveforms: list[torch.Tensor]) -> None:
    weights = load_file(folder / "model.safetensors")
    encoder_only = {name.removeprefix("model."): tensor for name, tensor in weights.items() if ".encoder." in name}
    save_file(encoder_only, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    expected = WhisperEncoder(folder, MID_LAYER).encode(waveforms[:1])[0]
    assert torch.equal(WhisperEncoder(tmp_path, MID_LAYER).encode(waveforms[:1])[0].final, expected.final)


def test_wrong_folders_are_refused_and_never_downloaded(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no Whisper folder"):
        WhisperEncoder("openai/whisper-tiny", MID_LAYER)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert', expected a Whisper"):
        WhisperEncoder(tmp_path, MID_LAYER)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors"):
        WhisperEncoder(tmp_path, MID_LAYER)
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"lacks model-1\.safetensors"):
        WhisperEncoder(tmp_path, MID_LAYER)


@pytest.mark.parametrize("mid_layer", [0, LAYERS, 16])
def test_a_middle_layer_that_is_not_there_is_refused(folder: Path, mid_layer: int) -> None:
    with pytest.raises(ValueError, match=f"MID_LAYER is {mid_layer}.*choose 1 to {LAYERS - 1}"):
        WhisperEncoder(folder, mid_layer)


def test_recordings_outside_the_window_are_refused(folder: Path) -> None:
    encoder = WhisperEncoder(folder, MID_LAYER)
    for waveform in (torch.zeros(0), torch.zeros(48_001), torch.zeros(1, 100)):
        with pytest.raises(ValueError, match=r"1 to 48000 samples \(3 s at 16 kHz\)"):
            encoder.encode([waveform])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_half_precision_on_a_gpu_is_close_to_the_cpu(
    folder: Path, waveforms: list[torch.Tensor], dtype: torch.dtype
) -> None:
    expected = WhisperEncoder(folder, MID_LAYER).encode(waveforms)
    found = WhisperEncoder(folder, MID_LAYER, "cuda", dtype).encode(waveforms)
    for features, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(features.final.float().cpu(), wanted.final, atol=0.1, rtol=0)


def test_importing_the_encoders_imports_no_heavy_library() -> None:
    script = """
import sys
import taste.whisper_encoder, taste.speaker, taste.text, utt2text_and_feature
print([name for name in ("transformers", "onnxruntime", "whisper", "matplotlib", "s3tokenizer") if name in sys.modules])
"""
    repository = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
