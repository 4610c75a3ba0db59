from dataclasses import replace

from taste.parameter_groups import parameter_groups
from tests.small_stage3 import CONFIG, small_model


def test_pretrained_and_new_parts_have_learning_rates_of_their_own():
    config = replace(CONFIG, lr=1e-4, new_modules_lr=1e-2)
    model = small_model()
    groups = parameter_groups(model, config)
    peaks = {id(parameter): group["peak_lr"] for group in groups for parameter in group["params"]}
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(peaks) == len(learning) == sum(len(group["params"]) for group in groups)
    for name, parameter in learning.items():
        assert peaks[id(parameter)] == (1e-4 if name.startswith("llm.") else 1e-2), name
    assert {group["peak_lr"] for group in parameter_groups(small_model("text_only"), config)} == {1e-4}
    assert {group["peak_lr"] for group in parameter_groups(small_model(freeze_llm=True), config)} == {1e-2}
