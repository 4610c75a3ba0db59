import torch

from taste.audio_branch import AudioBranch

LENGTHS = torch.tensor([5, 3])


def branch(**options) -> AudioBranch:
    torch.manual_seed(0)
    return AudioBranch(12, 6, 16, **{"heads": 4, "linear_units": 24} | options).eval()


def vectors() -> torch.Tensor:
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


def test_the_result_has_the_language_models_width():
    assert branch()(vectors(), LENGTHS).shape == (2, 5, 16)


def test_batch_of_rows_equals_rows_one_by_one():
    model, given = branch(), vectors()
    together = model(given, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = model(given[[row], :length], LENGTHS[[row]])
        torch.testing.assert_close(together[[row], :length], alone, rtol=1e-5, atol=1e-5)


def test_a_token_does_not_depend_on_later_ones():
    model, given = branch(), vectors()
    later = given.clone()
    later[:, 3:] += 1.0
    torch.testing.assert_close(model(later, LENGTHS)[:, :3], model(given, LENGTHS)[:, :3])
    assert not torch.allclose(model(later, LENGTHS)[0, 3:], model(given, LENGTHS)[0, 3:])


def test_the_eps_reaches_the_norms_inside_the_layers():
    norms = {layer.norm_ff.eps for layer in branch(layer_norm_eps=1e-5).audio_token_encoder.encoders}
    assert norms == {1e-5}
    assert {layer.norm_mha.eps for layer in branch().audio_token_encoder.encoders} == {1e-12}
