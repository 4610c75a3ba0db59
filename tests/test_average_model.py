"""Averaging the epochs of a training."""

from pathlib import Path

import pytest
import torch

from cosyvoice.bin import average_model

LOSSES = (3.0, 1.0, 2.0, 1.5)


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A folder with four epochs: weights are the epoch's number, in two types, beside a counter."""
    for epoch, loss in enumerate(LOSSES):
        weights = {
            "matrix": torch.full((2, 3), float(epoch)),
            "half": torch.full((2,), float(epoch), dtype=torch.float16),
            "counter": torch.tensor(epoch),
        }
        torch.save(weights, tmp_path / f"epoch_{epoch}.pt")
        (tmp_path / f"epoch_{epoch}.yaml").write_text(f"epoch: {epoch}\nloss_dict: {{loss: {loss}}}\n")
    (tmp_path / "init.yaml").write_text("loss_dict: {}\n")
    (tmp_path / "epoch_1_step_7.yaml").write_text("loss_dict: {loss: 0.1}\n")
    return tmp_path


def average(training: Path, *flags: str) -> dict[str, torch.Tensor]:
    words = ["--dst_model", str(training / "mean.pt"), "--src_path", str(training), *flags]
    assert average_model.main(words) == 0
    return torch.load(training / "mean.pt", weights_only=True)


def test_the_epochs_with_the_lowest_loss_are_averaged(training: Path) -> None:
    mean = average(training, "--num", "2", "--val_best")
    assert torch.equal(mean["matrix"], torch.full((2, 3), 2.0))  # epochs 1 and 3
    assert mean["half"].dtype == torch.float16
    assert mean["half"].tolist() == [2.0, 2.0]
    assert mean["counter"].item() == 1


def test_the_last_epochs_are_averaged_where_the_best_are_not_asked_for(training: Path) -> None:
    assert torch.equal(average(training, "--num", "2")["matrix"], torch.full((2, 3), 2.5))


def test_losses_with_discriminators_are_not_compared_with_those_before(training: Path) -> None:
    for epoch in (2, 3):
        loss = 10 * LOSSES[epoch]
        (training / f"epoch_{epoch}.yaml").write_text(f"loss_dict: {{loss: {loss}, loss_gen: 2.0}}\n")
    assert average(training, "--num", "1", "--val_best")["counter"].item() == 3
    assert torch.equal(average(training, "--num", "3", "--val_best")["matrix"], torch.full((2, 3), 2.5))


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (lambda folder: None, ["--num", "5"], "there are 4 epochs"),
        (lambda folder: (folder / "epoch_2.pt").unlink(), ["--num", "1"], "epoch_2.pt is missing"),
        (lambda folder: (folder / "epoch_2.yaml").write_text("epoch: 2\n"), ["--num", "1"], "no loss_dict.loss"),
        (
            lambda folder: torch.save({"other": torch.zeros(1)}, folder / "epoch_2.pt"),
            ["--num", "3"],
            "two models: 4 weights differ",
        ),
    ],
)
def test_what_cannot_be_averaged_is_named(training: Path, capsys, spoil, flags, message) -> None:
    spoil(training)
    words = ["--dst_model", str(training / "mean.pt"), "--src_path", str(training), *flags]
    assert average_model.main(words) == 1
    assert message in capsys.readouterr().err
    assert not (training / "mean.pt").exists()
