"""From a configuration and a command line to what the training loop works with."""

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cosyvoice.utils.checkpoint import flat_settings
from cosyvoice.utils.config import ConfigError, has_key, load_config, read_config
from cosyvoice.utils.executor import Batch, TrainConfig, Turn
from cosyvoice.utils.interrupt import obey_parent_alone, signals_held_back
from cosyvoice.utils.muon import MuonWithAdamW, muon_groups
from cosyvoice.utils.prefetch import prefetched
from cosyvoice.utils.scheduler import build_scheduler

if TYPE_CHECKING:
    from cosyvoice.dataset.dataset import Dataset

MODELS = ("llm", "flow", "hifigan")
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": MuonWithAdamW}
TRAIN_CONF_KEYS = frozenset(
    (
        *("optim", "optim_conf", "scheduler", "scheduler_conf", "max_epoch", "grad_clip", "accum_grad"),
        *("log_interval", "save_per_step", "optim_d", "optim_conf_d", "scheduler_d", "scheduler_conf_d"),
        *("cache", "adversarial_from", "check_every"),
    )
)
NEEDED_KEYS = ("optim", "optim_conf", "scheduler", "max_epoch", "grad_clip", "accum_grad")
NEEDED_GAN_KEYS = ("optim_d", "optim_conf_d", "scheduler_d")
OVERRIDES = (
    "max_epoch",
    "max_steps",
    "max_minutes",
    "total_minutes",
    "save_minutes",
    "check_every",
    "adversarial_from",
    "dtype",
    "seed",
)
LOG_INTERVAL = 100  # steps, where the configuration gives none


def config_keys(model: str) -> tuple[str, str]:
    """The top-level keys of a configuration that a model is trained by.

    Args:
        model: llm, flow or hifigan.

    Returns:
        those of its data pipeline and of its training settings.

    Raises:
        ValueError: there is no such model.
    """
    if model not in MODELS:
        raise ValueError(f"--model is {model!r}, wanted one of {', '.join(MODELS)}")
    suffix = "_gan" if model == "hifigan" else ""
    return f"data_pipeline{suffix}", f"train_conf{suffix}"


def pipeline_key(path: str | Path, model: str) -> str:
    """The top-level key of the data pipeline that a configuration has for a model.

    Args:
        path: a cosyvoice.yaml.
        model: llm, flow or hifigan.

    Returns:
        the model's own, such as data_pipeline_llm, where there is one; else that which it shares, as published.

    Raises:
        FileNotFoundError, ValueError: there is no such configuration, or it cannot be read.
    """
    shared, _ = config_keys(model)
    own = f"{shared}_{model}"
    return own if has_key(path, own) else shared


def read_train_conf(path: str | Path, model: str) -> dict[str, Any]:
    """Read the training settings of a configuration.

    Args:
        path: a cosyvoice.yaml.
        model: llm, flow or hifigan.

    Returns:
        its `train_conf`, or for hifigan its `train_conf_gan`.

    Raises:
        ConfigError: a setting is missing, or none is known by that name.
    """
    _, key = config_keys(model)
    conf = read_config(path, [key])[key]
    needed = NEEDED_KEYS + (NEEDED_GAN_KEYS if model == "hifigan" else ())
    problems = [f"no {name}" for name in needed if name not in conf]
    problems += [f"unknown {name}" for name in conf if name not in TRAIN_CONF_KEYS]
    if problems:
        raise ConfigError(f"{path}: {key} has {', '.join(problems)}")
    return conf


def resolved_config(conf: Mapping[str, Any], overrides: Mapping[str, Any]) -> TrainConfig:
    """Join the training settings of a configuration with those of the command line.

    Args:
        conf: what `read_train_conf` gives.
        overrides: settings by name; None leaves the configuration's.

    Returns:
        how to train.

    Raises:
        ValueError: a setting is out of range.
    """
    values = {
        "max_epoch": conf["max_epoch"],
        "grad_clip": conf["grad_clip"],
        "accum_grad": conf["accum_grad"],
        "log_interval": conf.get("log_interval", LOG_INTERVAL),
        "save_per_step": conf.get("save_per_step", -1),
        "adversarial_from": conf.get("adversarial_from", 0),
        "check_every": conf.get("check_every", 1),
    }
    values |= {name: overrides[name] for name in OVERRIDES if overrides.get(name) is not None}
    return TrainConfig(**values)


def build_turns(model: nn.Module, conf: Mapping[str, Any], config: TrainConfig, device: torch.device) -> list[Turn]:
    """Build the optimizers, schedules and gradient scalers of a model.

    A model with a `discriminator` gets two: the discriminator's turn comes first, as published.

    Args:
        model: on its device already.
        conf: the training settings of the configuration.
        config: the same with the command line's, for the schedules' ends.
        device: where the model is.

    Returns:
        the turns of a step.

    Raises:
        ValueError: an optimizer or schedule is unknown, or does not take its settings.
    """
    parts: list[tuple[str | None, nn.Module, str]] = [(None, model, "")]
    if hasattr(model, "discriminator"):
        parts = [
            (name, model.get_submodule(name), suffix) for name, suffix in (("discriminator", "_d"), ("generator", ""))
        ]
    turns = []
    for name, part, suffix in parts:
        parameters = [parameter for parameter in part.parameters() if parameter.requires_grad]
        optim = conf[f"optim{suffix}"]
        weights = muon_groups(part) if optim == "muon" else parameters
        optimizer = _optimizer(weights, optim, conf[f"optim_conf{suffix}"])
        scheduler = build_scheduler(
            conf[f"scheduler{suffix}"],
            optimizer,
            conf.get(f"scheduler_conf{suffix}", conf.get("scheduler_conf", {})),
            config.max_steps,
            by_clock=config.total_minutes is not None,
        )
        scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "fp16")
        turns.append(Turn(name, parameters, optimizer, scheduler, scaler))
    return turns


def _optimizer(weights: list[Any], name: str, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    if name not in OPTIMIZERS:
        raise ValueError(f"optim is {name!r}, wanted one of {', '.join(OPTIMIZERS)}")
    try:
        # one pass over the weights for all of them: small models spend a tenth of a step here otherwise
        return OPTIMIZERS[name](weights, **{"fused": True, **settings})
    except TypeError as error:
        raise ValueError(f"optim_conf {dict(settings)} does not fit {name}: {error}") from error


def batch_source(
    dataset: "Dataset", seed: int, num_workers: int, ahead: int
) -> Callable[[int, int], Generator[Batch, None, None]]:
    """Make the batches of an epoch while the model works on earlier ones.

    Args:
        dataset: its order depends on nothing else.
        seed: of the worker processes' generators.
        num_workers: processes that make batches; 0: one thread.
        ahead: batches held ready, by each worker.

    Returns:
        `(epoch, skip)` -> the batches of an epoch without its first `skip`.
    """

    def batches(epoch: int, skip: int) -> Generator[Batch, None, None]:
        dataset.set_epoch(epoch)
        if not num_workers:
            made: Iterator[Batch] = prefetched(_without_first(dataset, skip), ahead)
            yield from made
            return
        from torch.utils.data import DataLoader

        # Its own generator: the loader would draw its workers' seed from the one that training draws from.
        generator = torch.Generator().manual_seed(seed + epoch)
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=ahead,
            generator=generator,
            worker_init_fn=obey_parent_alone,
        )
        with signals_held_back():  # they would end a worker that does not obey its parent alone yet
            made = iter(loader)
        yield from _without_first(made, skip)

    return batches


def _without_first(items: Any, count: int) -> Iterator[Batch]:
    iterator = iter(items)
    for done in range(count):
        if next(iterator, None) is None:
            raise ValueError(
                f"the checkpoint was written after {count} batches of this epoch, but the data give only {done}: "
                "they have changed. Put them back, or start from the latest epoch_N.pt with --checkpoint"
            )
    yield from iterator


def describe_order(path: str | Path, model: str, train_data: str | Path, seed: int, num_workers: int) -> dict[str, Any]:
    """What decides the order of the training data, as JSON values.

    Args:
        path: the configuration.
        model: llm, flow or hifigan.
        train_data: the data list.
        seed: of the order.
        num_workers: processes that take turns in making batches.

    Returns:
        flat settings.
    """
    key = pipeline_key(path, model)
    digest = hashlib.blake2b(Path(train_data).read_bytes(), digest_size=8).hexdigest()
    return {"seed": seed, "train_data": digest, "num_workers": num_workers, **flat_settings(read_config(path, [key]))}


def check_data_list(flag: str, path: str | Path | None) -> Path:
    """Make sure that a data list names something.

    Args:
        flag: how the command line calls it.
        path: the list.

    Returns:
        the path.

    Raises:
        ValueError: it was not given, or is empty.
        FileNotFoundError: there is no such file.
    """
    if path is None:
        raise ValueError(f"{flag} is missing: a list of Parquet shards, one path a line")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{flag} {path}: there is no such file. Write it with CosyVoice/tools/make_parquet_list.py"
        )
    if not path.read_text(encoding="utf-8").strip():
        raise ValueError(f"{flag} {path} is empty: wanted a path of a Parquet shard on each line")
    return path


def load_model(path: str | Path, model: str) -> nn.Module:
    """Build the model that a configuration describes, with weights drawn from the generators as they stand.

    Args:
        path: a cosyvoice.yaml.
        model: llm, flow or hifigan.

    Returns:
        the model, in float32 on the CPU.

    Raises:
        ConfigError: the configuration is refused.
    """
    return load_config(path, [model])[model]
