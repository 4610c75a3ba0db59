import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lm_models import ENCODER_OPTIONS, build_language_model, build_llm
from cosyvoice.llm.llm import TransformerLM
from cosyvoice.transformer.embedding import FIRST_REACH_FRAMES, EspnetRelPositionalEncoding
from cosyvoice.transformer.encoder import ConformerEncoder, TransformerEncoder
from cosyvoice.transformer.label_smoothing_loss import LabelSmoothingLoss
from cosyvoice.utils.common import IGNORE_ID

TOLERANCE = 1e-5  # relative to the output's scale


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float(((got - expected).abs().max() / expected.abs().max()).detach())


def greedy(log_prob: Tensor, decoded: list[int], sampling: int) -> int:
    return int(log_prob.argmax())


def causal_frames(frames: int) -> Tensor:
    return torch.ones(1, frames, frames, dtype=torch.bool).tril()


@pytest.fixture
def lm(golden_dir) -> TransformerLM:
    model = build_language_model("small").eval()
    model.load_state_dict(torch.load(golden_dir / "small_llm.pt", weights_only=True))
    return model


@pytest.fixture
def batch(golden_cases) -> dict[str, Tensor]:
    case = golden_cases["llm_loss"]
    return {key: value.clone() for key, value in case.items() if key not in ("loss", "acc")}


def write(lm: TransformerLM, case: dict[str, Tensor], **options) -> list[int]:
    """S3 tokens of a case; what it does not mention is empty."""
    nothing = torch.zeros(1, 0, dtype=torch.int64)
    prompt_text, prompt_speech = case.get("prompt_text", nothing), case.get("prompt_speech_token", nothing)
    return list(
        lm.inference(
            text=case["text"],
            text_len=torch.tensor([case["text"].size(1)], dtype=torch.int32),
            prompt_text=prompt_text,
            prompt_text_len=torch.tensor([prompt_text.size(1)], dtype=torch.int32),
            prompt_speech_token=prompt_speech,
            prompt_speech_token_len=torch.tensor([prompt_speech.size(1)], dtype=torch.int32),
            embedding=case.get("embedding", torch.zeros(0, 192)),
            **options,
        )
    )


# ---- parity with the reference outputs


def test_text_encoder_equals_the_reference(lm, golden_cases):
    case = golden_cases["text_encoder"]
    hidden, valid = lm.text_encoder(
        case["x"], case["x_len"], case["decoding_chunk_size"], case["num_decoding_left_chunks"]
    )
    assert relative_error(hidden, case["y"]) < TOLERANCE
    assert torch.equal(valid, case["mask"])


def test_llm_encoder_equals_the_reference(lm, golden_cases):
    case = golden_cases["llm_encoder"]
    hidden, valid = lm.llm(case["x"], case["x_len"])
    assert relative_error(hidden, case["y"]) < TOLERANCE
    assert torch.equal(valid, case["mask"])


def test_forward_chunk_equals_the_reference(lm, golden_cases):
    case = golden_cases["llm_forward_chunk"]
    offset, att_cache, cnn_cache, hidden = 0, torch.zeros(0, 0, 0, 0), torch.zeros(0, 0, 0, 0), []
    for chunk in case["x"].split(case["splits"].tolist(), dim=1):
        mask = causal_frames(chunk.size(1))
        out, att_cache, cnn_cache = lm.llm.forward_chunk(chunk, offset, -1, att_cache, cnn_cache, mask)
        offset += chunk.size(1)
        hidden.append(out)
    assert relative_error(torch.cat(hidden, dim=1), case["y"]) < TOLERANCE
    assert att_cache.shape == (3, 4, 10, 16)  # layers, heads, frames, keys beside values


def test_loss_and_accuracy_equal_the_reference(lm, golden_cases, batch):
    case = golden_cases["llm_loss"]
    result = lm(batch, "cpu")
    assert relative_error(result["loss"], case["loss"]) < TOLERANCE
    assert float(result["acc"]) == pytest.approx(float(case["acc"]), abs=1e-7)


@pytest.mark.parametrize("name", ["llm_greedy", "llm_greedy_prompted", "llm_greedy_no_speaker"])
def test_greedy_tokens_are_those_of_the_reference(lm, golden_cases, name):
    lm.sampling = greedy
    assert write(lm, golden_cases[name]) == golden_cases[name]["tokens"].tolist()


def test_the_released_size_has_the_published_keys_and_shapes(golden_dir):
    expected = json.loads((golden_dir / "cosyvoice_300m_state_dict_shapes.json").read_text())["llm"]
    with torch.device("meta"):
        model = build_language_model("300m")
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == 310_718_465


# ---- the sequence


def test_loss_of_a_batch_is_the_mean_over_the_targets_of_its_rows(lm, batch):
    together = lm(batch, "cpu")
    targets = batch["speech_token_len"] + 1  # the S3 tokens and the end
    alone = []
    for row in range(len(targets)):
        part = {key: value[row : row + 1] for key, value in batch.items()}
        part["text_token"] = part["text_token"][:, : part["text_token_len"]]
        part["speech_token"] = part["speech_token"][:, : part["speech_token_len"]]
        alone.append(lm(part, "cpu"))
    for name in ("loss", "acc"):
        expected = sum(result[name] * count for result, count in zip(alone, targets, strict=True)) / targets.sum()
        assert float(together[name].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_tokens_in_the_padding_change_nothing(lm, batch):
    expected = lm(batch, "cpu")["loss"]
    for name, length in (("text_token", "text_token_len"), ("speech_token", "speech_token_len")):
        for tokens, valid in zip(batch[name], batch[length], strict=True):
            tokens[valid:] = torch.randint(1, 60, (len(tokens) - int(valid),))
    assert torch.equal(lm(batch, "cpu")["loss"], expected)


def test_no_position_sees_its_own_target_and_the_task_position_predicts_the_first(lm, batch):
    scored = []
    lm.llm.register_forward_hook(lambda module, inputs, output: scored.append(output[0].detach()))
    row, changed = 1, 4
    lm(batch, "cpu")
    batch["speech_token"][row, changed] = (batch["speech_token"][row, changed] + 1) % lm.speech_token_size
    lm(batch, "cpu")
    moved = (scored[0][row] - scored[1][row]).abs().amax(dim=-1) > 0
    task = 2 + int(batch["text_token_len"][row])
    end = task + 1 + int(batch["speech_token_len"][row])
    assert not moved[: task + changed + 1].any()  # task + changed is the position whose target was changed
    assert moved[task + changed + 1 : end].all()


def test_the_loss_counts_the_s3_tokens_from_the_task_position_and_the_end(lm, batch):
    seen, states = [], []
    lm.criterion_ce.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    lm.llm.register_forward_hook(lambda module, inputs, output: states.append(output[0]))
    lm.llm_decoder.register_forward_hook(lambda module, inputs, output: states.append(inputs[0]))
    lm(batch, "cpu")
    wanted, positions = [], []
    for row in range(len(batch["text_token"])):
        text, speech = int(batch["text_token_len"][row]), int(batch["speech_token_len"][row])
        wanted += [*batch["speech_token"][row, :speech].tolist(), lm.eos_token]
        positions.append(states[0][row, 2 + text : 3 + text + speech])
    assert seen[0].tolist() == wanted
    assert torch.equal(states[1], torch.cat(positions))


# ---- writing tokens


@pytest.mark.parametrize("name", ["llm_greedy", "llm_greedy_prompted"])
def test_tokens_are_scored_while_writing_as_they_are_in_training(lm, golden_cases, name):
    case, scores, trained = golden_cases[name], [], []

    def recording(log_prob: Tensor, decoded: list[int], sampling: int) -> int:
        scores.append(log_prob.clone())
        return greedy(log_prob, decoded, sampling)

    lm.sampling = recording
    written = write(lm, case, min_token_text_ratio=0, max_token_text_ratio=3)
    nothing = torch.zeros(1, 0, dtype=torch.int64)
    text = torch.cat([case.get("prompt_text", nothing), case["text"]], dim=1)
    speech = torch.cat([case.get("prompt_speech_token", nothing), torch.tensor([written])], dim=1)
    lm.llm_decoder.register_forward_hook(lambda module, inputs, output: trained.append(output.detach()))
    lm(
        {
            "text_token": text,
            "text_token_len": torch.tensor([text.size(1)]),
            "speech_token": speech,
            "speech_token_len": torch.tensor([speech.size(1)]),
            "embedding": case["embedding"],
        },
        "cpu",
    )
    expected = trained[0].log_softmax(dim=-1)[-len(written) - 1 :]
    assert relative_error(torch.stack(scores), expected[: len(scores)]) < TOLERANCE


def test_the_end_is_forbidden_before_the_fewest_tokens_and_taken_after(lm, golden_cases):
    lm.sampling = lambda log_prob, decoded, sampling: 64 if math.isfinite(log_prob[64]) else 7
    assert write(lm, golden_cases["llm_greedy"]) == [7] * 16  # 8 text tokens, 2 for each
    assert write(lm, golden_cases["llm_greedy"], min_token_text_ratio=0) == []


def test_writing_stops_at_the_most_tokens(lm, golden_cases):
    lm.sampling = lambda log_prob, decoded, sampling: 7
    assert write(lm, golden_cases["llm_greedy"], max_token_text_ratio=2.5) == [7] * 20
    assert write(lm, golden_cases["llm_greedy"], max_token_text_ratio=0) == []


def test_the_limits_count_the_text_without_the_prompts(lm, golden_cases):
    lm.sampling = lambda log_prob, decoded, sampling: 7
    assert len(write(lm, golden_cases["llm_greedy_prompted"], max_token_text_ratio=3)) == 24


def test_the_sampler_gets_the_tokens_written_so_far(lm, golden_cases):
    seen = []

    def counting(log_prob: Tensor, decoded: list[int], sampling: int) -> int:
        seen.append((list(decoded), sampling))
        return len(decoded)

    lm.sampling = counting
    write(lm, golden_cases["llm_greedy"], max_token_text_ratio=0.5, sampling=9)
    assert seen == [([], 9), ([0], 9), ([0, 1], 9), ([0, 1, 2], 9)]


def test_writing_leaves_its_arguments_as_they_were(lm, golden_cases):
    text = golden_cases["llm_greedy"]["text"].clone()
    length, prompt = torch.tensor([8], dtype=torch.int32), golden_cases["llm_greedy_prompted"]["prompt_text"]
    none, nothing = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 0, dtype=torch.int64)
    five = torch.tensor([5], dtype=torch.int32)
    next(lm.inference(text, length, prompt, five, nothing, none, torch.zeros(0, 192)))
    assert length.tolist() == [8]
    assert torch.equal(text, golden_cases["llm_greedy"]["text"])


def test_training_goes_on_after_writing(lm, golden_cases, batch):
    write(lm, golden_cases["llm_greedy"], max_token_text_ratio=1)
    lm(batch, "cpu")["loss"].backward()
    assert all(parameter.grad is not None for parameter in lm.parameters())


# ---- encoders


def test_a_full_context_encoder_ignores_padding():
    options = {**ENCODER_OPTIONS, "static_chunk_size": 0, "macaron_style": False, "use_cnn_module": False}
    encoder = ConformerEncoder(input_size=6, output_size=8, num_blocks=2, input_layer="linear", **options).eval()
    xs = torch.randn(2, 9, 6)
    alone, _ = encoder(xs[1:, :5], torch.tensor([5]))
    together, valid = encoder(xs, torch.tensor([9, 5]))
    assert relative_error(together[1:, :5], alone) < TOLERANCE
    assert valid[1, 0].tolist() == [True] * 5 + [False] * 4


def test_a_full_context_encoder_sees_what_comes_later_and_a_causal_one_does_not():
    for chunk, sees_later in ((0, True), (1, False)):
        encoder = TransformerEncoder(6, 8, input_layer="linear", **{**ENCODER_OPTIONS, "static_chunk_size": chunk})
        xs = torch.randn(1, 7, 6)
        before, _ = encoder.eval()(xs, torch.tensor([7]))
        xs[0, 4] += 1
        after, _ = encoder(xs, torch.tensor([7]))
        changed = (before - after).abs().amax(dim=-1)[0] > 0
        assert changed.tolist() == [sees_later] * 4 + [True] * 3


def test_an_empty_row_gives_no_nan(lm):
    hidden, valid = lm.llm(torch.randn(2, 5, 32), torch.tensor([5, 0]))
    assert hidden.isfinite().all()
    assert not valid[1].any()


def test_a_sequence_of_one_frame_is_encoded_as_the_first_of_a_longer_one(lm):
    xs = torch.randn(1, 2, 32)
    one, _ = lm.llm(xs[:, :1], torch.tensor([1]))
    two, _ = lm.llm(xs, torch.tensor([2]))
    assert relative_error(one, two[:, :1]) < TOLERANCE


def test_distances_beyond_the_first_table_continue_the_same_sinusoids():
    encoding = EspnetRelPositionalEncoding(6, 0.0)
    like = torch.zeros(())
    near = encoding.distances(3, -2, like)
    far = encoding.distances(FIRST_REACH_FRAMES + 100, -2, like)
    assert torch.equal(far[-6:], near)
    angle = torch.tensor(-2.0) / 10_000 ** (torch.arange(3) * 2 / 6)
    assert torch.allclose(near[-1], torch.stack([angle.sin(), angle.cos()], dim=-1).flatten())


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        options = {**ENCODER_OPTIONS, "input_layer": "linear", "gradient_checkpointing": checkpointing}
        encoder = TransformerEncoder(6, 8, num_blocks=2, **options).train()
        hidden, _ = encoder(torch.randn(2, 5, 6), torch.tensor([5, 3]))
        hidden.square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in encoder.parameters()]))
    assert torch.equal(*gradients)


def test_unsupported_options_are_refused_all_at_once():
    with pytest.raises(ValueError, match=r"ConformerEncoder: .*conv2d.*rel_pos'.*macaron_style.*use_cnn_module"):
        ConformerEncoder(8)
    for option, value in (
        ("input_layer", "conv2d"),
        ("pos_enc_layer_type", "abs_pos"),
        ("selfattention_layer_type", "selfattn"),
        ("activation_type", "gelu"),
        ("normalize_before", False),
        ("static_chunk_size", 4),
        ("use_dynamic_chunk", True),
        ("use_dynamic_left_chunk", True),
        ("global_cmvn", torch.nn.Identity()),
        ("key_bias", False),
    ):
        with pytest.raises(ValueError, match=rf"{option}=.*supported"):
            TransformerEncoder(8, **{**ENCODER_OPTIONS, "input_layer": "linear", option: value})


def test_a_width_that_the_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match="10 cannot be split among 4"):
        TransformerEncoder(8, 10, input_layer="linear", **ENCODER_OPTIONS)


def test_layer_norm_eps_reaches_the_layers_and_nothing_else():
    encoder = TransformerEncoder(8, 8, input_layer="linear", **ENCODER_OPTIONS)
    eps = {name: module.eps for name, module in encoder.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    assert {name for name, value in eps.items() if value == 1e-12} == {
        f"encoders.{layer}.norm{part}" for layer in range(6) for part in (1, 2)
    }
    assert eps["embed.out.1"] == eps["after_norm"] == 1e-5
    other = TransformerEncoder(8, 8, input_layer="linear", layer_norm_eps=1e-5, **ENCODER_OPTIONS)
    assert other.encoders[0].norm1.eps == 1e-5


# ---- forward_chunk


def test_chunks_of_several_frames_equal_the_full_forward(lm):
    xs = torch.randn(1, 9, 32)
    full, _ = lm.llm(xs, torch.tensor([9]))
    offset, att_cache, hidden = 0, None, []
    for chunk in xs.split([4, 3, 2], dim=1):
        seen = offset + chunk.size(1)
        mask = causal_frames(seen)[:, offset:]
        out, att_cache, _ = lm.llm.forward_chunk(chunk, offset, -1, att_cache, None, mask)
        hidden.append(out)
        offset = seen
    assert relative_error(torch.cat(hidden, dim=1), full) < TOLERANCE


def test_single_frames_at_offset_0_see_every_key_at_distance_0(lm):
    _, att_cache, _ = lm.llm.forward_chunk(torch.randn(1, 5, 32), 0, -1)
    frame = torch.randn(1, 1, 32)
    shuffled = att_cache[:, :, torch.randperm(5)]
    expected, _, _ = lm.llm.forward_chunk(frame, 0, -1, att_cache)
    got, _, _ = lm.llm.forward_chunk(frame, 0, -1, shuffled)
    assert relative_error(got, expected) < TOLERANCE
    placed, _, _ = lm.llm.forward_chunk(frame, 5, -1, att_cache)
    assert relative_error(placed, expected) > 1e-3


def test_forward_chunk_keeps_as_much_cache_as_asked(lm):
    xs = torch.randn(1, 6, 32)
    whole = lm.llm.forward_chunk(xs, 0, -1)[1]
    for size, frames in ((0, 0), (2, 2), (6, 6), (9, 6)):
        assert torch.equal(lm.llm.forward_chunk(xs, 0, size)[1], whole[:, :, 6 - frames :])


def test_forward_chunk_refuses_several_rows_and_an_offset_that_is_not_the_caches():
    llm = build_llm("small")
    with pytest.raises(ValueError, match="one sequence, got 2"):
        llm.forward_chunk(torch.randn(2, 3, 32), 0, -1)
    _, att_cache, _ = llm.forward_chunk(torch.randn(1, 3, 32), 0, -1)
    with pytest.raises(ValueError, match="offset 4 does not match the 3 frames"):
        llm.forward_chunk(torch.randn(1, 1, 32), 4, -1, att_cache)


# ---- the loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("normalize_length", [True, False])
def test_the_loss_is_the_divergence_from_the_smoothed_targets(smoothing, normalize_length):
    logits, target = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    target[1, 3:] = IGNORE_ID
    smoothed = torch.full((2, 5, 7), smoothing / 6).scatter(-1, target.clamp_min(0).unsqueeze(-1), 1 - smoothing)
    divergence = F.kl_div(logits.log_softmax(-1), smoothed, reduction="none")[target != IGNORE_ID].sum()
    loss = LabelSmoothingLoss(7, IGNORE_ID, smoothing, normalize_length)(logits, target)
    counted = target != IGNORE_ID
    alone = LabelSmoothingLoss(7, IGNORE_ID, smoothing, normalize_length)(logits[counted], target[counted], batch=2)
    torch.testing.assert_close(alone, loss)
    assert float(loss) == pytest.approx(float(divergence) / (8 if normalize_length else 2), rel=1e-5)


def test_the_loss_refuses_another_number_of_classes_and_a_smoothing_out_of_range():
    with pytest.raises(ValueError, match="7 classes, got logits for 6"):
        LabelSmoothingLoss(7, IGNORE_ID, 0.0)(torch.zeros(1, 2, 6), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1.0"):
        LabelSmoothingLoss(7, IGNORE_ID, 1.0)


def test_importing_the_language_model_imports_no_other_models_library():
    folder = Path(__file__).parents[1] / "CosyVoice"
    code = "import sys, cosyvoice.llm.llm; print(sorted({'transformers', 'onnxruntime', 'whisper'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
