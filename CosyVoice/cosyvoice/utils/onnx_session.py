"""Runs an ONNX file on the device that is really there, and says which one that is."""

import logging
import warnings
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import onnxruntime

logger = logging.getLogger(__name__)

CUDA_PROVIDER = "CUDAExecutionProvider"
CPU_PROVIDER = "CPUExecutionProvider"


class OnnxSession:
    """An onnxruntime session that opens at its first use.

    Args:
        path: the .onnx file.
        device: "cuda" asks for the CUDA provider, and warns where onnxruntime ends up on the CPU all the same.
        threads: CPU threads for one call; None takes torch's number.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu", threads: int | None = None) -> None:
        self.path = Path(path)
        self.device = torch.device(device)
        self.threads = threads

    @cached_property
    def _session(self) -> "onnxruntime.InferenceSession":
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf

        if not self.path.is_file():
            raise FileNotFoundError(f"there is no {self.path}; fetch it with: python setup_cosyvoice.py")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = self.threads or torch.get_num_threads()
        providers: list[str | tuple[str, dict[str, int]]] = [CPU_PROVIDER]
        cuda_wanted = self.device.type == "cuda"
        if cuda_wanted and CUDA_PROVIDER in onnxruntime.get_available_providers():
            providers.insert(0, (CUDA_PROVIDER, {"device_id": self.device.index or 0}))
        try:
            session = onnxruntime.InferenceSession(str(self.path), sess_options=options, providers=providers)
        except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf) as error:
            raise ValueError(f"{self.path} cannot be opened as an ONNX model: {error}") from error
        in_use = session.get_providers()[0]
        logger.info("%s runs on %s", self.path.name, in_use)
        if cuda_wanted and in_use != CUDA_PROVIDER:
            warnings.warn(
                f"{self.path.name}: CUDA was wanted but onnxruntime runs on the CPU, which is slower. "
                "Install onnxruntime-gpu in place of onnxruntime, with the CUDA and cuDNN versions it names",
                stacklevel=2,
            )
        return session

    @property
    def provider(self) -> str:
        """The provider in use, e.g. CPUExecutionProvider (opens the session)."""
        return self._session.get_providers()[0]

    def run(self, *inputs: np.ndarray) -> np.ndarray:
        """Run the model on its inputs, in the file's order, and return its first output.

        Args:
            inputs: one array for each input of the file.

        Returns:
            The first output.

        Raises:
            FileNotFoundError: the file is not there.
            ValueError: the file is no ONNX model, or it takes another number of inputs.
        """
        names = [entry.name for entry in self._session.get_inputs()]
        if len(names) != len(inputs):
            raise ValueError(f"{self.path} takes {len(names)} inputs ({', '.join(names)}); got {len(inputs)}")
        return self._session.run(None, dict(zip(names, inputs, strict=True)))[0]
