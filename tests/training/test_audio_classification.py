"""Audio classification: WAV files of any kind to waves, transformers' loss, masks, unreadable files."""

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from scipy.signal import resample_poly
from transformers import Wav2Vec2FeatureExtractor

from benchmarks.make_sounds import KINDS, RATE, write_sounds
from launcher.data.prepare import prepare
from launcher.data.waves import read_wave
from launcher.errors import SourceError
from launcher.planning.layout import Resources
from launcher.planning.plan import make_plan
from launcher.recipe.loading import load_recipe
from launcher.run_directory import RunDirectory
from launcher.submit import write_run
from launcher.tasks import make_task
from launcher.tasks.audio_classification import shortest_wave
from launcher.training.prediction import predict_file
from tests.support.ranks import Ranks
from tests.training.task_runs import run_of, write_recipe

NO_DROPOUT = ", ".join(
    f"{name}: 0.0"
    for name in ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
)
WAV2VEC2 = (
    "{model_type: wav2vec2, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, "
    "conv_dim: [16, 16, 16], conv_kernel: [10, 8, 8], conv_stride: [5, 4, 4], feat_extract_norm: NORM, "
    "num_conv_pos_embeddings: 16, num_conv_pos_embedding_groups: 4, classifier_proj_size: 32, mask_time_length: 4, "
    f"{NO_DROPOUT}}}"
)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets") / "sounds"
    write_sounds(folder, 40)
    return folder


def make(folder: Path, sounds: Path, *overrides: str, norm: str = "layer", **sections: Any) -> Any:
    recipe = write_recipe(
        folder, "audio_classification", f"{{config: {WAV2VEC2.replace('NORM', norm)}}}",
        [{"type": "audio_folder", "files": [f"{sounds}/*/*.wav"]}],
        **{"audio": {"sampling_rate": RATE, "max_seconds": 0.4}, **sections},
    )  # fmt: skip
    return run_of(recipe, folder / "run", *overrides)


def of_file(content: bytes) -> dict[str, Any]:
    return {"bytes": content, "path": None}


def written(rate: int, samples: Any) -> dict[str, Any]:
    stream = io.BytesIO()
    wavfile.write(stream, rate, samples)
    return of_file(stream.getvalue())


def test_every_kind_of_wav_file_is_read() -> None:
    tone = 0.5 * np.sin(np.arange(800) / 5)
    for kind, step in (("uint8", 2**-7), ("int16", 2**-15), ("int32", 2**-31), ("float32", 1e-7), ("float64", 1e-7)):
        whole = not kind.startswith("float")
        scaled = tone * 2.0 ** (8 * np.dtype(kind).itemsize - 1) if whole else tone
        stored = (np.round(scaled) + (128 if kind == "uint8" else 0)).astype(kind) if whole else tone.astype(kind)
        found = read_wave(written(RATE, stored), RATE)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, tone, atol=step + 1e-7)
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:  # 24 bits, two channels
        file.setparams((2, 3, RATE, 0, "NONE", ""))
        both = np.stack([tone, -0.2 * tone], axis=1)
        file.writeframes(b"".join(int(v * 2**23).to_bytes(3, "little", signed=True) for v in both.flatten()))
    np.testing.assert_allclose(read_wave(of_file(stream.getvalue()), RATE), 0.4 * tone, atol=1e-6)


def test_sounds_are_resampled() -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(4410) / 44100).astype(np.float32)
    found = read_wave(written(44100, tone), 16_000)
    assert len(found) == 1600
    np.testing.assert_allclose(found, resample_poly(tone, 160, 441), atol=1e-6)
    inside = slice(100, 1500)  # a filter rings at the ends
    expected = np.sin(2 * np.pi * 440 * np.arange(1600) / 16_000)
    np.testing.assert_allclose(found[inside], expected[inside], atol=5e-3)
    array = {"array": tone.tolist(), "sampling_rate": 44100}
    np.testing.assert_array_equal(read_wave(array, 16_000), found)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_the_loss_is_that_of_transformers(tmp_path: Path, sounds: Path, norm: str) -> None:
    """On waves that transformers' own feature extractor makes of the files."""
    _, plan, prepared = make(tmp_path, sounds, norm=norm)
    assert prepared.facts["labels"] == sorted(KINDS)
    task = make_task(plan, prepared.facts)
    model = task.build_model().eval()
    (dataset,) = prepared.split("train")
    samples = [dataset[index] for index in (0, 40, 80, 100)]
    assert len({len(sample["wave"]) for sample in samples}) > 1
    batch = task.collate(samples)
    output = task.loss(model, batch)

    files = {kind: sorted((sounds / kind).glob("*.wav")) for kind in KINDS}
    raw = [read_wave({"bytes": None, "path": str(path)}, RATE) for kind in sorted(KINDS) for path in files[kind]]
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True, return_attention_mask=norm == "layer")

    def found(wave: Any) -> Any:
        same_length = [one for one in raw if len(one) == len(wave)]
        scaled = [extractor(one, sampling_rate=RATE)["input_values"][0] for one in same_length]
        return next(one for one, own in zip(same_length, scaled, strict=True) if np.allclose(own, wave, atol=1e-5))

    chosen = [found(sample["wave"]) for sample in samples]
    longest = {"padding": "max_length", "max_length": round(0.4 * RATE)} if norm == "group" else {"padding": True}
    each = [{"input_values": extractor(one, sampling_rate=RATE)["input_values"][0]} for one in chosen]
    inputs = extractor.pad(each, return_tensors="pt", **longest)
    expected = model(**inputs, labels=batch["labels"]).loss
    assert output.loss_sum.item() / 4 == pytest.approx(expected.item(), abs=1e-5)
    alone = task.loss(model, task.collate(samples[:1]))
    torch.testing.assert_close(alone.predictions["logits"], output.predictions["logits"][:1], atol=1e-5, rtol=0)


def test_random_weights_are_those_that_transformers_means(tmp_path: Path, sounds: Path) -> None:
    """The convolution under weight norm too; and each step masks by its own seed."""
    _, plan, prepared = make(tmp_path, sounds)
    task = make_task(plan, prepared.facts)
    model = task.build_model()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    convolution = model.wav2vec2.encoder.pos_conv_embed.conv
    assert convolution.weight.std().item() == pytest.approx(2 * (1 / (16 * 32)) ** 0.5, rel=0.1)
    direction = convolution.parametrizations.weight.original1
    torch.testing.assert_close(convolution.weight, direction)
    (dataset,) = prepared.split("train")
    batch = task.collate([dataset[index] for index in range(4)])
    model.train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(task.loss(model, batch).loss_sum.item())
    assert losses[0] == losses[1] != losses[2]


def test_the_shortest_wave_makes_frames_enough(tmp_path: Path, sounds: Path) -> None:
    _, plan, prepared = make(tmp_path, sounds)
    task = make_task(plan, prepared.facts)
    model = task.build_model()
    shortest = shortest_wave(task.config())
    assert model.wav2vec2._get_feat_extract_output_lengths(shortest) == 5
    assert model.wav2vec2._get_feat_extract_output_lengths(shortest - 1) == 4
    (dataset,) = prepared.split("train")
    tiny = {**dataset[0], "wave": dataset[0]["wave"][:7]}
    assert task.loss(model.train(), task.collate([tiny])).loss_sum.isfinite()


def test_unreadable_sounds_are_counted_up_to_a_bound(tmp_path: Path, sounds: Path) -> None:
    bad = tmp_path / "sounds" / "sine"
    bad.mkdir(parents=True)
    whole = next((sounds / "sine").glob("*.wav")).read_bytes()
    for name, content in {"cut": whole[:-100], "text": b"no sound", "empty": b"", "header": whole[:30]}.items():
        (bad / f"{name}.wav").write_bytes(content)
    wavfile.write(bad / "nan.wav", RATE, np.array([0.1, np.nan], np.float32))
    wavfile.write(bad / "nothing.wav", RATE, np.zeros(0, np.int16))
    source = [{"type": "audio_folder", "files": [f"{sounds}/*/*.wav", f"{tmp_path}/sounds/*/*.wav"]}]
    with pytest.raises(SourceError, match="6 of 166 examples cannot be used: 6 x the sound cannot be read"):
        make(tmp_path, sounds, data={"sources": source})
    _, _, prepared = make(tmp_path, sounds, data={"sources": source, "max_bad_fraction": 0.05})
    assert prepared.statistics["sources"][0]["bad_examples"] == 6
    assert sum(len(part) for name in ("train", "validation") for part in prepared.split(name)) == 160


def test_text_and_pictures_are_no_sounds(tmp_path: Path, sounds: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(SourceError, match="type text has text, but the task also reads audio and label"):
        make(tmp_path, sounds, data={"sources": [{"type": "text", "files": [f"{tmp_path}/*.txt"]}]})
    with pytest.raises(SourceError, match="at least, but has: 'sine'"):
        make(tmp_path, sounds, data={"sources": [{"type": "audio_folder", "files": [f"{sounds}/sine/*.wav"]}]})


@pytest.mark.distributed
@pytest.mark.matrix
@pytest.mark.parametrize("stage", ["2", "3"])
def test_the_shipped_recipe_learns_kinds_of_waves(
    tmp_path: Path, two_ranks: Ranks, sounds: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setenv("ZEROFLEET_ASSETS", str(sounds.parent))
    overrides = ("training.max_steps=40", f"zero.stage={stage}", "export.at_end=false", "evaluation.eval_steps=40")
    recipe = load_recipe("finetune/audio-classification", (*overrides, f"data.cache_directory={tmp_path}/cache"))
    prepared = prepare(recipe, progress=False)
    plan = make_plan(recipe, Resources(nodes=1, workers_per_node=2))
    directory = RunDirectory.at(tmp_path / "run")
    write_run(directory, plan)
    results = two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    metrics = results[0]["metrics"]
    assert metrics["eval_accuracy"] > metrics["eval_majority_accuracy"] + 0.3
    if stage == "2":
        rows = tmp_path / "rows.jsonl"
        paths = [next((sounds / kind).glob("*.wav")) for kind in KINDS]
        rows.write_text("".join(f'{{"audio": "{path}"}}\n' for path in paths) + '{"audio": "/nothing.wav"}\n')
        (folder,) = sorted(directory.checkpoints.glob("step_*40"))
        answers = [answer for _, answer in predict_file(folder, plan, prepared, rows, workers=1)]
        assert answers[-1] == {"error": "the sound cannot be read"}
        assert sum(answer["label"] == kind for answer, kind in zip(answers, KINDS, strict=False)) >= 3
