"""Training batches: the same from the same seed, epoch and rank; cut, padded and counted right; errors that name."""

import logging
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from cosyvoice.dataset import processor
from cosyvoice.dataset.dataset import Dataset
from cosyvoice.dataset.pitch import pitch
from cosyvoice.dataset.sample import DataError
from cosyvoice.utils.audio import mel_spectrogram
from tests.small_shards import buzz, make_folder, make_shards

UTTERANCES = 10
CROP_SAMPLES = 20 * 256


class Letters:
    """A tokenizer of characters."""

    def encode(self, text: str, allowed_special: Any) -> list[int]:
        return [ord(letter) for letter in text]


MEL = partial(
    mel_spectrogram, n_fft=1024, num_mels=80, sampling_rate=22050, hop_size=256, win_size=1024, fmin=0, fmax=8000
)


def pipeline(gan: bool = False, late_cut: bool = True, **filters: Any) -> list[partial]:
    """The steps of the configurations, with small numbers."""
    cut = partial(processor.truncate, truncate_length=CROP_SAMPLES)
    steps = [
        partial(processor.parquet_opener),
        partial(processor.tokenize, get_tokenizer=Letters, allowed_special="all"),
        partial(processor.filter, **filters),
        partial(processor.resample, resample_rate=22050),
        *([cut] if gan and not late_cut else []),
        partial(processor.compute_fbank, feat_extractor=MEL),
        *([partial(processor.compute_f0, sample_rate=22050, hop_size=256)] if gan else []),
        partial(processor.parse_embedding, normalize=True),
        *([cut] if gan and late_cut else []),
        partial(processor.shuffle, shuffle_size=6),
        partial(processor.sort, sort_size=4),
        partial(processor.batch, batch_type="dynamic", max_frames_in_batch=200),
        partial(processor.padding, use_spk_embedding=False),
    ]
    return steps


@pytest.fixture(scope="module")
def data_list(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(make_folder(tmp_path_factory.mktemp("data") / "train", UTTERANCES), 3)


def epoch(data_list: Path, number: int = 0, gan: bool = False, late_cut: bool = True, **options: Any) -> list[dict]:
    dataset = Dataset(data_list, pipeline(gan, late_cut), gan=gan, **options)
    dataset.set_epoch(number)
    return list(dataset)


def names(batches: list[dict]) -> list[str]:
    return [utt for batch in batches for utt in batch["utts"]]


def assert_equal(some: list[dict], others: list[dict]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key], key


# ---- without sound


def test_a_language_models_batches_are_those_of_the_full_pipeline(data_list: Path) -> None:
    light = [step for step in pipeline() if step.func not in (processor.filter, processor.resample)]
    place = next(number for number, step in enumerate(light) if step.func is processor.compute_fbank)
    light[place] = partial(processor.frames_of_tokens, sample_rate=22050, hop_size=256)
    for number in (0, 1):
        dataset = Dataset(data_list, light)
        dataset.set_epoch(number)
        found, expected = list(dataset), epoch(data_list, number)
        assert len(expected) > 2
        for batch in (*found, *expected):
            del batch["speech_feat"]
        for one, other in zip(found, expected, strict=True):
            assert (one.pop("speech_feat_len") - other.pop("speech_feat_len")).abs().max() <= 1
        assert_equal(found, expected)


def test_a_rate_that_shares_no_factor_with_the_models_takes_no_filter_of_gigabytes() -> None:
    sound = torch.sin(torch.arange(44_099) / 44_099 * 2 * torch.pi * 200)[None]
    data = [{"utt": "u", "speech": sound, "sample_rate": 44_099}]
    (sample,) = processor.resample(data, resample_rate=22_050)
    assert sample["sample_rate"] == 22_050
    assert abs(sample["speech"].size(1) - 22_050) <= 1
    expected = torch.sin(torch.arange(22_050) / 22_050 * 2 * torch.pi * 200)
    assert torch.allclose(sample["speech"][0, 100:21_900], expected[100:21_900], atol=0.05)  # 44,099 Hz count as 44,100
    assert processor._resampler(44_099, 22_050).kernel.numel() < 10_000_000
    exact = processor._resampler(48_000, 22_050)
    assert (exact.orig_freq, exact.new_freq) == (320, 147)


def test_frames_of_tokens_hears_no_sound_and_checks_the_tokens() -> None:
    dropped: Counter[str] = Counter()

    def frames(tokens: list[int] | None) -> list[dict[str, Any]]:
        sample = {"utt": "a", "src": "shard", "audio_data": b"no sound", "speech_token": tokens, "text_token": [1]}
        return list(processor.frames_of_tokens([sample], sample_rate=22050, hop_size=256, dropped=dropped))

    (sample,) = frames([7] * 100)  # two seconds
    assert sample["speech_feat"].shape == (172, 0) and "audio_data" not in sample
    assert frames([]) == frames(None) == [] and dropped == {"no speech tokens": 2}
    for wrong in ([4096], [-1]):
        with pytest.raises(DataError, match=r"a.*speech tokens"):
            frames(wrong)


@pytest.mark.parametrize(("rows", "without", "refused"), [(12, 10, False), (30, 15, False), (20, 11, True)])
def test_a_shard_most_of_whose_utterances_have_no_speech_tokens_is_an_error(
    rows: int, without: int, refused: bool
) -> None:
    shard = [
        {"utt": str(row), "src": "shard.tar", "audio_data": b"", "speech_token": [] if row < without else [7]}
        for row in range(rows)
    ]
    kept = processor.frames_of_tokens(shard, sample_rate=22050, hop_size=256)
    if refused:
        with pytest.raises(
            DataError, match=f"shard.tar: {without} of {rows} utterances have no speech tokens.*stage 2"
        ):
            list(kept)
    else:
        assert len(list(kept)) == rows - without


# ---- order


def test_order_and_crops_follow_from_seed_and_epoch_alone(data_list: Path) -> None:
    first = epoch(data_list, 3, gan=True)
    torch.manual_seed(99)
    assert_equal(first, epoch(data_list, 3, gan=True))
    for other in (epoch(data_list, 4, gan=True), epoch(data_list, 3, gan=True, seed=7)):
        assert sorted(names(other)) == sorted(names(first)) and names(other) != names(first)


def test_processes_share_the_shards_and_together_read_each_once(data_list: Path) -> None:
    shares = [names(epoch(data_list, 1, rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(utt for share in shares for utt in share) == [f"utt{number:02d}" for number in range(UTTERANCES)]
    assert all(shares)
    everything = [names(epoch(data_list, 1, rank=rank, world_size=3, partition=False)) for rank in range(2)]
    assert everything[0] == everything[1] and len(everything[0]) == UTTERANCES


def test_loading_processes_share_the_shards_too(data_list: Path) -> None:
    loader = DataLoader(Dataset(data_list, pipeline()), batch_size=None, num_workers=2)
    assert sorted(names(list(loader))) == [f"utt{number:02d}" for number in range(UTTERANCES)]


def test_fewer_shards_than_processes_are_shared_with_a_warning(
    data_list: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert all(epoch(data_list, 0, rank=rank, world_size=6) for rank in range(6))
    assert "4 shards for 6 processes" in caplog.text


def test_without_shuffle_every_epoch_is_the_same(data_list: Path) -> None:
    assert_equal(*(epoch(data_list, number, gan=True, shuffle=False) for number in (0, 5)))


# ---- cache


@pytest.mark.parametrize("gan", [False, True])
def test_cached_epochs_equal_computed_ones_and_read_no_shard_again(
    data_list: Path, gan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [epoch(data_list, number, gan) for number in range(3)]
    dataset = Dataset(data_list, pipeline(gan), gan=gan, cache=True)
    given = []
    for number in range(3):
        dataset.set_epoch(number)
        given.append(list(dataset))
        monkeypatch.setattr(pq, "ParquetFile", None)
    for some, others in zip(given, wanted, strict=True):
        assert_equal(some, others)


def test_an_epoch_left_early_leaves_no_half_shard_in_the_cache(data_list: Path) -> None:
    dataset = Dataset(data_list, pipeline(), cache=True)
    next(iter(dataset))
    assert_equal(list(dataset), epoch(data_list))


# ---- what is in a batch


def test_batches_stay_within_their_frames_and_pad_with_zeros(data_list: Path) -> None:
    for batch in epoch(data_list):
        rows, frames, bands = batch["speech_feat"].shape
        assert rows * frames <= 200 and bands == 80
        assert batch["speech_feat_len"].tolist() == sorted(batch["speech_feat_len"].tolist(), reverse=True)
        for name in ("speech_feat", "speech_token", "text_token"):
            for row, length in zip(batch[name], batch[f"{name}_len"], strict=True):
                assert not row[length:].any() and row[:length].shape[0] == length
        torch.testing.assert_close(batch["embedding"].norm(dim=1), torch.ones(rows))
        assert torch.equal(batch["embedding"], batch["utt_embedding"]) and "speech" not in batch


@pytest.mark.parametrize("late_cut", [True, False])
def test_crops_hold_the_mel_and_pitch_of_their_own_sound(data_list: Path, late_cut: bool) -> None:
    for batch in epoch(data_list, gan=True, late_cut=late_cut):
        frames = CROP_SAMPLES // 256
        assert batch["speech"].shape[1:] == (CROP_SAMPLES,) and batch["pitch_feat"].shape[1:] == (frames,)
        inner = slice(3, frames - 3)  # the edges of a crop know what lies beyond it, or its mirror image
        mel = MEL(batch["speech"]).transpose(1, 2)
        torch.testing.assert_close(batch["speech_feat"][:, inner], mel[:, inner], atol=1e-4, rtol=0)
        for utt, track in zip(batch["utts"], batch["pitch_feat"], strict=True):
            heard = track[inner]
            assert (heard[heard > 0] - (100 + 20 * int(utt[3:]))).abs().max() < 3 and (heard > 0).float().mean() > 0.8


def test_a_sound_shorter_than_the_crop_is_followed_by_silence(data_list: Path) -> None:
    steps = pipeline(gan=True)
    steps[7] = partial(processor.truncate, truncate_length=100 * 256)
    for batch in Dataset(data_list, steps, gan=True):
        assert batch["speech_feat"].shape[1] == 100 and batch["speech"].shape[1] == 25600
        assert (batch["speech_feat"][:, -1] + 11.5129).abs().max() < 1e-3
        assert not batch["pitch_feat"][:, -1].any() and not batch["speech"][:, -1].any()


def test_static_batches_have_a_number_of_rows() -> None:
    samples = [{"speech_feat": torch.zeros(5, 80)} for _ in range(5)]
    assert [len(rows) for rows in processor.batch(samples, "static", batch_size=2)] == [2, 2, 1]
    assert [len(rows) for rows in processor.batch(samples, "dynamic", max_frames_in_batch=4)] == [1] * 5
    with pytest.raises(ValueError, match="expected static or dynamic"):
        list(processor.batch(samples, "all"))


# ---- what is dropped, and what is refused


def test_what_is_dropped_is_counted_by_reason_once_an_epoch(data_list: Path, caplog: pytest.LogCaptureFixture) -> None:
    for cache in (False, True):
        dataset = Dataset(data_list, pipeline(max_length=85), cache=cache)
        for _ in range(2):
            caplog.clear()
            assert len(names(list(dataset))) == 8
            assert [
                record.getMessage().split("; ")[1] for record in caplog.records if record.levelno > logging.INFO
            ] == ["dropped: 2 with sound over 0.85 s"]
    with pytest.raises(DataError, match=r"none of its 10 utterances is left.*sound over"):
        list(Dataset(data_list, pipeline(max_length=1)))


def changed_shard(data_list: Path, folder: Path, **columns: Any) -> Path:
    """A list of one shard in which the second row has other values."""
    source = data_list.read_text().splitlines()[0]
    table = pq.read_table(source)
    rows = table.to_pylist()
    rows[1].update(columns)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / "shard.tar")
    (folder / "data.list").write_text(f"{folder / 'shard.tar'}\n")
    return folder / "data.list"


def large_shard(data_list: Path, folder: Path, rows: int, mistaken: int) -> Path:
    """A list of one shard with so many rows, the last of which have another recording's speech tokens."""
    table = pq.read_table(data_list.read_text().splitlines()[0])
    row = table.to_pylist()[0]
    made = [{**row, "utt": f"row{number:03d}"} for number in range(rows)]
    for late in made[rows - mistaken :]:
        late["speech_token"] = [1] * 5
    pq.write_table(pa.Table.from_pylist(made, schema=table.schema), folder / "shard.tar")
    (folder / "data.list").write_text(f"{folder / 'shard.tar'}\n")
    return folder / "data.list"


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([], "no speech tokens"),  # published shards have these of recordings over 30 s
        (None, "no speech tokens"),
        ([1] * 5, "speech tokens of another length"),
    ],
)
def test_one_utterance_without_speech_tokens_of_its_own_is_dropped_and_counted(
    data_list: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, tokens: list[int] | None, reason: str
) -> None:
    dataset = Dataset(changed_shard(data_list, tmp_path, speech_token=tokens), pipeline(), shuffle=False)
    assert sorted(names(list(dataset))) == ["utt00", "utt02"]
    assert dataset.dropped == {reason: 1}
    assert f"2 of 3 utterances; dropped: 1 with {reason}" in caplog.text
    assert ("utterance 'utt01': its 5 speech tokens last 0.10 s and its sound 0.70 s" in caplog.text) == bool(tokens)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(("rows", "mistaken", "refused"), [(20, 10, False), (120, 11, False), (60, 11, True)])
def test_many_utterances_of_a_shard_with_tokens_of_other_recordings_are_an_error(
    data_list: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    rows: int,
    mistaken: int,
    refused: bool,
    cache: bool,
) -> None:
    dataset = Dataset(large_shard(data_list, tmp_path, rows, mistaken), pipeline(), shuffle=False, cache=cache)
    if refused:
        first = f"the first: .*utterance 'row{rows - mistaken:03d}': .*stage 2"
        with pytest.raises(DataError, match=f"shard.tar: {mistaken} of {rows} utterances have .*{first}"):
            list(dataset)
    else:
        assert len(names(list(dataset))) == rows - mistaken
    assert caplog.text.count("left out, as are others like it") == 1


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"speech_token": [1, 4096]}, r"run from 1 to 4096, expected integers 0\.\.4095"),
        ({"speech_token": [-1] * 30}, "run from -1"),
        ({"utt_embedding": None}, "utt_embedding has 0 values, expected 192; .*stage 1"),
        ({"spk_embedding": [1.0] * 100}, "spk_embedding has 100 values"),
        ({"utt_embedding": [float("nan")] * 192}, "no finite numbers"),
        ({"audio_data": b"RIFF"}, "cannot be decoded.*repair .*utt01.wav"),
    ],
)
def test_an_unusable_utterance_is_named_with_its_shard_and_the_next_step(
    data_list: Path, tmp_path: Path, columns: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=f"shard.tar: utterance 'utt01': .*{said}"):
        list(Dataset(changed_shard(data_list, tmp_path, **columns), pipeline(), shuffle=False))


def test_a_truncated_corrupt_or_missing_shard_is_named_with_the_next_step(data_list: Path, tmp_path: Path) -> None:
    content = Path(data_list.read_text().splitlines()[0]).read_bytes()
    flipped = bytearray(content)
    flipped[3000] ^= 1
    shard = tmp_path / "shard.tar"
    (tmp_path / "data.list").write_text(f"{shard}\n")
    for broken in (content[:-50], content[:100], b"", bytes(flipped)):
        shard.write_bytes(broken)
        with pytest.raises(DataError, match=r"shard.tar: no readable Parquet shard, .*stage 3"):
            list(Dataset(tmp_path / "data.list", pipeline()))
    shard.unlink()
    with pytest.raises(DataError, match=r"shard.tar: data.list names this shard, and there is no such file.*stage 3"):
        list(Dataset(tmp_path / "data.list", pipeline()))


def test_a_missing_or_empty_list_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such list of shards.*stage 3"):
        Dataset(tmp_path / "data.list", pipeline())
    (tmp_path / "data.list").write_text("\n")
    with pytest.raises(DataError, match="names no shard"):
        Dataset(tmp_path / "data.list", pipeline())


# ---- pitch


@pytest.mark.parametrize("hz", [75.0, 120.0, 233.0, 480.0])
def test_the_pitch_of_a_buzz_is_found_and_silence_and_noise_have_none(hz: float) -> None:
    rate, third = 22050, 22050 // 2
    generator = torch.Generator().manual_seed(0)
    sound = torch.cat(
        [
            torch.zeros(third),
            torch.from_numpy(buzz(hz, third, rate)).float(),
            0.02 * torch.randn(third, generator=generator),
        ]
    )
    track = pitch(sound, rate, 256)
    frames = third // 256
    assert track.shape == (sound.numel() // 256,) and track.dtype == torch.float32
    assert not track[: frames - 3].any() and (track[2 * frames + 4 :] > 0).float().mean() < 0.2
    torch.testing.assert_close(track[frames + 4 : 2 * frames - 3], torch.full((frames - 7,), hz), rtol=0.005, atol=0)
    assert not pitch(torch.zeros(5000), rate, 256).any() and pitch(torch.zeros(100), rate, 256).shape == (0,)
