"""Training CosyVoice's parts through the real entry point, on made-up batches."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_training
import torch
from accelerate import Accelerator
from small_training import TRAIN_BATCHES, training_flags, use_made_up_data, write_config

from cosyvoice.bin import train
from cosyvoice.utils import executor
from cosyvoice.utils.config import load_config
from cosyvoice.utils.model_dir import load_state
from cosyvoice.utils.published_flags import without_groups
from cosyvoice.utils.scheduler import ConstantLR
from cosyvoice.utils.train_log import TrainLog

MODELS = ("llm", "flow", "hifigan")


@pytest.fixture(autouse=True)
def made_up_data():
    earlier = use_made_up_data()
    yield
    train.open_data = earlier


def run(folder: Path, model: str, *flags: str, config: Path | None = None) -> int:
    return train.main(training_flags(folder, model, *flags, config=config))


def state_of(folder: Path) -> dict[str, Any]:
    state = torch.load(folder / "last" / "state.pt", weights_only=True)
    state.pop("notes")  # says how long it took
    return state


def assert_same(one: Any, other: Any, place: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{place}.{number}")
    else:
        assert one == other, place


def losses(folder: Path, tag: str) -> list[float]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if entry["tag"] == tag]


@pytest.mark.parametrize("optim", ["adam", "muon"])
@pytest.mark.parametrize("model", MODELS)
def test_five_and_five_steps_are_ten_bit_for_bit(tmp_path: Path, model: str, optim: str) -> None:
    # 6 batches an epoch: the second half begins in one epoch and ends in the next
    config = write_config(tmp_path / "small.yaml", {"optim: adam\n": f"optim: {optim}\n"})
    flags = ["--ema_decay", "0.9", "--adversarial_from", "2"]
    assert run(tmp_path / "whole", model, "--max_steps", "10", *flags, config=config) == 0
    assert run(tmp_path / "parts", model, "--max_steps", "5", *flags, config=config) == 0
    assert run(tmp_path / "parts", model, "--max_steps", "10", *flags, config=config) == 0
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert len(whole["optimizers"]) == (2 if model == "hifigan" else 1)
    assert_same(whole, parts)


def test_resume_repeats_accumulated_gradients_and_float16_scales(tmp_path: Path) -> None:
    config = write_config(tmp_path / "accumulating.yaml", {"accum_grad: 1": "accum_grad: 2"})
    flags = ["--dtype", "fp16"]
    assert run(tmp_path / "whole", "llm", "--max_steps", "4", *flags, config=config) == 0
    for steps in ("1", "4"):
        assert run(tmp_path / "parts", "llm", "--max_steps", steps, *flags, config=config) == 0
    assert state_of(tmp_path / "whole")["scalers"][0]["scale"] > 0
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))


def test_steps_that_overflow_in_float16_are_counted_and_leave_no_nan_in_the_log(tmp_path: Path, monkeypatch) -> None:
    made = torch.amp.GradScaler
    # far beyond float16 for the first steps: each halves the scale
    monkeypatch.setattr("torch.amp.GradScaler", lambda *args, **more: made(*args, **more | {"init_scale": 2.0**34}))
    assert run(tmp_path / "llm", "llm", "--max_steps", "6", "--dtype", "fp16") == 0
    written = (tmp_path / "llm" / "metrics.jsonl").read_text()
    steps = [entry for entry in map(json.loads, written.splitlines()) if entry["tag"] == "TRAIN"]
    assert "NaN" not in written and "Infinity" not in written
    assert steps[0]["skipped"] == 1 and "grad_norm" not in steps[0]


def test_a_state_from_other_random_numbers_differs(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        assert run(tmp_path / seed, "flow", "--max_steps", "1", "--seed", seed) == 0
    with pytest.raises(AssertionError):
        assert_same(state_of(tmp_path / "1"), state_of(tmp_path / "2"))


@pytest.mark.parametrize(("model", "dtype"), [("llm", "fp32"), ("llm", "bf16"), ("flow", "fp32"), ("hifigan", "fp32")])
def test_loss_falls(tmp_path: Path, model: str, dtype: str) -> None:
    assert run(tmp_path / model, model, "--max_epoch", "4", "--dtype", dtype, "--adversarial_from", "99") == 0
    checked = losses(tmp_path / model, "CV")
    assert len(checked) == 4
    assert checked[-1] < checked[0]


def test_fewer_checks_change_nothing_but_what_is_written(tmp_path: Path) -> None:
    assert run(tmp_path / "often", "llm", "--max_epoch", "5") == 0
    assert run(tmp_path / "seldom", "llm", "--max_epoch", "5", "--check_every", "2") == 0
    assert sorted(file.name for file in (tmp_path / "seldom").glob("epoch_*.pt")) == [
        "epoch_1.pt",
        "epoch_3.pt",
        "epoch_4.pt",
    ]
    weights = [torch.load(tmp_path / name / "epoch_4.pt", weights_only=True) for name in ("often", "seldom")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_what_a_training_writes(tmp_path: Path) -> None:
    folder, flags = tmp_path / "llm", ["--tensorboard_dir", str(tmp_path / "tb"), "--ema_decay", "0.5"]
    assert run(folder, "llm", "--max_epoch", "2", *flags) == 0
    names = {file.name for file in folder.iterdir()}
    assert names >= {"init.pt", "epoch_0.pt", "epoch_1.pt", "epoch_1_ema.pt", "epoch_1.yaml", "loss_curve.png"}
    assert list((tmp_path / "tb").glob("events*"))
    assert (folder / "loss_curve.png").stat().st_size > 5000
    model = load_config(tmp_path / "cosyvoice.yaml", ["llm"])["llm"]
    load_state(model, torch.load(folder / "epoch_1.pt", weights_only=True), "epoch_1.pt")
    notes = json.loads((folder / "last" / "state.json").read_text())
    assert notes["progress"]["complete"]
    assert notes["progress"]["step"] == 2 * TRAIN_BATCHES


@pytest.mark.parametrize("part", ["llm", "flow"])
def test_no_batch_waits_for_the_device(tmp_path: Path, part: str) -> None:
    """The meta device has no values, so whatever the host asks of it is an error, where a GPU would make it wait."""
    model = load_config(write_config(tmp_path / "cosyvoice.yaml"), [part])[part].to("meta")
    forward = type(model).forward
    forward = getattr(forward, "__wrapped__", forward)  # without autocast, which meta has none of
    loss = forward(model, small_training.made_up_batch(1, gan=False), torch.device("meta"))["loss"]
    assert loss.device.type == "meta" and loss.shape == ()
    loss.backward()


def test_a_complete_training_is_left_alone(tmp_path: Path, capsys) -> None:
    assert run(tmp_path / "llm", "llm", "--max_steps", "2") == 0
    before = state_of(tmp_path / "llm")
    assert run(tmp_path / "llm", "llm", "--max_steps", "2") == 0
    assert "complete: 2 steps are done" in capsys.readouterr().out
    assert_same(before, state_of(tmp_path / "llm"))


def test_a_run_ends_after_its_minutes_and_goes_on(tmp_path: Path, capsys) -> None:
    assert run(tmp_path / "llm", "llm", "--max_epoch", "1", "--max_minutes", "1e-9") == 0
    assert "not complete" in capsys.readouterr().out
    assert run(tmp_path / "llm", "llm", "--max_epoch", "1") == 0
    assert (tmp_path / "llm" / "epoch_0.pt").exists()


def test_a_training_may_end_by_the_clock_and_its_schedule_with_it(tmp_path: Path, capsys) -> None:
    config = write_config(tmp_path / "cosine.yaml", {"scheduler: warmuplr": "scheduler: warmupcosine"})
    assert run(tmp_path / "llm", "llm", config=config) == 1
    assert "give --max_steps or --total_minutes" in capsys.readouterr().err
    assert run(tmp_path / "llm", "llm", "--total_minutes", "0.01", config=config) == 0
    assert "complete: 0.01 minutes of training are over" in capsys.readouterr().out
    assert json.loads((tmp_path / "llm" / "last" / "state.json").read_text())["progress"]["seconds"] >= 0.6


@pytest.mark.parametrize("seconds", [18.5, 19.5, 20.5, 21.5])  # in an epoch, at its end, before the next one, in that
def test_the_last_weights_are_written_wherever_the_clock_ends_a_training(tmp_path: Path, monkeypatch, seconds) -> None:
    now = [0.0]
    monkeypatch.setattr(executor, "time", SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime))

    class Falling(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, batch: Any, device: torch.device) -> dict[str, torch.Tensor]:
            return {"loss": (self.weight - 1).square().sum()}

    def batches(epoch: int, skip: int) -> Iterator[dict[str, Any]]:
        for _ in range(skip, 4):  # a second each, and one at the end
            now[0] += 1
            yield {"utts": ["u"]}
        now[0] += 1

    model = Falling()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    turn = executor.Turn(None, list(model.parameters()), optimizer, ConstantLR(optimizer), scaler)
    config = executor.TrainConfig(
        *(20, 5.0, 1, 100, -1), check_every=5, total_minutes=seconds / 60
    )  # epochs, gradient's norm, accumulated, lines, steps between two cross-validations
    log = TrainLog(tmp_path, None, 0, active=True)
    log.draw = lambda title: None
    notes = {"model": {}, "order": {}, "train_conf": {}}
    once = lambda: (batch for batch in [{"utts": ["u"]}])  # noqa: E731
    made = executor.Executor(model, [turn], batches, once, config, tmp_path, Accelerator(cpu=True), log, notes)
    assert made.fit().complete
    (written,) = tmp_path.glob("epoch_*.pt")
    assert torch.equal(torch.load(written)["weight"], model.weight)
    assert written.stem == {18.5: "epoch_3", 19.5: "epoch_3", 20.5: "epoch_3", 21.5: "epoch_4"}[seconds]


def test_a_float32_state_goes_on_in_float16_and_another_optimizer_is_named(tmp_path: Path, capsys) -> None:
    assert run(tmp_path / "llm", "llm", "--max_steps", "2") == 0
    assert run(tmp_path / "llm", "llm", "--max_steps", "4", "--dtype", "fp16") == 0
    config = write_config(tmp_path / "muon.yaml", {"optim: adam\n": "optim: muon\n"})
    assert run(tmp_path / "llm", "llm", "--max_steps", "6", config=config) == 1
    assert "was trained with another optimizer" in capsys.readouterr().err


def test_nan_stops_with_step_and_utterances_and_keeps_the_last_state(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(train, "open_data", train.open_data)
    assert run(tmp_path / "llm", "llm", "--max_steps", "3") == 0
    before = state_of(tmp_path / "llm")
    use_made_up_data(spoiled=4)
    assert run(tmp_path / "llm", "llm", "--max_steps", "10") == 1
    message = capsys.readouterr().err
    assert "step 5: the loss is nan" in message
    assert "utt-4-0, utt-4-1" in message
    assert_same(before, state_of(tmp_path / "llm"))


@pytest.mark.parametrize(
    ("flags", "way_on"),
    [
        ([], "No checkpoint was written yet: the same command begins anew"),
        (["--max_epoch", "1"], "The same command then goes on from {last}, the end of an epoch"),
        (["--max_steps", "2"], "{last} stands within an epoch"),
    ],
    ids=["no checkpoint", "between epochs", "within an epoch"],
)
def test_too_little_memory_names_what_to_change_and_how_to_go_on(
    tmp_path: Path, capsys, monkeypatch, flags: list[str], way_on: str
) -> None:
    if flags:
        assert run(tmp_path / "llm", "llm", *flags) == 0

    def step(self: Any, group: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    with monkeypatch.context() as patch:
        patch.setattr(executor.Executor, "_train_step", step)
        assert run(tmp_path / "llm", "llm", "--max_epoch", "2") == 1
    message = capsys.readouterr().err
    assert "(CUDA out of memory)" in message and "Traceback" not in message
    assert "lower max_frames_in_batch, and raise accum_grad of train_conf" in message
    assert way_on.format(last=tmp_path / "llm" / "last") in message

    smaller = write_config(tmp_path / "smaller.yaml", {"max_frames_in_batch: ": "max_frames_in_batch: 1"})
    goes_on = run(tmp_path / "llm", "llm", "--max_epoch", "2", config=smaller) == 0
    assert goes_on == ("same command" in way_on), "it says what is true"


def test_a_checkpoint_of_another_configuration_is_refused_by_its_keys(tmp_path: Path, capsys) -> None:
    assert run(tmp_path / "llm", "llm", "--max_steps", "1") == 0
    changes = {"text_token_size: 60": "text_token_size: 61"}
    changed = write_config(tmp_path / "other.yaml", changes)
    assert run(tmp_path / "llm", "llm", "--max_steps", "2", config=changed) == 1
    assert "llm.text_token_size was 60, is 61" in capsys.readouterr().err


def test_another_order_of_the_data_is_refused_within_an_epoch_only(tmp_path: Path, capsys) -> None:
    assert run(tmp_path / "llm", "llm", "--max_steps", "2") == 0
    assert run(tmp_path / "llm", "llm", "--max_steps", "3", "--seed", "5") == 1
    assert "seed was 1986, is 5" in capsys.readouterr().err
    assert run(tmp_path / "llm", "llm", "--max_epoch", "1") == 0
    assert run(tmp_path / "llm", "llm", "--max_epoch", "2", "--seed", "5") == 0


def test_initial_weights_are_loaded_strictly_and_from_half_precision(tmp_path: Path, capsys) -> None:
    assert run(tmp_path / "first", "flow", "--max_steps", "1") == 0
    weights = torch.load(tmp_path / "first" / "epoch_0.pt", weights_only=True)
    torch.save({name: value.half() for name, value in weights.items()}, tmp_path / "half.pt")
    assert run(tmp_path / "second", "flow", "--max_steps", "1", "--checkpoint", str(tmp_path / "half.pt")) == 0
    taken = torch.load(tmp_path / "second" / "init.pt", weights_only=True)
    assert_same({name: value.half().float() for name, value in weights.items()}, taken)

    name = next(iter(weights))
    weights["other"] = weights.pop(name)
    torch.save(weights, tmp_path / "wrong.pt")
    assert run(tmp_path / "third", "flow", "--max_steps", "1", "--checkpoint", str(tmp_path / "wrong.pt")) == 1
    message = capsys.readouterr().err
    assert f"1 missing: {name}" in message
    assert "1 unexpected: other" in message


def test_a_training_does_not_go_on_from_another_start(tmp_path: Path, capsys) -> None:
    assert run(tmp_path / "first", "llm", "--max_steps", "1") == 0
    start = tmp_path / "start.pt"
    start.write_bytes((tmp_path / "first" / "init.pt").read_bytes())
    flags = ["--checkpoint", str(start), "--max_steps"]
    assert run(tmp_path / "second", "llm", *flags, "1") == 0
    assert run(tmp_path / "second", "llm", *flags, "2") == 0
    assert run(tmp_path / "second", "llm", "--max_steps", "3") == 0  # without the flag it goes on too
    start.write_bytes((tmp_path / "first" / "epoch_0.pt").read_bytes())
    assert run(tmp_path / "second", "llm", *flags, "4") == 1
    assert "began with other weights" in capsys.readouterr().err
    start.unlink()
    assert run(tmp_path / "second", "llm", *flags, "4") == 0
    start.write_bytes((tmp_path / "first" / "init.pt").read_bytes())
    assert run(tmp_path / "first", "llm", *flags, "2") == 1
    assert "or at random" in capsys.readouterr().err


def test_a_vocoder_alone_starts_a_gan(tmp_path: Path) -> None:
    assert run(tmp_path / "first", "hifigan", "--max_steps", "1") == 0
    weights = torch.load(tmp_path / "first" / "epoch_0.pt", weights_only=True)
    generator = {name[10:]: value for name, value in weights.items() if name.startswith("generator.")}
    torch.save(generator, tmp_path / "hift.pt")
    assert run(tmp_path / "second", "hifigan", "--max_steps", "1", "--checkpoint", str(tmp_path / "hift.pt")) == 0
    taken = torch.load(tmp_path / "second" / "init.pt", weights_only=True)
    assert_same(generator, {name[10:]: value for name, value in taken.items() if name.startswith("generator.")})


@pytest.mark.parametrize("prefix", ["", "generator."], ids=["vocoder", "hifigan"])
def test_a_gan_starts_from_the_older_weight_norms_names(tmp_path: Path, prefix: str) -> None:
    assert run(tmp_path / "first", "hifigan", "--max_steps", "1") == 0
    weights = torch.load(tmp_path / "first" / "epoch_0.pt", weights_only=True)
    older = {}
    for name, value in weights.items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        name = name.replace("parametrizations.weight.original1", "weight_v")
        if prefix or name.startswith("generator."):
            older[name if prefix else name.removeprefix("generator.")] = value
    torch.save(older, tmp_path / "hift.pt")
    assert run(tmp_path / "second", "hifigan", "--max_steps", "1", "--checkpoint", str(tmp_path / "hift.pt")) == 0
    taken = torch.load(tmp_path / "second" / "init.pt", weights_only=True)
    chosen = prefix or "generator."
    assert_same(
        *({name: value for name, value in part.items() if name.startswith(chosen)} for part in (weights, taken))
    )
    if prefix:  # the period discriminator's own weight_g too
        assert_same(weights, taken)


PUBLISHED_FLAGS = (  # of examples/libritts/cosyvoice/run.sh @ ace7c47, but for those of paths
    *("--train_engine", "torch_ddp", "--ddp.dist_backend", "nccl", "--num_workers", "0", "--prefetch", "100"),
    *("--pin_memory", "--use_amp", "--deepspeed_config", "./conf/ds_stage2.json"),
    *("--deepspeed.save_states", "model+optimizer"),
)


def test_a_published_command_trains_in_bfloat16_and_says_what_it_ignores(tmp_path: Path, capsys) -> None:
    flags = [*PUBLISHED_FLAGS, "--timeout", "300", "--max_steps", "2"]
    assert run(tmp_path / "published", "llm", *flags) == 0
    out = capsys.readouterr().out
    assert "parameters, bf16, on" in out
    ignored = "--dist_backend, --pin_memory, --timeout, --deepspeed_config, --save_states"
    assert f"ignored, as nothing here needs them: {ignored}" in out
    assert run(tmp_path / "own", "llm", "--dtype", "bf16", "--max_steps", "2") == 0
    assert "ignored" not in capsys.readouterr().out
    assert_same(state_of(tmp_path / "published"), state_of(tmp_path / "own"))


def test_published_flags_may_have_dashes() -> None:
    words = without_groups(["--train-engine", "x", "--ddp.dist-backend=gloo", "--deepspeed.save-states", "a--ddp.b"])
    settings = train.parse_settings(train.__file__, vars(train), words)
    assert (settings.train_engine, settings.dist_backend, settings.save_states) == ("x", "gloo", "a--ddp.b")


def test_a_released_folders_vocoder_stands_for_the_hifigan_that_published_commands_ask_for(
    tmp_path: Path, capsys
) -> None:
    assert run(tmp_path / "first", "hifigan", "--max_steps", "1") == 0
    (tmp_path / "released").mkdir()
    weights = torch.load(tmp_path / "first" / "init.pt", weights_only=True)
    generator = {name[10:]: value for name, value in weights.items() if name.startswith("generator.")}
    torch.save(generator, tmp_path / "released" / "hift.pt")
    asked = ["--checkpoint", str(tmp_path / "released" / "hifigan.pt"), "--max_steps", "1"]
    assert run(tmp_path / "second", "hifigan", *asked) == 0
    assert f"initial weights of the generator from {tmp_path / 'released' / 'hift.pt'}" in capsys.readouterr().out
    (tmp_path / "released" / "hift.pt").unlink()
    assert run(tmp_path / "third", "hifigan", *asked) == 1
    assert "hifigan.pt: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "hift"], "--model is 'hift', wanted one of llm, flow, hifigan"),
        (["--train_data", "/nowhere/data.list"], "there is no such file"),
        (["--checkpoint", "/nowhere/llm.pt"], "there is no such file"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--train_engine", "deepspeed"], "--train_engine deepspeed: only torch_ddp is here. Leave it out"),
        (["--use_amp", "--dtype", "fp16"], "--use_amp is --dtype bf16, and --dtype is fp16"),
        (["--max_steps", "0"], "max_steps is 0"),
        (["--prefetch", "0", "--ema_decay", "1"], "--prefetch is 0, wanted 1 or more; --ema_decay is 1.0"),
    ],
)
def test_wrong_flags_are_named(tmp_path: Path, capsys, flags: list[str], message: str) -> None:
    assert run(tmp_path / "llm", "llm", *flags) == 1
    assert message in capsys.readouterr().err


def test_an_empty_data_list_is_named(tmp_path: Path, capsys) -> None:
    (tmp_path / "empty.list").write_text("\n")
    assert run(tmp_path / "llm", "llm", "--cv_data", str(tmp_path / "empty.list")) == 1
    assert "empty.list is empty" in capsys.readouterr().err


def test_data_without_a_batch_is_an_error(tmp_path: Path, capsys) -> None:
    use_made_up_data(batches=0)
    assert run(tmp_path / "llm", "llm") == 1
    assert "the training data gives no batch" in capsys.readouterr().err


def test_a_damaged_state_is_named(tmp_path: Path, capsys) -> None:
    assert run(tmp_path / "llm", "llm", "--max_steps", "1") == 0
    path = tmp_path / "llm" / "last" / "state.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert run(tmp_path / "llm", "llm", "--max_steps", "2") == 1
    assert "state.pt is damaged" in capsys.readouterr().err


def command(folder: Path, model: str, *flags: str, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *launcher, small_training.__file__, *training_flags(folder, model, *flags)]


def environment() -> dict[str, str]:
    root = Path(__file__).parents[1]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (root, root / "CosyVoice")))}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path, workers: int) -> None:
    as_many = ("--num_workers", str(workers))
    words = command(tmp_path / "llm", "llm", "--max_epoch", "1000", *as_many)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=environment(), start_new_session=True, **pipes) as running:
        for line in running.stdout:
            if line.startswith("TRAIN epoch 1"):
                break
        os.killpg(running.pid, signal.SIGTERM)  # its workers hear it too, as of SLURM's
        _, message = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM
    assert "stopped after step" in message
    step = json.loads((tmp_path / "llm" / "last" / "state.json").read_text())["progress"]["step"]
    assert run(tmp_path / "llm", "llm", "--max_steps", str(step + 1), *as_many) == 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llm", "hifigan"])
def test_two_processes_train_and_resume_bit_for_bit(tmp_path: Path, model: str) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    for folder, steps in (("whole", "4"), ("parts", "2"), ("parts", "4")):
        words = command(tmp_path / folder, model, "--max_steps", steps, launcher=launcher)
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stderr[-2000:]
    assert len(state_of(tmp_path / "whole")["random"]) == 2
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
