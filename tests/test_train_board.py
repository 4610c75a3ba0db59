"""TensorBoard shows what a run remembers, once, whether it was resumed or not."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from taste.train_board import TrainBoard


def entry(epoch: int) -> dict:
    train = {"loss": 5.0 - epoch, "top1": 0.1} if epoch else {}
    return {"epoch": epoch, "train": train, "test": {"loss": 6.0 - epoch, "top1": 0.1 * epoch, "of": "words"}}


def step(number: int) -> str:
    return json.dumps({"kind": "step", "step": number, "epoch": 1, "loss": 1 / number, "lr": 0.1}) + "\n"


def curves(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, round(event.value, 5)) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_epochs_and_steps_are_shown_once(tmp_path):
    record = tmp_path / "metrics.jsonl"
    record.write_text(step(1) + json.dumps({"kind": "epoch", "step": 1, "epoch": 0}) + "\n" + step(2)[:9])
    board = TrainBoard(tmp_path / "board", record)
    board.update([entry(0)])
    record.write_text(record.read_text()[:-9] + step(2))
    board.update([entry(0), entry(1)])
    board.update([entry(0), entry(1)])
    board.close()
    found = curves(tmp_path / "board")
    assert found["epoch test/loss"] == [(0, 6), (1, 5)]
    assert found["epoch train/loss"] == [(1, 4)]
    assert found["step/loss"] == [(1, 1), (2, 0.5)]
    assert set(found) == {f"epoch {part}/{name}" for part in ("train", "test") for name in ("loss", "top1")} | {
        "step/loss",
        "step/lr",
    }


def test_a_resumed_run_has_the_curves_of_one_that_never_stopped(tmp_path):
    for folder, stops in ((tmp_path / "whole", []), (tmp_path / "resumed", [2])):
        board = TrainBoard(folder)
        for epochs in range(1, 4):
            if epochs in stops:  # killed: the epoch after the checkpoint was shown, and is trained again
                board.update([entry(number) for number in range(epochs + 1)])
                board.close()
                board = TrainBoard(folder)
            board.update([entry(number) for number in range(epochs)])
        board.close()
    assert curves(tmp_path / "resumed") == curves(tmp_path / "whole")
    assert len(list((tmp_path / "resumed").iterdir())) == 1


def test_a_board_that_was_never_used_leaves_nothing(tmp_path):
    TrainBoard(tmp_path / "board").close()
    assert not (tmp_path / "board").exists()
