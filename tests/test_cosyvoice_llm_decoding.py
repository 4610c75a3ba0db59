import json

import pytest
import torch
from torch import Tensor

from benchmarks import lm_decoding
from benchmarks.lm_models import ENCODER_OPTIONS, build_llm
from cosyvoice.transformer.decoding import POSITIONS_BLOCK_FRAMES
from cosyvoice.transformer.encoder import TransformerEncoder

TOLERANCE = 1e-5  # relative to the output's scale


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float(((got - expected).abs().max() / expected.abs().max()).detach())


@pytest.fixture
def llm(golden_dir) -> TransformerEncoder:
    weights = torch.load(golden_dir / "small_llm.pt", weights_only=True)
    encoder = build_llm("small").eval()
    encoder.load_state_dict(
        {key.removeprefix("llm."): value for key, value in weights.items() if key.startswith("llm.")}
    )
    return encoder


def full_pass(llm: TransformerEncoder, xs: Tensor) -> Tensor:
    """Hidden states of one row [L, D] by the forward over the whole of it."""
    return llm(xs.unsqueeze(0), torch.tensor([len(xs)]))[0][0].detach()


def test_steps_equal_the_reference(llm, golden_cases):
    case = golden_cases["llm_forward_chunk"]
    cache = llm.new_cache(1, 10)
    hidden = [llm.step(part, cache) for part in case["x"].split(case["splits"].tolist(), dim=1)]
    assert relative_error(torch.cat(hidden, dim=1), case["full_y"]) < TOLERANCE


@pytest.mark.parametrize("splits", [[12], [1] * 12, [5, 1, 1, 1, 4], [1, 10, 1]])
def test_steps_of_any_length_equal_the_full_forward(llm, splits):
    xs = torch.randn(3, 12, 32)
    cache = llm.new_cache(3, 12)
    hidden = torch.cat([llm.step(part, cache) for part in xs.split(splits, dim=1)], dim=1)
    expected, _ = llm(xs, torch.tensor([12, 12, 12]))
    assert relative_error(hidden, expected) < TOLERANCE


def test_rows_of_different_lengths_go_on_as_if_they_were_alone(llm):
    lengths, later = [4, 9, 1, 7], 6
    rows = [torch.randn(length + later, 32) for length in lengths]
    cache = llm.new_cache(4, 9 + later)
    prefixes = torch.nn.utils.rnn.pad_sequence([row[:-later] for row in rows], batch_first=True, padding_value=9.0)
    first = llm.step(prefixes, cache, lengths=torch.tensor(lengths))
    after = torch.stack([row[-later:] for row in rows])
    rest = [llm.step(part, cache) for part in after.split([1, 1, 1, 3], dim=1)]  # the last step has three frames
    rest = torch.cat(rest, dim=1)
    for row, length in enumerate(lengths):
        expected = full_pass(llm, rows[row])
        assert relative_error(first[row, :length], expected[:length]) < TOLERANCE
        assert relative_error(rest[row], expected[length:]) < TOLERANCE
        assert not first[row, length:].any()
    assert cache.lengths.tolist() == [length + later for length in lengths]


def test_a_batch_of_rows_equals_the_rows_one_by_one(llm):
    xs, lengths = torch.randn(3, 8, 32), torch.tensor([8, 3, 5])
    frame = torch.randn(3, 1, 32)
    cache = llm.new_cache(3, 9)
    llm.step(xs, cache, lengths=lengths)
    together = llm.step(frame, cache)
    for row, length in enumerate(lengths.tolist()):
        alone = llm.new_cache(1, length + 1)
        llm.step(xs[row : row + 1, :length], alone)
        assert relative_error(together[row : row + 1], llm.step(frame[row : row + 1], alone)) < TOLERANCE


def test_kept_rows_go_on_and_a_row_may_be_kept_twice(llm):
    xs, lengths, frame = torch.randn(3, 8, 32), torch.tensor([8, 3, 5]), torch.randn(3, 1, 32)
    cache = llm.new_cache(3, 10)
    llm.step(xs, cache, lengths=lengths)
    cache.keep_rows(torch.tensor([2, 2, 1]))
    assert cache.lengths.tolist() == [5, 5, 3]
    hidden = llm.step(frame, cache)
    for place, row in enumerate([2, 2, 1]):
        expected = full_pass(llm, torch.cat([xs[row, : lengths[row]], frame[place]]))
        assert relative_error(hidden[place], expected[-1:]) < TOLERANCE


def test_positions_are_projected_once_and_not_before_they_are_needed(llm):
    projected = []
    llm.encoders[1].self_attn.linear_pos.register_forward_hook(
        lambda module, inputs, output: projected.append(len(inputs[0]))
    )
    frames = 2 * POSITIONS_BLOCK_FRAMES + 60
    xs = torch.randn(1, frames, 32)
    cache = llm.new_cache(1, frames)
    hidden = [llm.step(xs[:, :50], cache)]
    assert projected == [POSITIONS_BLOCK_FRAMES]
    hidden += [llm.step(xs[:, index : index + 1], cache) for index in range(50, frames)]
    assert projected == [POSITIONS_BLOCK_FRAMES, POSITIONS_BLOCK_FRAMES, frames + 1 - 2 * POSITIONS_BLOCK_FRAMES]
    assert relative_error(torch.cat(hidden, dim=1)[0], full_pass(llm, xs[0])) < TOLERANCE


def test_a_prefix_longer_than_a_block_of_positions_equals_the_full_forward(llm):
    xs = torch.randn(1, POSITIONS_BLOCK_FRAMES + 20, 32)
    cache = llm.new_cache(1, 2 * POSITIONS_BLOCK_FRAMES)
    assert relative_error(llm.step(xs, cache)[0], full_pass(llm, xs[0])) < TOLERANCE


def test_a_cache_made_outside_of_inference_mode_serves_inside_and_the_reverse(llm):
    xs = torch.randn(2, 5, 32)
    expected, _ = llm(xs, torch.tensor([5, 5]))
    for first in (True, False):
        with torch.inference_mode(first):
            cache = llm.new_cache(2, 5)
            hidden = [llm.step(xs[:, :4], cache, lengths=torch.tensor([4, 4]))]
            cache.keep_rows(torch.tensor([0, 1]))
        with torch.inference_mode(not first):
            hidden.append(llm.step(xs[:, 4:], cache))
        assert relative_error(torch.cat(hidden, dim=1), expected.detach()) < TOLERANCE


def test_under_autocast_the_cache_has_its_dtype_and_the_result_stays_close(llm):
    xs, lengths = torch.randn(2, 7, 32), torch.tensor([7, 4])
    expected = llm.step(xs, llm.new_cache(2, 8), lengths=lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = llm.new_cache(2, 8)
        hidden = llm.step(xs, cache, lengths=lengths)
        llm.step(xs[:, :1], cache)
    assert cache.keys.dtype == torch.bfloat16
    assert relative_error(hidden.float(), expected) < 0.05


def test_half_precision_weights_get_a_cache_of_their_own_dtype(llm):
    xs = torch.randn(1, 6, 32)
    expected = full_pass(llm, xs[0])
    half = llm.to(torch.bfloat16)
    cache = half.new_cache(1, 6)
    hidden = torch.cat([half.step(part.to(torch.bfloat16), cache) for part in xs.split([5, 1], dim=1)], dim=1)
    assert hidden.dtype == torch.bfloat16
    assert relative_error(hidden[0].float(), expected) < 0.05


def test_a_refused_step_leaves_the_cache_as_it_was(llm):
    xs = torch.randn(1, 6, 32)
    cache = llm.new_cache(1, 6)
    llm.step(xs[:, :5], cache)
    with pytest.raises(ValueError, match="place for 6 frames and holds 5; 2 more do not fit"):
        llm.step(xs[:, :2], cache)
    assert relative_error(llm.step(xs[:, 5:], cache)[0], full_pass(llm, xs[0])[5:]) < TOLERANCE


def test_a_step_that_does_not_fit_the_cache_is_refused(llm):
    cache = llm.new_cache(2, 6)
    with pytest.raises(ValueError, match="holds 2 rows, got 3"):
        llm.step(torch.randn(3, 1, 32), cache)
    for lengths in ([0, 3], [4, 1], [3]):
        with pytest.raises(ValueError, match=r"lengths must be 2 numbers in 1 .. 3"):
            llm.step(torch.randn(2, 3, 32), cache, lengths=torch.tensor(lengths))
    llm.step(torch.randn(2, 3, 32), cache)
    with pytest.raises(ValueError, match="lengths belong to the first step"):
        llm.step(torch.randn(2, 3, 32), cache, lengths=torch.tensor([3, 3]))


def test_an_encoder_that_sees_later_frames_or_an_empty_cache_is_refused():
    full = TransformerEncoder(8, 8, input_layer="linear", **{**ENCODER_OPTIONS, "static_chunk_size": 0})
    with pytest.raises(ValueError, match="static_chunk_size=1"):
        full.new_cache(1, 5)
    with pytest.raises(ValueError, match="got 0 rows of 5"):
        build_llm("small").new_cache(0, 5)


def test_the_benchmark_finds_both_ways_equal_and_writes_what_it_measured(tmp_path, capsys):
    output = tmp_path / "speed.json"
    assert lm_decoding.main(["--size", "small", "--tokens", "5", "--batch-sizes", "2", "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert written["difference"] < TOLERANCE
    assert [row["batch_size"] for row in written["speeds"]] == [1, 1, 2]
    assert f"{written['ratio']:.2f}x" in capsys.readouterr().out
    assert lm_decoding.main(["--size", "tiny", "--output", str(output)]) == 2
