import pytest
import torch

from taste.aggregator import SimpleTextSpeechAggregator

TEXT_WIDTH, SPEECH_WIDTH = 6, 10


@pytest.fixture
def aggregator() -> SimpleTextSpeechAggregator:
    torch.manual_seed(0)
    return SimpleTextSpeechAggregator(TEXT_WIDTH, SPEECH_WIDTH)


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "text": torch.randn(3, 4, TEXT_WIDTH, generator=generator),
        "final": torch.randn(3, 9, SPEECH_WIDTH, generator=generator),
        "mid": torch.randn(3, 9, SPEECH_WIDTH, generator=generator),
        "speech_lengths": torch.tensor([9, 5, 1]),
    }


def test_the_result_has_the_width_of_the_text(aggregator, inputs):
    assert aggregator(**inputs).shape == (3, 4, TEXT_WIDTH)


def test_frames_behind_the_end_of_a_recording_are_never_looked_at(aggregator, inputs):
    expected = aggregator(**inputs)
    padding = torch.arange(9)[None, :, None] >= inputs["speech_lengths"][:, None, None]
    changed = {name: inputs[name].masked_fill(padding, 1e4) for name in ("final", "mid")}
    torch.testing.assert_close(aggregator(**inputs | changed), expected, rtol=0, atol=0)


def test_batch_of_rows_equals_rows_one_by_one(aggregator, inputs):
    together = aggregator(**inputs)
    for row, length in enumerate(inputs["speech_lengths"].tolist()):
        alone = aggregator(
            inputs["text"][[row]],
            inputs["final"][[row], :length],
            inputs["mid"][[row], :length],
            torch.tensor([length]),
        )
        torch.testing.assert_close(together[[row]], alone, rtol=1e-5, atol=1e-6)


def test_keys_are_the_final_layer_and_values_the_middle_one(aggregator, inputs):
    # over a single frame attention is 1 whatever the key: the result is a function of the middle layer alone
    one_frame = inputs | {"speech_lengths": torch.ones(3, dtype=torch.int64)}
    expected = aggregator(**one_frame)
    torch.testing.assert_close(aggregator(**one_frame | {"final": torch.randn(3, 9, SPEECH_WIDTH)}), expected)
    assert not torch.allclose(aggregator(**one_frame | {"mid": torch.randn(3, 9, SPEECH_WIDTH)}), expected)
    # over several frames it depends on the keys
    assert not torch.allclose(aggregator(**inputs | {"final": -inputs["final"]})[0], aggregator(**inputs)[0])


def test_a_token_finds_the_frame_whose_key_matches_it():
    aggregator = SimpleTextSpeechAggregator(TEXT_WIDTH, TEXT_WIDTH)
    for projection in (aggregator.query, aggregator.key, aggregator.value, aggregator.output):
        torch.nn.init.eye_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    directions = torch.eye(TEXT_WIDTH)[None]
    order = torch.tensor([3, 0, 5, 1])
    values = torch.randn(1, TEXT_WIDTH, TEXT_WIDTH)
    found = aggregator(100 * directions[:, order], directions, values, torch.tensor([TEXT_WIDTH]))
    torch.testing.assert_close(found, values[:, order])


def test_the_weights_shown_are_the_weights_used(aggregator, inputs):
    weights = aggregator.attention(inputs["text"], inputs["final"], inputs["speech_lengths"])
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 4))
    padding = torch.arange(9)[None, :] >= inputs["speech_lengths"][:, None]
    assert not weights.masked_select(padding[:, None, :]).any()
    torch.testing.assert_close(aggregator.output(weights @ aggregator.value(inputs["mid"])), aggregator(**inputs))


def test_weights_over_features_of_another_whisper_are_refused(aggregator, inputs):
    with pytest.raises(ValueError, match="final Whisper features are 11 wide"):
        aggregator.attention(inputs["text"], torch.zeros(3, 9, 11), inputs["speech_lengths"])


@pytest.mark.parametrize("layer", ["mid", "final"])
def test_features_of_another_whisper_are_refused(aggregator, inputs, layer):
    with pytest.raises(ValueError, match=f"{layer} Whisper features are 11 wide.* 10"):
        aggregator(**inputs | {layer: torch.zeros(3, 9, 11)})
