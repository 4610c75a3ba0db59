"""Opens a folder in the released CosyVoice layout: checks it, builds its parts, reads its sizes.

cosyvoice.yaml                        every class and size (read through `cosyvoice.utils.config`)
llm.pt  flow.pt  hift.pt              state dicts, loaded strictly
campplus.onnx  speech_tokenizer_v1.onnx   speaker vectors and S3 units
spk2info.pt                           named speakers; a folder may do without
*.zip                                 TorchScript archives, for `load_jit` only; they are never unpacked
"""

import json
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cosyvoice.utils.abridge import abridge
from cosyvoice.utils.config import Call, ConfigError, load_config, read_config
from cosyvoice.utils.state_difference import state_difference

if TYPE_CHECKING:
    from cosyvoice.flow.flow import MaskedDiffWithXvec
    from cosyvoice.hifigan.generator import HiFTGenerator
    from cosyvoice.llm.llm import TransformerLM

CONFIG_FILE = "cosyvoice.yaml"
WEIGHT_FILES = {"llm": "llm.pt", "flow": "flow.pt", "hift": "hift.pt"}
PART_CLASSES = {"llm": "TransformerLM", "flow": "MaskedDiffWithXvec", "hift": "HiFTGenerator"}
SPEAKER_MODEL_FILE = "campplus.onnx"
SPEECH_TOKENIZER_FILE = "speech_tokenizer_v1.onnx"
SPEAKERS_FILE = "spk2info.pt"
REQUIRED_FILES = (CONFIG_FILE, *WEIGHT_FILES.values(), SPEAKER_MODEL_FILE, SPEECH_TOKENIZER_FILE)

COUNTS = ("epoch", "step")
SHOWN_NAMES = 5  # state-dict keys a message lists before it only counts
GIT_LFS_POINTER = b"version https://git-lfs"

# The published code saved with the older of torch's two weight norms at first, which names its tensors otherwise.
WEIGHT_NORM_NAMES = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


class ModelSizes(NamedTuple):
    """The numbers that other stages must agree on."""

    text_vocab: int  # rows of the text embedding
    text_width: int  # width of the text embedding
    lm_width: int  # width of the language model's input
    speech_vocab: int  # S3 codes; EOS is this number
    spk_width: int  # width of a speaker vector
    sample_rate: int  # Hz of the sound made, and of the prompt's mel
    token_rate: int  # S3 codes a second


class ModelDir:
    """A folder in the released layout. Nothing is ever downloaded: a mistyped path is an error.

    Args:
        path: the folder.
    """

    def __init__(self, path: "str | Path | ModelDir") -> None:
        self.path: Path = path.path if isinstance(path, ModelDir) else Path(path).expanduser()

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"ModelDir({str(self.path)!r})"

    def file(self, name: str) -> Path:
        """The path of one file of the folder, whether it is there or not."""
        return self.path / name

    def check(self, files: Sequence[str] = REQUIRED_FILES) -> "ModelDir":
        """Make sure that files are there and are what they should be, before any is opened.

        Args:
            files: names wanted, e.g. `("cosyvoice.yaml", "llm.pt")`.

        Returns:
            The folder itself.

        Raises:
            FileNotFoundError: the folder or some of the files are missing (the message lists all that is wrong).
            ValueError: the folder holds another kind of model, or files are empty or git-lfs pointers.
        """
        remedy = f"Fetch or repair it with: python setup_cosyvoice.py --model-dir {self.path}"
        if not self.path.is_dir():
            what = "is a file, not a folder" if self.path.exists() else "does not exist"
            raise FileNotFoundError(
                f"model folder {self.path} {what} (looked from {Path.cwd()}). Nothing is downloaded by itself. {remedy}"
            )
        missing = [name for name in files if not self.file(name).is_file()]
        if missing and (other := self._other_kind()):
            raise ValueError(f"{self.path} is {other}; wanted a CosyVoice-300M folder with {', '.join(missing)}")
        broken = [f"{name} is {fault}" for name in files if name not in missing and (fault := self._fault(name))]
        problems = [f"{name} is missing" for name in missing] + broken
        if problems:
            error = FileNotFoundError if missing else ValueError
            raise error(f"model folder {self.path}: {'; '.join(problems)}. {remedy}")
        return self

    def _other_kind(self) -> str | None:
        """What the folder seems to be, where it is no CosyVoice-300M folder."""
        for name, kind in {"cosyvoice2.yaml": "CosyVoice2", "cosyvoice3.yaml": "CosyVoice3"}.items():
            if self.file(name).is_file() and not self.file(CONFIG_FILE).is_file():
                return f"a {kind} folder (it has {name})"
        if self.file("config.json").is_file() and not self.file(CONFIG_FILE).is_file():
            try:
                kind = json.loads(self.file("config.json").read_text(encoding="utf-8")).get("model_type", "unknown")
            except (ValueError, AttributeError):
                kind = "unknown"
            return f"a transformers folder of type {kind!r} (it has config.json)"
        return None

    def _fault(self, name: str) -> str | None:
        with self.file(name).open("rb") as file:
            head = file.read(len(GIT_LFS_POINTER))
        if not head:
            return "empty"
        return "a git-lfs pointer, not the file itself" if head == GIT_LFS_POINTER else None


@overload
def load_part(
    model_dir: str | Path | ModelDir, part: Literal["llm"], device: str | torch.device = ..., dtype: torch.dtype = ...
) -> "TransformerLM": ...


@overload
def load_part(
    model_dir: str | Path | ModelDir, part: Literal["flow"], device: str | torch.device = ..., dtype: torch.dtype = ...
) -> "MaskedDiffWithXvec": ...


@overload
def load_part(
    model_dir: str | Path | ModelDir, part: Literal["hift"], device: str | torch.device = ..., dtype: torch.dtype = ...
) -> "HiFTGenerator": ...


@overload
def load_part(
    model_dir: str | Path | ModelDir, part: str, device: str | torch.device = ..., dtype: torch.dtype = ...
) -> nn.Module: ...


def load_part(
    model_dir: str | Path | ModelDir,
    part: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Build one part of the model and load its weights, strictly.

    Args:
        model_dir: a folder in the released layout.
        part: "llm", "flow" or "hift".
        device: where the module shall live.
        dtype: its floating-point type; files in half precision are converted.

    Returns:
        The module in eval mode.

    Raises:
        FileNotFoundError: a file is missing.
        ConfigError: the configuration is refused (see `cosyvoice.utils.config`).
        ValueError: there is no such part, or the weights cannot be read or do not fit the configuration.
    """
    if part not in WEIGHT_FILES:
        raise ValueError(f"a model has the parts {', '.join(WEIGHT_FILES)}; got {part!r}")
    folder = ModelDir(model_dir).check((CONFIG_FILE, WEIGHT_FILES[part]))
    with _NoInitialisation():
        module = load_config(folder.file(CONFIG_FILE), [part])[part]
    if type(module).__name__ != PART_CLASSES[part]:
        raise ConfigError(
            f"{folder.file(CONFIG_FILE)}: {part} is a {type(module).__name__}, wanted a {PART_CLASSES[part]}"
        )
    load_weights(module, folder.file(WEIGHT_FILES[part]))
    return module.to(device=device, dtype=dtype).eval()


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a state dict into a module; every key and shape must agree.

    Args:
        module: takes the weights, converted to its own dtype and device.
        path: a .pt file. A whole HiFi-GAN's checkpoint will do for its generator.

    Raises:
        ValueError: the file cannot be read, or keys or shapes disagree (the message counts them, and lists the first).
    """
    load_state(module, _of_generator(read_weights(path)), path)


def load_state(module: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Put a state dict into a module; every key and shape must agree.

    Weight norms may have the names of `torch.nn.utils.weight_norm` or those of its successor in `parametrizations`.

    Args:
        module: takes the weights, converted to its own dtype and device.
        weights: {name: tensor}.
        source: where they come from, for the message.

    Raises:
        ValueError: keys or shapes disagree (the message counts them, and lists the first).
    """
    expected = module.state_dict()
    weights = _with_weight_norm_names(weights, expected)
    missing, unexpected, reshaped = state_difference(expected, weights)
    shapes = [f"{name} {shape} (configuration: {configured})" for name, shape, configured in reshaped]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    differences = [f"{len(names)} {kind}: {abridge(names, SHOWN_NAMES)}" for kind, names in kinds.items() if names]
    if differences:
        raise ValueError(
            f"{source} does not fit {type(module).__name__} as {CONFIG_FILE} describes it: "
            f"{'; '.join(differences)}. The two files must come from one release"
        )
    module.load_state_dict(weights)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Open a state dict, mapped from its file where the format allows: then a tensor is read when it is used.

    Args:
        path: a .pt file.

    Returns:
        {name: tensor} on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see `read_torch_file`; or the file holds something other than a state dict.
    """
    weights = read_torch_file(path)
    if isinstance(weights, dict):  # the published train.py puts two numbers among the tensors
        weights = {name: value for name, value in weights.items() if not (name in COUNTS and isinstance(value, int))}
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        found = type(weights).__name__
        if isinstance(weights, dict):
            others = [name for name, value in weights.items() if not isinstance(value, Tensor)]
            found = f"a dict in which {others[:SHOWN_NAMES]} are no tensors"
        raise ValueError(f"{path} holds {found}; wanted a state dict {{name: tensor}}")
    return weights


def read_torch_file(path: str | Path) -> Any:
    """Open a file that `torch.save` wrote; nothing in it is run.

    Args:
        path: a .pt file.

    Returns:
        What was saved, on the CPU, mapped from the file where its format allows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, a TorchScript archive, or holds more than tensors and plain values.
    """
    path = Path(path)
    remedy = f"Fetch it again with: python setup_cosyvoice.py --model-dir {path.parent}"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}. {remedy}")
    records = _zip_records(path)
    if any(os.path.basename(record.filename) == "constants.pkl" for record in records):
        raise ValueError(f"{path} is a TorchScript archive, which only load_jit=True takes; wanted tensors. {remedy}")
    # No zip archive is what PyTorch before 1.6 wrote. It cannot be mapped, and neither can a compressed record.
    can_be_mapped = bool(records) and all(record.compress_type == zipfile.ZIP_STORED for record in records)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped)
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, pickle.UnpicklingError) as error:
        cause = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated, damaged, or holds more than tensors: {cause}. {remedy}"
        ) from error


def text_embedding_table(model_dir: str | Path | ModelDir) -> Tensor:
    """Read the language model's text embedding, and nothing else of its weights.

    Args:
        model_dir: a folder in the released layout.

    Returns:
        The table, [V, D], float32, on the CPU.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: llm.pt cannot be read, or its table has another shape than the configuration says.
    """
    folder = ModelDir(model_dir).check((CONFIG_FILE, WEIGHT_FILES["llm"]))
    wanted = sizes(folder)
    weights = read_weights(folder.file(WEIGHT_FILES["llm"]))
    table = weights.get("text_embedding.weight")
    found = "no such table" if table is None else f"[{', '.join(map(str, table.shape))}]"
    if table is None or table.shape != (wanted.text_vocab, wanted.text_width):
        raise ValueError(
            f"text_embedding.weight of {folder.file('llm.pt')}: got {found}, "
            f"{CONFIG_FILE} says [{wanted.text_vocab}, {wanted.text_width}]. The two files must come from one release"
        )
    return table.to(torch.float32, copy=True)


def get_tokenizer(model_dir: str | Path | ModelDir) -> Any:
    """Build the text tokenizer that the folder's configuration names.

    Args:
        model_dir: a folder in the released layout.

    Returns:
        An openai-whisper `Tokenizer`, with `encode(text, allowed_special=...)` and `decode(tokens)`.

    Raises:
        FileNotFoundError: the configuration is missing.
        ConfigError: the configuration names no tokenizer, or one this project does not build.
    """
    folder = ModelDir(model_dir).check((CONFIG_FILE,))
    return load_config(folder.file(CONFIG_FILE), ["get_tokenizer"])["get_tokenizer"]()


def sizes(model_dir: str | Path | ModelDir) -> ModelSizes:
    """Read the model's sizes from its configuration; builds nothing.

    Args:
        model_dir: a folder in the released layout.

    Returns:
        The sizes.

    Raises:
        FileNotFoundError: the configuration is missing.
        ConfigError: the configuration is refused, or lacks one of the sizes.
    """
    path = ModelDir(model_dir).check((CONFIG_FILE,)).file(CONFIG_FILE)
    config = read_config(path, ["sample_rate", "llm", "flow"])
    arguments: dict[str, Any] = {"sample_rate": config["sample_rate"]}
    for part in ("llm", "flow"):
        if not isinstance(config[part], Call):
            raise ConfigError(f"{path}: {part} is {config[part]!r}, wanted !new:cosyvoice...")
        arguments |= {f"{part}.{name}": value for name, value in config[part].arguments.items()}
    names = {
        "text_vocab": "llm.text_token_size",
        "text_width": "llm.text_encoder_input_size",
        "lm_width": "llm.llm_input_size",
        "speech_vocab": "llm.speech_token_size",
        "spk_width": "llm.spk_embed_dim",
        "sample_rate": "sample_rate",
        "token_rate": "flow.input_frame_rate",
    }
    faulty = [name for name in names.values() if not isinstance(arguments.get(name), int) or arguments[name] < 1]
    if faulty:
        raise ConfigError(f"{path} gives no positive number for {', '.join(faulty)}")
    return ModelSizes(**{field: arguments[name] for field, name in names.items()})


class _NoInitialisation(TorchFunctionMode):
    """Skips `torch.nn.init`: the weights are loaded over it, and drawing 300 M numbers takes seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _of_generator(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The generator's own weights, where the file is the checkpoint of a whole HiFi-GAN."""
    prefix = "generator."
    inner = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    return inner or weights


def _with_weight_norm_names(weights: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, those of an older weight norm under the names that the module has for them."""
    renamed = {}
    for name, tensor in weights.items():
        owner, dot, last = name.rpartition(".")
        newer = f"{owner}{dot}{WEIGHT_NORM_NAMES.get(last, last)}"
        renamed[newer if name not in expected and newer in expected and newer not in weights else name] = tensor
    return renamed


def _zip_records(path: Path) -> list[zipfile.ZipInfo]:
    """What a zip archive holds; nothing where the file is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except zipfile.BadZipFile:
        return []
