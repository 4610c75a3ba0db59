"""Tells whether anything that the results of a run depend on is another than it was."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import taste
from cosyvoice.utils.provenance import DIGEST_DIGITS
from cosyvoice.utils.settings import Settings
from taste.run_files import best_checkpoint

CODE = ("model_code.py", "taste/**/*.py", "CosyVoice/cosyvoice/**/*.py")


def inputs_digest(settings: Settings, run_folder: Path) -> str:
    """A short fingerprint of a run's settings and of the files that it reads, by their sizes and times.

    Args:
        settings: of the run.
        run_folder: its folder; the weights in it belong to what its results depend on.

    Returns:
        DIGEST_DIGITS hexadecimal digits: equal while nothing has changed, come or gone.
    """
    state = hashlib.sha256(json.dumps(settings.to_dict(), sort_keys=True).encode())
    for path in sorted(set(_inputs(settings, run_folder))):
        found = path.stat()
        state.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode())
    return state.hexdigest()[:DIGEST_DIGITS]


def _inputs(settings: Settings, run_folder: Path) -> Iterator[Path]:
    places = [best_checkpoint(run_folder)]
    if settings.init_from:
        places.append(best_checkpoint(Path(settings.init_from)))
    for name, value in settings.to_dict().items():
        if name.startswith(("train_utt2", "test_utt2")):
            features = Path(value)
            places += [features, features.with_suffix(".made_with.json"), *features.with_suffix(".chunks").glob("*")]
    for folder in (settings.cosyvoice_model_dir, settings.whisper_dir):
        places += Path(folder).rglob("*") if folder else ()
    for pattern in CODE:
        places += taste.REPOSITORY.glob(pattern)
    yield from (place for place in places if place.is_file())
