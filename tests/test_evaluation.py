import os
import signal

import pytest
import torch
from accelerate import Accelerator

from taste.evaluation import evaluate, feature_loader, precision_of
from tests.small_stage3 import small_dataset, small_model

LENGTHS = [(3, 9)] * 6


@pytest.mark.parametrize("has_units", [True, False])
def test_bfloat16_is_for_gpus_that_have_units_for_it(monkeypatch, has_units):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_units
    )
    monkeypatch.setattr(torch, "autocast", lambda device_type, dtype, enabled: (dtype, enabled))
    assert precision_of(torch.device("cuda")) == (torch.bfloat16, has_units)
    assert precision_of(torch.device("cpu")) == (torch.bfloat16, False)


@pytest.mark.parametrize(
    ("workers", "together", "ahead"), [(1, 1, 2), (2, 16, 9), (2, 15, 9), (1, 16, 17), (0, 16, None)]
)
def test_workers_load_the_next_step_while_this_one_is_done(tmp_path, workers, together, ahead):
    loader = feature_loader(small_dataset(tmp_path, "test", LENGTHS), [[0], [1]], workers, together)
    assert loader.prefetch_factor == ahead


def test_a_signal_to_a_worker_that_has_just_started_is_overheard_too(tmp_path, monkeypatch):
    handlers = "torch.utils.data._utils.signal_handling._set_worker_signal_handlers"
    monkeypatch.setattr(handlers, lambda: os.kill(os.getpid(), signal.SIGTERM))
    loader = feature_loader(small_dataset(tmp_path, "test", LENGTHS), [[0, 1], [2]], 1)
    assert [len(batch.utt_ids) for batch in loader] == [2, 1]
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_evaluation_shows_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("taste.progress_bar.LINE_SECONDS", 0.0)
    dataset, accelerator = small_dataset(tmp_path, "test", LENGTHS), Accelerator(cpu=True)
    evaluate(small_model(), dataset, 2, accelerator)
    assert capsys.readouterr().err.splitlines()[1].startswith("evaluating: 2 of 3 batches, ")
