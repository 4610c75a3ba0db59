import math
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch

from cosyvoice.utils.output_lock import OutputBusyError
from taste import feature_writer
from taste.background_flush import BackgroundFlush
from taste.feature_files import chunk_folder, stored_bytes
from taste.feature_reader import FeatureFileError, load_file, open_features, open_units
from taste.feature_writer import FeatureWriteError, FeatureWriter

# A Whisper frames, 50 Hz   D channels
REPOSITORY = Path(__file__).parent.parent
WIDTH = 16


def _value(number: int, frames: int = 20) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    mid, final = torch.randn(2, frames, WIDTH, generator=generator).half()
    return {"mid": mid, "final": final}


def _write(path: Path, numbers: range, save_mode: str = "auto", chunk: int = 3, frames: int = 20) -> None:
    with FeatureWriter(path, nested=True) as writer:
        for number in numbers:
            if f"u{number}" not in writer.done_ids:
                writer.add(f"u{number}", _value(number, frames))
            if number % chunk == chunk - 1:
                writer.flush()
        writer.finish(save_mode)


def _check(path: Path, numbers: range) -> None:
    features = open_features(path)
    assert set(features) == {f"u{number}" for number in numbers}
    for number in numbers:
        for field, expected in _value(number).items():
            assert torch.equal(features[f"u{number}"][field], expected)


@pytest.mark.parametrize("save_mode", ["single", "chunks", "auto"])
def test_every_save_mode_reads_back_the_same_values(tmp_path: Path, save_mode: str) -> None:
    path = tmp_path / "new" / "train_whisper_feats.pt"
    _write(path, range(8), save_mode)
    _check(path, range(8))
    assert path.exists() == (save_mode != "chunks")
    assert chunk_folder(path).exists() == (save_mode == "chunks")
    assert not list(path.parent.glob("*.lock")) and not list(path.parent.glob(".*"))
    if save_mode == "chunks":
        assert sorted(file.name for file in chunk_folder(path).iterdir()) == ["000000.pt", "000001.pt", "000002.pt"]
        _check(chunk_folder(path), range(8))


@pytest.mark.parametrize("save_mode", ["single", "chunks"])
def test_what_is_forgotten_is_written_anew(tmp_path: Path, save_mode: str) -> None:
    path = tmp_path / "a.pt"
    _write(path, range(8), save_mode)
    with FeatureWriter(path, nested=True) as writer:
        writer.forget(["u2", "u5", "unknown"])
        assert writer.done_ids == {f"u{number}" for number in (0, 1, 3, 4, 6, 7)} == set(open_features(path))
        assert path.exists() == (save_mode == "single")  # chunks stay apart: all together may be more than memory
        writer.add("u2", _value(2))
        writer.add("u5", _value(5))
        writer.finish(save_mode)
    _check(path, range(8))


def test_a_file_too_large_to_be_mapped_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    _write(path, range(3), "single")

    def out_of_memory(*_, **__):
        raise RuntimeError("unable to mmap 64 bytes from file <a.pt>: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "load", out_of_memory)
    with pytest.raises(FeatureFileError, match="the file is whole") as caught:
        open_features(path)
    assert "remove it" not in str(caught.value)


def test_the_single_file_has_the_layout_of_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    _write(path, range(4), "single")
    content = torch.load(path, weights_only=True, mmap=True)
    assert list(content) == ["mid", "final"] and set(content["mid"]) == {"u0", "u1", "u2", "u3"}
    with FeatureWriter(tmp_path / "flat.pt") as writer:
        writer.add("a", {"text": "héllo", "text_token": torch.tensor([1, 2]), "duration_s": 1.5})
        writer.add("b", [1, 2, 3])
        writer.finish()
    content = torch.load(tmp_path / "flat.pt", weights_only=True)
    assert content["b"] == [1, 2, 3] and content["a"]["text"] == "héllo"


def test_a_view_is_stored_without_the_rest_of_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with FeatureWriter(path) as writer:
        writer.add("a", torch.zeros(1500, 1280)[:10])
        writer.finish("single")
    assert path.stat().st_size < 60_000


def test_a_resumed_writer_skips_what_the_chunks_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with FeatureWriter(path, nested=True) as writer:
        writer.add("u0", _value(0))
        writer.flush()
        writer.add("u1", _value(1))  # lost: never flushed
    with FeatureWriter(path, nested=True) as writer:
        assert writer.done_ids == {"u0"}
        with pytest.raises(ValueError, match="u0"):
            writer.add("u0", _value(0))
    _write(path, range(5))
    _check(path, range(5))


def test_to_resume_no_more_is_in_memory_than_the_values_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with FeatureWriter(path) as writer:
        for number in range(12):
            writer.add(f"u{number}", list(range(50_000)))
            writer.flush()
    tracemalloc.start()
    try:
        load_file(chunk_folder(path) / "000000.pt")
        _, most_of_one = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        with FeatureWriter(path) as writer:
            assert len(writer.done_ids) == 12
        _, most_of_all = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_of_all < 3 * most_of_one


class _HeldSave:
    """Stands for the function that writes a chunk: waits for a release, and notes what was written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.released = threading.Semaphore(0), threading.Semaphore(0)
        self.written: list[str] = []
        self._save = feature_writer._save
        monkeypatch.setattr(feature_writer, "_save", self)

    def __call__(self, path: Path, content: dict[str, object]) -> None:
        self.begun.release()
        assert self.released.acquire(timeout=30)
        self._save(path, content)
        self.written.append(f"{path.parent.stem}/{path.stem}")


def test_while_a_chunk_is_written_the_next_one_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, held = tmp_path / "a.pt", _HeldSave(monkeypatch)
    with FeatureWriter(path, nested=True, chunk_utterances=1) as writer:
        with BackgroundFlush([writer]) as background:
            writer.add("u0", _value(0))
            background.start()
            assert held.begun.acquire(timeout=30) and not writer.is_full
            writer.add("u1", _value(1))
            assert writer.is_full and writer.done_ids == set()  # nothing is done before it is written
            with pytest.raises(ValueError, match="has a value for 'u0' already"):
                writer.add("u0", _value(0))
            held.released.release(2)
            background.start()  # waits for the first
            assert "u0" in writer.done_ids and held.written[:1] == ["a/000000"]
        assert writer.done_ids == {"u0", "u1"}  # the end of the block waits
        held.released.release(1)
        writer.finish("single")
    _check(path, range(2))


def test_of_several_writers_chunks_are_written_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = _HeldSave(monkeypatch)
    held.released.release(5)
    with FeatureWriter(tmp_path / "a.pt") as first, FeatureWriter(tmp_path / "b.pt") as second:
        with BackgroundFlush([second, first]) as background:
            for number in range(2):
                first.add(f"u{number}", [number])
                second.add(f"u{number}", [number])
                background.start()
        second.add("u2", [2])
        second.flush()
    assert held.written == ["b/000000", "a/000000", "b/000001", "a/000001", "b/000002"]


@pytest.mark.parametrize("where", ["start", "wait", "end"])
def test_what_could_not_be_written_meanwhile_is_told_and_kept(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = FeatureWriter(tmp_path / "a.pt"), FeatureWriter(tmp_path / "b.pt")

    def add(number: int) -> None:
        for writer in (first, second):
            writer.add(f"u{number}", [number])

    def fail(path: Path, content: dict[str, object]) -> None:
        raise OSError(28, "No space left on device")

    with first, second:
        with monkeypatch.context() as full_disk:
            message = r"a.chunks/000001.pt: No space left on device; the 1 utterances written before are safe"
            with pytest.raises(FeatureWriteError, match=message), BackgroundFlush([first, second]) as background:
                add(0)
                background.start()
                background.wait()
                full_disk.setattr(feature_writer, "_save", fail)
                add(1)
                background.start()
                add(2)
                if where != "end":
                    getattr(background, where)()
                    pytest.fail("the failure was not told")
        for writer in (first, second):
            assert writer.done_ids == {"u0"} == set(open_features(writer.output_path))
        for writer in (first, second):  # the disk has room again
            writer.finish("single")
            assert dict(open_features(writer.output_path)) == {f"u{number}": [number] for number in range(3)}


def test_an_error_of_the_caller_waits_for_the_chunk_in_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, held = tmp_path / "a.pt", _HeldSave(monkeypatch)
    with FeatureWriter(path, nested=True) as writer:
        with pytest.raises(KeyError, match="mine"), BackgroundFlush([writer]) as background:
            writer.add("u0", _value(0))
            background.start()
            threading.Timer(0.2, held.released.release).start()
            raise KeyError("mine")
        assert writer.done_ids == {"u0"}
    _check(path, range(1))


def test_a_finished_file_grows_by_the_new_utterances_only(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    _write(path, range(4), "single")
    before = stored_bytes(path)
    with FeatureWriter(path, nested=True) as writer:
        assert writer.done_ids == {f"u{number}" for number in range(4)}
        writer.add("u4", _value(4))
        writer.flush()
        assert path.stat().st_size == before
        _check(path, range(5))  # the file and the chunk together
        writer.finish("single")
    assert not chunk_folder(path).exists()
    _check(path, range(5))


def test_a_kill_between_merge_and_clean_up_leaves_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    _write(path, range(6), "chunks")
    chunks = {chunk.name: chunk.read_bytes() for chunk in chunk_folder(path).iterdir()}
    _write(path, range(6), "single")
    chunk_folder(path).mkdir()
    for name, content in chunks.items():
        (chunk_folder(path) / name).write_bytes(content)
    _check(path, range(6))
    _write(path, range(7), "single")
    _check(path, range(7))


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    _write(path, range(3), "chunks")
    (chunk_folder(path) / ".000001.writing-1.pt").write_bytes(b"half")
    (tmp_path / ".a.writing-1.pt").write_bytes(b"half")
    _check(path, range(3))
    _write(path, range(6), "single")
    _check(path, range(6))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pt"]


def test_merging_needs_no_memory_for_the_values(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    _write(path, range(32), "chunks", frames=50_000)
    size = stored_bytes(path)
    assert size > 100e6
    most, done = 0, threading.Event()
    writer = FeatureWriter(path, nested=True)
    start = _anonymous_bytes()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    writer.finish("single")
    done.set()
    watcher.join()
    assert path.stat().st_size > 100e6
    assert most - start < size / 5


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    pytest.skip("this kernel does not tell anonymous memory apart")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused_with_the_command_that_makes_it_again(tmp_path: Path, share: float) -> None:
    path = tmp_path / "train_whisper_feats.pt"
    _write(path, range(4), "single")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    for opening in (lambda: open_features(path), lambda: FeatureWriter(path, nested=True)):
        with pytest.raises(FeatureFileError, match="utt2text_and_feature") as caught:
            opening()
        assert str(path) in str(caught.value)
    assert not list(tmp_path.glob("*.lock"))


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FeatureFileError, match=r"make it again with: bash s3\.sh"):
        open_features(tmp_path / "train_utt2s3.pt")
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({1: torch.zeros(2)}, tmp_path / "numbers.pt")
    torch.save({"a": Path("no tensor")}, tmp_path / "object.pt")
    torch.save({"x/a.wav": torch.zeros(2), "y/a.wav": torch.zeros(2)}, tmp_path / "twice.pt")
    for name in ("text", "list", "numbers", "object", "twice"):
        with pytest.raises(FeatureFileError, match=f"{name}.pt"):
            open_features(tmp_path / f"{name}.pt")


def test_files_of_other_scripts_open(tmp_path: Path) -> None:
    frames = torch.randn(1, 1500, WIDTH)
    layers = {"/data/1/2/1-2-3.flac": frames, "/data/1/2/1-2-4.flac": None}
    torch.save({"mid": layers, "final": layers}, tmp_path / "nested.pt")
    features = open_features(tmp_path / "nested.pt")
    assert list(features) == ["1-2-3"]
    assert torch.equal(features["1-2-3"]["mid"], frames[0])

    torch.save(
        {"1-2-1-2-3": torch.ones(4, WIDTH), "1-2-1-2-4": None},
        tmp_path / "old.pt",
        _use_new_zipfile_serialization=False,
    )
    assert list(open_features(tmp_path / "old.pt")) == ["1-2-3"]
    torch.save({"wav-p1-p1_7": torch.ones(4, WIDTH)}, tmp_path / "dashed.pt")
    assert list(open_features(tmp_path / "dashed.pt", known_ids=["p1_7"])) == ["p1_7"]


def test_units_are_whole_numbers_however_they_were_stored(tmp_path: Path) -> None:
    units = {
        "a": [1, 4095],
        "b": [1.0, 2.0],
        "c": torch.tensor([3, 4]),
        "d": torch.tensor([[5.0, 6.0]]),
        "e": None,
        "f": [],
    }
    torch.save(units, tmp_path / "utt2s3.pt")
    assert open_units(tmp_path / "utt2s3.pt") == {"a": [1, 4095], "b": [1, 2], "c": [3, 4], "d": [5, 6], "f": []}
    for wrong in ([0.5], [math.nan], [math.inf], [2**40], [[1], [2, 3]], [[1, 2]], [True], ["1"], [None], "text", 7):
        torch.save({"a": wrong}, tmp_path / "x_utt2s3.pt")
        with pytest.raises(FeatureFileError, match="'a' is no list of S3 units"):
            open_units(tmp_path / "x_utt2s3.pt")


def test_units_of_several_files_are_read_file_by_file(tmp_path: Path) -> None:
    with FeatureWriter(tmp_path / "a_utt2s3.pt", chunk_utterances=1) as writer:
        for utt_id in ("b", "a"):
            writer.add(utt_id, [1, 4095, 7])
            writer.flush()
        writer.finish("chunks")
    torch.save({"c": [], "a": [1, 4095, 7]}, tmp_path / "a_utt2s3.pt")
    units = open_units(tmp_path / "a_utt2s3.pt")
    assert units == {"a": [1, 4095, 7], "b": [1, 4095, 7], "c": []}
    assert all(type(unit) is int for row in units.values() for unit in row)


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    script = f"""
import sys, time
import taste
from cosyvoice.utils.output_lock import OutputLock
lock = OutputLock({str(path)!r})
print("held", flush=True)
time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(OutputBusyError, match=f"process {holder.pid}"):
            FeatureWriter(path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / "a.pt.lock").exists()  # stale: its holder is dead
    with FeatureWriter(path), pytest.raises(OutputBusyError, match=f"process {os.getpid()}"):
        FeatureWriter(path)
    assert not (tmp_path / "a.pt.lock").exists()


def test_a_full_disk_costs_only_the_chunk_in_work(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    _write(path, range(4), "chunks")
    # a file-size limit makes write() fail as a full disk does, in the process that has it
    script = f"""
import resource, sys, taste, torch
sys.path.insert(0, "tests")
from pathlib import Path
from test_feature_store import FeatureWriteError, FeatureWriter, _value
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
writer = FeatureWriter({str(path)!r}, nested=True)
writer.add("u4", _value(4))
writer.flush()
writer.add("big", _value(5, frames=10_000))
for attempt in range(2):
    try:
        writer.flush()
    except FeatureWriteError as error:
        print(error)
writer.close()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]
    assert "File too large; the 5 utterances written before are safe" in lines[0]
    assert not list(chunk_folder(path).glob(".*"))
    _check(path, range(5))


def test_a_merge_that_does_not_fit_keeps_the_chunks(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    _write(path, range(9), "chunks")
    script = f"""
import resource
from taste.feature_writer import FeatureWriteError, FeatureWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    FeatureWriter({str(path)!r}, nested=True).finish("single")
except FeatureWriteError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "the chunks are untouched" in done.stdout and "--save-mode chunks" in done.stdout
    assert not path.exists()
    _check(path, range(9))


def test_wrong_values_and_modes_are_refused(tmp_path: Path) -> None:
    with FeatureWriter(tmp_path / "a.pt", nested=True) as writer:
        with pytest.raises(ValueError, match="mid"):
            writer.add("a", torch.zeros(2))
        with pytest.raises(ValueError, match="SAVE_MODE is 'one'"):
            writer.finish("one")
    assert issubclass(FeatureWriteError, OSError)
