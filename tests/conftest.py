"""Fixtures every test may use: where the reference outputs lie, and what they hold."""

import os
import signal
import socket
from pathlib import Path
from typing import Any

# One thread, here and in the scripts that tests start: sums in another order differ in the last bit, and tests compare
# what a script wrote with what was computed here. Set before torch is imported, which reads it once.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

settings.register_profile("tests", deadline=None, derandomize=True)  # a busy machine is no failure
settings.load_profile("tests")

GOLDEN_DIR = Path(__file__).parent / "golden"


def pytest_configure() -> None:
    """Hear Ctrl-C: a shell that starts the tests in the background ignores it, and so would the scripts they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of reference weights, outputs and shapes."""
    return GOLDEN_DIR


@pytest.fixture(scope="session")
def golden_cases() -> dict[str, dict[str, Any]]:
    """Reference inputs and outputs by case name; treat them as read-only (clone before changing one)."""
    return torch.load(GOLDEN_DIR / "small_cases.pt", weights_only=True)


@pytest.fixture(autouse=True)
def this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection from this process to another machine is an error."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"the network was used: {address}")
        connect(self, address)

    monkeypatch.setattr("socket.socket.connect", connect_here)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any use of a network in this process is an error."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"the network was used: {arguments}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
