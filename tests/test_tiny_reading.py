"""How the tiny recipe's language model learns to read: what it is shown, what is hidden, and that a run goes on."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import reading_lessons
import teach_reading
import torch
import torch.nn.functional as F
from corpus_reader import PAUSE, PHONES
from reading_lessons import FACTS, ReadingLessons, WordFacts, describe_words, log_paces, log_weights
from resumable import pick_dtype
from teach_reading import Aligned, AlignedSet, Pace, unit_owners
from unit_codes import CODE_WIDTH, unit_codes
from word_times import Span

from cosyvoice.transformer.attention import RelPositionMultiHeadedAttention
from cosyvoice.utils.interrupt import StopRequest
from cosyvoice.utils.train_utils import load_model
from taste.threads import torch_threads_kept
from tests.small_corpus import LEXICON, write_spoken_corpus
from tests.small_training import CODES, TEXT_TOKENS, write_config

ALL_TEXT_TOKENS = 51_866
LM_LAYERS = "linear_units: 32\n        input_layer: 'linear_legacy'"
QUICK = ("--batch-positions", "200", "--check-every", "3", "--device", "cpu", "--dtype", "float32")
DTYPES = ("float32", "bfloat16")
SIZES = {"train": 14, "phrases": 3, "lively": 3, "dev": 4}


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with torch_threads_kept():
        torch.set_num_threads(1)
        yield


def write_deep_config(path: Path, text_tokens: int = TEXT_TOKENS) -> Path:
    """A small configuration whose language model has as many layers as the lessons need."""
    write_config(
        path,
        {
            f"num_blocks: 1\n        attention_heads: 2\n        {LM_LAYERS}": "num_blocks: 5\n"
            + 8 * " "
            + f"attention_heads: 2\n        {LM_LAYERS}",
            f"text_token_size: {TEXT_TOKENS}": f"text_token_size: {text_tokens}",
        },
    )
    return path


# ---- the lessons


@pytest.fixture
def lessons(tmp_path: Path) -> ReadingLessons:
    torch.manual_seed(0)
    llm = load_model(write_deep_config(tmp_path / "deep.yaml"), "llm")
    for layer in llm.llm.encoders:
        for linear in (layer.self_attn.linear_q, layer.self_attn.linear_k, layer.self_attn.linear_pos):
            linear.weight.data *= 3.0  # so that attention prefers some positions
    return ReadingLessons(llm).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two rows of different lengths, the second with padding in text and units."""
    generator = torch.Generator().manual_seed(1)
    return {
        "text_token": torch.randint(0, TEXT_TOKENS, (2, 5), generator=generator),
        "text_token_len": torch.tensor([5, 3]),
        "word": torch.tensor([[0, 0, 1, 2, 2], [0, 1, 1, 0, 0]]),
        "speech_token": torch.randint(0, CODES, (2, 12), generator=generator),
        "speech_token_len": torch.tensor([12, 7]),
        "embedding": torch.randn(2, 192, generator=generator),
        "owner": torch.tensor([[0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4], [0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0]]),
        "phone": torch.randint(0, 9, (2, 12), generator=generator),
        "expected": torch.randint(0, 3, (2, 5, len(PHONES)), generator=generator, dtype=torch.int16),
        "said": torch.randint(0, 3, (2, 5, len(PHONES)), generator=generator, dtype=torch.int16),
        "usual": torch.tensor([[4.0, 4.0, 3.0, 5.0, 5.0], [2.0, 3.0, 3.0, 1.0, 1.0]]),
    }


def real_weights(attention: RelPositionMultiHeadedAttention, x, distances, visible) -> torch.Tensor:
    """What attention's own product computes, [B, H, L, K]: its values are replaced by rows of the identity."""
    queries, seen = attention._project(x)
    keys = x.shape[1]
    seen = seen._replace(values=torch.eye(keys).expand(*seen.keys.shape[:2], keys, keys))
    out, attention.linear_out = attention.linear_out, torch.nn.Identity()
    try:
        rows = attention._attend(queries, seen, attention.project_distances(distances), visible)
    finally:
        attention.linear_out = out
    return rows.unflatten(2, (attention.heads, keys)).transpose(1, 2)


def test_log_weights_are_those_of_the_attention() -> None:
    torch.manual_seed(0)
    attention = RelPositionMultiHeadedAttention(4, 32, 0.0)
    x, distances = torch.randn(2, 9, 32), torch.randn(17, 32)
    seen = torch.ones(9, 9, dtype=torch.bool).tril() & (torch.arange(9) < torch.tensor([[[9]], [[6]]]))
    for visible in (None, seen):
        expected = real_weights(attention, x, distances, visible)[:, :3]
        found = log_weights(attention, x, distances, visible, 3)
        torch.testing.assert_close(found.exp(), expected, atol=1e-5, rtol=1e-4)
    assert found[0, :, 0, 1:].isneginf().all()


def test_heads_are_shown_the_token_of_the_next_unit_and_the_one_after_it(lessons, batch) -> None:
    weights = []
    for layer in reading_lessons.GUIDED_LAYERS:
        attention = lessons.llm.llm.encoders[layer].self_attn
        attention.register_forward_hook(lambda module, inputs, _: weights.append(real_weights(module, *inputs[:3])))
    found = lessons(batch)
    losses, hits = [], []
    for layer in weights:
        for row in range(2):
            tokens, units = int(batch["text_token_len"][row]), int(batch["speech_token_len"][row])
            for unit in range(units):
                position = 2 + tokens + unit  # [sos] [speaker] [text] [task] unit 0 ..: of what unit is predicted by
                owner = int(batch["owner"][row, unit])
                for head, token in enumerate((owner, min(owner + 1, tokens - 1))):
                    losses.append(-layer[row, head, position, 2 + token].log())
                if layer is weights[-1]:
                    hits.append(layer[row, 0, position].argmax() == 2 + owner)
    torch.testing.assert_close(found.guide, torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.found, torch.stack(hits).float().mean())


def test_the_phone_of_the_next_unit_is_asked_for(lessons, batch) -> None:
    hidden = []
    lessons.llm.llm.register_forward_hook(lambda *call: hidden.append(call[2][0]))
    found = lessons(batch)
    rows = [hidden[0][row, 2 + tokens : 2 + tokens + units] for row, (tokens, units) in enumerate(((5, 12), (3, 7)))]
    phones = torch.cat([batch["phone"][0], batch["phone"][1, :7]])
    logits = lessons.phone_reader(torch.cat(rows))
    torch.testing.assert_close(found.phone, F.cross_entropy(logits, phones))
    torch.testing.assert_close(found.phone_acc, (logits.argmax(dim=1) == phones).float().mean())


def test_the_phone_to_come_is_the_next_that_begins() -> None:
    end = len(PHONES)
    phones = torch.tensor([[3, 3, 5, 5, 5, 3], [7, 7, 2, 2, 0, 0]])
    wanted = [[3, 5, 5, 3, 3, 3], [7, 2, 2, end, end, end]]
    found = reading_lessons.coming_phones(phones, torch.tensor([6, 4])).tolist()
    assert found[0] == wanted[0] and found[1][:4] == wanted[1][:4]


def test_the_phone_to_come_is_asked_for_in_two_layers(lessons, batch) -> None:
    states = []
    lessons.llm.llm.encoders[reading_lessons.COMING_LAYER].register_forward_hook(
        lambda *call: states.append(call[2][0])
    )
    lessons.llm.llm.register_forward_hook(lambda *call: states.append(call[2][0]))
    found = lessons(batch)
    classes = reading_lessons.coming_phones(batch["phone"], batch["speech_token_len"])
    classes = torch.cat([classes[0], classes[1, :7]])
    losses = []
    for reader, layer in zip(lessons.coming_readers, states, strict=True):
        logits = reader(torch.cat([layer[0, 7:19], layer[1, 5:12]]))
        losses.append(F.cross_entropy(logits, classes))
    torch.testing.assert_close(found.coming, torch.stack(losses).mean())
    torch.testing.assert_close(found.coming_acc, (logits.argmax(dim=1) == classes).float().mean())


def test_how_words_sound_is_where_they_differ_from_what_their_text_says(lessons, batch) -> None:
    pause = PHONES.index(PAUSE)
    batch = {**batch, "phone": batch["phone"].masked_fill(batch["phone"] == pause, pause + 1)}
    batch["phone"][0, 9:11] = pause
    words, of_unit = describe_words(batch, unit_codes()), unit_codes()
    for row, token, numbers in ((0, 1, (5, 4, 0)), (0, 2, (2, 3, 0)), (0, 4, (3, 5, 2)), (1, 2, (6, 3, 0))):
        assert words[row, token, :3].tolist() == list(numbers)
    facts = WordFacts.of(words)
    assert torch.equal(facts.changes, (batch["said"] - batch["expected"]).float())
    units = batch["speech_token"]
    for row, token, own in ((0, 1, units[0, :5]), (0, 2, units[0, 5:7]), (0, 4, units[0, [7, 8, 11]])):
        held = of_unit[own].sum(dim=0)  # the pause's units are not among them
        torch.testing.assert_close(facts.codes[row, token], held / held.norm() * CODE_WIDTH**0.5)
    paces = log_paces(words)
    torch.testing.assert_close(paces[0, 4].exp(), torch.tensor([3 / 5, 3.0]))
    told = lessons.word_sounds(words)
    assert not torch.allclose(told[0, 1], told[0, 2])  # slower than usual, and faster
    as_slow = words.clone()
    as_slow[:, :, :2] *= 2
    torch.testing.assert_close(lessons.word_sounds(as_slow), told)  # twice as long, and so it should be
    torch.testing.assert_close(told[0, 1], told[0, 0])
    more = lessons.word_sounds(words + F.one_hot(torch.tensor(4), words.shape[2])) - told
    torch.testing.assert_close(more[0, 1], lessons.word_sounds.mapping.weight[:, -len(PHONES) + 1])
    other = words.clone()
    other[0, 1, -1] += 1
    more = lessons.word_sounds(other) - lessons.word_sounds(words)
    torch.testing.assert_close(more[0, 1], lessons.word_sounds.mapping.weight[:, -len(PHONES) - 1])
    silent = {**batch, "owner": batch["owner"].masked_fill(batch["owner"] == 2, 1)}  # without the word of token 2
    words = describe_words(silent, of_unit)
    assert not WordFacts.of(words).codes[0, 2].any()
    told = lessons.word_sounds(words)
    assert not told[0, 2].any() and told[0, 1].any()


def test_how_long_a_word_has_lasted_and_will_last_is_asked_for(lessons, batch, monkeypatch) -> None:
    monkeypatch.setattr(reading_lessons, "LASTING_BOUNDS", tuple(range(20)))
    since, until = reading_lessons.lasting_classes(batch)  # words of 5, 2 and 5 units; of 1 and 6
    assert since[0].tolist() == [0, 1, 2, 3, 4, 5, 1, 2, 1, 2, 3, 4]
    assert until[0].tolist() == [5, 4, 3, 2, 1, 0, 1, 0, 4, 3, 2, 1]
    assert since[1, :7].tolist() == [0, 1, 1, 2, 3, 4, 5] and until[1, :7].tolist() == [1, 0, 5, 4, 3, 2, 1]
    monkeypatch.undo()
    states = []
    lessons.llm.llm.encoders[reading_lessons.COMING_LAYER].register_forward_hook(
        lambda *call: states.append(call[2][0])
    )
    lessons.llm.llm.register_forward_hook(lambda *call: states.append(call[2][0]))
    found, losses = lessons(batch), []
    for reader, layer, classes in zip(
        lessons.lasting_readers, states, reading_lessons.lasting_classes(batch), strict=True
    ):
        classes = torch.cat([classes[0], classes[1, :7]])
        logits = reader(torch.cat([layer[0, 7:19], layer[1, 5:12]]))
        losses.append(F.cross_entropy(logits, classes))
    torch.testing.assert_close(found.lasting, torch.stack(losses).mean())
    torch.testing.assert_close(found.lasting_acc, (logits.argmax(dim=1) == classes).float().mean())


def test_telling_begins_with_the_text_encoders_own_words_for_phones(lessons, monkeypatch) -> None:
    draw = torch.Generator().manual_seed(3)
    counts = torch.randint(0, 3, (60, 5, len(PHONES)), generator=draw, dtype=torch.int16)
    vectors = torch.randn(32, len(PHONES), generator=draw)
    encoded = iter(counts.float() @ vectors.T + 4)
    monkeypatch.setattr(lessons.llm, "encode", lambda text, lengths: (next(encoded)[None], lengths))
    nothing = torch.zeros(5, dtype=torch.int64)
    items = [Aligned("utt", *[nothing] * 5, torch.zeros(192), count, count) for count in counts]
    torch.testing.assert_close(teach_reading.words_for_phones(lessons.llm, items), vectors, atol=0.1, rtol=0)


def test_the_usual_pace_is_found_without_the_pauses() -> None:
    draw, items = torch.Generator().manual_seed(4), []
    of_phone = torch.rand(len(PHONES), generator=draw) * 5 + 1
    for number in range(300):
        counts = torch.randint(0, 2, (3, len(PHONES)), generator=draw, dtype=torch.int16)
        units = (counts.float() @ of_phone + 2).round().long()
        owners = torch.arange(3).repeat_interleave(units)
        phones = torch.ones_like(owners)
        owners, phones = torch.cat([owners, torch.full((9,), 2)]), F.pad(phones, (0, 9), value=PHONES.index(PAUSE))
        items.append(Aligned(str(number), owners, torch.arange(3), owners, owners, phones, owners, counts, counts))
    pace = teach_reading.usual_pace(items)
    torch.testing.assert_close(pace.of_phone, of_phone, atol=0.2, rtol=0)
    assert pace.more == pytest.approx(2, abs=1)
    assert pace.units(torch.zeros(len(PHONES))) == pytest.approx(pace.more)


def test_only_rows_that_are_told_hear_how_words_sound(lessons, batch) -> None:
    states = []
    lessons.llm.llm.register_forward_hook(lambda *call: states.append(call[2][0]))
    with torch.no_grad():
        lessons.word_sounds.mapping.weight *= 100
    lessons(batch, lessons=False)
    lessons(batch, told=torch.tensor([True, False]), lessons=False)
    assert not torch.allclose(states[0][0], states[1][0], atol=1e-3)
    torch.testing.assert_close(states[0][1], states[1][1])


def test_the_codes_are_asked_for_where_they_were_told(lessons, batch) -> None:
    states = []
    for module in (lessons.llm.llm.encoders[reading_lessons.COMING_LAYER], lessons.llm.llm):
        module.register_forward_hook(lambda *call: states.append(call[2][0]))
    found = lessons(batch, told=torch.tensor([False, True]))
    codes = WordFacts.of(describe_words(batch, unit_codes())).codes[1, batch["owner"][1, :7]]
    variance = (codes - codes.mean(dim=0)).square().sum()
    errors = [
        (reader(layer[1, 5:12]) - codes).square().sum() / variance
        for reader, layer in zip(lessons.sounding_readers, states, strict=True)
    ]
    torch.testing.assert_close(found.sounding, torch.stack(errors).mean())
    assert lessons(batch).sounding == lessons(batch, told=torch.tensor([False, False])).sounding == 0


def test_attention_is_left_alone_where_it_is_not_asked_for(lessons, batch) -> None:
    both, without = lessons(batch), lessons(batch, guide=False)
    assert without.guide == without.found == 0
    assert both.guide > 0 and without.coming == both.coming and without.loss == both.loss


def test_the_published_loss_stays_what_it_is(lessons, batch) -> None:
    published = lessons.llm(batch, "cpu")
    for asked in (True, False):
        found = lessons(batch, lessons=asked)
        assert found.loss == published["loss"] and found.acc == published["acc"]
    assert found.guide == found.phone == found.coming == found.lasting == 0
    text_of_another = {**batch, "text_token": batch["text_token"].flip(0), "text_token_len": torch.tensor([3, 5])}
    assert lessons(text_of_another, lessons=False).loss != published["loss"]


def test_hidden_units_cannot_be_seen(lessons, batch) -> None:
    kept = torch.ones(2, 12, dtype=torch.bool)
    kept[0, 4:6] = kept[1, 2] = False
    other = {**batch, "speech_token": torch.where(kept, batch["speech_token"], (batch["speech_token"] + 1) % CODES)}
    states = []
    lessons.llm.llm.register_forward_hook(lambda *call: states.append(call[2][0]))
    for each in (batch, other):
        lessons(each, kept)
    assert torch.equal(states[0], states[1])
    for each in (batch, other):
        lessons(each)
    assert not torch.equal(states[2], states[0]) and not torch.equal(states[2], states[3])


def test_a_model_with_too_few_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 1 layers, expected at least 5"):
        ReadingLessons(load_model(write_config(tmp_path / "small.yaml"), "llm"))


# ---- what is spoken when


def test_a_unit_belongs_to_the_token_that_was_begun_last() -> None:
    spans = [Span(0.1, 0.2), None, Span(0.2, 0.4), Span(0.5, 0.6)]
    assert unit_owners(spans, 32).tolist() == [0] * 10 + [2] * 15 + [3] * 7
    assert unit_owners([None, Span(0.0, 0.1)], 3).tolist() == [1, 1, 1]


def test_utterances_can_be_read_another_text() -> None:
    def item(number: int) -> Aligned:
        units = torch.full((2 + number,), number)
        text = torch.full((1 + number,), number)
        phones = torch.full((1 + number, len(PHONES)), number, dtype=torch.int16)
        speaker = torch.full((192,), float(number))
        return Aligned(str(number), text, text, units, units, units, speaker, phones, 2 * phones)

    items = AlignedSet([item(number) for number in range(4)], torch.device("cpu"), Pace(torch.ones(len(PHONES)), 0.5))
    mixed = items.batch([1, 3], texts=[2, 0])
    assert mixed["text_token"].tolist() == [[2, 2, 2], [0, 0, 0]] and mixed["text_token_len"].tolist() == [3, 1]
    assert mixed["word"].tolist() == [[2, 2, 2], [0, 0, 0]]
    assert mixed["expected"][:, 0, 0].tolist() == [2, 0] and mixed["said"][:, 0, 0].tolist() == [4, 0]
    assert mixed["usual"][:, 0].tolist() == [2 * len(PHONES) + 0.5, 1]
    assert mixed["speech_token_len"].tolist() == [3, 5] and mixed["embedding"][:, 0].tolist() == [1, 3]
    assert mixed["owner"][1].tolist() == mixed["phone"][1].tolist() == [3] * 5
    assert items.batch([1, 3])["text_token_len"].tolist() == [2, 4]


# ---- the training


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Teaches in a folder of its own; gives the folder of what it wrote."""
    root = tmp_path_factory.mktemp("reading")
    config = write_deep_config(root / "deep.yaml", ALL_TEXT_TOKENS)
    torch.manual_seed(0)
    torch.save(load_model(config, "llm").state_dict(), root / "start.pt")

    def teach(name: str, *words: str, code: int = 0) -> Path:
        work_dir = root / name
        if not work_dir.exists():
            write_spoken_corpus(work_dir, SIZES)
        paths = ("--work-dir", str(work_dir), "--config", str(config), "--llm", str(root / "start.pt"))
        assert teach_reading.main([*paths, *QUICK, *words]) == code
        return work_dir / "exp" / "llm"

    with pytest.MonkeyPatch.context() as patch:  # flite need not be there
        patch.setattr(teach_reading, "find_flite", lambda: "no flite")
        patch.setattr(teach_reading, "pronounce_texts", lambda texts, flite: LEXICON)
        yield teach


def entries(folder: Path, tag: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in lines if entry["tag"] == tag]


def test_all_lessons_are_learned(start) -> None:
    rates = ("--lr", "0.01", "--lesson-lr", "0.01")
    folder = start("learns", "--steps", "80", *rates, "--batch-positions", "800", "--check-every", "40")
    first, *_, last = entries(folder, "TRAIN")
    assert [entry["step"] for entry in (first, last)] == [20, 80]
    assert last["loss"] < 0.5 * first["loss"] and last["phone"] < 0.5 * first["phone"]
    assert last["guide"] < 0.75 * first["guide"] and last["coming"] < 0.75 * first["coming"]
    assert last["lasting"] < 0.9 * first["lasting"]
    checked = entries(folder, "CV")
    assert [entry["step"] for entry in checked] == [40, 80]
    for name in ("loss_with_wrong_text", "loss_with_sounds"):
        assert all(entry[name] != entry["loss"] for entry in checked)
    assert (folder / "loss_curve.png").is_file()


def test_text_embeddings_stay_as_they_were_and_everything_else_learns(start) -> None:
    folder = start("embeddings", "--steps", "3")
    before, after = (
        torch.load(path, weights_only=True) for path in (folder.parents[2] / "start.pt", folder / "llm.pt")
    )
    assert before.keys() == after.keys()
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert same == {"text_embedding.weight"}


def test_what_an_aggregator_shall_hear_is_written(start) -> None:
    folder = start("written", "--steps", "2")
    words = torch.load(folder / reading_lessons.WORDS_FILE, weights_only=True)
    units = torch.load(folder.parents[1] / "corpus" / "lively" / "utt2speech_token.pt", weights_only=True)
    assert len(words) == sum(SIZES.values())
    for name, own in units.items():
        assert words[name].dtype == torch.float16 and words[name].shape[1] == FACTS
        assert words[name][:, :2].min() > 0 and words[name][:, ::2].float()[:, :2].sum() >= len(own)
        facts = WordFacts.of(words[name])
        assert not facts.changes.any()  # all is said as it is written
        torch.testing.assert_close(
            facts.codes.norm(dim=1), torch.full((len(facts.codes),), CODE_WIDTH**0.5), atol=0.01, rtol=0
        )
    sounds = torch.load(folder / reading_lessons.SOUNDS_FILE, weights_only=True)
    untold = start("untold", "--steps", "2", "--tell-rows", "0") / reading_lessons.SOUNDS_FILE
    assert not torch.equal(sounds["mapping.weight"], torch.load(untold, weights_only=True)["mapping.weight"])


def test_bfloat16_learns_alike(start) -> None:
    checked = [entries(start(f"in-{name}", "--steps", "6", "--dtype", name), "CV")[-1] for name in DTYPES]
    assert checked[0]["loss"] != checked[1]["loss"] == pytest.approx(checked[0]["loss"], rel=0.02)


def test_a_dtype_is_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for name, fast, wanted in (
        ("amx_bf16", True, torch.bfloat16),
        ("avx512_bf16", True, torch.bfloat16),
        ("amx_bf16", False, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name, fast=fast: {name: fast})
        assert pick_dtype("auto", cpu) == wanted and pick_dtype("auto", cuda) == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # of another kind of processor
    assert pick_dtype("auto", cpu) == torch.float32 and pick_dtype("bfloat16", cpu) == torch.bfloat16


def test_a_stopped_run_goes_on_to_the_same_weights(start, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = start("straight", "--steps", "11")
    run = teach_reading.run
    for stop_after in (4, 5):
        asked = iter([False] * stop_after + [True])
        with monkeypatch.context() as patch:
            patch.setattr(teach_reading, "run", lambda settings, stop, asked=asked: run(settings, lambda: next(asked)))
            patch.setattr(StopRequest, "exit_code", 130)
            start("stopped", "--steps", "11", code=130)
    stopped = start("stopped", "--steps", "11")
    one, other = (torch.load(folder / "llm.pt", weights_only=True) for folder in (straight, stopped))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    losses = [[(entry["step"], entry["loss"]) for entry in entries(folder, "CV")] for folder in (straight, stopped)]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [3, 6, 9, 11]


def test_a_finished_run_goes_on_with_more_steps(start) -> None:
    folder = start("longer", "--steps", "4")
    start("longer", "--steps", "9")
    assert [entry["step"] for entry in entries(folder, "CV")] == [3, 4, 6, 9]


def test_every_utterance_is_learned_from_once_in_a_pass(start) -> None:
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        begin = teach_reading.Teaching.begin_step
        patch.setattr(teach_reading.Teaching, "begin_step", lambda *call: seen.append(begin(*call)) or seen[-1])
        start("passes", "--steps", "20")
    rows = [row for batch in seen for row in batch]
    learned = sum(count for split, count in SIZES.items() if split != "dev")
    assert len(rows) > 2 * learned
    for first in (0, learned):
        assert sorted(rows[first : first + learned]) == list(range(learned))
    assert rows[:learned] != rows[learned : 2 * learned]


def test_other_settings_or_another_start_are_refused(start, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = start("settings", "--steps", "2")
    capsys.readouterr()
    start("settings", "--steps", "2", "--lr", "0.5", code=1)
    assert "other settings (lr)" in capsys.readouterr().err
    weights = torch.load(folder / "llm.pt", weights_only=True)
    torch.save(weights, tmp_path / "other.pt")
    start("settings", "--steps", "2", "--llm", str(tmp_path / "other.pt"), code=1)
    assert "other settings (start)" in capsys.readouterr().err
    start("settings", "--steps", "2", "--dtype", "fp16", code=1)
    assert "expected auto, float32 or bfloat16" in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_told_and_not_saved(
    start, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    good = start("spoiled", "--steps", "1")
    weights = torch.load(good / "llm.pt", weights_only=True)
    weights["llm_decoder.bias"][0] = torch.nan
    torch.save(weights, tmp_path / "spoiled.pt")
    for name in ("state.pt", "llm.pt"):
        (good / name).unlink()
    start("spoiled", "--steps", "30", "--llm", str(tmp_path / "spoiled.pt"), "--save-minutes", "0", code=1)
    assert "no finite loss between steps 0 and 1:" in capsys.readouterr().err
    assert not (good / "llm.pt").exists() and not (good / "state.pt").exists()


def test_what_is_missing_is_named(start, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = start("missing", "--steps", "1")
    start("missing", "--llm", str(tmp_path / "none.pt"), code=1)
    assert "none.pt: there is no such file; run start_llm.py" in capsys.readouterr().err
    units = folder.parents[1] / "corpus" / "train" / "utt2speech_token.pt"
    torch.save({name: value for name, value in torch.load(units).items() if name != "train-003"}, units)
    start("missing", code=1)
    assert "1 utterances have no speech tokens or no speaker vector, train-003 first" in capsys.readouterr().err
