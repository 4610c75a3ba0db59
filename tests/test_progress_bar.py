import io

import pytest

from taste import progress_bar as module
from taste.progress_bar import progress_bar


class Clock:
    """Time that goes on by so many seconds whenever it is looked at."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now = seconds, 0.0

    def monotonic(self) -> float:
        self.now += self.seconds
        return self.now


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps of 25 seconds; what `on_line` was called for."""
    monkeypatch.setattr(module, "time", Clock(25.0))
    return []


def test_where_no_terminal_shows_a_bar_there_is_a_line_a_minute(lines, capsys):
    steps = progress_bar(
        range(7), "epoch 1/2", "steps", done=1_000, note=lambda: "loss 1.5", on_line=lambda: lines.append("")
    )
    assert list(steps) == list(range(7))
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "epoch 1/2: 1,003 of 1,007 steps, 0.04 a second, 01:40 left, loss 1.5",
        "epoch 1/2: 1,006 of 1,007 steps, 0.04 a second, 00:25 left, loss 1.5",
    ]
    assert len(lines) == 2


def test_items_of_several_units_count_as_so_many(lines, capsys):
    batches = ["abcd", "efgh", "ij"]
    assert list(progress_bar(batches, "work", "letters", done=10, size=len)) == batches
    assert capsys.readouterr().err.splitlines() == ["work: 20 of 20 letters, 0.133 a second, 00:00 left"]


def test_a_short_loop_without_a_terminal_says_nothing(capsys):
    assert list(progress_bar("abc", "short", "letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_all_but_the_main_process_say_nothing(lines, capsys):
    assert list(progress_bar(range(7), "work", "steps", active=False, on_line=lambda: lines.append(""))) == list(
        range(7)
    )
    assert capsys.readouterr().err == "" and not lines


def test_a_terminal_has_a_bar_and_no_lines(lines, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    for _ in progress_bar(range(7), "work", "steps", on_line=lambda: lines.append("")):
        pass
    assert "work:" in terminal.getvalue() and "\n" not in terminal.getvalue()
    assert len(lines) == 2
