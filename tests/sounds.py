"""Makes small recordings for the tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile


def voice_like(seconds: float, rate_hz: int, seed: int = 0) -> np.ndarray:
    """A gliding tone with overtones whose loudness swells, [N] float64: the same sound at every rate."""
    parts = np.random.default_rng(seed)
    pitch_hz, glide = parts.uniform(100, 250), parts.uniform(-0.2, 0.2)
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    phase = 2 * np.pi * pitch_hz * (time + glide * time**2)
    tone = sum(np.sin(overtone * phase) / overtone for overtone in (1, 2, 3, 5))
    return 0.2 * tone * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * time))


def write_recording(path: Path, seconds: float = 1.0, rate_hz: int = 16_000, seed: int = 0) -> Path:
    """Write one; the suffix chooses the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(str(path), voice_like(seconds, rate_hz, seed), rate_hz)
    return path


def write_manifest(path: Path, entries: list[dict[str, Any]]) -> Path:
    """Write one object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")
    return path
