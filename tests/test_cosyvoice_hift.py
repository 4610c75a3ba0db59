import json

import pytest
import torch

from benchmarks.flow_hift_models import build_hift
from cosyvoice.hifigan.f0_predictor import ConvRNNF0Predictor
from cosyvoice.hifigan.generator import HiFTGenerator
from cosyvoice.utils.model_dir import load_weights


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.fixture()
def hift(golden_dir) -> HiFTGenerator:
    model = build_hift("small").eval()
    model.load_state_dict(torch.load(golden_dir / "small_hift.pt", weights_only=True))
    return model


def with_older_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As `torch.nn.utils.weight_norm` names them, which the published code used at first."""
    older = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    renamed = {}
    for name, tensor in weights.items():
        for newer, old in older.items():
            name = name.replace(newer, old)
        renamed[name] = tensor
    return renamed


def random_mel(frames: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, 80, frames, generator=torch.Generator().manual_seed(frames))


def test_the_released_size_has_the_published_keys_and_shapes(golden_dir):
    expected = json.loads((golden_dir / "cosyvoice_300m_state_dict_shapes.json").read_text())["hift"]
    with torch.device("meta"):
        model = build_hift("300m")
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == 20_460_591


@pytest.mark.parametrize("prefix", ["", "generator."], ids=["vocoder", "hifigan"])
def test_weights_under_the_older_weight_norms_names_make_the_same_sound(hift, golden_dir, tmp_path, prefix):
    weights = with_older_names(torch.load(golden_dir / "small_hift.pt", weights_only=True))
    assert "conv_pre.weight_g" in weights and "f0_predictor.condnet.0.weight_v" in weights
    torch.save({f"{prefix}{name}": tensor for name, tensor in weights.items()}, tmp_path / "hift.pt")
    model = build_hift("small").eval()
    load_weights(model, tmp_path / "hift.pt")
    sounds = []
    for vocoder in (hift, model):
        torch.manual_seed(3)
        sounds.append(vocoder.inference(random_mel(12)).speech)
    assert torch.equal(*sounds)


def test_a_weight_that_is_missing_is_named_beside_older_names(golden_dir, tmp_path):
    weights = with_older_names(torch.load(golden_dir / "small_hift.pt", weights_only=True))
    del weights["conv_pre.weight_g"]
    weights["conv_last.weight_g"] = torch.zeros(1)
    torch.save(weights, tmp_path / "hift.pt")
    with pytest.raises(ValueError, match=r"1 missing: conv_pre\.parametrizations.*1 unexpected: conv_last\.weight_g"):
        load_weights(build_hift("small"), tmp_path / "hift.pt")


@torch.no_grad()
def test_f0_equals_the_reference(hift, golden_cases):
    case = golden_cases["f0_predictor"]
    assert relative_error(hift.f0_predictor(case["mel"]), case["f0"]) <= 1e-5


@torch.no_grad()
def test_decoding_a_given_source_equals_the_reference(hift, golden_cases):
    case = golden_cases["hift_decode"]
    assert relative_error(hift.decode(case["mel"], case["source"]), case["wav"]) <= 1e-5


@torch.no_grad()
def test_the_source_of_seeded_noise_equals_the_reference(hift, golden_cases):
    case = golden_cases["hift_source"]
    torch.manual_seed(case["seed"])
    assert relative_error(hift._source(case["f0"]), case["source"]) <= 1e-5
    samples = case["f0"].unsqueeze(1).repeat_interleave(256, dim=-1)
    assert torch.equal(hift.m_source(samples).voiced.transpose(1, 2), case["uv"])


def test_seeded_inference_equals_the_reference(hift, golden_cases):
    case = golden_cases["hift_inference"]
    torch.manual_seed(case["seed"])
    generated = hift.inference(case["mel"])
    assert relative_error(generated.speech, case["wav"]) <= 1e-5
    assert relative_error(generated.source, case["source"]) <= 1e-5


def test_the_sources_stft_equals_the_reference(hift, golden_cases):
    case = golden_cases["hift_stft"]
    spectrum = hift._stft(case["x"])
    assert relative_error(spectrum.real, case["real"]) <= 1e-5
    assert relative_error(spectrum.imag, case["imag"]) <= 1e-5


def test_the_training_pass_equals_inference_with_the_same_noise(hift):
    mel = random_mel(20, rows=2)
    torch.manual_seed(4)
    trained = hift({"speech_feat": mel.transpose(1, 2)}, torch.device("cpu"))
    torch.manual_seed(4)
    torch.testing.assert_close(trained.speech, hift.inference(mel).speech, rtol=0, atol=0)
    torch.testing.assert_close(trained.f0, hift.f0_predictor(mel), rtol=0, atol=0)


def test_speech_teaches_everything_but_f0_and_f0_teaches_its_predictor(hift):
    batch = {"speech_feat": random_mel(12).transpose(1, 2)}
    output = hift.train()(batch, torch.device("cpu"))
    output.speech.square().sum().backward(retain_graph=True)
    for name, parameter in hift.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached != name.startswith("f0_predictor."), name
    output.f0.sum().backward()
    assert all(parameter.grad is not None for parameter in hift.f0_predictor.parameters())


def test_magnitudes_that_overflow_give_finite_speech_and_gradients(hift):
    with torch.no_grad():
        hift.conv_post.bias[:9] = 200.0  # e^200 is infinite in float32
    output = hift({"speech_feat": random_mel(6).transpose(1, 2)}, torch.device("cpu"))
    assert torch.isfinite(output.speech).all()
    output.speech.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in hift.parameters() if p.grad is not None)


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("level", [-11.5129, 0.0])
def test_a_short_or_silent_mel_gives_finite_f0_and_speech(hift, frames, level):
    mel = torch.full((1, 80, frames), level)
    generated = hift.inference(mel)
    assert generated.speech.shape == (1, frames * 256)
    assert torch.isfinite(generated.speech).all()
    assert torch.isfinite(hift.f0_predictor(mel)).all()


def test_a_cached_source_begins_the_next_chunk(hift):
    first = hift.inference(random_mel(10))
    cached = first.source[:, :, -512:]
    second = hift.inference(random_mel(8), cache_source=cached)
    assert torch.equal(second.source[:, :, :512], cached)
    empty = torch.zeros(1, 1, 0)
    torch.manual_seed(0)
    with_empty_cache = hift.inference(random_mel(8), cache_source=empty)
    torch.manual_seed(0)
    assert torch.equal(with_empty_cache.speech, hift.inference(random_mel(8)).speech)


def test_overtones_start_at_random_phases_and_the_fundamental_at_zero(hift):
    generator = hift.m_source.l_sin_gen
    generator.noise_std = 0.0
    torch.manual_seed(0)
    waves = generator(torch.full((2, 1, 2205), 100.0)).waves
    expected = 0.1 * torch.sin(2 * torch.pi * 100.0 * torch.arange(1, 2206) / 22_050)
    torch.testing.assert_close(waves[:, 0], expected.expand(2, -1), rtol=0, atol=1e-4)
    assert (waves[0, 1:] - waves[1, 1:]).abs().amax(dim=-1).min() > 1e-3


def test_folding_the_weight_norms_changes_no_sample(hift):
    mel, source = random_mel(10), torch.randn(1, 1, 2560, generator=torch.Generator().manual_seed(0)) / 10
    with torch.no_grad():
        before = hift.decode(mel, source)
        hift.remove_weight_norm()
        torch.testing.assert_close(hift.decode(mel, source), before, rtol=0, atol=1e-7)
    assert not any("parametrizations" in key for key in hift.state_dict())


def test_a_model_built_on_the_meta_device_and_then_loaded_speaks_the_same(hift):
    with torch.device("meta"):
        loaded = build_hift("small").eval()
    loaded.load_state_dict(hift.state_dict(), assign=True)
    mel = random_mel(5)
    torch.manual_seed(0)
    expected = hift.inference(mel).speech
    torch.manual_seed(0)
    assert torch.equal(loaded.inference(mel).speech, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hift_stays_in_float32_under_autocast_and_refuses_16_bit_weights(hift, dtype):
    mel = random_mel(5)
    torch.manual_seed(0)
    expected = hift.inference(mel).speech
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=dtype):
        got = hift.inference(mel).speech
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match=r"\.float\(\)"):
        hift.to(dtype).inference(mel)


def test_bad_input_is_refused_by_name(hift):
    with pytest.raises(ValueError, match=r"F >= 1, got \(1, 80, 0\)"):
        hift.inference(torch.zeros(1, 80, 0))
    with pytest.raises(ValueError, match="cache_source has 600 samples, but this chunk has only 512"):
        hift.inference(random_mel(2), cache_source=torch.zeros(1, 1, 600))
    with pytest.raises(ValueError, match="24000"):
        HiFTGenerator(sampling_rate=24_000, f0_predictor=ConvRNNF0Predictor(cond_channels=8))
    with pytest.raises(ValueError, match="f0_predictor"):
        HiFTGenerator()
