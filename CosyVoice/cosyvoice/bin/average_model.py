"""Average the weights of a training's best epochs.

In:   <src_path>/epoch_N.pt and epoch_N.yaml, as train.py writes them, or the published one: epoch_N_whole.pt and .yaml
Out:  <dst_model>: the mean of the weights, each in the type it has in the files

    python CosyVoice/cosyvoice/bin/average_model.py --dst_model exp/llm/llm.pt --src_path exp/llm --num 5 --val_best

Without --val_best it takes the last epochs. With it, only epochs whose loss is the sum of the same parts as the last
one's are compared, however few they are: of a HiFT that learned alone at first, those with discriminators. Exit codes:
0 done, 1 error, 2 unknown flag.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cosyvoice.utils.model_dir import read_weights
from cosyvoice.utils.settings import Settings, run_script
from cosyvoice.utils.state_difference import state_difference
from cosyvoice.utils.tensor_file import save_tensors

DST_MODEL = None  # str: .pt file to write
SRC_PATH = None  # str: folder of the training
NUM = 5  # epochs to average
VAL_BEST = False  # those with the lowest cross-validation loss; false: the last ones

_EPOCH_FILE = re.compile(r"epoch_(\d+)(?:_whole)?\.yaml")


class Epoch(NamedTuple):
    """What is known of the weights after an epoch."""

    number: int
    loss: float  # of the cross-validation
    weights: Path
    parts: frozenset[str]  # what that loss is the sum of


def list_epochs(folder: Path) -> list[Epoch]:
    """Find the epochs of a training.

    Args:
        folder: `model_dir` of train.py.

    Returns:
        the epochs in order.

    Raises:
        FileNotFoundError: there is no such folder, or an epoch has no weights.
        ValueError: a .yaml file does not say the epoch's loss, or an epoch is there twice.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--src_path {folder}: there is no such folder; wanted the --model_dir of train.py")
    epochs, problems = [], []
    for path in folder.glob("epoch_*.yaml"):
        match = _EPOCH_FILE.fullmatch(path.name)
        if match is None:
            continue  # saved within an epoch, by save_per_step
        weights = path.with_suffix(".pt")
        try:
            losses = _losses(path)
            loss = _number(losses["loss"])
        except (YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"{path} gives no loss_dict.loss ({error!r})")
            continue
        if not weights.is_file():
            raise FileNotFoundError(f"{weights} is missing, though {path.name} is there")
        epochs.append(Epoch(int(match[1]), loss, weights, frozenset(losses)))
    numbers = Counter(epoch.number for epoch in epochs)
    problems += [
        f"{folder} has epoch {number} of two trainings, epoch_{number} and epoch_{number}_whole: move one of them away"
        for number, count in numbers.items()
        if count > 1
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return sorted(epochs)


def _losses(path: Path) -> dict[str, str]:
    """The losses that a .yaml file tells; the published one holds a tensor too, as Python objects, which stay nodes."""
    keys = YAML(typ="safe", pure=True).compose(path.read_text(encoding="utf-8")).value
    losses = {key.value: value for key, value in keys}["loss_dict"]
    return {name.value: number.value for name, number in losses.value}


def _number(written: str) -> float:
    """A number as YAML writes it; what is none (.nan) is worse than all others."""
    number = float(written.replace(".nan", "nan").replace(".inf", "inf"))
    return math.inf if math.isnan(number) else number


def choose(epochs: Sequence[Epoch], count: int, best: bool) -> list[Epoch]:
    """Choose the epochs to average.

    Args:
        epochs: all of them, in order.
        count: how many.
        best: those with the lowest loss (of equal ones the earlier) among epochs whose loss has the same parts as the
            last one's, fewer than `count` where there are no more of these; else the last.

    Returns:
        the chosen ones.

    Raises:
        ValueError: there are fewer.
    """
    if not 1 <= count <= len(epochs):
        raise ValueError(f"--num is {count}, but there are {len(epochs)} epochs: train longer, or lower --num")
    if best:
        comparable = [epoch for epoch in epochs if epoch.parts == epochs[-1].parts]
        return sorted(comparable, key=lambda epoch: (epoch.loss, epoch.number))[:count]
    return list(epochs[-count:])


def average(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Average state dicts of one model.

    Args:
        paths: .pt files.

    Returns:
        the means, summed in float32, in the type that they have in the files; what is no fraction (a counter) is that
        of the first file.

    Raises:
        ValueError: keys or shapes differ.
    """
    first = read_weights(paths[0])
    sums = {name: value.float() for name, value in first.items() if value.is_floating_point()}
    for path in paths[1:]:
        weights = read_weights(path)
        missing, unexpected, reshaped = state_difference(first, weights)
        differing = sorted([*missing, *unexpected, *(found.name for found in reshaped)])
        if differing:
            raise ValueError(
                f"{path} and {paths[0]} are of two models: {len(differing)} weights differ in name or shape, "
                f"{', '.join(differing[:5])} first"
            )
        for name, total in sums.items():
            sums[name] = total + weights[name].float()
    return {
        name: (sums[name] / len(paths)).to(value.dtype) if name in sums else value.clone()
        for name, value in first.items()
    }


def run(settings: Settings) -> None:
    """Average as the settings say.

    Args:
        settings: the script's constants, as the command line left them.

    Raises:
        ValueError: a flag is missing, or the files do not fit.
        OSError: a file is missing, or cannot be written.
    """
    if settings.dst_model is None or settings.src_path is None:
        raise ValueError("--dst_model and --src_path must be given; see --help")
    chosen = choose(list_epochs(Path(settings.src_path)), settings.num, settings.val_best)
    for epoch in chosen:
        print(f"epoch {epoch.number}: loss {epoch.loss:.5f} ({epoch.weights})")
    save_tensors(Path(settings.dst_model), average([epoch.weights for epoch in chosen]))
    print(f"wrote the mean of {len(chosen)} to {settings.dst_model}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code.

    Args:
        argv: command-line words without the program's name; None takes those of the process.
    """
    return run_script(__file__, globals(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
