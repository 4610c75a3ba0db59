import dataclasses
import itertools
import json
import math
import re
import subprocess
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from taste.checkpoint import Checkpoint, code_commit, load_checkpoint, save_checkpoint
from taste.data import UtteranceDataset
from taste.model import CosyVoiceS3Model
from taste.progress import Progress, StepRecord
from taste.scoring import Totals, evaluate
from taste.training import NonFiniteLossError, RunStopped, Trainer, TrainingConfig, parameter_groups, share_of_peak
from tests.small_stage3 import random_examples, small_dataset, small_model

CONFIG = TrainingConfig(
    num_epochs=2,
    batch_size=2,
    lr=1e-3,
    new_parts_lr=1e-3,
    warmup_steps=2,
    weight_decay=0.01,
    grad_clip=1.0,
    accumulation_steps=1,
    seed=0,
)
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
    **options,
) -> Trainer:
    config = dataclasses.replace(CONFIG, **options)
    return Trainer(model or small_model(), *sets, config, folder, Accelerator(cpu=True), {"settings": {}}, stop)


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
    assert_same(ten.model.learned_state(), more.model.learned_state())


def test_a_checkpoint_within_an_epoch_is_as_good(tmp_path, sets):
    whole = make_trainer(tmp_path / "whole", sets)
    whole.fit()
    killed = make_trainer(tmp_path / "killed", sets, checkpoint_every=3)
    train_step, steps = killed._train_step, iter(range(4))

    def train_step_or_die(batches):
        if next(steps, None) is None:
            raise KeyboardInterrupt  # no time to save anything
        return train_step(batches)

    killed._train_step = train_step_or_die
    with pytest.raises(KeyboardInterrupt):
        killed.fit()
    assert len(records(tmp_path / "killed")) == 1 + 4  # epoch 0 and four steps, one more than the checkpoint knows
    going_on = make_trainer(tmp_path / "killed", sets, checkpoint_every=3)
    going_on.resume(load_checkpoint(going_on.last_path))
    assert going_on.progress.step == 3
    going_on.fit()
    assert_same(whole.model.learned_state(), going_on.model.learned_state())
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
    forward, add_up = trainer.wrapped_model.forward, trainer._add_up_gradients

    def counted(batch):
        alive.append(sum(reference() is not None for reference in loaded))
        return forward(batch)

    def watched(batches):
        loaded.extend(map(weakref.ref, batches))
        return add_up(batches)

    trainer.wrapped_model.forward, trainer._add_up_gradients = counted, watched
    trainer._train_epoch()
    assert alive == [5, 4, 3, 2, 1]


def test_a_run_that_nobody_watches_says_how_far_it_is_once_a_minute(tmp_path, sets, monkeypatch, capsys):
    trainer = make_trainer(tmp_path, sets, num_epochs=1)
    minutes = []
    trainer.on_minute = minutes.append
    trainer.fit()
    assert not minutes and capsys.readouterr().err == ""
    monkeypatch.setattr("taste.followed.LINE_SECONDS", 0.0)
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


def test_a_loss_that_is_no_number_stops_with_step_and_utterance(tmp_path):
    examples = random_examples(LENGTHS)
    train_set = small_dataset(tmp_path, "train", LENGTHS)
    bad = examples[6]._replace(text=torch.full_like(examples[6].text, math.nan))
    train_set.features.text._values[bad.utt_id] = bad.text
    trainer = make_trainer(tmp_path, (train_set, train_set.subset([0, 1])), checkpoint_every=1)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.fit()
    step = trainer.progress.step + 1
    assert f"step {step}: the loss is nan" in str(caught.value)
    assert "utterances: utt-06. " in str(caught.value)
    kept = load_checkpoint(trainer.last_path)
    assert kept.notes["progress"]["step"] == step - 1
    assert all(value.isfinite().all() for value in kept.weights.values())


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
    trainer.model.load_learned_state(best.weights)
    again = evaluate(trainer.model, sets[1], 2, Accelerator(cpu=True)).averages()
    assert again["loss"] == pytest.approx(min(losses), rel=1e-6)
    with pytest.raises(ValueError, match="weights only"):
        trainer.resume(best)


def test_the_learning_rate_rises_straight_and_falls_as_a_cosine():
    rates = [share_of_peak(step, 104, warmup_steps=4) for step in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[54] == pytest.approx((1 + 0.05) / 2)
    assert rates[104] == pytest.approx(0.05)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))


def test_pretrained_and_new_parts_have_learning_rates_of_their_own():
    config = dataclasses.replace(CONFIG, lr=1e-4, new_parts_lr=1e-2)
    model = small_model()
    groups = parameter_groups(model, config)
    peaks = {id(parameter): group["peak_lr"] for group in groups for parameter in group["params"]}
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(peaks) == len(learning) == sum(len(group["params"]) for group in groups)
    for name, parameter in learning.items():
        assert peaks[id(parameter)] == (1e-4 if name.startswith("llm.") else 1e-2), name
    assert {group["peak_lr"] for group in parameter_groups(small_model("text_only"), config)} == {1e-4}
    assert {group["peak_lr"] for group in parameter_groups(small_model(freeze_llm=True), config)} == {1e-2}


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
        {"new_parts_lr": 0.0},
        {"batch_size": 0},
        {"accumulation_steps": 0},
        {"grad_clip": -1.0},
        {"warmup_steps": -1},
    ],
)
def test_training_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options)).upper()):
        dataclasses.replace(CONFIG, **options)
