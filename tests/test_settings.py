import json
from collections import defaultdict
from pathlib import Path

import pytest

from cosyvoice.utils.settings import Settings, describe_device, find_constants, parse_settings, pick_device

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("*.py", "json/*.py", "CosyVoice/tools/*.py", "CosyVoice/cosyvoice/bin/*.py", "benchmarks/*.py")
SCRIPTS = sorted(
    path
    for pattern in (*FOLDERS, "CosyVoice/examples/**/*.py")
    for path in REPOSITORY.glob(pattern)
    if "(__file__, globals(), " in path.read_text(encoding="utf-8")
)
SCRIPT = '''"""Does a thing.

    python script.py --num-epochs 2
"""
import os

NUM_EPOCHS = 10  # passes over 100 % of the training set
LR: float = 1e-3  # learning rate
USE_SPEAKER = True  # with the speaker vector
NAME = "a # b"  # what to call it
LIMIT = None  # int: at most so many
NOTE = None  # free words
FOLDER = None  # Path: where to look
LAYERS = (
    4,
    6,
)  # which ones
MODE = (
    "train"  # a comment as long as the line, which the formatter has wrapped
)
GRAD_CLIP: float = 1  # what was 1.0 before somebody edited it
MINUTES = 30  # float: by the clock; none: no limit
_PRIVATE = {}
lower = 1


def main():
    INSIDE = 3
'''


def _parse(tmp_path: Path, *words: str) -> Settings:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    constants: dict[str, object] = {}
    exec(SCRIPT, constants)
    return parse_settings(str(path), constants, words)


def test_without_a_command_line_the_script_decides(tmp_path: Path) -> None:
    assert _parse(tmp_path).to_dict() == {
        "num_epochs": 10,
        "lr": 1e-3,
        "use_speaker": True,
        "name": "a # b",
        "limit": None,
        "note": None,
        "folder": None,
        "layers": [4, 6],
        "mode": "train",
        "grad_clip": 1.0,
        "minutes": 30.0,
    }
    assert all(type(getattr(_parse(tmp_path), name)) is float for name in ("grad_clip", "minutes"))


def test_the_trailing_comment_is_the_help() -> None:
    values: dict[str, object] = {}
    exec(SCRIPT, values)
    comments = {constant.name: constant.help for constant in find_constants(SCRIPT, values) if constant.name[0] != "_"}
    assert comments["NUM_EPOCHS"] == "passes over 100 % of the training set"
    assert comments["NAME"] == "what to call it"
    assert comments["LAYERS"] == "which ones"
    assert comments["MODE"] == "a comment as long as the line, which the formatter has wrapped"
    assert comments["LIMIT"] == "at most so many"  # its type is not help
    assert comments["NOTE"] == "free words"
    assert "INSIDE" not in comments and "lower" not in comments


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--num-epochs", "2"], "num_epochs", 2),
        (["--num_epochs", "2"], "num_epochs", 2),
        (["--num_epochs=2"], "num_epochs", 2),
        (["--lr", "5e-4"], "lr", 5e-4),
        (["--no-use-speaker"], "use_speaker", False),
        (["--no_use_speaker"], "use_speaker", False),
        (["--use-speaker", "false"], "use_speaker", False),
        (["--use_speaker"], "use_speaker", True),
        (["--name", "my_name--x"], "name", "my_name--x"),
        (["--limit", "7"], "limit", 7),
        (["--limit", "none"], "limit", None),
        (["--note", "7"], "note", "7"),
        (["--folder", "a/b"], "folder", Path("a/b")),
        (["--folder", "none"], "folder", None),
        (["--layers", "1,2, 3"], "layers", (1, 2, 3)),
        (["--grad-clip", "0.5"], "grad_clip", 0.5),
        (["--minutes", "7.5"], "minutes", 7.5),
        (["--minutes", "none"], "minutes", None),
    ],
)
def test_a_flag_overrides_its_constant_with_the_constants_type(
    tmp_path: Path, words: list[str], name: str, value: object
) -> None:
    settings = _parse(tmp_path, *words)
    assert getattr(settings, name) == value
    changed = {key for key, now in settings.to_dict().items() if now != _parse(tmp_path).to_dict()[key]}
    assert changed <= {name}


@pytest.mark.parametrize(
    "words",
    [
        ["--num-epoch", "2"],
        ["--unknown"],
        ["--num-epochs", "two"],
        ["--use-speaker", "maybe"],
        ["--layers", "a"],
        ["x"],
    ],
)
def test_an_unknown_flag_or_wrong_value_is_wrong_usage(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        _parse(tmp_path, *words)
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_a_decimal_in_place_of_a_whole_number_says_where_to_allow_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for value, told in (("2.5", "write 10.0 there if it may have decimals"), ("two", "invalid int value: 'two'")):
        with pytest.raises(SystemExit) as caught:
            _parse(tmp_path, "--num-epochs", value)
        assert caught.value.code == 2
        assert told in " ".join(capsys.readouterr().err.split())


def test_help_shows_the_docstring_the_comments_and_the_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        _parse(tmp_path, "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("Does a thing.", "--num-epochs", "passes over 100 % of the training set (default: 10)"):
        assert part in " ".join(text.split())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_setting_of_every_script_is_explained(script: Path) -> None:
    constants = find_constants(script.read_text(encoding="utf-8"), defaultdict(int))
    assert [constant.name for constant in constants if not constant.help] == []


def test_what_was_resolved_is_shown_and_saved(tmp_path: Path) -> None:
    settings = _parse(tmp_path, "--num-epochs", "2")
    assert "NUM_EPOCHS   2   (default 10)" in settings.describe()
    settings.save(tmp_path / "new" / "settings.json")
    assert json.loads((tmp_path / "new" / "settings.json").read_text()) == settings.to_dict()


def test_a_mistyped_setting_in_code_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="num_epochs"):
        _ = _parse(tmp_path).num_epoch


def test_a_constant_that_no_flag_can_spell_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("TABLE = {}\n")
    with pytest.raises(TypeError, match="TABLE is a dict"):
        parse_settings(str(path), {"TABLE": {}}, [])


def test_devices_are_checked() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda")
    assert describe_device(pick_device("cpu")).startswith("cpu (")
    with pytest.raises(ValueError, match="expected auto, cpu"):
        pick_device("gpu")
    with pytest.raises(ValueError, match="PyTorch sees"):
        pick_device("cuda:99")
