import json

from taste.comparison import write_comparison


def metrics(top5: float, **more) -> dict:
    scores = {"loss": 2.0, "top1": 0.4, "top5": top5}
    history = [{"epoch": epoch, "train": {}, "test": scores} for epoch in range(2)]
    return {"test": scores, "history": history, **more}


def test_each_variant_is_a_row_with_the_papers_figure_marked_as_theirs(tmp_path, capsys):
    controls = {"shuffled": {"loss": 3.0, "top1": 0.3, "top5": 0.61}, "silenced": "not measured: no Whisper"}
    found = {
        "text_only": metrics(0.65123),
        "taste": metrics(0.7, controls=controls, codes={"bits_per_second": 149.6}),
    }
    write_comparison(tmp_path, found, {"seed": 0})
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert lines[0] == "| variant | test loss | top-1 | top-5 | top-5, other recording | bit/s | paper's top-5 |"
    assert lines[2] == "| text_only | 2.000 | 0.400 | 0.651 |  |  | 0.65 |"
    assert lines[3] == "| taste | 2.000 | 0.400 | 0.700 | 0.610 | 150 | 0.76 |"
    assert "on their own data" in lines[5]
    assert lines[3] in capsys.readouterr().out
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["rows"][1]["top-5"] == 0.7 and content["rows"][1]["paper_top5"] == 0.76
    assert content["settings"] == {"seed": 0}
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
