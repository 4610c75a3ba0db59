"""What the command line of the published train.py says, in the settings of ours.

Source: FunAudioLLM/CosyVoice cosyvoice/bin/train.py and examples/libritts/cosyvoice/run.sh @ ace7c47.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cosyvoice.utils.model_dir import WEIGHT_FILES
from cosyvoice.utils.settings import Settings

IGNORED = ("dist_backend", "pin_memory", "timeout", "deepspeed_config", "save_states")
FLAG_GROUP = re.compile(r"--(ddp|deepspeed)\.")
UNRELEASED_CHECKPOINT = "hifigan.pt"


def without_groups(words: Sequence[str]) -> list[str]:
    """Write published flags as settings are named: `--ddp.dist_backend` -> `--dist_backend`.

    Args:
        words: of a command line.

    Returns:
        the words.
    """
    return [FLAG_GROUP.sub("--", word) if word.startswith("--") else word for word in words]


def as_own_settings(settings: Settings) -> Settings:
    """Put what published commands say into the settings that mean it here.

    Args:
        settings: of train.py.

    Returns:
        settings with dtype bf16 for `use_amp`, and, where hifigan is to start from a hifigan.pt that is not there, with
        the hift.pt beside it: the published recipe asks for `<model>.pt`, and no released folder has hifigan's.

    Raises:
        ValueError: the engine is not torch_ddp, or two dtypes are asked for.
    """
    if settings.train_engine != "torch_ddp":
        raise ValueError(
            f"--train_engine {settings.train_engine}: only torch_ddp is here. Leave it out, start a process a GPU with "
            "torchrun or accelerate launch, and give --dtype bf16; accumulation and clipping are train_conf's"
        )
    changes: dict[str, Any] = {}
    if settings.use_amp:
        if settings.dtype == "fp16":
            raise ValueError("--use_amp is --dtype bf16, and --dtype is fp16; leave one of them out")
        changes["dtype"] = "bf16"
    if settings.model == "hifigan" and settings.checkpoint:
        asked = Path(settings.checkpoint)
        vocoder = asked.with_name(WEIGHT_FILES["hift"])
        if asked.name == UNRELEASED_CHECKPOINT and not asked.is_file() and vocoder.is_file():
            changes["checkpoint"] = str(vocoder)  # the line about initial weights names it
    return settings.replaced(**changes)


def ignored(settings: Settings) -> list[str]:
    """Name the flags that were given and change nothing.

    Args:
        settings: of train.py.

    Returns:
        the flags.
    """
    return [f"--{name}" for name in IGNORED if getattr(settings, name)]
