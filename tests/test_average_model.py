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


@pytest.mark.parametrize("written", [".nan", ".inf"])
def test_an_epoch_whose_loss_is_no_number_is_none_of_the_best(training: Path, written: str) -> None:
    (training / "epoch_1.yaml").write_text(f"epoch: 1\nloss_dict: {{loss: {written}, acc: none}}\n")
    assert torch.equal(average(training, "--num", "2", "--val_best")["matrix"], torch.full((2, 3), 2.5))  # 2 and 3


def test_a_folder_of_the_published_trainer_is_averaged_alike(training: Path) -> None:
    wanted = average(training, "--num", "2", "--val_best")
    for epoch in range(len(LOSSES)):
        weights = torch.load(training / f"epoch_{epoch}.pt", weights_only=True)
        torch.save({**weights, "epoch": epoch, "step": 10 * epoch}, training / f"epoch_{epoch}_whole.pt")
        (training / f"epoch_{epoch}.pt").unlink()
        tensor = (  # as the published trainer writes the norm of a gradient
            "grad_norm: !!python/object/apply:torch._utils._rebuild_tensor_v2\n"
            "- !!python/object/apply:torch.storage._load_from_bytes\n  - !!binary |\n    gAKKCmz8nEY=\n"
            "- 0\n- !!python/tuple []\n- !!python/tuple []\n- false\n"
            "- !!python/object/apply:collections.OrderedDict\n  - []\n"
        )
        losses = (training / f"epoch_{epoch}.yaml").read_text()
        (training / f"epoch_{epoch}.yaml").unlink()
        (training / f"epoch_{epoch}_whole.yaml").write_text(tensor + losses)
    mean = average(training, "--num", "2", "--val_best")
    assert mean.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in mean.items())


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
            lambda folder: torch.save({"half": torch.zeros(1), "hidden": torch.zeros(1)}, folder / "epoch_2.pt"),
            ["--num", "3"],
            "two models: 4 weights differ in name or shape, counter, half, hidden, matrix first",
        ),
        (
            lambda folder: [
                (folder / f"epoch_2_whole{end}").write_bytes((folder / f"epoch_2{end}").read_bytes())
                for end in (".pt", ".yaml")
            ],
            ["--num", "1"],
            "has epoch 2 of two trainings",
        ),
    ],
)
def test_what_cannot_be_averaged_is_named(training: Path, capsys, spoil, flags, message) -> None:
    spoil(training)
    words = ["--dst_model", str(training / "mean.pt"), "--src_path", str(training), *flags]
    assert average_model.main(words) == 1
    assert message in capsys.readouterr().err
    assert not (training / "mean.pt").exists()
