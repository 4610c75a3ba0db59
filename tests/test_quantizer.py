import pytest
import torch
from torch import nn

from taste.quantizer import NO_CODE, WordQuantizer
from taste.words import word_mean, word_starts

WIDTH, LEVELS, CODES = 12, 3, 8


def quantizer(**options) -> WordQuantizer:
    torch.manual_seed(0)
    return WordQuantizer(WIDTH, 4, LEVELS, CODES, **{"quantize_dropout": False, "kmeans_init": False} | options)


def spoken(words: int, seed: int = 0, tokens_a_word: int = 1) -> torch.Tensor:
    """[1, T, WIDTH]: each word's vector on all its tokens."""
    vectors = torch.randn(1, words, WIDTH, generator=torch.Generator().manual_seed(seed))
    return vectors.repeat_interleave(tokens_a_word, dim=1)


def all_valid(vectors: torch.Tensor) -> torch.Tensor:
    return torch.ones(vectors.shape[:2], dtype=torch.bool)


def state(model: WordQuantizer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_decoding_the_codes_gives_the_quantized_vectors():
    model, vectors = quantizer().eval(), spoken(20)
    valid = all_valid(vectors)
    valid[0, 15:] = False
    quantized = model(vectors, valid)
    torch.testing.assert_close(model.decode(quantized.codes), quantized.vectors)
    assert quantized.codes.dtype == torch.int64
    assert (quantized.codes[0, 15:] == NO_CODE).all()
    assert not quantized.vectors[0, 15:].any()
    assert quantized.codes[0, :15].min() >= 0


def test_all_tokens_of_a_word_get_the_same_codes():
    model = quantizer().eval()
    ids, lengths = torch.tensor([[0, 0, 1, 2, 2], [0, 1, 1, 0, 0]]), torch.tensor([5, 3])
    vectors = word_mean(torch.randn(2, 5, WIDTH), ids, lengths)
    valid = torch.arange(5) < lengths[:, None]
    quantized = model(vectors, valid, word_starts(ids, lengths))
    once_a_token = model(vectors, valid)
    assert torch.equal(quantized.codes, once_a_token.codes)
    torch.testing.assert_close(quantized.vectors, once_a_token.vectors)
    assert torch.equal(quantized.codes[0, 0], quantized.codes[0, 1])
    assert torch.equal(quantized.codes[1, 1], quantized.codes[1, 2])


def test_codes_do_not_depend_on_the_batch():
    model, vectors = quantizer().eval(), torch.randn(4, 10, WIDTH)
    together = model(vectors, all_valid(vectors)).codes
    alone = torch.cat([model(row[None], all_valid(row[None])).codes for row in vectors])
    assert torch.equal(together, alone)


def test_statistics_are_taken_once_a_word():
    long, short = quantizer().train(), quantizer().train()
    vectors = spoken(6, tokens_a_word=3)
    starts = torch.tensor([[True, False, False] * 6])
    long(vectors, all_valid(vectors), starts)
    short(spoken(6), all_valid(spoken(6)))
    for name, value in state(long).items():
        torch.testing.assert_close(value, state(short)[name], msg=name)
    once_a_token = quantizer(once_a_word=False).train()
    once_a_token(vectors, all_valid(vectors), starts)
    size = "rvq.layers.0._codebook.cluster_size"
    assert not torch.allclose(state(once_a_token)[size], state(short)[size])


def test_gradients_of_all_tokens_reach_the_word():
    model = quantizer().train()
    for level in model.rvq.layers:
        level.commitment_weight, level.has_commitment_loss = 0.0, False
    words = torch.randn(1, 4, WIDTH, requires_grad=True)
    weights = torch.randn(1, 8, WIDTH)
    starts = torch.tensor([[True, False] * 4])
    (model(words.repeat_interleave(2, dim=1), all_valid(weights), starts).vectors * weights).sum().backward()
    straight = model.rvq.project_out.weight @ model.rvq.project_in.weight
    expected = LEVELS * weights.unflatten(1, (4, 2)).sum(dim=2) @ straight  # once for each level, as published
    torch.testing.assert_close(words.grad, expected, rtol=1e-4, atol=1e-5)


def test_padding_does_not_move_the_codebooks():
    one, other = quantizer().train(), quantizer().train()
    vectors = spoken(10)
    padded = torch.cat([vectors, torch.full((1, 5, WIDTH), 9.0)], dim=1)
    valid = torch.arange(15)[None] < 10
    loss = one(padded, valid).commitment_loss
    torch.testing.assert_close(loss, other(vectors, all_valid(vectors)).commitment_loss)
    for name, value in state(one).items():
        torch.testing.assert_close(value, state(other)[name], msg=name)


def test_eval_mode_changes_nothing_and_costs_nothing():
    model = quantizer().train()
    model(spoken(20), all_valid(spoken(20)))
    model.eval()
    before = state(model)
    loss = model(spoken(20, seed=1), all_valid(spoken(20))).commitment_loss
    assert loss == 0
    assert not loss.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_codebooks_never_start_from_data_that_is_not_trained_on():
    model = quantizer(kmeans_init=True).eval()
    with pytest.raises(RuntimeError, match="codebooks are empty"):
        model(spoken(20), all_valid(spoken(20)))


def test_whether_codebooks_have_started_is_read_until_they_have_and_after_loading():
    model, empty = quantizer(kmeans_init=True).train(), quantizer(kmeans_init=True)
    assert not model.is_started
    model(spoken(20), all_valid(spoken(20)))
    assert model.is_started
    with torch.no_grad():
        for level in model.rvq.layers:
            level._codebook.initted.fill_(False)
    assert model.is_started  # nobody looked: on a GPU that waits for it
    nn.ModuleDict({"quantizer": model}).load_state_dict({f"quantizer.{k}": v for k, v in empty.state_dict().items()})
    assert not model.is_started


def test_every_level_starts_in_the_first_step_although_levels_are_dropped():
    for seed in range(5):
        model = quantizer(kmeans_init=True, quantize_dropout=True).train()
        torch.manual_seed(seed)
        model(spoken(20), all_valid(spoken(20)))
        assert model.is_started
    used = set()
    for seed in range(20):
        torch.manual_seed(seed)
        codes = model(spoken(20), all_valid(spoken(20))).codes
        used.add(int((codes[0, 0] != NO_CODE).sum()))
    assert used == {1, 2, 3}


def codes_in_use(revive_dead_codes: bool) -> int:
    """Of 64 codes, after training on 10 words a step."""
    torch.manual_seed(0)
    model = WordQuantizer(WIDTH, 4, 1, 64, quantize_dropout=False, revive_dead_codes=revive_dead_codes).train()
    data = spoken(400)
    for step in range(200):
        batch = data[:, 10 * (step % 40) : 10 * (step % 40) + 10]
        model(batch, all_valid(batch))
    model.eval()
    return len(model(data, all_valid(data)).codes.unique())


def test_fewer_words_than_codes_still_end_with_codes_in_use():
    assert codes_in_use(revive_dead_codes=True) > 55
    assert codes_in_use(revive_dead_codes=False) < 40  # the reason why there is the option


def test_a_batch_without_words_is_no_error():
    model = quantizer().train()
    before = state(model)
    quantized = model(torch.randn(2, 3, WIDTH), torch.zeros(2, 3, dtype=torch.bool))
    assert not quantized.vectors.any()
    assert (quantized.codes == NO_CODE).all()
    assert quantized.commitment_loss == 0
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_padding_gets_the_bias_where_the_published_behaviour_is_wanted():
    model = quantizer(padding_as_bias=True).eval()
    vectors = spoken(4)
    quantized = model(vectors, torch.tensor([[True, True, False, False]]))
    bias = model.rvq.project_out.bias
    torch.testing.assert_close(quantized.vectors[0, 2:], bias.expand(2, -1))
    torch.testing.assert_close(model.decode(quantized.codes), quantized.vectors)


def test_codes_of_another_model_are_refused():
    model = quantizer().eval()
    with pytest.raises(ValueError, match="from 0 to 8, this quantizer has 0 to 7"):
        model.decode(torch.tensor([[[0, 8, 1]]]))
    with pytest.raises(ValueError, match="codes of 4 levels, this quantizer reads 3 to 3"):
        model.decode(torch.zeros(1, 1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="codes of 2 levels"):
        model.decode(torch.zeros(1, 1, 2, dtype=torch.int64))


def test_fewer_levels_are_read_where_training_dropped_levels():
    model = quantizer(quantize_dropout=True).eval()
    codes = model(spoken(5), all_valid(spoken(5))).codes
    without_last = codes.clone()
    without_last[..., 2] = NO_CODE
    torch.testing.assert_close(model.decode(codes[..., :2]), model.decode(without_last))
