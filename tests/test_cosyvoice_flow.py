import json
import random

import pytest
import torch

from benchmarks.flow_hift import solve_with_two_calls
from benchmarks.flow_hift_models import CFM_PARAMS, build_flow
from cosyvoice.flow.decoder import ConditionalDecoder
from cosyvoice.flow.flow import MaskedDiffWithXvec
from cosyvoice.flow.flow_matching import ConditionalCFM
from cosyvoice.flow.length_regulator import mel_frames_of_tokens


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.fixture()
def flow(golden_dir) -> MaskedDiffWithXvec:
    model = build_flow("small").eval()
    model.load_state_dict(torch.load(golden_dir / "small_flow.pt", weights_only=True))
    return model


def generate(flow: MaskedDiffWithXvec, case: dict, flow_cache: torch.Tensor | None = None):
    return flow.inference(
        token=case["token"],
        token_len=torch.tensor([case["token"].size(1)]),
        prompt_token=case["prompt_token"],
        prompt_token_len=torch.tensor([case["prompt_token"].size(1)]),
        prompt_feat=case["prompt_feat"],
        prompt_feat_len=torch.tensor([case["prompt_feat"].size(1)]),
        embedding=case["embedding"],
        flow_cache=flow_cache,
    )


def training_batch(golden_cases) -> dict[str, torch.Tensor]:
    case = golden_cases["flow_loss"]
    return {key: value.clone() for key, value in case.items() if key not in ("seed", "loss")}


def seeded_loss(flow: MaskedDiffWithXvec, batch: dict[str, torch.Tensor], seed: int = 5) -> torch.Tensor:
    random.seed(seed)
    torch.manual_seed(seed)
    return flow(batch, torch.device("cpu"))["loss"]


def test_the_released_size_has_the_published_keys_and_shapes(golden_dir):
    expected = json.loads((golden_dir / "cosyvoice_300m_state_dict_shapes.json").read_text())["flow"]
    with torch.device("meta"):
        model = build_flow("300m")
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == 104_874_752


@pytest.mark.parametrize("name", ["flow_short", "flow_long", "flow_prompted"])
def test_generated_mel_and_cache_equal_the_reference(flow, golden_cases, name):
    case = golden_cases[name]
    torch.manual_seed(case["seed"])
    generated = generate(flow, case)
    assert relative_error(generated.mel, case["mel"]) <= 1e-5
    assert relative_error(generated.flow_cache, case["flow_cache"]) <= 1e-5


@torch.no_grad()
def test_the_estimator_equals_the_reference(flow, golden_cases):
    case = golden_cases["flow_estimator"]
    velocity = flow.decoder.estimator(*(case[key] for key in ("x", "mask", "mu", "t", "spks", "cond")))
    assert relative_error(velocity, case["y"]) <= 1e-5


@torch.no_grad()
def test_the_length_regulator_equals_the_reference(flow, golden_cases):
    case = golden_cases["length_regulator"]
    regulated = flow.length_regulator(case["x"], case["y_len"])
    assert relative_error(regulated.frames, case["y"]) <= 1e-5
    assert torch.equal(regulated.mel_lengths, case["y_len"])


@torch.no_grad()
def test_the_length_regulator_with_a_prompt_equals_the_reference(flow, golden_cases):
    case = golden_cases["length_regulator_inference"]
    regulated = flow.length_regulator.inference(case["x1"], case["x2"], case["mel_len1"], case["mel_len2"])
    assert relative_error(regulated.frames, case["y"]) <= 1e-5
    assert regulated.mel_length == case["mel_len1"] + case["mel_len2"]


def test_the_training_loss_equals_the_reference(flow, golden_cases):
    case = golden_cases["flow_loss"]
    loss = seeded_loss(flow, training_batch(golden_cases), case["seed"])
    assert relative_error(loss.detach(), case["loss"]) <= 1e-5


def test_the_loss_does_not_depend_on_what_stands_in_the_padding(flow, golden_cases):
    batch = training_batch(golden_cases)
    expected = seeded_loss(flow, batch)
    row = int(batch["speech_feat_len"].argmin())
    assert batch["speech_feat_len"][row] < batch["speech_feat"].size(1)
    batch["speech_feat"][row, batch["speech_feat_len"][row] :] = 50.0
    batch["speech_token"][row, batch["speech_token_len"][row] :] = -1
    torch.testing.assert_close(seeded_loss(flow, batch), expected)


def test_every_parameter_learns_from_the_loss(flow, golden_cases):
    seeded_loss(flow.train(), training_batch(golden_cases)).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(("tokens", "frames"), [(1, 1), (20, 34), (50, 86), (75, 129), (1500, 2583)])
def test_tokens_last_as_many_mel_frames_as_published(tokens, frames):
    assert mel_frames_of_tokens(tokens, 50) == frames == int(tokens / 50 * 22050 / 256)


@pytest.mark.parametrize("tokens", [1, 2, 40, 41, 42])
def test_speech_of_any_length_has_its_number_of_frames_and_no_nan(flow, golden_cases, tokens):
    case = golden_cases["flow_prompted"]
    generated = generate(flow, case | {"token": torch.arange(tokens).remainder(64).unsqueeze(0)})
    assert generated.mel.shape == (1, 80, mel_frames_of_tokens(tokens, 50))
    assert torch.isfinite(generated.mel).all()


def test_a_chunk_that_the_cache_covers_does_not_depend_on_new_noise(flow, golden_cases):
    case = golden_cases["flow_prompted"] | {"token": golden_cases["flow_prompted"]["token"][:, -20:]}
    cache = generate(flow, golden_cases["flow_prompted"]).flow_cache
    assert cache.size(2) == case["prompt_feat"].size(1) + 34
    torch.manual_seed(1)
    first = generate(flow, case, cache)
    torch.manual_seed(2)
    second = generate(flow, case, cache)
    assert torch.equal(first.mel, second.mel)
    assert torch.equal(first.flow_cache, cache)


def test_inference_leaves_its_inputs_as_they_were(flow, golden_cases):
    case = golden_cases["flow_prompted"]
    before = {key: value.clone() for key, value in case.items() if isinstance(value, torch.Tensor)}
    cache = generate(flow, case).flow_cache
    kept = cache.clone()
    generate(flow, case, cache)
    assert torch.equal(cache, kept)
    assert all(torch.equal(case[key], value) for key, value in before.items())


def test_guided_and_unguided_rows_in_one_call_equal_two_calls(flow):
    draw = torch.Generator().manual_seed(0)
    noise, mu, cond = (torch.randn(2, 80, 21, generator=draw) for _ in range(3))
    spks = torch.randn(2, 80, generator=draw)
    mask = torch.ones(2, 1, 21)
    times = 1 - torch.cos(torch.linspace(0, 1, 11) * 0.5 * torch.pi)
    with torch.no_grad():
        together = flow.decoder.solve_euler(noise, times, mu, mask, spks, cond)
    for row in range(2):
        one = slice(row, row + 1)
        apart = solve_with_two_calls(flow.decoder, noise[one], mu[one], mask[one], spks[one], cond[one])
        torch.testing.assert_close(together[one], apart, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_flow_stays_in_float32_under_autocast_and_refuses_16_bit_weights(flow, golden_cases, dtype):
    case = golden_cases["flow_short"]
    torch.manual_seed(case["seed"])
    with torch.autocast("cpu", dtype=dtype):
        generated = generate(flow, case)
        loss = seeded_loss(flow, training_batch(golden_cases))
    assert relative_error(generated.mel, case["mel"]) <= 1e-5
    assert torch.equal(loss, seeded_loss(flow, training_batch(golden_cases)))
    with pytest.raises(ValueError, match=r"\.float\(\)"):
        generate(flow.to(dtype), case)


def test_bad_input_is_refused_by_name(flow, golden_cases):
    case = golden_cases["flow_short"]
    with pytest.raises(ValueError, match=r"S >= 1, got \(1, 0\)"):
        generate(flow, case | {"token": case["token"][:, :0]})
    with pytest.raises(ValueError, match=r"\[1, S\].*got \(2, 30\)"):
        generate(flow, case | {"token": case["token"].expand(2, -1)})
    with pytest.raises(ValueError, match="covers 60 mel frames, but this chunk has only 51"):
        generate(flow, case, torch.zeros(1, 80, 60, 2))


def test_a_configuration_that_is_not_implemented_is_refused_by_name(flow):
    estimator = flow.decoder.estimator
    with pytest.raises(ValueError, match="'midpoint'"):
        ConditionalCFM(240, CFM_PARAMS | {"solver": "midpoint"}, estimator=estimator)
    with pytest.raises(ValueError, match="'sigmoid'"):
        ConditionalCFM(240, CFM_PARAMS | {"t_scheduler": "sigmoid"}, estimator=estimator)
    with pytest.raises(ValueError, match="estimator"):
        ConditionalCFM(240, CFM_PARAMS)
    with pytest.raises(ValueError, match="'snake'"):
        ConditionalDecoder(320, 80, act_fn="snake")
    with pytest.raises(ValueError, match="no encoder, decoder"):
        MaskedDiffWithXvec(length_regulator=flow.length_regulator)
