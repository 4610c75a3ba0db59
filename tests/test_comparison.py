import json
from pathlib import Path

from cosyvoice.utils.atomic import write_json
from taste.comparison import epochs_trained, write_comparison
from tests.small_model_folder import write_small_model_folder


def outcome(top5: float, **more) -> dict:
    scores = {"loss": 2.0, "top1": 0.4, "top5": top5}
    history = [{"epoch": epoch, "train": {}, "test": scores} for epoch in range(2)]
    return {"test": scores, "history": history, **more}


def test_all_variants_stand_in_one_table_with_the_papers_figures_marked_as_theirs(tmp_path: Path, golden_dir, capsys):
    controls = {"shuffled": {"loss": 3.0, "top1": 0.3, "top5": 0.61}, "silenced": "not measured: no Whisper"}
    codes = {"words": 90, "bits_per_second": 149.6, "words_per_second": 4.2}
    codes |= {"usage": [0.5, 0.3], "perplexity": [30.0, 10.0]}
    start = {"variant": "text_only", "epoch": 1}
    found = {
        "text_only": outcome(0.65123, started_from=None),
        "taste": outcome(0.7, controls=controls, codes=codes, started_from=start),
    }
    for variant, metrics in found.items():
        (tmp_path / variant).mkdir()
        write_json(tmp_path / variant / "metrics.json", metrics)
    model_dir = write_small_model_folder(tmp_path / "model", golden_dir)
    write_comparison(tmp_path, found, {"seed": 0, "cosyvoice_model_dir": str(model_dir)})
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["measures"]["text_only"] == {
        "epochs_trained": 1,
        "loss": 2.0,
        "top1": 0.4,
        "top5": 0.65123,
    }
    taste = content["measures"]["taste"]
    assert taste["top5_shuffled"] == 0.61 and "top5_silenced" not in taste
    assert taste["epochs_trained"] == 2
    assert taste["code_usage"] == 0.4 and taste["bits_per_second"] == 149.6
    assert content["settings"]["seed"] == 0
    table = (tmp_path / "table.md").read_text()
    assert "| epochs of training, earlier stages included | 1 | 2 |" in table
    assert "0.651" in table and "other data" in table
    assert table.splitlines()[2] in capsys.readouterr().out
    for name in ("comparison.png", "report.html"):
        assert (tmp_path / name).stat().st_size > 1000


def test_the_training_of_the_stages_before_counts():
    found = {
        "text_only": trained(3),
        "simple": trained(3, "text_only"),
        "taste_novq": trained(2, "text_only"),
        "taste": trained(3, "taste_novq"),
    }
    assert epochs_trained(found) == {"text_only": 3, "simple": 6, "taste_novq": 5, "taste": 8}
    assert epochs_trained({"taste": trained(3, "taste_novq")}) == {"taste": None}  # nobody knows of the other
    assert epochs_trained({"text_only": {}}) == {"text_only": 0}  # the model folder as it is


def trained(epochs: int, start: str | None = None) -> dict:
    return {
        "history": [{"epoch": epoch} for epoch in range(epochs + 1)],
        "started_from": {"variant": start, "epoch": 1} if start else None,
    }
