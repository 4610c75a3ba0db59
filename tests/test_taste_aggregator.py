import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_whisper import WIDTH as WHISPER_WIDTH
from small_whisper import write_small_whisper
from whisper.tokenizer import get_tokenizer

from taste.taste_aggregator import WHISPER_PREFIX, TasteAggregator, start_from_whisper

TEXT_WIDTH, SPEECH_WIDTH, VOCABULARY = 6, 8, 40
PREFIX = (36, 37, 38)


def aggregator(**options) -> TasteAggregator:
    torch.manual_seed(0)
    return TasteAggregator(TEXT_WIDTH, SPEECH_WIDTH, **{"heads": 2, "max_positions": 16} | options)


@pytest.fixture(params=["embeddings", "tokens"])
def either(request) -> TasteAggregator:
    """An aggregator that reads the text as embeddings, and one that reads its tokens."""
    own = {} if request.param == "embeddings" else {"vocabulary": VOCABULARY, "prefix_tokens": PREFIX}
    return aggregator(**own)


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "text": torch.randn(3, 5, TEXT_WIDTH, generator=generator),
        "final": torch.randn(3, 9, SPEECH_WIDTH, generator=generator),
        "mid": torch.randn(3, 9, SPEECH_WIDTH, generator=generator),
        "text_lengths": torch.tensor([5, 3, 1]),
        "speech_lengths": torch.tensor([9, 6, 1]),
        "text_tokens": torch.randint(0, 30, (3, 5), generator=generator),
    }


def silence(inputs: dict[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
    padding = torch.arange(9)[None, :, None] >= inputs["speech_lengths"][:, None, None]
    return inputs | {name: inputs[name].masked_fill(padding, value) for name in ("final", "mid")}


def test_the_result_has_the_width_of_the_speech(either, inputs):
    assert either(**inputs).shape == (3, 5, SPEECH_WIDTH)


def test_frames_behind_the_end_of_a_recording_are_never_looked_at(either, inputs):
    torch.testing.assert_close(either(**silence(inputs, 1e4)), either(**inputs), rtol=0, atol=0)


def test_padded_silence_is_looked_at_where_the_published_behaviour_is_wanted(inputs):
    published = aggregator(mask_padding=False)
    assert not torch.allclose(published(**silence(inputs, 3.0))[1], published(**inputs)[1])
    torch.testing.assert_close(published(**silence(inputs, 3.0))[0], published(**inputs)[0])


def test_a_recording_without_frames_gives_numbers(either, inputs):
    nothing = silence(inputs | {"speech_lengths": torch.tensor([9, 6, 0])}, 0.0)
    assert either(**nothing).isfinite().all()
    assert either.attention(**nothing).isfinite().all()


def test_batch_of_rows_equals_rows_one_by_one(either, inputs):
    together = either(**inputs)
    for row, (tokens, frames) in enumerate(
        zip(inputs["text_lengths"].tolist(), inputs["speech_lengths"].tolist(), strict=True)
    ):
        alone = {name: value[[row]] for name, value in inputs.items()}
        alone |= {name: alone[name][:, :frames] for name in ("final", "mid")}
        alone |= {name: alone[name][:, :tokens] for name in ("text", "text_tokens")}
        torch.testing.assert_close(together[[row], :tokens], either(**alone), rtol=1e-5, atol=1e-5)


def test_a_token_does_not_depend_on_later_ones(either, inputs):
    changed = inputs | {"text": inputs["text"].clone(), "text_tokens": inputs["text_tokens"].clone()}
    changed["text"][:, 3:] += 1.0
    changed["text_tokens"][:, 3:] = 35
    before, after = either(**inputs), either(**changed)
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_the_prefix_moves_the_text_to_later_positions_and_is_dropped(inputs):
    with_prefix = aggregator(vocabulary=VOCABULARY, prefix_tokens=PREFIX)
    without = aggregator(vocabulary=VOCABULARY, prefix_tokens=())
    without.load_state_dict(with_prefix.state_dict())
    written_out = torch.cat([torch.tensor(PREFIX).expand(3, -1), inputs["text_tokens"]], dim=1)
    everything = without(**inputs | {"text_tokens": written_out})
    torch.testing.assert_close(everything[:, len(PREFIX) :], with_prefix(**inputs))


def test_keys_are_the_final_layer_and_values_the_middle_one(either, inputs):
    # over a single frame attention is 1 whatever the key: the result is a function of the middle layer alone
    one_frame = inputs | {"speech_lengths": torch.ones(3, dtype=torch.int64)}
    expected = either(**one_frame)
    torch.testing.assert_close(either(**one_frame | {"final": torch.randn(3, 9, SPEECH_WIDTH)}), expected)
    assert not torch.allclose(either(**one_frame | {"mid": torch.randn(3, 9, SPEECH_WIDTH)}), expected)
    assert not torch.allclose(either(**inputs | {"final": -inputs["final"]})[0], either(**inputs)[0])


def test_values_start_unchanged(inputs):
    values = aggregator().layers[0].encoder_attn.v_proj(inputs["mid"])
    torch.testing.assert_close(values, inputs["mid"], rtol=0, atol=0)
    values = aggregator(identity_values=False).layers[0].encoder_attn.v_proj(inputs["mid"])
    assert not torch.allclose(values, inputs["mid"])


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_the_weights_shown_are_the_weights_used(either, inputs, layer):
    seen = []
    attention = either.layers[layer].encoder_attn
    attention.register_forward_hook(lambda module, given, output: seen.append((given, output)))
    either(**inputs)
    (looking, _, mid, _), output = seen[0]
    by_head = either.attention(**inputs, layer=layer, by_head=True)
    values = attention.v_proj(mid).unflatten(-1, (2, -1)).transpose(1, 2)
    mixed = attention.out_proj((by_head @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed, output[:, looking.shape[1] - 5 :], rtol=1e-5, atol=1e-5)
    shown = either.attention(**inputs, layer=layer)
    torch.testing.assert_close(shown, by_head.mean(dim=1))
    torch.testing.assert_close(shown.sum(dim=-1), torch.ones(3, 5))
    padding = torch.arange(9)[None, :] >= inputs["speech_lengths"][:, None]
    assert not shown.masked_select(padding[:, None, :]).any()


def test_every_weight_learns(either, inputs):
    either(**inputs).square().sum().backward()
    without = [name for name, weight in either.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []


@pytest.mark.parametrize("layer", ["mid", "final"])
def test_features_of_another_whisper_are_refused(either, inputs, layer):
    with pytest.raises(ValueError, match=f"{layer} Whisper features are 11 wide.* 8"):
        either(**inputs | {layer: torch.zeros(3, 9, 11)})


def test_a_text_longer_than_the_positions_is_refused(either, inputs):
    long = {"text": torch.zeros(3, 17, TEXT_WIDTH), "text_tokens": torch.zeros(3, 17, dtype=torch.int64)}
    with pytest.raises(ValueError, match="the aggregator has 16 positions"):
        either(**inputs | long)


def test_a_missing_text_is_refused(inputs):
    with pytest.raises(ValueError, match="6 wide, got none"):
        aggregator()(**inputs | {"text": None})
    with pytest.raises(ValueError, match="needs text_tokens"):
        aggregator(vocabulary=VOCABULARY)(**inputs | {"text_tokens": None})


def test_the_prefix_is_the_one_that_whisper_itself_writes_behind():
    tokenizer = get_tokenizer(multilingual=True, num_languages=100, language="en", task="transcribe")
    assert WHISPER_PREFIX == tokenizer.sot_sequence_including_notimestamps


def small_whisper(folder, layers: int):
    """A Whisper of 50 tokens with a decoder of as many layers, all different."""
    write_small_whisper(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"decoder_layers": layers}))
    weights = load_file(folder / "model.safetensors")
    first = {name: value for name, value in weights.items() if name.startswith("model.decoder.layers.0.")}
    for layer in range(layers):
        for name, value in first.items():
            weights[name.replace("layers.0.", f"layers.{layer}.")] = value + layer
    save_file(weights, folder / "model.safetensors")
    return folder, weights


def test_whispers_decoder_is_copied_but_for_the_values(tmp_path):
    folder, weights = small_whisper(tmp_path / "whisper", layers=2)
    model = TasteAggregator(5, WHISPER_WIDTH, heads=2, feed_forward=64, max_positions=8)
    before = model.text_proj.weight.clone()
    copied = start_from_whisper(model, folder)
    own = model.state_dict()
    assert set(own) - set(copied) == {"text_proj.weight", "text_proj.bias"}
    torch.testing.assert_close(model.text_proj.weight, before, rtol=0, atol=0)
    for name in copied:
        if "encoder_attn.v_proj" not in name:
            torch.testing.assert_close(own[name], weights[f"model.decoder.{name}"], msg=name)
    torch.testing.assert_close(model.layers[1].encoder_attn.v_proj.weight, torch.eye(WHISPER_WIDTH))


def test_layers_at_even_distances_are_taken_from_a_deeper_decoder(tmp_path):
    folder, weights = small_whisper(tmp_path / "whisper", layers=5)
    model = TasteAggregator(5, WHISPER_WIDTH, layers=3, heads=2, feed_forward=64, max_positions=8, vocabulary=50)
    start_from_whisper(model, folder)
    for own, theirs in ((0, 0), (1, 2), (2, 4)):
        torch.testing.assert_close(model.layers[own].fc1.weight, weights[f"model.decoder.layers.{theirs}.fc1.weight"])
    torch.testing.assert_close(model.embed_tokens.weight, weights["model.decoder.embed_tokens.weight"])


def test_a_decoder_of_other_sizes_is_refused_with_all_that_is_wrong(tmp_path):
    folder, _ = small_whisper(tmp_path / "whisper", layers=1)
    model = TasteAggregator(5, WHISPER_WIDTH, heads=4, feed_forward=48, max_positions=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 decoder layers, wanted at least 2; 2 attention heads, wanted 4; .*fc1"):
        start_from_whisper(model, folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
