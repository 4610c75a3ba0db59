import os
import signal
import subprocess
import sys
import threading

import pytest
from torch.utils.data import DataLoader

from cosyvoice.utils.interrupt import STOP_SIGNALS, StopRequest, obey_parent_alone


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_only_asks_to_stop(number: signal.Signals, exit_code: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.exit_code == exit_code
    assert signal.getsignal(number) is before
    assert "stopping after this batch" in capfd.readouterr().err


def test_a_second_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosyvoice.utils.interrupt.REPEAT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("repeated", [signal.SIGINT, signal.SIGTERM])
def test_a_request_that_comes_twice_within_seconds_is_one(repeated: signal.Signals) -> None:
    acted = []
    before = {number: signal.signal(number, lambda number, frame: acted.append(number)) for number in STOP_SIGNALS}
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), repeated)
            assert stop.requested and stop.exit_code == 143
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not acted


def test_a_later_sigterm_has_its_default_action() -> None:
    script = (
        "import os, signal, taste, cosyvoice.utils.interrupt\n"
        "cosyvoice.utils.interrupt.REPEAT_SECONDS = 0.0\n"
        "with cosyvoice.utils.interrupt.StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], stderr=subprocess.DEVNULL).returncode == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_overhear_the_signals_of_others_and_obey_their_parent(number: signal.Signals) -> None:
    loader = iter(DataLoader(range(100), num_workers=1, prefetch_factor=1, worker_init_fn=obey_parent_alone))
    next(loader)
    (worker,) = loader._workers
    assert subprocess.run(["kill", f"-{number}", str(worker.pid)]).returncode == 0
    assert [int(item) for item in loader] == list(range(1, 100))
    loader = iter(DataLoader(range(100), num_workers=1, prefetch_factor=1, worker_init_fn=obey_parent_alone))
    next(loader)
    (worker,) = loader._workers
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(timeout=30)
    assert worker.exitcode == 0


def test_an_error_that_nobody_catches_leaves_no_workers_waiting() -> None:
    script = (
        "from torch.utils.data import DataLoader\n"
        "import taste\n"
        "from cosyvoice.utils.interrupt import obey_parent_alone\n"
        "loader = iter(DataLoader(range(100), num_workers=1, worker_init_fn=obey_parent_alone))\n"
        "next(loader)\n"
        "raise RuntimeError('nobody catches it')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "nobody catches it" in done.stderr


def test_without_a_signal_the_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        pass
    assert not stop.requested
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_may_use_it() -> None:
    seen = []

    def body() -> None:
        with StopRequest() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [False]
