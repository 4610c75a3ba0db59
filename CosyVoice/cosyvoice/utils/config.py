"""Reads released cosyvoice.yaml files (HyperPyYAML syntax) through a list of allowed names.

A released file names classes and functions: `!new:` builds an object, `!name:` binds arguments to a function,
`!ref <key>` points at another key, and `!apply:` calls a function while the file is loaded (the released files seed
every random generator that way). HyperPyYAML imports and calls whatever a file names; even without a tag, its plain
scalar `(!!python/object/apply:os.system [ls])` runs a command. A model folder is data from outside, so this module
parses the same syntax with ruamel.yaml's composer, which builds no objects, and works in two steps:

1. `read_config` checks the kind of every tag of the whole file, then turns the wanted keys (and what they `!ref`) into
   plain values and `Call` records, whose names must be on the list. Nothing is imported.
2. `load_config` imports the listed names and builds the records, leaving every random generator as it was.

What is checked is what is built: both steps look at the same nodes, and there is no second parse.
"""

import importlib
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MODEL_KEYS = ("sample_rate", "llm", "flow", "hift", "get_tokenizer", "feat_extractor", "allowed_special")

# name in a released file -> where it is in this project
CLASSES = {
    "cosyvoice.llm.llm.TransformerLM": "cosyvoice.llm.llm.TransformerLM",
    "cosyvoice.transformer.encoder.ConformerEncoder": "cosyvoice.transformer.encoder.ConformerEncoder",
    "cosyvoice.transformer.encoder.TransformerEncoder": "cosyvoice.transformer.encoder.TransformerEncoder",
    "cosyvoice.flow.flow.MaskedDiffWithXvec": "cosyvoice.flow.flow.MaskedDiffWithXvec",
    "cosyvoice.flow.length_regulator.InterpolateRegulator": "cosyvoice.flow.length_regulator.InterpolateRegulator",
    "cosyvoice.flow.flow_matching.ConditionalCFM": "cosyvoice.flow.flow_matching.ConditionalCFM",
    "cosyvoice.flow.decoder.ConditionalDecoder": "cosyvoice.flow.decoder.ConditionalDecoder",
    "cosyvoice.hifigan.generator.HiFTGenerator": "cosyvoice.hifigan.generator.HiFTGenerator",
    "cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor": "cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor",
    "cosyvoice.hifigan.hifigan.HiFiGan": "cosyvoice.hifigan.hifigan.HiFiGan",
    "cosyvoice.hifigan.discriminator.MultipleDiscriminator": "cosyvoice.hifigan.discriminator.MultipleDiscriminator",
    "cosyvoice.hifigan.discriminator.MultiResSpecDiscriminator": (
        "cosyvoice.hifigan.discriminator.MultiResSpecDiscriminator"
    ),
    "matcha.hifigan.models.MultiPeriodDiscriminator": "cosyvoice.hifigan.discriminator.MultiPeriodDiscriminator",
    "omegaconf.DictConfig": "omegaconf.DictConfig",
}
FUNCTIONS = {
    "cosyvoice.utils.common.ras_sampling": "cosyvoice.utils.common.ras_sampling",
    "cosyvoice.utils.common.random_sampling": "cosyvoice.utils.common.random_sampling",
    "matcha.utils.audio.mel_spectrogram": "cosyvoice.utils.audio.mel_spectrogram",
    "whisper.tokenizer.get_tokenizer": "whisper.tokenizer.get_tokenizer",
} | {
    f"cosyvoice.dataset.processor.{step}": f"cosyvoice.dataset.processor.{step}"
    for step in (
        "parquet_opener",
        "tokenize",
        "filter",
        "frames_of_tokens",
        "resample",
        "truncate",
        "compute_fbank",
        "compute_f0",
        "parse_embedding",
        "shuffle",
        "sort",
        "batch",
        "padding",
    )
}
BUILDABLE = {"!new:": CLASSES, "!name:": FUNCTIONS}

# The released files call these while loading. They may stand in a file, under keys that are not built; they never run.
SEEDING_CALLS = frozenset(
    {"random.seed", "numpy.random.seed", "torch.manual_seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all"}
)

MAX_FILE_BYTES = 1 << 16  # a released file has 8 kB
MAX_DEPTH = 32  # nesting, and length of a chain of references
MAX_VALUES = 100_000  # values after references are followed

_YAML_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = frozenset(_YAML_TAG + kind for kind in ("str", "int", "float", "bool", "null"))
_DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)
_REFERENCE = re.compile(r"<([A-Za-z_]\w*)>", re.ASCII)


class ConfigError(ValueError):
    """A configuration file that cannot be read, or that names something outside the list."""


class Call(NamedTuple):
    """One `!new:` or `!name:` of a file, checked but not imported."""

    tag: str  # "!new:" or "!name:"
    name: str  # as written in the file, e.g. cosyvoice.llm.llm.TransformerLM
    arguments: dict[str, Any]  # plain values and further Calls
    where: str  # file:line, for messages


def read_config(path: str | Path, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """Check a configuration file and return its wanted keys, with nothing imported or built.

    Args:
        path: a cosyvoice.yaml in HyperPyYAML syntax.
        keys: top-level keys wanted, all of which must exist; None takes those of `MODEL_KEYS` that do.

    Returns:
        {key: value}, where `!new:` and `!name:` are `Call` records and `!ref` is followed.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the file is not plain YAML, lacks a key, has a tag of another kind anywhere, or names something
            outside the list in what is wanted.
    """
    document = _Document(Path(path))
    wanted = [key for key in MODEL_KEYS if key in document.nodes] if keys is None else list(keys)
    absent = [key for key in wanted if key not in document.nodes]
    if absent:
        raise ConfigError(f"{path} has no key {', '.join(map(repr, absent))}; it has {', '.join(document.nodes)}")
    return {key: document.value_of(key) for key in wanted}


def has_key(path: str | Path, key: str) -> bool:
    """Whether a configuration file has a top-level key; nothing is built.

    Args:
        path: a cosyvoice.yaml in HyperPyYAML syntax.
        key: wanted.

    Returns:
        True where it is there.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the file is not plain YAML, or has a tag of another kind.
    """
    return key in _Document(Path(path)).nodes


def load_config(path: str | Path, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """Build the objects a released configuration describes.

    Only the wanted keys and what they refer to are built. Random generators (Python, NumPy, torch) keep their states.

    Args:
        path: a cosyvoice.yaml in HyperPyYAML syntax.
        keys: top-level keys to build, all of which must exist; None builds those of `MODEL_KEYS` that do.

    Returns:
        {key: value}: modules for `!new:`, callables with their arguments bound for `!name:`, plain values otherwise.
        Two references to one key give the same object.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: see `read_config`; or a class refuses the arguments that the file gives it.

    Source: the released files follow hyperpyyaml; names as in FunAudioLLM/CosyVoice @ ace7c47.
    """
    checked = read_config(path, keys)
    built: dict[int, Any] = {}
    with random_states_kept():
        return {key: _build(value, built) for key, value in checked.items()}


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Give Python's, NumPy's and torch's random generators back the states they had on entry."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def _build(value: Any, built: dict[int, Any]) -> Any:
    """Turn checked values into objects; `built` keeps one object a Call, so that references share it."""
    if isinstance(value, Call):
        if id(value) not in built:
            built[id(value)] = _build_call(value, built)
        return built[id(value)]
    if isinstance(value, dict):
        return {key: _build(item, built) for key, item in value.items()}
    if isinstance(value, list):
        return [_build(item, built) for item in value]
    return value


def _build_call(call: Call, built: dict[int, Any]) -> Any:
    module, attribute = BUILDABLE[call.tag][call.name].rsplit(".", maxsplit=1)
    target = getattr(importlib.import_module(module), attribute)
    arguments = _build(call.arguments, built)
    if call.tag == "!name:":
        return partial(target, **arguments)
    try:
        return target(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{call.where}: {call.name} cannot be built from these arguments: {error}") from error


class _Document:
    """One configuration file: parsed, the kind of every tag checked; values made, their names checked, on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._yaml = YAML(typ="safe", pure=True)
        self._calls: dict[int, Call] = {}
        self._open_keys: list[str] = []
        self._values_made = 0
        root = self._parse()
        if not isinstance(root, MappingNode):
            raise ConfigError(f"{path} is not a mapping of keys to values, so it is no cosyvoice.yaml")
        self._check(root)
        self.nodes: dict[str, Node] = {key.value: value for key, value in root.value}

    def value_of(self, key: str) -> Any:
        """The value of a top-level key, references followed."""
        if key in self._open_keys or len(self._open_keys) >= MAX_DEPTH:
            chain = " -> ".join([*self._open_keys[-5:], key])
            raise ConfigError(f"{self.path}: references that never end: {chain}")
        self._open_keys.append(key)
        value = self._value(self.nodes[key])
        self._open_keys.pop()
        return value

    # ---- parsing: text -> nodes, nothing constructed

    def _parse(self) -> Node | None:
        with self.path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"{self.path} is over {MAX_FILE_BYTES} bytes, far larger than any released file")
        try:
            text = content.decode("utf-8-sig")
            self._check_structure(text)
            return self._yaml.compose(text)
        except (UnicodeDecodeError, YAMLError) as error:
            raise ConfigError(f"{self.path} is not a YAML text: {error}") from error

    def _check_structure(self, text: str) -> None:
        """Refuse, before any node exists, what no released file has and what makes parsers run away."""
        documents = depth = 0
        for event in YAML(typ="safe", pure=True).parse(text):
            if isinstance(event, AliasEvent):
                raise self._refusal(event, f"alias *{event.anchor}", "write the value out, or use !ref <key>")
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1 or event.version is not None or event.tags:
                    raise self._refusal(event, "a second document or a % directive", "a file holds one plain document")
            depth += isinstance(event, CollectionStartEvent)
            depth -= isinstance(event, CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise self._refusal(event, f"nesting deeper than {MAX_DEPTH}", "released files nest 5 deep")

    # ---- checking: the kind of every tag of the file, whether built or not; `_call` checks the names of what is built

    def _check(self, node: Node) -> None:
        tag = str(node.tag)
        if isinstance(node, MappingNode):
            keys = [key for key, _ in node.value]
            for key in keys:
                if not isinstance(key, ScalarNode) or str(key.tag) != _YAML_TAG + "str":
                    raise self._refusal(key, "a key that is not a plain string", "merge keys (<<) are not supported")
            names: set[str] = set()
            for key in keys:
                if key.value in names:
                    raise self._refusal(key, f"key {key.value!r}, given twice", "keep one")
                names.add(key.value)
            children, plain_tag = [value for _, value in node.value], tag == _YAML_TAG + "map"
        elif isinstance(node, SequenceNode):
            children, plain_tag = node.value, tag == _YAML_TAG + "seq"
        else:
            children, plain_tag = [], tag in _SCALAR_TAGS or tag == "!ref"
        if not plain_tag:
            self._check_named(node, tag)
        for child in children:
            self._check(child)

    def _check_named(self, node: Node, tag: str) -> None:
        kind, colon, name = tag.partition(":")
        kind += colon
        well_formed = _DOTTED_NAME.fullmatch(name) is not None
        if kind in BUILDABLE and well_formed:
            return  # published recipes name parts of other packages under keys that are not built, so not imported
        if kind == "!apply:" and name in SEEDING_CALLS:
            return
        raise self._refusal(node, tag, "only !new:, !name: and !ref are read, and calls that seed are left out")

    # ---- making values: only the keys wanted

    def _value(self, node: Node) -> Any:
        self._values_made += 1
        if self._values_made > MAX_VALUES:
            raise ConfigError(f"{self.path}: its references expand to over {MAX_VALUES} values")
        tag = str(node.tag)
        if tag == "!ref":
            return self._referred(node)
        if tag in _SCALAR_TAGS:
            return self._scalar(node)
        if tag == _YAML_TAG + "seq":
            return [self._value(item) for item in node.value]
        if tag == _YAML_TAG + "map":
            return {key.value: self._value(item) for key, item in node.value}
        if id(node) not in self._calls:
            self._calls[id(node)] = self._call(node, tag)
        return self._calls[id(node)]

    def _referred(self, node: Node) -> Any:
        match = _REFERENCE.fullmatch(node.value)
        if match is None:
            raise self._refusal(node, f"!ref {node.value}", "only !ref <key> is read: no arithmetic, no attributes")
        if match[1] not in self.nodes:
            raise self._refusal(node, f"!ref {node.value}", f"there is no key {match[1]!r}")
        return self.value_of(match[1])

    def _scalar(self, node: Node) -> Any:
        try:
            value = self._yaml.constructor.construct_object(node)
        except ValueError as error:
            raise ConfigError(f"{self._where(node)}: {node.value[:40]!r} is no {node.tag}: {error}") from error
        if isinstance(value, str) and "${" in value:
            raise self._refusal(node, repr(value), "omegaconf would look such a name up in the environment")
        return value

    def _call(self, node: Node, tag: str) -> Call:
        kind, _, name = tag.partition(":")
        kind += ":"
        if name not in BUILDABLE.get(kind, {}):
            known = ", ".join(sorted(CLASSES) + sorted(FUNCTIONS))
            raise self._refusal(node, tag, f"this project builds CosyVoice-300M only, out of: {known}")
        if isinstance(node, MappingNode):
            return Call(kind, name, {key.value: self._value(item) for key, item in node.value}, self._where(node))
        if isinstance(node, ScalarNode) and node.value == "":
            return Call(kind, name, {}, self._where(node))
        raise self._refusal(node, f"{tag} with unnamed arguments", "write them as `name: value`")

    # ---- messages

    def _where(self, item: Any) -> str:
        return f"{self.path}:{item.start_mark.line + 1}"

    def _refusal(self, item: Any, what: str, instead: str) -> ConfigError:
        return ConfigError(f"{self._where(item)}: refused {what} ({instead})")
