from functools import partial

import pytest
import torch
from torch import nn

from cosyvoice.hifigan.discriminator import MultiPeriodDiscriminator, MultipleDiscriminator, MultiResSpecDiscriminator
from cosyvoice.hifigan.f0_predictor import ConvRNNF0Predictor
from cosyvoice.hifigan.generator import HiFTGenerator, Snake
from cosyvoice.hifigan.hifigan import HiFiGan
from cosyvoice.utils.audio import mel_spectrogram
from cosyvoice.utils.losses import tpr_loss

CPU = torch.device("cpu")
MEL = partial(
    mel_spectrogram, n_fft=1024, num_mels=80, sampling_rate=22_050, hop_size=256, win_size=1024, fmin=0, fmax=None
)
SHORT_MEL = partial(
    mel_spectrogram, n_fft=512, num_mels=40, sampling_rate=22_050, hop_size=128, win_size=512, fmin=0, fmax=None
)


class TwoNumberVocoder(nn.Module):
    """Stands for the vocoder where the golden file was made: its output depends on nothing but two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.pitch = nn.Parameter(torch.tensor(3.0))

    def forward(self, batch, device):
        return batch["raw"] * self.gain + 0.01, batch["pitch_raw"] * self.pitch


def seeded_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The recipe by which the golden file's weights were made, keys in alphabetical order."""
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for key, value in sorted(model.state_dict().items()):
        noise = torch.randn(value.shape, generator=generator)
        if key.endswith(("weight_g", "original0")):
            noise = 1 + 0.1 * noise
        elif key.endswith("bias"):
            noise = 0.05 * noise
        weights[key] = noise
    return weights


@pytest.fixture(scope="module")
def golden(request):
    return torch.load(request.path.parent / "golden" / "hifigan_losses.pt", weights_only=True)


@pytest.fixture(scope="module")
def released_size() -> MultipleDiscriminator:
    model = MultipleDiscriminator(MultiPeriodDiscriminator(), MultiResSpecDiscriminator())
    model.load_state_dict(seeded_weights(model))
    return model


def small_gan(tpr_loss_weight: float = 1.0) -> HiFiGan:
    torch.manual_seed(1)
    vocoder = HiFTGenerator(base_channels=16, f0_predictor=ConvRNNF0Predictor(cond_channels=8))
    mpd = MultiPeriodDiscriminator(periods=(2, 3), channels=(2, 4, 4, 4, 4))
    mrd = MultiResSpecDiscriminator(fft_sizes=(256,), hop_sizes=(64,), win_lengths=(256,), channels=2)
    return HiFiGan(vocoder, MultipleDiscriminator(mpd, mrd), [MEL], tpr_loss_weight=tpr_loss_weight)


def small_batch(turn: str, **extra) -> dict:
    time = torch.arange(10 * 256) / 22_050
    speech = torch.stack([0.3 * torch.sin(2 * torch.pi * hertz * time) for hertz in (150, 220)])
    pitch = torch.tensor([[150.0], [220.0]]).expand(2, 10)
    return {"turn": turn, "speech": speech, "speech_feat": MEL(speech).transpose(1, 2), "pitch_feat": pitch, **extra}


def learned(model: nn.Module, side: str) -> list[bool]:
    named = model.named_parameters()
    return [value.grad is not None and bool(value.grad.any()) for name, value in named if name.startswith(side)]


def test_the_discriminators_have_the_published_keys_and_shapes(golden, released_size):
    assert {key: list(value.shape) for key, value in released_size.state_dict().items()} == golden["state_shapes"]


@torch.no_grad()
def test_scores_and_feature_maps_equal_the_reference(golden, released_size):
    judged = released_size(golden["batch"]["speech"], golden["batch"]["raw"])
    assert [[list(layer.shape) for layer in layers] for layers in judged.real_maps] == golden["map_shapes"]
    for got, expected in zip(judged[:2], golden["scores"], strict=True):
        for scores, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(scores.double().norm(), wanted, rtol=1e-5, atol=0)
    for got, expected in zip(judged[2:], golden["maps"], strict=True):
        for layers, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(
                torch.stack([layer.double().norm() for layer in layers]), wanted, rtol=1e-5, atol=0
            )


@pytest.mark.parametrize("turn", ["generator", "discriminator"])
@pytest.mark.parametrize("tau", [0.04, 10.0])
def test_losses_and_gradients_equal_the_reference(golden, released_size, turn, tau):
    model = HiFiGan(TwoNumberVocoder(), released_size, [MEL, SHORT_MEL], tpr_loss_tau=tau)
    model.zero_grad()
    losses = model({**golden["batch"], "turn": turn}, CPU)
    losses["loss"].backward()
    expected = golden["turns"][f"{turn} {tau}"]
    assert losses.keys() == expected["losses"].keys()
    for name, value in expected["losses"].items():
        torch.testing.assert_close(
            losses[name].detach(), value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    norms = {name: p.grad.double().norm() for name, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == expected["grad_norms"].keys()
    for name, value in expected["grad_norms"].items():
        # A bias's gradient is a sum of thousands of terms that nearly cancel.
        torch.testing.assert_close(norms[name], value, rtol=5e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("turn, other", [("generator", "discriminator"), ("discriminator", "generator")])
def test_each_turn_teaches_its_own_side_alone(turn, other):
    model = small_gan()
    model(small_batch(turn), CPU)["loss"].backward()
    assert all(learned(model, turn))
    assert not any(learned(model, other))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_discriminators_the_mel_and_f0_losses_are_the_same():
    torch.manual_seed(3)
    adversarial = small_gan()(small_batch("generator"), CPU)
    torch.manual_seed(3)
    plain = small_gan()(small_batch("generator", adversarial=False), CPU)
    assert plain.keys() == {"loss", "loss_mel", "loss_f0"}
    assert plain["loss_mel"] == adversarial["loss_mel"]
    assert plain["loss_f0"] == adversarial["loss_f0"]
    torch.testing.assert_close(plain["loss"], 45 * plain["loss_mel"] + plain["loss_f0"])


def test_no_relativistic_loss_where_its_weight_is_zero():
    model = small_gan(tpr_loss_weight=0)
    assert "loss_tpr" not in model(small_batch("generator"), CPU)
    losses = model(small_batch("discriminator"), CPU)
    assert losses.keys() == {"loss", "loss_disc"}
    assert losses["loss"] == losses["loss_disc"]


def test_scores_that_all_differ_alike_add_no_relativistic_loss():
    scores = torch.ones(2, 5, requires_grad=True)
    loss = tpr_loss([scores], [torch.zeros(2, 5)], tau=0.04)
    loss.backward()
    assert loss == 0
    assert not scores.grad.any()


def test_a_few_steps_lower_the_mel_and_f0_losses():
    model = small_gan()
    vocoder = torch.optim.AdamW(model.generator.parameters(), 2e-3)
    critics = torch.optim.AdamW(model.discriminator.parameters(), 2e-4)
    history = []
    for _ in range(6):
        for turn, optimizer in (("discriminator", critics), ("generator", vocoder)):
            losses = model(small_batch(turn), CPU)
            losses["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        history.append(losses)
    assert history[-1]["loss_mel"] < 0.95 * history[0]["loss_mel"]
    assert history[-1]["loss_f0"] < history[0]["loss_f0"]


def test_half_precision_of_the_discriminators_leaves_the_mel_loss_alone():
    batch = small_batch("generator")

    def losses(enabled: bool) -> dict[str, torch.Tensor]:
        model = small_gan()
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return model(batch, CPU)

    exact, rounded = losses(False), losses(True)
    assert exact["loss_mel"] == rounded["loss_mel"]
    assert exact["loss_f0"] == rounded["loss_f0"]
    torch.testing.assert_close(exact["loss_gen"], rounded["loss_gen"], rtol=0.05, atol=0)
    assert all(value.dtype == torch.float32 for value in rounded.values())


def test_the_snakes_gradients_equal_finite_differences():
    torch.manual_seed(0)
    snake = Snake(3).double()
    snake.alpha.data.uniform_(0.5, 2)
    x = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: snake(x), (x, snake.alpha))


def test_bad_batches_are_refused_with_the_reason():
    model = small_gan()
    with pytest.raises(ValueError, match=r"'turn'.*is 'both', expected 'generator' or 'discriminator'"):
        model(small_batch("both"), CPU)
    longer = small_batch("discriminator")
    longer["speech"] = torch.zeros(2, 2600)
    with pytest.raises(ValueError, match=r"'speech'.*\(2, 2600\).*\(2, 2560\)"):
        model(longer, CPU)
    shorter = small_batch("generator")
    shorter["pitch_feat"] = shorter["pitch_feat"][:, :9]
    with pytest.raises(ValueError, match=r"'pitch_feat'.*\(2, 9\).*\(2, 10\)"):
        model(shorter, CPU)
