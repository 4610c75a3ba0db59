"""The report of a run is one page that loads nothing, whatever text and however little it has to show."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import soundfile
import torch

from taste.report import ReportUtterance, write_report

RATE_HZ = 22_050
EVIL = "</script><img src=http://example.org/x.png onerror=alert(1)> \"quoted\" & 'more' {{ 7 * 7 }} 你好"
VOID = {"meta", "link", "img", "br", "hr", "input", "source"}
SVG_VOID = {"line", "polyline", "circle"}
ADDRESSES = {"src", "href", "action", "data", "poster", "srcset", "xlink:href"}
HISTORY = [
    {"epoch": 0, "train": {}, "test": {"loss": 8.3, "top1": 0.0, "top5": 0.01}},
    {"epoch": 1, "train": {"loss": 5.0, "top1": 0.2, "top5": 0.4}, "test": {"loss": 4.9, "top1": 0.2, "top5": 0.5}},
]


class Page(HTMLParser):
    """What a page holds; fails where tags are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID | SVG_VOID
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def utterance(text: str = "The old house.", **changes: Any) -> ReportUtterance:
    torch.manual_seed(0)
    sounds = {"original": 0.1 * torch.randn(RATE_HZ), "taste": 2 * torch.randn(RATE_HZ // 2)}
    values: dict[str, Any] = {
        "utt_id": "utt-1",
        "text": text,
        "sounds": sounds,
        "mels": {name: torch.randn(80, len(sound) // 256) for name, sound in sounds.items()},
        "attention": torch.softmax(torch.randn(4, 50), dim=1),
        "token_labels": ["The", " old", " hou", "se."],
        "word_spans": [(0, 1), (1, 2), (2, 4)],
        "word_times": [(0.1, 0.3), None, (0.5, 2.0)],
        "codes": torch.tensor([[0, 1, 2, 3], [4, 5, 6, 511], [0, 9, 9, 9]]),
    }
    return ReportUtterance(**(values | changes))


def page_of(folder: Path, **changes: Any) -> Page:
    values: dict[str, Any] = {
        "title": "run",
        "settings": {"lr": 3e-4, "init_from": None},
        "histories": {"taste": HISTORY},
        "measures": {"text_only": {"top5": 0.5}, "taste": {"top5": 0.6, "word_error": None}},
        "skipped": {"word_error": "skipped: needs ears"},
        "notes": ["a note"],
        "rate_hz": RATE_HZ,
        "utterances": [utterance()],
    }
    path = write_report(folder, **(values | changes))
    assert path == folder / "report.html"
    return Page(path)


def test_the_page_loads_nothing(tmp_path):
    page = page_of(tmp_path, utterances=[utterance(), utterance(EVIL)])
    for tag, attributes in page.tags:
        for name in ADDRESSES & set(attributes):
            assert attributes[name].startswith(("data:", "#")), (tag, name, attributes[name][:60])
    assert not {"iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert "@import" not in page.source and "url(" not in page.source
    policy = next(tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy  # the browser holds the page to it
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_text_of_manifests_and_settings_stays_text(tmp_path):
    plain = page_of(tmp_path / "a", utterances=[utterance("x")])
    evil = page_of(
        tmp_path / "b",
        title=EVIL,
        settings={EVIL: EVIL, "init_from": None},
        histories={EVIL: HISTORY},
        measures={EVIL: {EVIL: 1.0}, "taste": {"top5": 0.6}},
        notes=[EVIL],
        skipped={"word_error": EVIL},
        utterances=[
            utterance(EVIL, utt_id=EVIL, token_labels=[EVIL, "a", "b", "c"], notes=[EVIL]),
        ],
    )
    assert len(evil.all("script")) == len(plain.all("script")) == 1
    assert not any("onerror" in attributes for _, attributes in evil.tags)
    assert len(evil.all("img")) == len(plain.all("img"))
    assert evil.words.count(" ".join(EVIL.split())) >= 8
    assert "{{ 7 * 7 }}" in evil.words  # text is no template either


def test_sounds_can_be_played_and_keep_their_samples(tmp_path):
    page = page_of(tmp_path)
    players = page.all("audio")
    assert [player["aria-label"] for player in players] == [
        "original recording: The old house.",
        "TASTE: The old house.",
    ]
    assert all("controls" in player for player in players)
    samples, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(players[0]["src"].partition(",")[2])))
    assert rate_hz == RATE_HZ
    assert torch.allclose(torch.tensor(samples).float(), utterance().sounds["original"], atol=1e-4)
    loud, _ = soundfile.read(io.BytesIO(base64.b64decode(players[1]["src"].partition(",")[2])))
    assert abs(loud).max() <= 1 and len(loud) == RATE_HZ // 2


def test_pictures_hold_a_pixel_a_value_low_bands_at_the_bottom(tmp_path):
    mel = torch.zeros(80, 30)
    mel[0] = 1
    page = page_of(tmp_path, utterances=[utterance(mels={"original": mel}, word_times=None)])
    mel_uri, attention_uri = (tag["src"] for tag in page.all("img"))
    picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(mel_uri.partition(",")[2])))
    assert picture.shape[:2] == (80, 30)
    assert picture[-1, 0, :3].sum() > picture[0, 0, :3].sum()
    assert matplotlib.image.imread(io.BytesIO(base64.b64decode(attention_uri.partition(",")[2]))).shape[:2] == (4, 50)
    assert all(tag["alt"] for tag in page.all("img"))


def test_words_have_their_boundaries_and_codes(tmp_path):
    page = page_of(tmp_path)
    boxes = [attributes for _, attributes in page.tags if attributes.get("class") == "box"]
    # the original is 1 s long: over its spectrogram, then over the attention; what lies beyond the end is cut
    assert [box["style"].partition(";")[0] for box in boxes] == ["left: 10.0%", "left: 50.0%"] * 2
    assert boxes[1]["style"].split("; ")[1] == "width: 50.0%"
    assert boxes[3]["style"].endswith("top: 50.0%; height: 50.0%")  # two of four tokens
    assert [attributes.get("class") for _, attributes in page.tags].count("code") == 12
    assert "house. 0 9 9 9" in page.words and "old 4 5 6 511" in page.words


def test_curves_are_described_for_those_who_do_not_see_them(tmp_path):
    page = page_of(tmp_path)
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert labels[0] == "Loss (teacher-forced). test: 8.3 at 0, 4.9 at 1; train: 5 at 1, 5 at 1"
    assert "test top-1: 0 at 0, 0.2 at 1" in labels[1]
    assert "test top-5: 0.01 at 0, 0.5 at 1" in labels[1]
    assert "8.3000" in page.words  # and the numbers themselves
    both = page_of(tmp_path, histories={"text_only": HISTORY, "taste": HISTORY, "simple": []})
    assert "text only, test" in both.words and "TASTE, test top-5" in both.words


@pytest.mark.parametrize("measures", [{}, {"taste": {}}])
def test_a_run_with_nothing_to_show_says_so(tmp_path, measures):
    page = page_of(tmp_path, utterances=[], histories={}, measures=measures, settings={}, skipped={}, notes=[])
    assert "There are no test utterances in this report" in page.words
    assert "Nothing was trained" in page.words
    assert "Nothing was measured" in page.words
    assert "No settings were noted" in page.words
    assert not page.all("audio") and not page.all("table")


def test_an_utterance_without_sounds_attention_or_codes_is_shown_with_what_it_has(tmp_path):
    bare = ReportUtterance("utt-2", "", {}, {})
    page = page_of(tmp_path, utterances=[bare])
    assert "(no transcript)" in page.words and "There is no sound of this utterance." in page.words
    assert "Codes of each word" not in page.words and "looks in the recording" not in page.words


def test_parts_that_do_not_fit_are_all_named(tmp_path):
    wrong = utterance(
        attention=torch.rand(3, 9),
        word_spans=[(0, 1), (1, 9)],
        mels={"nobody": torch.zeros(80, 3)},
    )
    with pytest.raises(ValueError, match=r"report of utt-1: attention of 3 tokens, but 4 token labels") as caught:
        page_of(tmp_path, utterances=[wrong])
    for part in (
        "codes of 3 words, but 2",
        "times of 3 words, but 2",
        "beyond 4 tokens",
        "mels without a sound: nobody",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_reading_the_page_needs_no_pointer(tmp_path):
    page = page_of(tmp_path)
    scrolled = [attributes for _, attributes in page.tags if attributes.get("class") == "scroll"]
    assert all(area["tabindex"] == "0" and area["aria-label"] and area["role"] == "region" for area in scrolled)
    targets = {attributes["href"][1:] for attributes in page.all("a")}
    assert targets <= {attributes.get("id") for _, attributes in page.tags}
    assert page.all("html") == [{"lang": "en"}]
