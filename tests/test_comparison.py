import json
from pathlib import Path

from taste.checkpoint import write_json
from taste.comparison import write_comparison
from tests.small_model_folder import write_small_model_folder


def outcome(top5: float, **more) -> dict:
    scores = {"loss": 2.0, "top1": 0.4, "top5": top5}
    history = [{"epoch": epoch, "train": {}, "test": scores} for epoch in range(2)]
    return {"test": scores, "history": history, **more}


def test_all_variants_stand_in_one_table_with_the_papers_figures_marked_as_theirs(tmp_path: Path, golden_dir, capsys):
    controls = {"shuffled": {"loss": 3.0, "top1": 0.3, "top5": 0.61}, "silenced": "not measured: no Whisper"}
    codes = {"bits_per_second": 149.6, "words_per_second": 4.2, "usage": [0.5, 0.3], "perplexity": [30.0, 10.0]}
    found = {"text_only": outcome(0.65123), "taste": outcome(0.7, controls=controls, codes=codes)}
    for variant, metrics in found.items():
        (tmp_path / variant).mkdir()
        write_json(tmp_path / variant / "metrics.json", metrics)
    model_dir = write_small_model_folder(tmp_path / "model", golden_dir)
    write_comparison(tmp_path, found, {"seed": 0, "cosyvoice_model_dir": str(model_dir)})
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["measures"]["text_only"] == {"loss": 2.0, "top1": 0.4, "top5": 0.65123}
    taste = content["measures"]["taste"]
    assert taste["top5_shuffled"] == 0.61 and "top5_silenced" not in taste
    assert taste["code_usage"] == 0.4 and taste["bits_per_second"] == 149.6
    assert content["settings"]["seed"] == 0
    table = (tmp_path / "table.md").read_text()
    assert "0.651" in table and "other data" in table
    assert table.splitlines()[2] in capsys.readouterr().out
    for name in ("comparison.png", "report.html"):
        assert (tmp_path / name).stat().st_size > 1000
