"""What the two export programs share: which parts there are, and how an exported one is held against its source."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cosyvoice.transformer.embedding import FIRST_REACH_FRAMES
from cosyvoice.utils.model_dir import load_part

CHECKED_LENGTHS = (1, 2, 7, 64, 257)  # frames; traced at another length, so that one written into the trace shows
TRACED_LENGTH = 5
# Largest difference over largest magnitude. In half precision, rounding alone gives about 1e-3.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2}

assert max(CHECKED_LENGTHS) < FIRST_REACH_FRAMES


class ExportError(ValueError):
    """An exported file does not compute what its source computes."""


class Pair(NamedTuple):
    """One output, computed by the model and by what was exported."""

    wanted: Tensor
    got: Tensor


def check_agreement(name: str, pairs: Iterable[Pair], dtype: torch.dtype) -> float:
    """Hold what an export computed against the model's own output.

    Args:
        name: of the file, for the message.
        pairs: outputs on the same inputs; shapes must agree.
        dtype: precision of the export, which sets the tolerance.

    Returns:
        The largest difference, over the largest magnitude of its output.

    Raises:
        ExportError: a shape differs, or a difference is above the tolerance or no number.
    """
    worst = 0.0
    for wanted, got in pairs:
        if wanted.shape != got.shape:
            raise ExportError(f"{name} gives the shape {list(got.shape)} where the model gives {list(wanted.shape)}")
        if wanted.numel() == 0:
            continue
        magnitude = wanted.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        difference = float((wanted.float() - got.float().to(wanted.device)).abs().max() / magnitude)
        if not difference <= TOLERANCES[dtype]:  # nan is not
            raise ExportError(
                f"{name} differs from the model by {difference:.1e} of the largest output, allowed is "
                f"{TOLERANCES[dtype]:.0e}; it was not written"
            )
        worst = max(worst, difference)
    return worst


def load_modules(model_dir: str | Path, names: Sequence[str], known: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Load the parts of a model that are to be exported, one after the other.

    Args:
        model_dir: a folder in the released layout.
        names: such as `llm.text_encoder`: the part, then where the module stands in it.
        known: the names there are.

    Yields:
        The name and the module, in float32 on the CPU, in eval mode.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there is no such name, or the folder is refused (see `cosyvoice.utils.model_dir`).
    """
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"there is no part {', '.join(unknown) or '(none given)'}; expected some of {', '.join(known)}"
        )
    for part in ("llm", "flow"):
        wanted = [name for name in names if name.startswith(f"{part}.")]
        whole = load_part(model_dir, part) if wanted else None
        for name in wanted:
            yield name, attrgetter(name.removeprefix(f"{part}."))(whole)


@contextmanager
def quiet_tracing() -> Iterator[None]:
    """Hide what PyTorch says about its TorchScript entry points and about sizes that our checks cover anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message=".*(legacy TorchScript|dynamic_axes|constant folding|ONNX).*")
        yield
