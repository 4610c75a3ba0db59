"""Settings that are left to the size of the model."""

from pathlib import Path

import pytest

import model_code
from cosyvoice.utils.model_dir import sizes
from cosyvoice.utils.settings import find_constants, parse_settings
from taste.size_defaults import LARGE, SMALL, with_defaults

REPOSITORY = Path(__file__).resolve().parents[1]


def test_the_script_tells_both_values_of_each():
    constants = find_constants(Path(model_code.__file__).read_text(), vars(model_code))
    told = {constant.name.lower(): constant for constant in constants if constant.name.lower() in SMALL}
    assert set(told) == set(SMALL) == set(LARGE)
    for name, constant in told.items():
        assert constant.default is None
        numbers = [float(word.strip(";,()")) for word in constant.help.split() if word[0].isdigit() and word != "300M"]
        assert numbers[:2] == [SMALL[name], LARGE[name]], name


@pytest.mark.parametrize(("lm_width", "expected"), [(192, SMALL), (1024, LARGE)])
def test_what_is_not_given_suits_the_models_size(lm_width, expected):
    model_sizes = sizes(REPOSITORY / "CosyVoice-tiny")._replace(lm_width=lm_width)
    settings = parse_settings(model_code.__file__, vars(model_code), ["--lr", "0.5", "--audio-heads", "2"])
    filled = with_defaults(settings, model_sizes).to_dict()
    assert {name: filled[name] for name in expected} == {**expected, "lr": 0.5, "audio_heads": 2}
    assert {name: value for name, value in filled.items() if name not in expected} == {
        name: value for name, value in settings.to_dict().items() if name not in expected
    }
