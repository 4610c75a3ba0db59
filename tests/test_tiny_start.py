"""What the tiny recipe's language model and flow know before they are trained."""

import runpy
from pathlib import Path

import pytest
import soundfile
import start_flow
import start_llm
import torch
from word_times import Span

from cosyvoice.utils.config import load_config
from cosyvoice.utils.settings import parse_settings
from cosyvoice.utils.train_utils import load_model
from tests.small_corpus import LEXICON, write_spoken_corpus
from tests.small_training import CODES, TEXT_TOKENS, made_up_batch, write_config

TINY = Path(__file__).resolve().parents[1] / "CosyVoice" / "examples" / "tiny"

WORDS = 12  # tokens that the made-up texts use


@pytest.fixture
def model(tmp_path: Path):
    torch.manual_seed(0)
    return load_model(write_config(tmp_path / "small.yaml"), "llm")


def made_up_texts(count: int) -> list[start_llm.Pronounced]:
    """Texts in which each token has phones of its own."""
    generator = torch.Generator().manual_seed(1)
    sounds = torch.randint(1, len(start_llm.PHONES), (TEXT_TOKENS, start_llm._MOST_PHONES), generator=generator)
    tokens = [torch.randint(0, WORDS, (5,), generator=generator) for _ in range(count)]
    return [start_llm.Pronounced(row, sounds[row]) for row in tokens]


def test_phones_of_a_token_are_those_whose_middle_it_covers() -> None:
    phones = [("pau", 0.1), ("dh", 0.2), ("ax", 0.3), ("pau", 0.4), ("k", 0.5)]
    assert start_llm.phones_within(phones, Span(0.1, 0.3)) == ["dh", "ax"]
    assert start_llm.phones_within(phones, Span(0.16, 0.5)) == ["ax", "k"]
    assert start_llm.phones_within([("ax", 0.1 * n) for n in range(1, 20)], Span(0.0, 9.0)) == ["ax"] * 8


def test_units_that_sound_alike_begin_alike(model) -> None:
    codes = torch.randn(CODES, 7, generator=torch.Generator().manual_seed(2))
    codes[1] = codes[0] + 0.01
    drawn = model.llm_decoder.weight.std().item()
    start_llm.place_codes(model, codes)
    for weight in (model.speech_embedding.weight, model.llm_decoder.weight):
        alike = torch.cosine_similarity(weight[0], weight[1], dim=0)
        assert alike > 0.99 > torch.cosine_similarity(weight[0], weight[2:CODES], dim=1).max()
    assert model.llm_decoder.weight.std().item() == pytest.approx(drawn, rel=0.1)


def test_tokens_that_do_not_occur_get_random_signs_and_the_others_stay(model) -> None:
    before = model.text_embedding.weight.detach().clone()
    start_llm.mark_unused_tokens(model, made_up_texts(40))
    weight = model.text_embedding.weight.detach()
    assert torch.equal(weight[:WORDS], before[:WORDS])
    assert (weight[WORDS:].abs() == 1).all() and 0.4 < (weight[WORDS:] > 0).float().mean() < 0.6
    assert len(weight[WORDS:].unique(dim=0)) == TEXT_TOKENS - WORDS


def test_every_token_that_the_language_model_will_read_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_llm, "find_flite", lambda: "no flite")
    monkeypatch.setattr(start_llm, "pronounce_texts", lambda texts, flite: LEXICON)
    write_spoken_corpus(tmp_path, {"train": 1, "phrases": 1, "lively": 9, "dev": 2}, words=2)
    settings = parse_settings(start_llm.__file__, vars(start_llm), ["--work-dir", str(tmp_path)])
    texts = start_llm.read_pronounced(settings)
    assert (len(texts["train"]), len(texts["dev"])) == (11, 2)
    tokenizer = load_config(settings.config, ["get_tokenizer"])["get_tokenizer"]()
    spoken = [line.split(maxsplit=1)[1] for line in (tmp_path / "corpus/lively/text").read_text().splitlines()]
    learned = set(torch.cat([text.tokens for text in texts["train"]]).tolist())
    assert {token for text in spoken for token in tokenizer.encode(text)} <= learned
    sounds = [start_llm.PHONES[number] for number in texts["dev"][0].phones[0].tolist()]
    word = (tmp_path / "corpus/dev/text").read_text().split()[1]
    assert sounds[: len(LEXICON[word])] == list(LEXICON[word]) and set(sounds[len(LEXICON[word]) :]) == {"pau"}


def test_the_text_side_learns_how_tokens_sound_and_nothing_else_changes(model) -> None:
    settings = parse_settings(start_llm.__file__, vars(start_llm), ["--steps", "150", "--batch-size", "16"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reader = torch.nn.Linear(model.llm_input_size, start_llm._MOST_PHONES * len(start_llm.PHONES))
    unseen = made_up_texts(20)
    untaught = start_llm.measure(model, reader, unseen)["dev_phone_accuracy"]
    assert start_llm.teach(settings, model, reader, made_up_texts(60), lambda: False)
    assert start_llm.measure(model, reader, unseen)["dev_phone_accuracy"] > max(0.6, 4 * untaught)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith(start_llm._TEXT_SIDE) for name in changed)


def test_a_wish_to_stop_ends_it(model) -> None:
    settings = parse_settings(start_llm.__file__, vars(start_llm), ["--steps", "5"])
    reader = torch.nn.Linear(model.llm_input_size, start_llm._MOST_PHONES * len(start_llm.PHONES))
    assert not start_llm.teach(settings, model, reader, made_up_texts(4), lambda: True)


def test_a_missing_tokenizer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runpy.run_path(str(TINY / "start_llm.py"))["main"](["--work-dir", str(tmp_path)]) == 1
    assert "speech_tokenizer_v1.onnx: there is no such file" in capsys.readouterr().err


def test_a_flow_begins_where_speech_is_loud_and_with_its_units_near_those_that_sound_alike(tmp_path: Path) -> None:
    config = write_config(tmp_path / "small.yaml")
    corpus = write_spoken_corpus(tmp_path, {"train": 6}) / "corpus"
    generator = torch.Generator().manual_seed(3)
    for line in (corpus / "train" / "wav.scp").read_text().splitlines():
        soundfile.write(line.split()[1], 0.01 * torch.randn(8000, generator=generator).numpy(), 16_000)
    mean = start_flow.mean_mel(config, start_flow.read_split(corpus, "train"))
    assert mean.shape == (80,) and (mean < -1).all()
    torch.manual_seed(0)
    flow = load_model(config, "flow")
    codes = torch.randn(CODES, 7, generator=generator)
    codes[1] = codes[0] + 0.01
    batch = made_up_batch(4, gan=False)
    batch["speech_feat"] += mean

    def loss() -> float:
        torch.manual_seed(1)
        return flow(batch, torch.device("cpu"))["loss"].item()

    drawn = loss()
    start_flow.begin(flow, codes, mean)
    assert loss() < 0.5 * drawn
    embedded = flow.input_embedding.weight
    assert torch.cosine_similarity(embedded[0], embedded[1], dim=0) > 0.99
    assert embedded.square().mean().item() == pytest.approx(1.0, rel=0.01)


def test_start_flow_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runpy.run_path(str(TINY / "start_flow.py"))["main"](["--work-dir", str(tmp_path)]) == 1
    assert "speech_tokenizer_v1.onnx: there is no such file" in capsys.readouterr().err
