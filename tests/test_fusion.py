import pytest
import torch

from taste.fusion import Concat, Sum, WeightedSum, build_fusion

LENGTHS = torch.tensor([4, 2])
OTHER_LENGTHS = torch.tensor([1, 3])


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def audio() -> torch.Tensor:
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))


def test_balance_starts_from_the_mean_of_both(text, audio):
    fused = WeightedSum("balance")(text, LENGTHS, audio, LENGTHS)
    torch.testing.assert_close(fused.vectors, (text + audio) / 2)
    assert fused.lengths is LENGTHS


def test_zero_audio_starts_close_to_the_text_alone(text, audio):
    fused = WeightedSum("zero_audio")(text, LENGTHS, audio, LENGTHS).vectors
    share = torch.sigmoid(torch.tensor(-4.0))
    torch.testing.assert_close(fused, text + share * (audio - text))


def test_the_weights_learn(text, audio):
    fusion = WeightedSum()
    fusion(text, LENGTHS, audio, LENGTHS).vectors.sum().backward()
    assert fusion.weights.grad.abs().min() > 0


def test_normalize_brings_vectors_of_any_size_together(text, audio):
    fusion = WeightedSum(normalize=True)
    expected = fusion(text, LENGTHS, audio, LENGTHS).vectors
    torch.testing.assert_close(fusion(100 * text, LENGTHS, audio + 7, LENGTHS).vectors, expected, rtol=1e-4, atol=1e-4)


def test_sum_adds(text, audio):
    torch.testing.assert_close(Sum()(text, LENGTHS, audio, LENGTHS).vectors, text + audio)


@pytest.mark.parametrize("audio_first", [True, False])
def test_concat_joins_rows_before_their_padding(text, audio, audio_first):
    fused = Concat(audio_first)(text, LENGTHS, audio, OTHER_LENGTHS)
    assert fused.lengths.tolist() == [5, 5]
    for row, (texts, sounds) in enumerate(zip(LENGTHS.tolist(), OTHER_LENGTHS.tolist(), strict=True)):
        parts = [audio[row, :sounds], text[row, :texts]]
        expected = torch.cat(parts if audio_first else parts[::-1])
        torch.testing.assert_close(fused.vectors[row, : len(expected)], expected, rtol=0, atol=0)


def test_a_separator_stands_between_the_two(text, audio):
    fusion = build_fusion("concat_with_sep", width=6)
    fused = fusion(text, LENGTHS, audio, OTHER_LENGTHS)
    assert fused.lengths.tolist() == [6, 6]
    torch.testing.assert_close(fused.vectors[0, 1], fusion.sep_embed[0])
    torch.testing.assert_close(fused.vectors[1, 3], fusion.sep_embed[0])


@pytest.mark.parametrize("name", ["weighted_sum", "sum"])
def test_sequences_of_different_lengths_are_not_added(text, audio, name):
    with pytest.raises(ValueError, match=r"lengths \[4, 2\].* lengths \[1, 3\]"):
        build_fusion(name, width=6)(text, LENGTHS, audio, OTHER_LENGTHS)


def test_an_unknown_fusion_is_refused():
    with pytest.raises(ValueError, match="'product'; expected one of weighted_sum, sum, concat"):
        build_fusion("product", width=6)
    with pytest.raises(ValueError, match="balance, zero_audio; got 'half'"):
        WeightedSum("half")
