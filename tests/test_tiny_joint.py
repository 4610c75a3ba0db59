"""The joint training of CosyVoice-tiny's language model and the parts that hear a recording."""

import json
from pathlib import Path

import listening_lesson
import pytest
import torch
import torch.nn.functional as F
import train_taste
from corpus_reader import PHONES
from joint_taste import JointModel, start_codebooks
from listening_lesson import find_tokens, from_alignment, from_words, hear_sounds, teach
from packed_features import PackedFeatures
from reading_lessons import SOUNDS_FILE, WORDS_FILE, WordSounds
from unit_codes import CODE_WIDTH, unit_codes

from cosyvoice.utils.common import IGNORE_ID
from cosyvoice.utils.model_dir import load_part
from cosyvoice.utils.settings import parse_settings
from taste.batch import Example, collate
from taste.build import TasteSizes, build_model, build_together
from taste.data import open_dataset
from taste.feature_set import FeaturePaths
from taste.pretrained_parts import take_parts
from taste.variants import VARIANTS
from tests.small_model_folder import write_small_model_folder
from tests.small_stage3 import SIZES, SPEECH_WIDTH, TASTE_SIZES, random_examples, small_model, write_features

CPU = torch.device("cpu")
LENGTHS = [(2 + number % 5, 12 + 3 * (number % 4)) for number in range(12)]
QUICK = {"steps": 6, "batch_units": 120, "check_every": 3, "device": "cpu", "quantizer_from": 0.3, "llm_lr": 3e-3}
QUICK |= {"lesson_steps": 5, "dtype": "float32"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, golden_dir) -> Path:
    return write_small_model_folder(tmp_path_factory.mktemp("model"), golden_dir)


@pytest.fixture(scope="module")
def examples(model_dir):
    """Utterances whose text embeddings are the language model's."""
    table = load_part(model_dir, "llm").text_embedding.weight.detach()
    return [example._replace(text=table[example.text_tokens]) for example in random_examples(LENGTHS)]


@pytest.fixture(scope="module")
def features(tmp_path_factory, examples) -> Path:
    """Two sets to learn from, and one to measure."""
    folder = tmp_path_factory.mktemp("features")
    for name, part in {"one": examples[:7], "two": examples[7:], "dev": examples[:4]}.items():
        write_features(folder, name, part)
    return folder


@pytest.fixture(scope="module")
def start(model_dir, features, tmp_path_factory):
    """Runs the script in a folder of its own, with sizes as small as the model's."""
    train_taste._TASTE_SIZES = TASTE_SIZES

    def run(name: str | Path, stop_after: int | None = None, **options) -> Path | None:
        out = tmp_path_factory.getbasetemp() / "joint" / str(name)
        values = {"model_dir": model_dir, "train": f"{features}/one,{features}/two", "dev": f"own={features}/dev"}
        words = values | {"out": out} | QUICK | options
        argv = [word for key, value in words.items() for word in (f"--{key}", str(value))]
        if stop_after is None:
            assert train_taste.main(argv) == 0
            return out
        asked = iter(range(stop_after))
        settings = parse_settings(train_taste.__file__, vars(train_taste), argv)
        assert not train_taste.run(settings, lambda: next(asked, None) is None)
        return out

    yield run
    train_taste._TASTE_SIZES = TasteSizes(
        **{name: getattr(train_taste.model_code, name.upper()) for name in vars(TASTE_SIZES)}
    )


@pytest.fixture(scope="module")
def trained(start) -> Path:
    return start("whole")


def weights(out: Path) -> dict[str, torch.Tensor]:
    files = [torch.load(out / name, weights_only=True) for name in ("llm.pt", "taste.pt")]
    return {name: value for state in files for name, value in state.items()}


def test_the_loss_falls(start):
    history = [
        json.loads(line)["dev"]["own"]
        for line in (start("longer", steps=30, check_every=10) / "metrics.jsonl").read_text().splitlines()
        if "dev" in line
    ]
    for variant in VARIANTS[:3]:
        losses = [entry[variant]["loss"] for entry in history]
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.2, variant
    assert {"taste", "taste shuffled", "taste_novq shuffled", "text_only wrong text"} <= history[-1].keys()


def test_every_variant_starts_from_what_was_written(trained, model_dir, tmp_path, examples):
    for file in model_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    for name in ("llm.pt", "taste.pt"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(trained / name)
    measured = json.loads((trained / "metrics.json").read_text())["dev"]["own"]
    for variant in VARIANTS:
        options = {"speech_width": SPEECH_WIDTH, "freeze_llm": False, "use_speaker": True, "taste_sizes": TASTE_SIZES}
        model = build_model(tmp_path, variant, **options).eval()
        taken = take_parts(model, tmp_path)
        assert variant == "text_only" or not taken.left
        with torch.no_grad():
            scores = model(collate(examples[:4]))
        loss = float(scores.loss_sums.sum() / scores.target_counts.sum())
        assert loss == pytest.approx(measured[variant]["loss"], abs=2e-3), variant


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(trained, start):
    for stop_after in (1, 4):  # before the codebooks' start, and after it
        stopped = start(f"stopped-{stop_after}", stop_after=stop_after)
        went_on = weights(start(stopped.name))
        assert went_on.keys() == weights(trained).keys()
        for name, value in weights(trained).items():
            assert torch.equal(value, went_on[name]), name
    lines = [json.loads(line)["step"] for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert lines == [3, 6]


def test_other_settings_do_not_go_on(trained, start, capsys):
    with pytest.raises(AssertionError):
        start("whole", hide_units=0.5)
    assert "other settings (hide_units)" in capsys.readouterr().err


def test_an_unknown_dtype_is_refused_before_anything_is_read(start, capsys):
    with pytest.raises(AssertionError):
        start("odd-dtype", dtype="fp16", train="/nowhere")
    assert "expected auto, float32 or bfloat16" in capsys.readouterr().err


def test_a_text_that_is_left_out_does_not_learn(start, model_dir):
    before = load_part(model_dir, "llm").state_dict()
    biases = [name for name in before if name.startswith("text_encoder.encoders.") and name.endswith(".bias")]
    moved = []
    for share in (1.0, 0.0):
        after = weights(start(f"text-left-out-{share}", drop_text=share, variants="taste_novq", lesson_steps=0))
        moved.append([name for name in biases if not torch.equal(after[name], before[name])])
    assert moved[0] == [] and moved[1]


def test_how_much_the_quantizer_commits_is_a_setting(trained, start):
    name = "taste.quantizer.rvq.project_in.weight"
    assert not torch.equal(weights(trained)[name], weights(start("uncommitted", commitment_weight=0.0))[name])


def test_text_embeddings_of_another_model_are_refused(start, features, examples, capsys):
    write_features(features, "other", [example._replace(text=example.text + 0.1) for example in examples])
    with pytest.raises(AssertionError):
        start("other", train=f"{features}/other")
    assert "is not this language model's" in capsys.readouterr().err


# --- the lesson

FRAMES = 4  # of a short token; a long one has twice as many


def spoken(count: int) -> list[Example]:
    """Utterances of one-token words, long or short; last states name the token, middle ones how far it has come."""
    generator = torch.Generator().manual_seed(3)
    vocabulary = torch.randn(12, SIZES.text_width, generator=generator)
    examples = []
    for example in random_examples([(6, 48)] * count, seed=3):
        tokens = torch.randperm(12, generator=generator)[:6]
        frames = FRAMES * (1 + torch.randint(0, 2, (6,), generator=generator))
        final = vocabulary[tokens, :SPEECH_WIDTH].repeat_interleave(frames, dim=0)
        mid = torch.zeros(len(final), SPEECH_WIDTH)
        mid[:, 0] = torch.cat([torch.arange(number) for number in frames]).float()
        noise = 0.05 * torch.randn(2, *final.shape, generator=generator)
        examples.append(
            example._replace(
                text=vocabulary[tokens],
                text_tokens=tokens,
                word_ids=torch.arange(6),
                speech_final=final + noise[0],
                speech_mid=mid + noise[1],
            )
        )
    return examples


@pytest.mark.parametrize("variant", ["simple", "taste_novq"])
def test_after_the_lesson_a_word_tells_how_long_it_lasts(variant):
    model, examples = small_model(variant), spoken(40)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spans = list(find_tokens(examples, range(len(examples))).values())
    wanted = from_alignment(examples, spans, by_word=variant != "simple")
    untaught = teach(model, examples, wanted, device=CPU, steps=1, peak_lr=1e-9, seed=0)
    told = teach(model, examples, wanted, device=CPU, steps=120, peak_lr=5e-3, seed=0)
    assert untaught["length"] < 0.1 and told["length"] > untaught["length"] + 0.4
    for name, value in model.state_dict().items():
        assert name.startswith("aggregator.") or torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


# --- packed features


@pytest.fixture(scope="module")
def packed(features):
    sets = [open_dataset(paths(features, name), SIZES) for name in ("one", "two")]
    return PackedFeatures(sets, CPU), [dataset[index] for dataset in sets for index in range(len(dataset))]


def paths(folder: Path, name: str) -> FeaturePaths:
    units, *others = (folder / f"{name}_{kind}.pt" for kind in ("utt2s3", "text_emb", "whisper_feats", "utt2info"))
    return FeaturePaths(units, *others)


def test_a_packed_batch_is_a_collated_one(packed):
    together, examples = packed
    for chosen in ([3], [0, 9, 4], list(range(12))):
        ours, theirs = together.batch(chosen), collate([examples[number] for number in chosen])
        for name, value in vars(theirs).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(getattr(ours, name), value, rtol=0, atol=0)
    assert together.batch([0, 3]).units.eq(IGNORE_ID).any()


def test_a_batch_can_hear_and_read_what_is_not_its_own(packed):
    together, examples = packed
    mixed = together.batch([0, 1], recordings=[5, 6], texts=[7, 8])
    for field, source in (("units", 0), ("speech_final", 5), ("speech_mid", 5), ("text", 7), ("word_ids", 7)):
        row = getattr(mixed, field)[0]
        value = getattr(examples[source], field)
        torch.testing.assert_close(row[: len(value)], value, rtol=0, atol=0)
    assert mixed.speech_lengths.tolist() == [len(examples[number].speech_mid) for number in (5, 6)]
    assert mixed.text_lengths.tolist() == [len(examples[number].text) for number in (7, 8)]


def test_every_utterance_is_in_one_batch_of_an_epoch_and_no_batch_is_too_large(packed):
    together, _ = packed
    for batches in (together.batches(60, 1, 0), together.batches(60, 1, 1), together.batches_by_length(60)):
        assert sorted(number for batch in batches for number in batch) == list(range(12))
        assert all(len(batch) * together.positions[batch].max() <= 60 or len(batch) == 1 for batch in batches)
    assert together.batches(60, 1, 0) == together.batches(60, 1, 0) != together.batches(60, 1, 1)


def test_tokens_are_found_alike_by_one_process_and_by_two():
    examples = spoken(24)
    alone = find_tokens(examples, range(0, 24, 2))
    together = find_tokens(examples, range(0, 24, 2), workers=2)
    assert list(alone) == list(range(0, 24, 2)) and alone.keys() == together.keys()
    for number, span in alone.items():
        assert torch.equal(span, together[number])
        assert span.shape == (6, 2) and bool((span[1:, 0] >= span[:-1, 1]).all())


# --- the joint model


def test_variants_side_by_side_cost_what_each_costs_alone(model_dir, packed):
    together, _ = packed
    torch.manual_seed(0)
    names = ("text_only", "simple", "taste_novq")
    models = build_together(load_part(model_dir, "llm"), names, speech_width=SPEECH_WIDTH, taste_sizes=TASTE_SIZES)
    joint, batch = JointModel(models).eval(), together.batch([0, 9, 4])
    found = joint(batch, names).losses
    for loss, name in zip(found, names, strict=True):
        scores = models[name](batch)
        torch.testing.assert_close(loss, scores.loss_sums.sum() / scores.target_counts.sum())
    hidden = torch.ones_like(batch.units, dtype=torch.bool)
    assert not torch.allclose(joint(batch, names, hidden).losses, found)


def test_everything_learns_but_the_text_embedding(model_dir, packed):
    together, _ = packed
    models = build_together(
        load_part(model_dir, "llm"), VARIANTS[:3], speech_width=SPEECH_WIDTH, taste_sizes=TASTE_SIZES
    )
    joint = JointModel(models).train()
    assert joint.llm.text_encoder.training and joint.llm.llm.training
    joint(together.batch([0, 9, 4]), VARIANTS[:3]).losses.mean().backward()
    without = {name for name, parameter in joint.named_parameters() if parameter.grad is None}
    assert without == {"models.text_only.llm.text_embedding.weight"}


def test_a_row_without_text_reads_the_mean_of_all_text_that_was_encoded(model_dir, packed):
    together, _ = packed
    names = ("text_only", "taste_novq", "taste")
    models = build_together(load_part(model_dir, "llm"), names, speech_width=SPEECH_WIDTH, taste_sizes=TASTE_SIZES)
    joint, batch = JointModel(models), together.batch([0, 9, 4])
    start_codebooks(joint, packed[1])
    joint.eval()
    encoded, _ = models["text_only"].llm.encode(batch.text, batch.text_lengths)
    mean = torch.cat([row[:length] for row, length in zip(encoded, batch.text_lengths, strict=True)]).mean(dim=0)
    fused = []
    watch = models["taste_novq"].fusion.register_forward_hook(lambda _, inputs, result: fused.append(inputs[0]))
    losses = [joint(batch, names, textless=rows).losses for rows in (None, torch.tensor([False, True, False]), None)]
    watch.remove()
    assert losses[0][0] == losses[1][0] and (losses[0] == losses[2]).all()
    assert (losses[0][1:] != losses[1][1:]).all()
    assert len(fused) == 6  # of two variants, three times
    for number, text in enumerate(fused):
        torch.testing.assert_close(text[[0, 2]], encoded[[0, 2]])
        torch.testing.assert_close(text[1], mean.expand_as(text[1]) if number in (2, 3) else encoded[1])


def test_the_commitment_moves_the_quantizer_alone(model_dir, packed):
    together, examples = packed
    names = ("taste_novq", "taste")
    torch.manual_seed(0)
    models = build_together(load_part(model_dir, "llm"), names, speech_width=SPEECH_WIDTH, taste_sizes=TASTE_SIZES)
    joint = JointModel(models)
    start_codebooks(joint, examples)
    joint.train()
    found = joint(together.batch([0, 9, 4]), names)
    joint.commit(found.commitment)
    moved = {name for name, parameter in joint.named_parameters() if parameter.grad is not None}
    assert moved == {f"models.taste.quantizer.rvq.project_in.{name}" for name in ("weight", "bias")}
    assert models["taste"].quantizer.rvq.project_in.weight.grad.norm() > 0
    found.losses.mean().backward()  # the graph is still there
    assert models["taste"].aggregator.layer_norm.weight.grad.norm() > 0
    joint.commit(JointModel({"taste_novq": models["taste_novq"]})(together.batch([0]), ["taste_novq"]).commitment)


def sounding(examples: list[Example]) -> tuple[list[Example], dict[str, torch.Tensor]]:
    """`spoken` utterances whose units tell long words from short ones, and what is told of their words."""
    heard, words = [], {}
    for number, example in enumerate(examples):
        middle = example.speech_mid[:, 0].round()
        starts = (middle == 0).long().cumsum(dim=0) - 1
        lengths = starts.bincount()
        named = example._replace(utt_id=f"utt-{number}", units=torch.where(lengths[starts] > FRAMES, 5, 2))
        heard.append(named)
        words[named.utt_id] = told_words(lengths)
    return heard, words


def told_words(lengths: torch.Tensor) -> torch.Tensor:
    """Words of so many units, all of one kind, and as many as a short one has by their text; spoken as written."""
    numbers = F.pad(torch.stack([lengths, torch.full_like(lengths, FRAMES)], dim=1), (0, 1 + len(PHONES)))
    return torch.cat([numbers, unit_codes()[torch.full_like(lengths, 5)]], dim=1).half()


def loud_sounds() -> WordSounds:
    torch.manual_seed(7)
    return WordSounds(SIZES.lm_width)


def test_the_aggregator_learns_to_hear_how_words_sound():
    model, sounds = small_model("taste_novq"), loud_sounds()
    examples, words = sounding(spoken(40))
    spans = list(find_tokens(examples, range(len(examples))).values())
    teach(model, examples, from_alignment(examples, spans, by_word=True), device=CPU, steps=120, peak_lr=5e-3, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = {name: value.clone() for name, value in sounds.state_dict().items()}
    how = {"device": CPU, "peak_lr": 5e-3, "seed": 0}
    untaught = hear_sounds(model, sounds, words, examples, steps=1, **how | {"peak_lr": 1e-9})
    told = hear_sounds(model, sounds, words, examples, steps=200, **how)
    assert untaught < 0.1 and told > 0.5
    for name, value in model.state_dict().items():
        assert name.startswith(("aggregator.", "audio_branch.")) or torch.equal(value, before[name]), name
    assert all(torch.equal(value, kept[name]) for name, value in sounds.state_dict().items())


def test_simple_learns_to_give_the_encoded_text_and_how_its_words_sound():
    model, sounds = small_model("simple"), loud_sounds()
    examples, words = sounding(spoken(40))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    how = {"device": CPU, "seed": 0}
    untaught = hear_sounds(model, sounds, words, examples, steps=1, peak_lr=1e-9, **how)
    told = hear_sounds(model, sounds, words, examples, steps=200, peak_lr=5e-3, **how)
    assert untaught < 0.1 and told > 0.3
    learned = ("aggregator.", "text_norm.", "speech_norm.", "input_proj.")
    for name, value in model.state_dict().items():
        assert name.startswith(learned) or torch.equal(value, before[name]), name
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name.rstrip(".") for name in learned}


def test_what_the_branch_does_not_need_takes_little_room_in_the_vectors(monkeypatch):
    examples, words = sounding(spoken(40))
    shares = []
    for blur, bulk in ((1.0, listening_lesson._BULK_WEIGHT), (0.0, 0.0)):
        monkeypatch.setattr(listening_lesson, "_BLUR", blur)
        monkeypatch.setattr(listening_lesson, "_BULK_WEIGHT", bulk)
        model = small_model("taste_novq")
        hear_sounds(model, loud_sounds(), words, examples, device=CPU, steps=600, peak_lr=5e-3, seed=0)
        with torch.no_grad():
            vectors = torch.cat([model.aggregate(collate([example]))[0] for example in examples])
        variances = torch.linalg.svdvals(vectors - vectors.mean(dim=0)).square()
        shares.append(float(variances[0] / variances.sum()))  # long words from short ones: one direction is enough
    assert shares[0] > shares[1]


def test_pace_and_pause_and_changed_phones_and_units_are_what_is_told_of_words():
    examples, words = sounding(spoken(12))
    for number, row in enumerate(words.values()):
        row[0, 3 + PHONES.index("iy")] = number % 2  # in every other utterance the first word has one more
        row[1, 2] = 5  # a pause after the second one
        row[1, -CODE_WIDTH:] = unit_codes()[2]
    wanted = from_words(examples, words)
    assert wanted.groups == {"pace": 1, "pause": 1, "changes": 1, "codes": CODE_WIDTH}
    paces, pauses, changes, codes = torch.cat(wanted.rows).split([1, 1, 1, CODE_WIDTH], dim=1)
    paces, pauses, changes = paces[:, 0], pauses[:, 0], changes[:, 0]
    assert len(pauses.unique()) == len(codes.unique(dim=0)) == 2
    slow = (torch.cat([*words.values()])[:, 0].float() / FRAMES).log()
    torch.testing.assert_close(paces, (slow - slow.mean()) / slow.std())
    assert len(changes.unique()) == 2 and changes.max() > 0
    torch.testing.assert_close(
        torch.stack([changes.mean(), changes.std()]), torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0
    )


def test_a_training_begins_with_what_the_language_model_was_told(start, examples, tmp_path, capsys):
    words = {example.utt_id: told_words(torch.ones(len(example.text), dtype=torch.int64)) for example in examples}
    torch.save(WordSounds(SIZES.lm_width).state_dict(), tmp_path / SOUNDS_FILE)
    torch.save(words, tmp_path / WORDS_FILE)
    start("told", sounds=tmp_path, sound_steps=3, variants="taste_novq")
    assert '"sounds": ' in capsys.readouterr().out
    torch.save({}, tmp_path / WORDS_FILE)
    with pytest.raises(AssertionError):
        start("told-nothing", sounds=tmp_path, variants="taste_novq")
    assert "has 0 of the utterances to train with, expected 10" in capsys.readouterr().err


def test_a_training_goes_on_with_the_parts_of_another(trained, start):
    still = {"steps": 1, "check_every": 1, "llm_lr": 1e-9, "parts_lr": 1e-9, "quantizer_from": 0.9}
    further = start("further", parts=trained, llm=trained / "llm.pt", **still)
    before, after = (json.loads((out / "metrics.json").read_text())["dev"]["own"] for out in (trained, further))
    for variant in VARIANTS:
        assert after[variant]["loss"] == pytest.approx(before[variant]["loss"], abs=2e-3), variant


def test_parts_that_are_not_there_are_refused(start, tmp_path, capsys):
    novq = start("novq-parts", steps=1, variants="taste_novq", lesson_steps=0)
    for name, options, message in (
        ("nowhere", {"parts": tmp_path}, "taste.pt: there is no such file; train_taste.py writes it"),
        (
            "no-quantizer",
            {"parts": novq, "variants": "taste"},
            "not all that taste is made of: quantizer: taste.pt has none",
        ),
        ("twice", {"parts": novq, "sounds": tmp_path}, "PARTS and SOUNDS are both given"),
    ):
        with pytest.raises(AssertionError):
            start(name, **options)
        assert message in capsys.readouterr().err
