"""How natural a sound is, as UTMOS predicts listeners' opinions."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cosyvoice.utils.model_dir import read_torch_file
from taste.listening import import_listener, resampled

# N samples
WEIGHTS_FILE = "utmos_state_dict.pt"  # of the strong learner, as Blinorot/UTMOS-PyTorch on Hugging Face has it
INSTALL_UTMOS = "pip install 'utmos-pytorch>=0.1,<0.2'"
FETCH_WEIGHTS = f"hf download Blinorot/UTMOS-PyTorch {WEIGHTS_FILE} --local-dir"


class FoundUtmos(NamedTuple):
    """A judge of naturalness, or why there is none."""

    judge: "Utmos | None"
    reason: str  # "skipped: needs ..."; "" where there is one, or the model folder has no weights of one


class Utmos:
    """UTMOS (Saeki et al., Interspeech 2022; its strong learner), by the package utmos-pytorch.

    Args:
        weights_path: its state dict.
        device: where to compute.

    Raises:
        ListenerMissingError: utmos-pytorch is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or of another model.
    """

    def __init__(self, weights_path: Path, device: str = "cpu") -> None:
        package = import_listener("utmos_pytorch.utmos_torch", INSTALL_UTMOS)
        with torch.device("meta"):
            wanted = {name: value.shape for name, value in package.UTMOSModel().state_dict().items()}
        remedy = f"Fetch it again: {FETCH_WEIGHTS} {weights_path.parent}"
        try:
            found = {name: value.shape for name, value in read_torch_file(weights_path).items()}
        except ValueError as error:  # its advice is for the model folder's own files
            raise ValueError(f"{weights_path} is truncated, damaged, or holds more than tensors. {remedy}") from error
        # the package itself leaves random what it does not find; what else wav2vec 2.0 has may be in the file
        if lacking := [name for name in wanted if found.get(name) != wanted[name]]:
            raise ValueError(
                f"{weights_path} is not of utmos-pytorch's model: {len(lacking)} of its {len(wanted)} weights are not "
                f"there in their shape, {lacking[0]} first. {remedy}"
            )
        self._model = package.UTMOSScoreTorch(str(weights_path), device)
        self._device = device

    def score(self, waveform: Tensor, rate_hz: int) -> float:
        """Predict the mean opinion of listeners.

        Args:
            waveform: [N] float, -1..1, of 50 ms or more.
            rate_hz: of it.

        Returns:
            the score, from 1 (bad) to 5 (excellent).
        """
        return float(self._model.score(resampled(waveform, rate_hz).to(self._device)))


def find_utmos(model_dir: str | Path, device: str = "cpu") -> FoundUtmos:
    """Open UTMOS where the model folder has its weights, which is how a user asks for it.

    Args:
        model_dir: a model folder.
        device: where to compute.

    Returns:
        the judge, or why there is none.
    """
    path = Path(model_dir) / WEIGHTS_FILE
    if not path.is_file():
        return FoundUtmos(None, "")
    try:
        return FoundUtmos(Utmos(path, device), "")
    except (ImportError, ValueError) as error:
        return FoundUtmos(None, f"skipped: {error}")
