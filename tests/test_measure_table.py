"""The table of measures keeps ours and the paper's figures apart, and says why one is missing."""

from taste.measure_table import MEASURES, PAPER, PAPER_NOTE, SYSTEMS, lay_out, to_markdown


def rows_of(markdown: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in markdown.splitlines() if "|" in line]
    return {row[0]: row[1:] for row in rows}


def test_models_stand_in_one_order_before_the_sounds_they_are_compared_with():
    table = lay_out({"original": {}, "taste": {"top5": 0.7}, "mine": {"top5": 0.1}, "text_only": {"top5": 0.6}})
    assert table.systems == ["text only", "TASTE", "original recording", "mine"]


def test_the_papers_figures_are_marked_and_explained():
    rows = rows_of(text := to_markdown({"taste": {"top5": 0.701, "mcd_db": 6.0}, "true_units": {"word_error": 0.25}}))
    assert rows["teacher-forced top-5 accuracy ↑"] == ["0.701 (paper 0.76†)", "–"]
    assert rows["word error ↓"] == ["– (paper 4.4 %†)", "25.0 % (paper 3 %†)"]
    assert rows["mel-cepstral distortion after alignment ↓"] == ["6.00 dB", "–"]
    assert f"† {PAPER_NOTE}" in text
    assert PAPER_NOTE not in to_markdown({"simple": {"mcd_db": 6.0}})


def test_what_sets_our_figures_apart_from_the_papers_is_said_below_them():
    assert "50 ms at most" in PAPER_NOTE and "less than 25 ms" in PAPER_NOTE
    assert "drops an utterance in which the numbers of heard words differ" in PAPER_NOTE
    assert "what a recogniser wrote down" in PAPER_NOTE and "ours speak the manifest's text" in PAPER_NOTE
    assert "top-k of 10, for text only of 25" in PAPER_NOTE and "UTMOS is measured where" in PAPER_NOTE
    assert "the paper: 4.18 of true units, 4.31 of text only, 4.29 of TASTE" in PAPER_NOTE
    assert "CAM++" in PAPER_NOTE and "CAM++" in MEASURES["speaker_similarity"].label


def test_the_paper_is_quoted_for_systems_and_measures_that_exist():
    assert set(PAPER) <= set(MEASURES)
    assert {system for values in PAPER.values() for system in values} <= set(SYSTEMS)


def test_the_best_model_is_found_in_the_right_direction():
    measures = {
        "text_only": {"loss": 2.0, "top5": 0.6, "length_ratio": 1.0},
        "taste": {"loss": 1.5, "top5": 0.7, "length_ratio": 1.2},
        "true_units": {"loss": 0.0, "top5": 1.0},  # no model
    }
    best = {row.label: [cell.best for cell in row.cells] for row in lay_out(measures).rows}
    assert best[MEASURES["loss"].label] == [False, True, False]
    assert best[MEASURES["top5"].label] == [False, True, False]
    assert best[MEASURES["length_ratio"].label] == [False, False, False]  # neither direction is better
    assert not any(cell.best for row in lay_out({"taste": {"loss": 1.0}}).rows for cell in row.cells)  # alone


def test_a_measure_that_nobody_has_is_there_with_its_reason():
    text = to_markdown({"taste": {"word_error": None, "loss": 1.0}}, {"word_error": "skipped: needs ears"}, ["a note"])
    assert rows_of(text)["word error ↓"] == ["– (paper 4.4 %†)"]
    assert "- word error: skipped: needs ears" in text
    assert "- a note" in text
    assert "needs ears" not in to_markdown({"taste": {"word_error": 0.1}}, {"word_error": "skipped: needs ears"})


def test_what_is_no_number_or_unknown_is_still_shown():
    rows = rows_of(to_markdown({"a|b": {"loss": float("nan"), "odd_measure": 0.12345}}))
    assert rows["odd measure"] == ["0.123"]
    assert rows["teacher-forced loss of a unit, nats ↓"] == ["–"]
    assert rows["measure"] == ["a\\|b"]
    assert to_markdown({}) == "Nothing was compared.\n"
