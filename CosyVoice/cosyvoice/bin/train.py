"""Train one part of CosyVoice: the language model, the flow, or HiFT as the generator of a GAN.

In:   a cosyvoice.yaml; two lists of Parquet shards (CosyVoice/tools/make_parquet_list.py writes them)
Out:  <model_dir>/epoch_N.pt     weights after epoch N (a plain state dict), epoch_N.yaml beside it: losses and settings
      <model_dir>/init.pt        weights before the first step
      <model_dir>/last/          all that is needed to go on: weights, optimizers, steps, place in the data, generators
      <model_dir>/metrics.jsonl, loss_curve.png, and TensorBoard's files in --tensorboard_dir

    python CosyVoice/cosyvoice/bin/train.py --model llm --config conf/cosyvoice.yaml \
        --train_data data/train/parquet/data.list --cv_data data/dev/parquet/data.list --model_dir exp/llm
    torchrun --nproc_per_node 4 CosyVoice/cosyvoice/bin/train.py --model flow ...      # four GPUs
    accelerate launch --num_processes 4 CosyVoice/cosyvoice/bin/train.py --model flow ...
    python CosyVoice/cosyvoice/bin/train.py --max_steps 20 ...                         # a look in a minute

The same command goes on where it was stopped or killed. `--checkpoint` gives weights to start from (fine-tuning).
Published commands run as they stand: --use_amp is --dtype bf16, hifigan.pt may be hift.pt, --train_engine is torch_ddp.
Exit codes: 0 complete, or --max_minutes are over; 1 error; 2 unknown flag; 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

import json
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cosyvoice.utils.checkpoint import (
    NOTES_FILE,
    Ema,
    flat_settings,
    load_initial_weights,
    load_state_file,
)
from cosyvoice.utils.common import set_all_random_seed
from cosyvoice.utils.config import load_config, read_config
from cosyvoice.utils.executor import LAST_FOLDER, Batch, Executor, Outcome
from cosyvoice.utils.interrupt import StopRequest
from cosyvoice.utils.output_lock import OutputBusyError, OutputLock
from cosyvoice.utils.provenance import file_digest
from cosyvoice.utils.published_flags import as_own_settings, ignored, without_groups
from cosyvoice.utils.settings import Settings, parse_settings, pick_device
from cosyvoice.utils.stops import NonFiniteLossError, RunStopped
from cosyvoice.utils.train_log import TrainLog
from cosyvoice.utils.train_utils import (
    batch_source,
    build_turns,
    check_data_list,
    config_keys,
    describe_order,
    load_model,
    pipeline_key,
    read_train_conf,
    resolved_config,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

MODEL = None  # str: llm, flow or hifigan
CONFIG = None  # str: cosyvoice.yaml
TRAIN_DATA = None  # str: list of Parquet shards to learn from
CV_DATA = None  # str: list of Parquet shards to check with
MODEL_DIR = None  # str: folder to write
TENSORBOARD_DIR = None  # str: folder for TensorBoard; none: no such files
CHECKPOINT = None  # str: .pt file with weights to start from; none: at random
DTYPE = "fp32"  # fp32, bf16 or fp16: of the matrix products, but for flow and HiFT; weights and loss stay fp32
MAX_EPOCH = None  # int: passes over the data; none: the configuration's
MAX_STEPS = None  # int: steps of the whole training; none: as many as the epochs have
MAX_MINUTES = None  # float: of this run, which then saves and ends well; none: no limit
TOTAL_MINUTES = None  # float: of the whole training, all runs together; none: no limit
CHECK_EVERY = None  # int: epochs between two cross-validations, each of which writes weights; none: 1
SAVE_MINUTES = 10.0  # between two states saved; 0: only at the end of an epoch that is checked
ADVERSARIAL_FROM = None  # int: step of hifigan's first adversarial loss, its generator learns alone before; none: 0
EMA_DECAY = 0.0  # keep a running average of the weights too (epoch_N_ema.pt), e.g. 0.999; 0: none
NUM_THREADS = None  # int: CPU threads for the model; none: PyTorch's choice
NUM_WORKERS = 0  # processes that prepare batches; 0: a thread
PREFETCH = 4  # batches held ready, by each worker
SEED = 1986  # of the weights, the order of the data, and dropout
DEVICE = "auto"  # auto, cpu, cuda, cuda:1
USE_AMP = False  # the published name of --dtype bf16
TRAIN_ENGINE = "torch_ddp"  # torch_ddp; of published commands, whose other one, deepspeed, is not here
DIST_BACKEND = None  # str: of published commands (--ddp.dist_backend); ignored: nccl on GPUs, gloo on CPUs
PIN_MEMORY = False  # of published commands; ignored
TIMEOUT = None  # int: of published commands, seconds; ignored
DEEPSPEED_CONFIG = None  # str: of published commands; ignored
SAVE_STATES = None  # str: of published commands (--deepspeed.save_states); ignored: last/ holds all states


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them.

    Args:
        argv: command-line words without the program's name; None takes those of the process.

    Returns:
        the exit code.
    """
    settings = parse_settings(__file__, globals(), without_groups(sys.argv[1:] if argv is None else argv))
    with StopRequest() as stop:
        try:
            settings = as_own_settings(settings)
            outcome = run(settings, lambda: stop.requested)
            state = "complete" if outcome.complete else "not complete, the same command goes on"
            print(f"train.py: {settings.model} training {state}: {outcome.reason}")
        except RunStopped as stopped:
            print(f"train.py: {stopped}. The same command goes on from there.", file=sys.stderr)
            return stop.exit_code
        except (ValueError, OSError, OutputBusyError, NonFiniteLossError) as error:
            print(f"train.py: error: {error}", file=sys.stderr)
            return 1
        except torch.OutOfMemoryError as error:
            print(f"train.py: error: {out_of_memory(settings, error)}", file=sys.stderr)
            return 1
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return 0


def run(settings: Settings, stop_requested: Callable[[], bool]) -> Outcome:
    """The training from settings to the last checkpoint.

    Args:
        settings: the script's constants, as the command line left them.
        stop_requested: asked between steps.

    Returns:
        how it ended.

    Raises:
        RunStopped: it was asked to stop; the state is saved.
        NonFiniteLossError: a loss is no number.
        ValueError: something in settings, data or checkpoints does not fit; the message says what.
        OSError: a file is missing, or the disk is full.
        OutputBusyError: another process works on this folder.
        torch.OutOfMemoryError: a batch is too large for the GPU.
    """
    check_settings(settings)
    conf = read_train_conf(settings.config, settings.model)
    config = resolved_config(conf, settings.to_dict())
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    if settings.model == "hifigan" and config.dtype != "fp32" and pick_device(settings.device).type == "cpu":
        raise ValueError(
            f"--dtype {config.dtype}: the discriminators take minutes a step so on a CPU; use --dtype fp32, and no "
            "--use_amp"
        )
    accelerator = start_processes(settings)
    # float32 parts of a 16-bit training (the whole flow, HiFT) may round their products' inputs on a GPU
    torch.backends.cuda.matmul.allow_tf32 = config.dtype != "fp32"
    model_dir = Path(settings.model_dir)

    with OutputLock(model_dir / LAST_FOLDER) if accelerator.is_main_process else nullcontext():
        set_all_random_seed(config.seed)
        model = load_model(settings.config, settings.model)
        saved = load_state_file(model_dir / LAST_FOLDER)
        start = check_start(settings.checkpoint, saved[1] if saved else None, model_dir / LAST_FOLDER)
        loaded = load_initial_weights(model, settings.checkpoint) if settings.checkpoint and not saved else None
        model.to(accelerator.device)
        train_batches, cv_batches = open_data(settings, cache=conf.get("cache", False))
        step = saved[1]["progress"]["step"] if saved else 0
        tensorboard_dir = Path(settings.tensorboard_dir) if settings.tensorboard_dir else None
        log = TrainLog(model_dir, tensorboard_dir, step, accelerator.is_main_process)
        notes = {
            "model": flat_settings(read_config(settings.config, [settings.model])),
            "order": describe_order(
                settings.config, settings.model, settings.train_data, config.seed, settings.num_workers
            ),
            "train_conf": {**conf, **vars(config)},
            "start": start,
        }
        executor = Executor(
            model,
            build_turns(model, conf, config, accelerator.device),
            train_batches,
            cv_batches,
            config,
            model_dir,
            accelerator,
            log,
            notes,
            Ema(model, settings.ema_decay) if settings.ema_decay else None,
            stop_requested,
        )
        log.say(describe(settings, model, accelerator))
        if flags := ignored(settings):
            log.say(f"ignored, as nothing here needs them: {', '.join(flags)}")
        set_all_random_seed(config.seed + accelerator.process_index)  # each process its own dropout
        if saved:
            executor.resume(*saved, model_dir / LAST_FOLDER)
        else:
            if loaded:
                log.say(loaded)
            executor.save_weights("init")
        try:
            return executor.fit()
        finally:
            log.close()


def out_of_memory(settings: Settings, error: torch.OutOfMemoryError) -> str:
    """Say what makes a batch smaller, and how the training goes on with it.

    Args:
        settings: the script's settings.
        error: what torch says of the memory.

    Returns:
        the message.
    """
    last = Path(settings.model_dir) / LAST_FOLDER
    _, train_conf = config_keys(settings.model)
    notes = last / NOTES_FILE
    if not notes.is_file():
        way_on = "No checkpoint was written yet: the same command begins anew"
    elif json.loads(notes.read_text(encoding="utf-8"))["progress"]["batches"] == 0:
        way_on = f"The same command then goes on from {last}, the end of an epoch"
    else:
        way_on = (
            f"{last} stands within an epoch, the order of whose batches would change: it cannot be gone on from. Start "
            f"from the latest epoch_N.pt (else init.pt) of {last.parent} with --checkpoint and another --model_dir"
        )
    return (
        f"a batch is too large for the memory of the GPU ({str(error).partition('. ')[0]}). In {settings.config}, "
        f"lower max_frames_in_batch, and raise accum_grad of {train_conf} by as much, which keeps what a step learns "
        f"from. {way_on}"
    )


def check_settings(settings: Settings) -> None:
    """Refuse what cannot work, before anything is built.

    Args:
        settings: the script's settings.

    Raises:
        ValueError: a flag is missing or wrong.
        FileNotFoundError: a file is missing.
    """
    wanted = {"--model": settings.model, "--config": settings.config, "--model_dir": settings.model_dir}
    missing = [flag for flag, value in wanted.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given; see --help")
    config_keys(settings.model)
    for flag, path in {"--train_data": settings.train_data, "--cv_data": settings.cv_data}.items():
        check_data_list(flag, path)
    problems = [
        f"--{name} is {getattr(settings, name)}, wanted {low} or more"
        for name, low in {"num_workers": 0, "prefetch": 1, "seed": 0}.items()
        if getattr(settings, name) < low
    ]
    if settings.num_threads is not None and settings.num_threads < 1:
        problems.append(f"--num_threads is {settings.num_threads}, wanted 1 or more")
    if not 0 <= settings.ema_decay < 1:
        problems.append(f"--ema_decay is {settings.ema_decay}, wanted 0 (none), or less than 1")
    if problems:
        raise ValueError("; ".join(problems))


def check_start(checkpoint: str | None, notes: Mapping[str, Any] | None, last: Path) -> str | None:
    """Refuse to go on with a training that began with other weights than it is given now.

    Args:
        checkpoint: file of the weights to begin with.
        notes: of the state to go on from, where there is one.
        last: its folder, for the message.

    Returns:
        what names the weights that the training began with.

    Raises:
        ValueError: they are others now.
    """
    if checkpoint is None or not Path(checkpoint).is_file():  # whoever reads it first says that it is not there
        return notes.get("start") if notes else None
    now = file_digest(checkpoint)
    if notes is not None and notes.get("start", now) != now:
        raise ValueError(
            f"{last} began with other weights than --checkpoint {checkpoint} holds now, or at random; begin anew in "
            "another --model_dir, or leave --checkpoint out to go on"
        )
    return now


def start_processes(settings: Settings) -> "Accelerator":
    """Join the other processes of torchrun or accelerate, where there are any.

    Args:
        settings: the device, and the model, whose turns decide what a step leaves out.

    Returns:
        the accelerator; it leaves precision and accumulation to the training loop.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    device = pick_device(settings.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # of several processes each is given its own afterwards
    # a turn of a GAN leaves the other part's weights alone
    exchange = DistributedDataParallelKwargs(find_unused_parameters=settings.model == "hifigan")
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[exchange])


def open_data(
    settings: Settings, cache: bool
) -> tuple[Callable[[int, int], Generator[Batch, None, None]], Callable[[], Generator[Batch, None, None]]]:
    """Open the data that the configuration's pipeline prepares.

    Args:
        settings: lists of shards, configuration, model.
        cache: keep what the pipeline derives from a recording in memory after the first pass.

    Returns:
        batches to learn from, by epoch and the number to skip; and batches to check with.
    """
    from cosyvoice.dataset.dataset import Dataset

    key = pipeline_key(settings.config, settings.model)
    pipeline = load_config(settings.config, [key])[key]
    gan = settings.model == "hifigan"
    common = {"gan": gan, "seed": settings.seed, "cache": cache}
    train = Dataset(settings.train_data, pipeline, mode="train", shuffle=True, partition=True, **common)
    checked = Dataset(settings.cv_data, pipeline, mode="dev", shuffle=False, partition=False, **common)
    train_source = batch_source(train, settings.seed, settings.num_workers, settings.prefetch)
    cv_source = batch_source(checked, settings.seed, settings.num_workers, settings.prefetch)
    return train_source, lambda: cv_source(0, 0)


def describe(settings: Settings, model: torch.nn.Module, accelerator: "Accelerator") -> str:
    """One line about what is trained where.

    Args:
        settings: the script's settings.
        model: the model.
        accelerator: device and processes.

    Returns:
        the line.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{settings.model}: {count:,} parameters, {settings.dtype}, on {accelerator.num_processes} x "
        f"{accelerator.device.type} with {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    sys.exit(main())
