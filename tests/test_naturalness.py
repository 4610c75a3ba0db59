"""UTMOS is asked where its weights are there, and no other file is taken for them."""

import sys
from pathlib import Path

import pytest
import torch
import torchaudio
from utmos_pytorch.utmos_torch import UTMOSModel, UTMOSScoreTorch

from taste.asr import Found
from taste.naturalness import WEIGHTS_FILE, Utmos, find_utmos
from taste.sound_evaluation import UtteranceSounds, evaluate_sounds

RATE_HZ = 22_050


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with weights of UTMOS, random ones."""
    folder = tmp_path_factory.mktemp("judged")
    torch.manual_seed(0)
    weights = {name: value.half() for name, value in UTMOSModel().state_dict().items()}
    unused = {"feature_extractors.0.ssl_model.mask_emb": torch.zeros(768)}  # of wav2vec 2.0's pretraining
    torch.save(weights | unused, folder / WEIGHTS_FILE)
    return folder


def noise(seconds: float, seed: int) -> torch.Tensor:
    return 0.1 * torch.randn(int(seconds * RATE_HZ), generator=torch.Generator().manual_seed(seed))


def test_every_sound_has_the_score_that_the_package_gives_it(folder):
    original, first, second = noise(0.5, 0), noise(0.4, 1), noise(0.6, 2)
    rows = [
        UtteranceSounds("a", "x", original, {"taste": first, "true_units": second}),
        UtteranceSounds("b", "x", None, {"taste": second, "true_units": noise(0.01, 3)}),  # too short for an opinion
    ]
    result = evaluate_sounds(rows, RATE_HZ, folder, Found(None, "skipped: nobody listens"))
    package = UTMOSScoreTorch(str(folder / WEIGHTS_FILE))
    scores = [
        float(package.score(torchaudio.functional.resample(sound, RATE_HZ, 16_000)))
        for sound in (original, first, second)
    ]
    assert len({round(score, 4) for score in scores}) == 3
    assert result.measures["original"]["utmos"] == pytest.approx(scores[0])
    assert result.measures["taste"]["utmos"] == pytest.approx((scores[1] + scores[2]) / 2)
    assert result.measures["true_units"]["utmos"] == pytest.approx(scores[2])
    assert "utmos" not in result.skipped


def test_without_weights_nobody_asked_for_it(tmp_path):
    assert find_utmos(tmp_path) == (None, "")
    row = UtteranceSounds("a", "x", noise(0.5, 0), {"taste": noise(0.5, 1)})
    result = evaluate_sounds([row], RATE_HZ, tmp_path, Found(None, "skipped"))
    assert "utmos" not in result.measures["taste"] and "utmos" not in result.skipped


@pytest.mark.parametrize("change", ["missing", "shape", "truncated"])
def test_other_weights_are_refused(folder, tmp_path, change):
    path = tmp_path / WEIGHTS_FILE
    weights = dict.fromkeys(UTMOSModel().state_dict(), torch.zeros(1))
    if change == "missing":
        weights = torch.load(folder / WEIGHTS_FILE, mmap=True)
        del weights["output_layers.1.net.0.weight"]
    torch.save(weights, path)
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated" if change == "truncated" else "are not there in their shape"):
        Utmos(path)
    reason = find_utmos(tmp_path).reason
    assert reason.startswith("skipped: ") and reason.endswith(f"{WEIGHTS_FILE} --local-dir {tmp_path}")


def test_weights_without_the_package_name_the_command(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "utmos_pytorch.utmos_torch", None)
    found = find_utmos(folder)
    assert found.judge is None
    assert found.reason.startswith("skipped: ") and "pip install 'utmos-pytorch" in found.reason
