"""Turns the UPPER_CASE constants at the top of a script into its command line.

    NUM_EPOCHS = 10  # passes over the training set

becomes `--num-epochs` (or `--num_epochs`), an integer, with the comment as its help. The type is the default's:

    True/False      --flag, --no-flag, --flag true|false
    1, 0.5, "a"     --flag VALUE
    (1, 2)          --flag 1,2        elements typed like the first one
    None            --flag VALUE      text; `none` is None

unless the script names it (int, float, str, Path), which then holds whatever the value is edited to: as an annotation
(`GRAD_CLIP: float = 1`) or, of what may be None, at the beginning of the comment (`LIMIT = None  # int: at most so
many`). Where it names none, 1 takes whole numbers only, and 1.0 decimals too: the error for one says that a point is
missing in the script.
"""

import argparse
import ast
import io
import os
import re
import sys
import tokenize
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cosyvoice.utils.atomic import write_json
from cosyvoice.utils.output_lock import OutputBusyError

if TYPE_CHECKING:
    import torch

CONSTANT_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
NAMED_TYPE = re.compile(r"(int|float|str|Path):\s*")
TYPES: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "Path": Path}
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Constant(NamedTuple):
    """One setting, as the script spells it."""

    name: str  # NUM_EPOCHS
    default: Any
    help: str  # its comment, without the type
    type: str  # as an annotation: `float`, `int | None`; empty where the script names none


class Settings:
    """The values a run uses, read as attributes in lower case: `settings.num_epochs`."""

    def __init__(self, constants: Sequence[Constant], values: Mapping[str, Any]) -> None:
        self._constants = tuple(constants)
        self._values = dict(values)

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values", {})
        if name not in values:
            raise AttributeError(f"no setting {name!r}; there are: {', '.join(sorted(values))}")
        return values[name]

    def to_dict(self) -> dict[str, Any]:
        """Every setting by its lower-case name, as JSON knows values (a path is text, a tuple is a list)."""
        return {name: _as_json(value) for name, value in self._values.items()}

    def replaced(self, **changes: Any) -> "Settings":
        """The same settings with other values.

        Args:
            **changes: values by lower-case name.

        Returns:
            new settings.

        Raises:
            AttributeError: there is no such setting.
        """
        for name in changes:
            getattr(self, name)
        return Settings(self._constants, self._values | changes)

    def describe(self) -> str:
        """A table with one setting a line; a value that is not the script's own shows what that was."""
        name_width = max((len(constant.name) for constant in self._constants), default=0)
        lines = []
        for constant in self._constants:
            value = self._values[constant.name.lower()]
            changed = "" if value == constant.default else f"   (default {constant.default!r})"
            lines.append(f"  {constant.name.ljust(name_width)}  {value!r}{changed}")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the settings as JSON, atomically.

        Args:
            path: the file to write; its folder is made if missing.
        """
        write_json(path, self.to_dict())


def parse_settings(script: str, constants: Mapping[str, Any], argv: Sequence[str] | None = None) -> Settings:
    """Read a script's constants, let the command line override them, and return the values of this run.

    Called at the start of `main()` as `parse_settings(__file__, globals(), argv)`.

    Args:
        script: path of the script; its docstring describes the command.
        constants: the script's globals, where the defaults are looked up.
        argv: command-line words without the program's name; None takes those of the process.

    Returns:
        the settings, one attribute a constant.

    Raises:
        SystemExit: code 2 for an unknown flag or a value of the wrong type, 0 after `--help`.
        TypeError: a constant has a type that no flag can spell (a name with a leading underscore is left alone).
    """
    source = Path(script).read_text(encoding="utf-8")
    found = find_constants(source, constants)
    parser = argparse.ArgumentParser(
        prog=Path(script).name,
        description=ast.get_docstring(ast.parse(source)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for constant in found:
        _add_flag(parser, constant)
    words = sys.argv[1:] if argv is None else argv
    parsed = parser.parse_args([_dashed(word) for word in words])
    return Settings(found, vars(parsed))


def run_script(
    script: str,
    constants: Mapping[str, Any],
    run: Callable[[Settings], int | None],
    argv: Sequence[str] | None = None,
) -> int:
    """Run a script with its settings, and tell in one line what is wrong.

    Args:
        script: as for `parse_settings`.
        constants: likewise.
        run: the script; what it raises of OSError, ValueError and OutputBusyError is for the person at the keyboard.
        argv: as for `parse_settings`.

    Returns:
        the exit code: what `run` gives, 0 for nothing; 1 after an error.
    """
    settings = parse_settings(script, constants, argv)
    try:
        return run(settings) or 0
    except (OSError, ValueError, OutputBusyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def find_constants(source: str, values: Mapping[str, Any]) -> list[Constant]:
    """The top-level UPPER_CASE assignments of a script, in its order, each with its trailing comment.

    Args:
        source: the script's text.
        values: where each constant's value is looked up by name.

    Returns:
        the constants; the last comment on the lines of an assignment is its help.
    """
    comments = {
        token.start[0]: token.string.lstrip("# ").rstrip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            targets, annotation = node.targets, ""
        elif isinstance(node, ast.AnnAssign):
            targets, annotation = [node.target], ast.unparse(node.annotation)
        else:
            continue
        lines = range(node.end_lineno or node.lineno, node.lineno - 1, -1)  # several, where the formatter wrapped it
        comment = next((comments[line] for line in lines if line in comments), "")
        if named := NAMED_TYPE.match(comment):
            comment, annotation = comment[named.end() :], annotation or f"{named[1]} | None"
        for target in targets:
            if isinstance(target, ast.Name) and CONSTANT_NAME.fullmatch(target.id):
                default = values[target.id]
                if annotation.startswith("float") and type(default) is int:
                    default = float(default)
                found.append(Constant(target.id, default, comment, annotation))
    return found


def pick_device(name: str) -> "torch.device":
    """The device a setting names.

    Args:
        name: `auto` (the first CUDA device, else the CPU), `cpu`, `cuda`, or `cuda:1`.

    Returns:
        the device, known to exist.

    Raises:
        ValueError: it is not a device, or this machine has none such.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"DEVICE is {name!r}; expected auto, cpu, cuda, or cuda:<number>") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"DEVICE is {name!r}, but PyTorch sees {torch.cuda.device_count()} CUDA devices here; "
            "use --device auto or --device cpu"
        )
    return device


def describe_device(device: "torch.device") -> str:
    """Name a device, so that nobody computes on a slow one without knowing it.

    Args:
        device: it.

    Returns:
        such as `cuda (NVIDIA H100)`, or `cpu (8 threads; PyTorch sees no CUDA device)`.
    """
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    blind = "" if torch.cuda.is_available() else "; PyTorch sees no CUDA device"
    return f"{device} ({torch.get_num_threads()} threads{blind})"


def _add_flag(parser: argparse.ArgumentParser, constant: Constant) -> None:
    flag = "--" + constant.name.lower().replace("_", "-")
    default = constant.default
    text = f"{constant.help} (default: {default})".replace("%", "%%")
    common: dict[str, Any] = {"dest": constant.name.lower(), "default": default, "help": text}
    if isinstance(default, bool):
        parser.add_argument(flag, nargs="?", const=True, type=_boolean, metavar="true|false", **common)
        parser.add_argument(
            flag.replace("--", "--no-", 1),
            dest=common["dest"],
            action="store_false",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
        return
    named = TYPES.get(constant.type.removesuffix(" | None"), str if default is None else None)
    if named is not None:
        read = named
    elif isinstance(default, tuple):
        read = _comma_list(type(default[0]) if default else str)
    elif isinstance(default, int):
        read = _whole_number(constant)
    elif isinstance(default, (float, str)):
        read = type(default)
    elif isinstance(default, Path):
        read = Path
    else:
        raise TypeError(
            f"{constant.name} is a {type(default).__name__}, which no flag can spell; give it a leading underscore "
            "or move it out of the script's settings"
        )
    if default is None or constant.type.endswith(" | None"):
        read = _or_none(read)
    parser.add_argument(flag, type=read, metavar="VALUE", **common)


def _dashed(word: str) -> str:
    """`--num_epochs=2` -> `--num-epochs=2`; values are left alone."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _boolean(word: str) -> bool:
    if word.lower() not in WORDS:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return WORDS[word.lower()]


def _whole_number(constant: Constant) -> Callable[[str], int]:
    def value(word: str) -> int:
        try:
            return int(word)
        except ValueError:
            float(word)  # else it is no number at all, which argparse says
        raise argparse.ArgumentTypeError(
            f"{word!r} is no whole number, as {constant.name} is in the script; write {constant.default}.0 there if it "
            "may have decimals"
        )

    value.__name__ = "int"  # argparse names the type in its message
    return value


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def value(word: str) -> Any:
        return None if word.lower() == "none" else read(word)

    value.__name__ = getattr(read, "__name__", "value")  # argparse names the type in its message
    return value


def _comma_list(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def values(word: str) -> tuple[Any, ...]:
        return tuple(read(part.strip()) for part in word.split(",") if part.strip())

    values.__name__ = "comma list"
    return values


def _as_json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_as_json(part) for part in value]
    return value
