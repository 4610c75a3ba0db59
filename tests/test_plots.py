import soundfile
import torch

from taste import plots
from taste.batch import Example
from taste.data import open_dataset
from taste.feature_set import FeaturePaths
from taste.generation import Generated
from taste.plots import plot_alignment, plot_losses, plot_mels
from taste.results import decode_units, draw_alignments
from taste.synthesis import UnitDecoder
from tests.small_model_folder import write_small_model_folder
from tests.small_stage3 import SIZES, random_examples, write_features

AWKWARD_TITLE = "utt: it costs $5 or $6_{ and 50 % more, " + "very long " * 60
PNG = b"\x89PNG"


def width_of(path) -> int:
    return int.from_bytes(path.read_bytes()[16:20], "big")


def test_any_transcript_can_head_a_picture_and_none_widens_it(tmp_path):
    widths = []
    for number, title in enumerate(("utt: short", AWKWARD_TITLE, "")):
        for name in ("mel", "alignment"):
            path = tmp_path / f"{number}_{name}.png"
            if name == "mel":
                plot_mels(path, {"one": torch.randn(80, 30), "two": torch.randn(80, 9)}, title)
            else:
                plot_alignment(path, torch.rand(3, 20), [" $1", "", "_{$"], torch.randn(80, 34), title)
            assert path.read_bytes().startswith(PNG)
            widths.append(width_of(path))
    assert len(set(widths)) == 1


def test_an_alignment_is_drawn_without_the_recording_too(tmp_path):
    plot_alignment(tmp_path / "alone.png", torch.rand(1, 1), ["a"], None, "one token, one frame")
    assert (tmp_path / "alone.png").read_bytes().startswith(PNG)


def test_losses_are_drawn_from_the_first_scores_on(tmp_path):
    scores = {"loss": 8.0, "top1": 0.0, "top5": 0.1}
    plot_losses(tmp_path / "loss.png", [{"epoch": 0, "train": {}, "test": scores}], 4097, AWKWARD_TITLE)
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_curves_far_below_an_even_guess_fill_the_picture(tmp_path, monkeypatch):
    drawn = []
    make = plots._new_figure
    monkeypatch.setattr(plots, "_new_figure", lambda *sizes: drawn.append(make(*sizes)) or drawn[-1])
    for highest in (8.0, 1.9):
        entries = [{"loss": highest * share, "top1": 0.4, "top5": 0.8} for share in (1.0, 0.9)]
        history = [
            {"epoch": epoch, "train": entry if epoch else {}, "test": entry} for epoch, entry in enumerate(entries)
        ]
        plot_losses(tmp_path / "loss.png", history, 4097, "utt")
    (reached, _), (left, _) = (axes for _, axes in drawn)
    assert reached.get_ylim()[1] > 8.3 and left.get_ylim()[1] < 2.0
    assert "ln 4097 = 8.32" in left.get_legend().get_texts()[0].get_text()


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(97 + token) for token in tokens)


def written_paths(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.*")}


def recorded_dataset(folder, audio_path: str, tokens: bool):
    """Two utterances; stage 1 noted where the first was recorded."""
    examples: list[Example] = random_examples([(3, 12), (2, 8)])
    paths: FeaturePaths = write_features(folder, "test", examples)
    info = torch.load(paths.info)
    info["utt-00"]["audio_path"] = audio_path
    if tokens:
        info["utt-00"]["text_token"] = torch.tensor([0, 1, 2])
    torch.save(info, paths.info)
    return open_dataset(paths, SIZES)


def test_original_true_and_predicted_lie_side_by_side_at_one_rate(tmp_path, golden_dir):
    decoder = UnitDecoder(write_small_model_folder(tmp_path / "model", golden_dir), torch.device("cpu"))
    soundfile.write(tmp_path / "a.wav", 0.1 * torch.randn(3840).numpy(), 16_000)  # 0.24 s
    dataset = recorded_dataset(tmp_path / "features", str(tmp_path / "a.wav"), tokens=True)
    run = tmp_path / "run"
    paths = decode_units(decoder, dataset, Generated([[1] * 9, [2]], [True, True]), run, 0, lambda: False)
    draw_alignments([torch.rand(3, 12), torch.rand(2, 8)], decoder, dataset, Letters(), run)
    wavs = {"wavs/utt-00_original.wav", "wavs/utt-00_true_units.wav", "wavs/utt-00_predicted.wav"}
    wavs |= {"wavs/utt-01_true_units.wav"}  # no recording noted, and one unit makes no sound
    pictures = {f"figures/utt-{number}_{name}.png" for number in ("00", "01") for name in ("mel", "alignment")}
    assert written_paths(run) == wavs | pictures
    assert {path.removeprefix(f"{run}/") for path in paths} == wavs
    assert {soundfile.info(path).samplerate for path in paths} == {decoder.sample_rate_hz}
    assert soundfile.info(run / "wavs/utt-00_original.wav").duration == 0.24


def test_a_recording_that_is_gone_costs_only_its_panel(tmp_path, golden_dir, capsys):
    decoder = UnitDecoder(write_small_model_folder(tmp_path / "model", golden_dir), torch.device("cpu"))
    dataset = recorded_dataset(tmp_path / "features", str(tmp_path / "gone.wav"), tokens=False).subset([0])
    run = tmp_path / "run"
    decode_units(decoder, dataset, Generated([[1] * 9], [True]), run, 0, lambda: False)
    draw_alignments([torch.rand(3, 12)], decoder, dataset, Letters(), run)
    names = {"wavs/utt-00_true_units.wav", "wavs/utt-00_predicted.wav"}
    assert written_paths(run) == names | {"figures/utt-00_mel.png", "figures/utt-00_alignment.png"}
    assert "gone.wav: there is no such file" in capsys.readouterr().out
