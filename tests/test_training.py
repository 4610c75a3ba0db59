import dataclasses
import itertools
import json
import math
import re
import subprocess
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from cosyvoice.utils.stops import NonFiniteLossError, RunStopped
from taste.batch import Batch
from taste.checkpoint import Checkpoint, code_commit, disk_warning, load_checkpoint, save_checkpoint
from taste.data import UtteranceDataset
from taste.evaluation import evaluate
from taste.learned_state import learned_state, load_learned_state
from taste.lr_schedule import share_of_peak
from taste.model import CosyVoiceS3Model
from taste.scores import Totals
from taste.train_state import Progress, StepRecord
from taste.training import MOST_SKIPPED_STEPS, Trainer
from tests.small_stage3 import CONFIG, small_dataset, small_model

LENGTHS = [(2 + number % 4, 5 + 3 * (number % 5)) for number in range(10)]  # 5 steps an epoch


@pytest.fixture
def sets(tmp_path) -> tuple[UtteranceDataset, UtteranceDataset]:
    return small_dataset(tmp_path, "train", LENGTHS), small_dataset(tmp_path, "test", LENGTHS[:3], seed=1)


class Asked:
    """A stop request that comes when it has been looked for so many times."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self) -> bool:
        self.after -= 1
        return self.after < 0


def make_trainer(
    folder: Path,
    sets: tuple[UtteranceDataset, UtteranceDataset],
    model: CosyVoiceS3Model | None = None,
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = lambda: 0.0,
    **options,
) -> Trainer:
    config = dataclasses.replace(CONFIG, **options)
    notes, accelerator = {"settings": {}}, Accelerator(cpu=True)
    return Trainer(model or small_model(), *sets, config, folder, accelerator, notes, stop, clock=clock)


def assert_same(a: dict, b: dict) -> None:
    """Equal to the last bit, whatever is nested in it."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, dict):
            assert_same(value, b[name])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, b[name]), name
        else:
            assert value == b[name], name


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# 3 batches of evaluation before training, 5 steps an epoch, 2 batches of evaluation after each (3 test utterances)
@pytest.mark.parametrize(
    ("variant", "looks"),
    [("simple", looks) for looks in (0, 1, 2, 3, 5, 7, 8, 9, 12)]
    + [("taste", looks) for looks in (0, 3, 5, 9)]  # its codebooks move without any gradient
    + [("taste_novq", 5)],
)
def test_a_stopped_and_resumed_run_equals_one_that_was_never_stopped(tmp_path, sets, variant, looks):
    whole = make_trainer(tmp_path / "whole", sets, small_model(variant))
    whole.fit()
    with pytest.raises(RunStopped, match=r"last\.pt"):
        make_trainer(tmp_path / "parts", sets, small_model(variant), stop=Asked(after=looks)).fit()
    torch.manual_seed(1234)  # another process has another state
    going_on = make_trainer(tmp_path / "parts", sets, small_model(variant))
    going_on.resume(load_checkpoint(going_on.last_path))
    going_on.fit()

    for name in ("last_path", "best_path"):
        one, two = load_checkpoint(getattr(whole, name)), load_checkpoint(getattr(going_on, name))
        assert_same(one.weights, two.weights)
        assert_same(one.notes, two.notes)
    assert_same(whole.optimizer.state_dict()["state"], going_on.optimizer.state_dict()["state"])
    assert records(tmp_path / "whole") == records(tmp_path / "parts")
    assert whole.progress.step == 10


def test_five_steps_and_five_more_are_ten_steps_to_the_bit(tmp_path, sets):
    ten = make_trainer(tmp_path / "ten", sets, num_epochs=1, batch_size=1)  # a single epoch: stops in its middle
    ten.fit()
    five = make_trainer(tmp_path / "five", sets, stop=Asked(after=3 + 5), num_epochs=1, batch_size=1)
    with pytest.raises(RunStopped, match="after step 5"):
        five.fit()
    assert five.progress.step_in_epoch == 5
    more = make_trainer(tmp_path / "five", sets, num_epochs=1, batch_size=1)
    more.resume(load_checkpoint(more.last_path))
    more.fit()
    assert more.progress.step == ten.progress.step == 10
    assert_same(learned_state(ten.model), learned_state(more.model))


def test_a_checkpoint_within_an_epoch_is_as_good(tmp_path, sets):
    whole = make_trainer(tmp_path / "whole", sets)
    whole.fit()
    killed = make_trainer(tmp_path / "killed", sets, checkpoint_every=3)
    train_step, steps = killed._train_step, iter(range(4))

    def train_step_or_die(*step):
        if next(steps, None) is None:
            raise KeyboardInterrupt  # no time to save anything
        return train_step(*step)

    killed._train_step = train_step_or_die
    with pytest.raises(KeyboardInterrupt):
        killed.fit()
    assert len(records(tmp_path / "killed")) == 1 + 4  # epoch 0 and four steps, one more than the checkpoint knows
    going_on = make_trainer(tmp_path / "killed", sets, checkpoint_every=3)
    going_on.resume(load_checkpoint(going_on.last_path))
    assert going_on.progress.step == 3
    going_on.fit()
    assert_same(learned_state(whole.model), learned_state(going_on.model))
    assert records(tmp_path / "whole") == records(tmp_path / "killed")


@pytest.mark.parametrize(("batch_size", "accumulation_steps"), [(5, 2), (2, 5), (1, 10), (3, 4)])
def test_accumulated_batches_make_the_step_of_one_big_batch(tmp_path, sets, batch_size, accumulation_steps):
    weights = []
    for size, accumulation in ((10, 1), (batch_size, accumulation_steps)):
        trainer = make_trainer(
            tmp_path / str(size),
            sets,
            small_model(freeze_llm=True),  # no dropout acts, so only the grouping differs
            num_epochs=1,
            batch_size=size,
            accumulation_steps=accumulation,
        )
        trainer.fit()
        assert trainer.progress.step == 1
        weights.append(trainer)
    (one_step,) = [entry for entry in records(tmp_path / "10") if entry["kind"] == "step"]
    (accumulated,) = [entry for entry in records(tmp_path / str(batch_size)) if entry["kind"] == "step"]
    for name in ("loss", "top1", "top5", "gradient_norm"):
        assert accumulated[name] == pytest.approx(one_step[name], rel=1e-5), name
    moments = [trainer.optimizer.state_dict()["state"] for trainer in weights]
    for number, state in moments[0].items():
        torch.testing.assert_close(moments[1][number]["exp_avg"], state["exp_avg"], rtol=1e-4, atol=1e-7)


def test_a_step_lets_go_of_each_batch_once_it_is_done(tmp_path, sets):
    trainer = make_trainer(tmp_path, sets, num_epochs=1, accumulation_steps=5)
    loaded, alive = [], []
    forward, add_up = trainer.wrapped_model.forward, trainer.gradients._add_up_whole

    def counted(batch):
        alive.append(sum(reference() is not None for reference in loaded))
        return forward(batch)

    def watched(batches):
        loaded.extend(map(weakref.ref, batches))
        return add_up(batches)

    trainer.wrapped_model.forward, trainer.gradients._add_up_whole = counted, watched
    trainer._train_epoch()
    assert alive == [5, 4, 3, 2, 1]


def test_a_run_that_nobody_watches_says_how_far_it_is_once_a_minute(tmp_path, sets, monkeypatch, capsys):
    trainer = make_trainer(tmp_path, sets, num_epochs=1)
    minutes = []
    trainer.on_minute = minutes.append
    trainer.fit()
    assert not minutes and capsys.readouterr().err == ""
    monkeypatch.setattr("taste.progress_bar.LINE_SECONDS", 0.0)
    again = make_trainer(tmp_path, sets, num_epochs=1)
    again.on_minute = minutes.append
    again.fit()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch 1/1: ")]
    assert len(lines) == len(minutes) == 5
    assert re.fullmatch(r"epoch 1/1: 3 of 5 steps, [\d.e+]+ a second, 00:00 left, loss \d\.\d{3}", lines[2])


def test_codebooks_move_in_training_and_are_saved(tmp_path, sets):
    model = small_model("taste")
    before = {name: value.clone() for name, value in model.state_dict().items() if "_codebook" in name}
    trainer = make_trainer(tmp_path, sets, model)
    history = trainer.fit().history
    saved = load_checkpoint(trainer.last_path).weights
    assert all(name in saved for name in before)
    moved = {name.rpartition(".")[2] for name, value in before.items() if not torch.equal(saved[name], value)}
    assert moved == {"embed", "embed_avg", "cluster_size"}
    assert history[1]["train"]["commitment"] > 0 and "commitment" not in history[1]["test"]


def test_evaluation_moves_no_codebook(tmp_path, sets):
    model = small_model("taste")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, sets[0], 3, Accelerator(cpu=True))
    assert_same(before, model.state_dict())


def test_accumulated_batches_average_the_commitment_over_their_words(tmp_path, sets):
    sizes = {"quantize_dropout": False}
    norms = []
    for size, accumulation in ((10, 1), (5, 2)):
        model = small_model("taste", dropout=0.0, sizes=sizes)
        for layer in model.quantizer.rvq.layers:
            layer._codebook.decay = 1.0  # hold the codebooks still, so that only the grouping differs
        trainer = make_trainer(
            tmp_path / str(size), sets, model, num_epochs=1, batch_size=size, accumulation_steps=accumulation
        )
        trainer.fit()
        (step,) = [entry for entry in records(tmp_path / str(size)) if entry["kind"] == "step"]
        norms.append((step["loss"], step["commitment"], step["gradient_norm"]))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.parametrize("variant", ["text_only", "simple", "taste_novq", "taste"])
def test_a_small_set_is_learned_by_heart(tmp_path, variant):
    train_set = small_dataset(tmp_path, "train", [(2, 6), (3, 5), (4, 7)])
    model = small_model(variant, dropout=0.0)
    trainer = make_trainer(
        tmp_path, (train_set, train_set), model, num_epochs=25, batch_size=1, lr=1e-2, warmup_steps=5, weight_decay=0.0
    )
    history = trainer.fit().history
    assert history[0]["test"]["loss"] > 3.5  # ln 65 is 4.17
    assert history[-1]["test"]["loss"] < 0.3
    assert history[-1]["test"]["top1"] > 0.95


def test_a_frozen_run_trains_and_stores_only_what_is_new(tmp_path, sets):
    model = small_model(freeze_llm=True)
    before = {name: value.clone() for name, value in model.llm.state_dict().items()}
    trainer = make_trainer(tmp_path, sets, model)
    history = trainer.fit().history
    assert_same(before, model.llm.state_dict())
    stored = load_checkpoint(trainer.last_path).weights
    assert not any(name.startswith("llm.") for name in stored)
    assert history[-1]["test"]["loss"] != history[0]["test"]["loss"]


def test_a_frozen_text_only_model_cannot_be_trained(tmp_path, sets):
    with pytest.raises(ValueError, match="nothing to learn"):
        make_trainer(tmp_path, sets, small_model("text_only", freeze_llm=True))


def spoil(dataset: UtteranceDataset, numbers: Sequence[int]) -> None:
    """Leave no number in the text features of some utterances."""
    texts = dataset.features.text
    for number in numbers:
        texts[f"utt-{number:02d}"] = torch.full_like(texts[f"utt-{number:02d}"], math.nan)


@pytest.mark.parametrize("variant", ["simple", "taste"])  # codebooks move before the loss is known
def test_a_step_whose_loss_is_no_number_is_left_out_and_told(tmp_path, sets, capsys, variant):
    spoil(sets[0], [6])
    epochs = MOST_SKIPPED_STEPS + 1  # one such step in each
    trainer = make_trainer(tmp_path, sets, small_model(variant), num_epochs=epochs)
    history = trainer.fit().history
    assert trainer.progress.step == 5 * epochs
    skipped = [entry for entry in records(tmp_path) if entry["kind"] == "skipped"]
    taken = [entry for entry in records(tmp_path) if entry["kind"] == "step"]
    assert [entry["utterances"] for entry in skipped] == [["utt-06"]] * epochs
    assert sorted(entry["step"] for entry in skipped + taken) == list(range(1, 5 * epochs + 1))
    shares = [share_of_peak(entry["step"] - 1, 5 * epochs, CONFIG.warmup_steps) for entry in taken]
    assert [entry["lr"] for entry in taken] == pytest.approx([CONFIG.lr * share for share in shares])
    told = capsys.readouterr().err
    assert told.count("is left out: the loss is nan") == epochs
    assert f"warning: step {skipped[0]['step']} is left out" in told and "utterances: utt-06\n" in told
    assert all(value.isfinite().all() for value in load_checkpoint(trainer.last_path).weights.values())
    assert all(math.isfinite(value) for entry in history[1:] for value in entry["train"].values())


@pytest.mark.parametrize("variant", ["simple", "taste"])
@pytest.mark.parametrize("looks", range(3, 7))
def test_a_resumed_run_leaves_out_the_same_steps(tmp_path, sets, variant, looks):
    spoil(sets[0], [6, 7])
    whole = make_trainer(tmp_path / "whole", sets, small_model(variant))
    whole.fit()
    with pytest.raises(RunStopped):
        make_trainer(tmp_path / "parts", sets, small_model(variant), stop=Asked(after=looks)).fit()
    going_on = make_trainer(tmp_path / "parts", sets, small_model(variant))
    going_on.resume(load_checkpoint(going_on.last_path))
    going_on.fit()
    assert_same(load_checkpoint(whole.last_path).weights, load_checkpoint(going_on.last_path).weights)
    assert_same(load_checkpoint(whole.last_path).notes, load_checkpoint(going_on.last_path).notes)
    assert any(entry["kind"] == "skipped" for entry in records(tmp_path / "whole"))
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


@pytest.mark.parametrize("steps_before_a_stop", [0, 3])
def test_many_steps_in_a_row_that_come_to_no_number_end_the_run(tmp_path, sets, steps_before_a_stop):
    spoil(sets[0], range(len(LENGTHS)))
    if steps_before_a_stop:
        with pytest.raises(RunStopped):
            make_trainer(tmp_path, sets, batch_size=1, stop=Asked(after=3 + steps_before_a_stop)).fit()
    trainer = make_trainer(tmp_path, sets, batch_size=1)
    if steps_before_a_stop:
        trainer.resume(load_checkpoint(trainer.last_path))
    start = {name: value.clone() for name, value in learned_state(trainer.model).items()}
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.fit()
    lines = [entry for entry in records(tmp_path) if entry["kind"] == "skipped"]
    assert len(lines) == MOST_SKIPPED_STEPS == 5
    told = str(caught.value)
    assert "step 5 is the last of 5 in a row" in told and lines[-1]["utterances"][0] in told
    assert f"--init-from {trainer.best_path} --run-name" in told
    assert_same(start, learned_state(trainer.model))


def test_a_gradient_that_is_no_number_is_left_out_too_with_all_utterances_of_its_step(tmp_path, sets):
    trainer = make_trainer(tmp_path, sets, num_epochs=1)
    factors = iter([math.inf])  # in the first step
    trainer.model.llm.llm_decoder.weight.register_hook(lambda gradient: gradient * next(factors, 1.0))
    trainer.fit()
    first, *others = [entry for entry in records(tmp_path) if entry["kind"] != "epoch"]
    (batch,) = trainer._steps_of(0)[0]
    assert first["kind"] == "skipped" and first["utterances"] == [sets[0].utt_ids[number] for number in batch]
    assert math.isfinite(float(first["loss"])) and not math.isfinite(float(first["gradient_norm"]))
    assert {entry["kind"] for entry in others} == {"step"} and len(others) == 4


def test_an_epoch_of_which_no_step_was_taken_has_no_training_loss(tmp_path, sets):
    spoil(sets[0], range(len(LENGTHS)))
    history = make_trainer(tmp_path, sets, num_epochs=1, batch_size=4).fit().history  # 3 steps
    assert history[1]["train"] == {} and history[1]["test"] == history[0]["test"]


def let_memory_end(trainer: Trainer, rows: int, fits: int = 0) -> list[int]:
    """Let a batch of more than so many rows not fit, but the first ones; gives the rows of all that are tried."""
    forward, tried = trainer.wrapped_model.forward, []

    def limited(batch: Batch):
        tried.append(len(batch.utt_ids))
        if tried[-1] > rows and len(tried) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(batch)

    trainer.wrapped_model.forward = limited
    return tried


def test_a_batch_that_does_not_fit_in_memory_is_computed_in_parts(tmp_path, sets, capsys):
    options = {"num_epochs": 1, "batch_size": 5, "accumulation_steps": 2}
    whole = make_trainer(tmp_path / "whole", sets, small_model(freeze_llm=True), **options)  # without dropout
    whole.fit()
    cut = make_trainer(tmp_path / "cut", sets, small_model(freeze_llm=True), **options)
    tried = let_memory_end(cut, rows=2, fits=1)  # the first batch's gradient is there when the second ends it
    (tmp_path / "cut").mkdir()
    cut._train_epoch()
    assert tried == [5, 5, 2, 3, 1, 1, 1, 2, 1, 1, 1, 2]
    (one,) = [entry for entry in records(tmp_path / "whole") if entry.pop("kind") == "step"]
    (other,) = [entry for entry in records(tmp_path / "cut") if entry.pop("kind") == "step"]
    assert other == pytest.approx(one, rel=1e-5)
    moments = [trainer.optimizer.state_dict()["state"] for trainer in (whole, cut)]
    for number, state in moments[0].items():
        torch.testing.assert_close(moments[1][number]["exp_avg"], state["exp_avg"], rtol=1e-4, atol=1e-7)
    told = capsys.readouterr().err
    assert told.count("do not fit in the device's memory") == 1
    assert "5 utterances of up to 23 positions" in told and "computed 2 at a time" in told


def test_nothing_is_left_of_an_attempt_that_did_not_fit(tmp_path, sets):
    """Neither in the codebooks nor in the random state: as if the batches had been cut before."""
    weights = []
    for name in ("cut", "tried"):
        trainer = make_trainer(tmp_path / name, sets, small_model("taste"), batch_size=2, accumulation_steps=5)
        (tmp_path / name).mkdir()
        (step,) = trainer._steps_of(0)
        if name == "tried":
            let_memory_end(trainer, rows=1, fits=2)
        else:
            step = [[number] for batch in step for number in batch]
        trainer._train_step([trainer.gradients.load(batch) for batch in step], step)
        weights.append(learned_state(trainer.model))
    assert_same(*weights)


@pytest.mark.parametrize("variant", ["simple", "taste"])
def test_a_step_is_taken_or_forgotten_once(tmp_path, sets, variant):
    gradients = make_trainer(tmp_path, sets, small_model(variant)).gradients
    for end in (gradients.take_step, gradients.forget):
        with pytest.raises(AssertionError, match="no step is open"):
            end()
        gradients.add_up([gradients.load([0])], [[0]], step=0)
        with pytest.raises(AssertionError, match="neither taken nor forgotten"):
            gradients.add_up([gradients.load([0])], [[0]], step=1)
        end()
        with pytest.raises(AssertionError, match="no step is open"):
            gradients.forget()


def test_one_utterance_that_does_not_fit_in_memory_ends_the_run(tmp_path, sets):
    trainer = make_trainer(tmp_path, sets, batch_size=4)
    let_memory_end(trainer, rows=0)
    with pytest.raises(
        ValueError, match=r"Tried to allocate 2.00 GiB.*one utterance at a time, of up to \d+ positions"
    ):
        trainer._train_epoch()


@pytest.mark.parametrize("variant", ["simple", "taste"])
@pytest.mark.parametrize("rows", [1, 4])
def test_trying_the_memory_before_the_first_step_changes_nothing(tmp_path, sets, variant, rows, capsys):
    options = {"num_epochs": 1, "batch_size": 4, "accumulation_steps": 2}
    plain = make_trainer(tmp_path / "plain", sets, small_model(variant), **options)
    plain.fit()
    tried = make_trainer(tmp_path / "tried", sets, small_model(variant), **options)
    forward, state = tried.wrapped_model.forward, torch.get_rng_state()
    computed = let_memory_end(tried, rows=rows)
    tried.try_memory()
    assert computed == ([4] if rows == 4 else [4, 2, 1, 1, 1, 1])
    assert ("do not fit" in capsys.readouterr().err) == (rows == 1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in tried.model.parameters()) and not tried.optimizer.state
    tried.wrapped_model.forward = forward
    tried.fit()
    assert_same(learned_state(plain.model), learned_state(tried.model))
    assert_same(plain.optimizer.state_dict()["state"], tried.optimizer.state_dict()["state"])
    assert records(tmp_path / "plain") == records(tmp_path / "tried")


def test_minutes_without_a_checkpoint_are_few(tmp_path, sets):
    whole = make_trainer(tmp_path / "whole", sets)
    whole.fit()
    seconds = itertools.count(step=50.0)  # at each look
    timed = make_trainer(tmp_path / "timed", sets, checkpoint_minutes=2.0, clock=lambda: next(seconds))
    saved, save = [], timed._save_last

    def noted():
        saved.append((timed.progress.epoch, timed.progress.step))
        save()

    timed._save_last = noted
    timed.fit()
    within = [step for epoch, step in saved if step not in (0, 5, 10)]
    assert within and len(within) < 8  # now and then, not at each step
    going_on = make_trainer(tmp_path / "timed", sets)
    going_on.resume(load_checkpoint(timed.last_path))
    assert_same(learned_state(whole.model), learned_state(timed.model))
    assert records(tmp_path / "whole") == records(tmp_path / "timed")


def test_a_disk_without_room_for_the_checkpoints_is_told(tmp_path, sets, monkeypatch):
    trainer = make_trainer(tmp_path, sets, num_epochs=1)
    tmp_path.mkdir(exist_ok=True)
    free = {"bytes": 0}
    monkeypatch.setattr("taste.checkpoint.shutil.disk_usage", lambda folder: SimpleNamespace(free=free["bytes"]))
    warning = disk_warning(trainer.last_path, trainer.best_path, trainer.model)
    assert warning.startswith("warning: ") and str(trainer.last_path.parent) in warning and "0.0 GB are free" in warning
    trainer.fit()
    last, best = (path.stat().st_size for path in (trainer.last_path, trainer.best_path))
    for path in (trainer.last_path, trainer.best_path):
        path.unlink()
    needed = 2 * last + best
    for share, expected in ((0.8, True), (1.0, False)):  # files have names and notes beside the numbers
        free["bytes"] = int(share * needed)
        assert (disk_warning(trainer.last_path, trainer.best_path, trainer.model) is not None) == expected
    trainer._save_last()  # which is there now: only the next one needs room
    free["bytes"] = last + best
    assert disk_warning(trainer.last_path, trainer.best_path, trainer.model) is None


def test_test_scores_do_not_depend_on_the_batch_size(tmp_path, sets):
    model, accelerator = small_model(), Accelerator(cpu=True)
    scores = [evaluate(model, sets[0], size, accelerator).as_list() for size in (1, 3, 10)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    assert scores[0] == pytest.approx(scores[2], rel=1e-6)
    assert scores[0][3] == sum(units + 1 for _, units in LENGTHS)


def test_the_best_epoch_is_kept_beside_the_last(tmp_path, sets):
    trainer = make_trainer(tmp_path, sets, num_epochs=4, lr=0.3)  # a rate that spoils the model
    progress = trainer.fit()
    losses = [entry["test"]["loss"] for entry in progress.history]
    assert losses[progress.best_epoch] == min(losses) < losses[-1]
    best = load_checkpoint(trainer.best_path)
    assert best.optimizer is None
    load_learned_state(trainer.model, best.weights)
    again = evaluate(trainer.model, sets[1], 2, Accelerator(cpu=True)).averages()
    assert again["loss"] == pytest.approx(min(losses), rel=1e-6)
    with pytest.raises(ValueError, match="weights only"):
        trainer.resume(best)


def test_the_loss_of_an_epoch_is_the_mean_over_its_targets(tmp_path, sets):
    history = make_trainer(tmp_path, sets).fit().history
    for epoch in (1, 2):
        steps = [entry for entry in records(tmp_path) if entry["kind"] == "step" and entry["epoch"] == epoch]
        targets = [entry["targets"] for entry in steps]
        assert sum(targets) == sum(units + 1 for _, units in LENGTHS) and len(set(targets)) > 1
        for name in ("loss", "top1", "top5"):
            mean = sum(entry[name] * weight for entry, weight in zip(steps, targets, strict=True)) / sum(targets)
            assert history[epoch]["train"][name] == pytest.approx(mean, rel=1e-9)


def test_weight_decay_is_for_matrices_only(tmp_path, sets):
    trainer = make_trainer(tmp_path, sets)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decayed, others = set(), set()  # each in groups by learning rate
    for group in trainer.optimizer.param_groups:
        (decayed if group["weight_decay"] else others).update(names[id(p)] for p in group["params"])
    assert {"aggregator.query.weight", "llm.llm_decoder.weight", "input_proj.weight"} <= decayed
    assert {"input_proj.bias", "text_norm.weight", "llm.speech_embedding.weight", "llm.llm_embedding.weight"} <= others
    assert decayed | others == {name for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("what", ["train_set", "frozen_weights", "processes"])
def test_a_run_does_not_go_on_with_something_else(tmp_path, sets, what):
    trainer = make_trainer(tmp_path, sets)
    trainer._save_last()
    model, data = small_model(), sets
    checkpoint = load_checkpoint(trainer.last_path)
    if what == "frozen_weights":
        with torch.no_grad():
            model.llm.text_embedding.weight[3, 3] += 1
    elif what == "train_set":
        data = (sets[0].subset(range(9)), sets[1])
    else:
        checkpoint.notes["processes"] = 4
    named = {"train_set": "training utterances", "frozen_weights": "frozen weights", "processes": "processes"}[what]
    with pytest.raises(ValueError, match=f"{named}.*--resume never"):
        make_trainer(tmp_path, data, model).resume(checkpoint)


def test_a_record_keeps_what_the_checkpoint_knows_and_drops_half_a_line(tmp_path):
    record = StepRecord(tmp_path / "metrics.jsonl")
    record.keep_until(Progress())
    for step in range(1, 5):
        record.add("step", step, 1, {"loss": 1.0})
    record.add("epoch", 4, 1, {})
    with record.path.open("a") as file:
        file.write('{"kind": "st')
    record.keep_until(Progress(epoch=1, step=2, history=[{}]))
    assert [(entry["kind"], entry["step"]) for entry in records(tmp_path)] == [("step", 1), ("step", 2)]
    record.keep_until(Progress())
    assert records(tmp_path) == []


def test_a_crash_while_saving_leaves_the_checkpoint_from_before(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, Checkpoint({"w": torch.ones(3)}, None, {"step": 1}))

    def half_a_file(content, file):
        file.write(b"PK half")
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(torch, "save", half_a_file)
    with pytest.raises(OSError, match=r"last\.pt.*untouched"):
        save_checkpoint(path, Checkpoint({"w": torch.zeros(3)}, None, {"step": 2}))
    assert load_checkpoint(path).notes == {"step": 1}
    assert torch.equal(load_checkpoint(path).weights["w"], torch.ones(3))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.json", "last.pt"]


def test_the_notes_can_be_read_without_torch(tmp_path, sets):
    trainer = make_trainer(tmp_path, sets)
    trainer.fit()
    notes = json.loads(trainer.last_path.with_suffix(".json").read_text())
    assert notes["progress"]["step"] == 10 and notes["progress"]["epoch"] == 2
    assert notes == load_checkpoint(trainer.last_path).notes
    assert Progress.from_dict(notes["progress"]).epoch_totals == Totals()


@pytest.mark.parametrize("damage", ["missing", "truncated", "something else"])
def test_a_checkpoint_that_cannot_be_used_is_named(tmp_path, damage):
    path = tmp_path / "last.pt"
    save_checkpoint(tmp_path / "best.pt", Checkpoint({"w": torch.ones(300)}, None, {}))
    if damage == "truncated":
        path.write_bytes((tmp_path / "best.pt").read_bytes()[:500])
    elif damage == "something else":
        torch.save({"w": torch.ones(3)}, path)
    error, message = (FileNotFoundError, "holds best.pt") if damage == "missing" else (ValueError, "--resume never")
    with pytest.raises(error, match=message):
        load_checkpoint(path)


def test_the_commit_is_noted_where_there_is_one(tmp_path):
    assert code_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "code.py").write_text("1")
    for words in (["init", "--quiet"], ["add", "code.py"], ["commit", "--quiet", "--no-gpg-sign", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert code_commit(tmp_path) == commit
    (tmp_path / "code.py").write_text("2")
    assert code_commit(tmp_path) == f"{commit}+changes"


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.0},
        {"new_modules_lr": 0.0},
        {"batch_size": 0},
        {"accumulation_steps": 0},
        {"grad_clip": -1.0},
        {"warmup_steps": -1},
        {"checkpoint_minutes": -1},
    ],
)
def test_training_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options)).upper()):
        dataclasses.replace(CONFIG, **options)
