import pytest
from accelerate import Accelerator

import model_code
from cosyvoice.utils.settings import parse_settings
from cosyvoice.utils.stops import RunStopped
from taste.audio_use import listen
from tests.small_stage3 import small_dataset, small_model

LENGTHS = [(3, 9), (4, 12), (2, 8)]


class SecondProcess(Accelerator):
    """As one that is not the main one sees itself."""

    is_main_process = False


def listening(tmp_path, accelerator, stop_requested=lambda: False) -> dict:
    settings = parse_settings(model_code.__file__, vars(model_code), ["--batch-size", "1"])
    dataset = small_dataset(tmp_path, "test", LENGTHS)
    return listen(settings, small_model("taste"), dataset, accelerator, print, stop_requested)


def test_the_controls_stop_between_batches(tmp_path):
    asked = iter([False, False, True])
    with pytest.raises(RunStopped, match="what was trained is saved"):
        listening(tmp_path, Accelerator(cpu=True), lambda: next(asked))
    assert next(asked, None) is None


def test_codes_are_counted_in_the_main_process_only(tmp_path):
    assert listening(tmp_path, Accelerator(cpu=True)).keys() == {"controls", "codes"}
    assert listening(tmp_path, SecondProcess(cpu=True)).keys() == {"controls"}
