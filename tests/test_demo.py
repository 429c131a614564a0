"""The demo's recipe on small made-up packages, its committed tables, and what the committed checkpoint can do."""

import csv
import json
import re
from collections import defaultdict

import msgspec
import numpy as np
import pytest
import soundfile
import torch
from conftest import DEMO_CHECKPOINT, RECORDINGS, ROOT
from helpers import synthetic_audio

from aesanet.axes import AXES
from aesanet.errors import InputError
from aesanet.hashing import file_sha256
from aesanet.metrics import rank_metrics
from aesanet.models.checkpoint import load_checkpoint
from aesanet.runtime.audio.decode import clip_blocks
from aesanet.runtime.rows.row import Clip
from aesanet.training.demo import degrade, plan, sources, train
from aesanet.training.demo.__main__ import tell_other_versions
from aesanet.training.demo.baseline import Baseline, features
from aesanet.training.demo.corpus import NOISE_FLOOR_DB, with_noise_floor
from aesanet.training.demo.label import LEAST_STEP, Label, Measured, label
from aesanet.training.demo.ladders import TableRow, kind_heard, label_rows, ladder_rows, table_text
from aesanet.training.demo.plan import DemoClip
from aesanet.training.demo.render import Part, Reference, active_share, render, render_reference, write_clip
from aesanet.training.demo.tables import LABELS_FILE, REFERENCES_FILE, read_table, write_table

PQ = AXES.index("PQ")


def recording(name):
    (path,) = [p for p in RECORDINGS if p.name.startswith(name)]
    return np.concatenate(list(clip_blocks(Clip(str(path))))).astype(np.float64)[:80_000]


def spectral_distance(a, b):
    """Mean absolute difference of log spectra in dB, of frames that are not silent: no metric that labels use."""
    frames = [x[: len(x) // 512 * 512].reshape(-1, 512) * np.hanning(512) for x in (a, b)]
    power = [10 * np.log10(np.abs(np.fft.rfft(x)) ** 2 + 1e-7 * np.square(a).mean() * 512) for x in frames]
    return np.abs(power[0] - power[1]).mean()


@pytest.mark.parametrize("name", degrade.DEGRADATIONS)
@pytest.mark.parametrize("clip", ["speech-ru", "music-guitar"])
def test_each_level_of_damage_is_farther_from_the_original(name, clip):
    x = recording(clip)
    damaged = [degrade.DEGRADATIONS[name](x, level, np.random.default_rng(5)) for level in degrade.LEVELS]
    assert all(y.shape == x.shape and np.isfinite(y).all() for y in damaged)
    distances = [spectral_distance(x, y) for y in damaged]
    if name == "opus":  # which at the lowest rate narrows the band, and distorts what is left less
        assert distances[:4] == sorted(distances[:4])
        assert distances[4] > distances[1]
        assert degrade.bandwidth_hertz(damaged[4]) < 0.75 * degrade.bandwidth_hertz(x)
    else:
        assert distances == sorted(distances)
    assert distances[0] > 0


def test_noise_is_as_loud_as_it_says():
    x = recording("speech-ru")
    for level, snr_db in zip(degrade.LEVELS, degrade.NOISE_SNR_DB, strict=True):
        added = degrade.noise(x, level, np.random.default_rng(0)) - x
        assert 10 * np.log10(np.square(x).sum() / np.square(added).sum()) == pytest.approx(snr_db, abs=0.01)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Two small packages a split of speechlike bursts, tones and noises."""
    folder = tmp_path_factory.mktemp("packages")
    listed = []
    for split in ("train", "validation", "test"):
        for kind, sounds in (("speech", ("speechlike", "gaps")), ("music", ("tones",)), ("effect", ("red_noise",))):
            package = sources.Package(f"{kind}-{split}", split, kind, language="xx")
            listed.append(package)
            (folder / package.name / "audio").mkdir(parents=True)
            for index in range(7):
                rng = np.random.default_rng([len(listed), index])
                audio = synthetic_audio(rng, 4.0)
                mixed = sum(audio[sound] for sound in sounds) + 1e-4 * audio["white_noise"]
                file = folder / package.name / "audio" / f"{index}.flac"
                soundfile.write(file, 0.3 * mixed / np.abs(mixed).max(), 16_000)
    return folder, tuple(listed)


@pytest.fixture
def small(packages, monkeypatch):
    folder, listed = packages
    monkeypatch.setattr(sources, "PACKAGES", listed)
    counts = plan.Counts(
        speech=2, music=2, effect=2, types=1, held_out_types=1, voices=3, sounds=2, layer_ladders=1, speeds=(0.8, 1.2)
    )
    monkeypatch.setattr(plan, "COUNTS", dict.fromkeys(("train", "validation", "test"), counts))
    # One file a group, so that five sounds of different groups can be found.
    monkeypatch.setattr(sources, "_source", lambda p, f: sources.Source(p, str(f), p.kind, str(f), "xx"))
    monkeypatch.setattr(plan, "is_fit", lambda x, kind, strict: True)
    return folder


def test_a_plan_is_the_same_each_time_and_keeps_packages_apart(small):
    references, clips = plan.plan(small, sources.sources(small))
    again = plan.plan(small, sources.sources(small))
    assert (references, clips) == again
    assert len({clip.id for clip in clips}) == len(clips)
    by_id = {one.id: one for one in references}
    for clip in clips:
        for name in clip.references:
            assert all(part.file.split("/")[0].endswith(clip.split) for part in by_id[name].parts)


def test_layers_are_equally_loud(small):
    references, clips = plan.plan(small, sources.sources(small))
    by_id = {one.id: one for one in references}
    mixes = [clip for clip in clips if clip.kind == "mix" and clip.split == "test"]
    assert [clip.layers for clip in mixes] == [1, 2, 3, 4, 5]
    rms = [np.sqrt(np.square(render(small, by_id, c.references, c.degradation, c.level)).mean()) for c in mixes]
    np.testing.assert_allclose(rms, rms[0], rtol=1e-6)


def test_a_voice_played_faster_is_shorter_and_higher(small):
    references, _ = plan.plan(small, sources.sources(small))
    voice = next(one for one in references if one.speed > 1.05)
    slow, fast = (render_reference(small, msgspec.structs.replace(voice, speed=speed)) for speed in (1.0, 2.0))
    assert len(fast) == pytest.approx(len(slow) / 2, abs=2)
    half = len(slow) // 2
    low = np.abs(np.fft.rfft(slow[: 2 * half])) ** 2
    high = np.abs(np.fft.rfft(fast[:half])) ** 2  # bins twice as far apart
    centre = [(np.arange(len(power)) * power).sum() / power.sum() for power in (low[: half // 2], high)]
    assert centre[1] == pytest.approx(centre[0], rel=0.05)


def test_what_sounds_at_the_same_time_sounds_most_of_the_time(small):
    assert active_share(np.r_[np.ones(16_000), np.zeros(48_000)]) == pytest.approx(0.25)
    references, clips = plan.plan(small, sources.sources(small))
    by_id = {one.id: one for one in references}
    for clip in clips:
        if clip.kind == "mix":
            assert all(
                active_share(render_reference(small, by_id[name])) >= plan.LEAST_ACTIVE for name in clip.references
            )


def test_loops_and_long_effects_are_no_single_things(small, tmp_path):
    package = sources.Package("effects", "train", "effect")
    for name, seconds in {"bang": 1, "loop_bang": 1, "forest": 30}.items():
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(seconds * 8000), 8000)
    found = [sources.Source(package, f"{name}.wav", "effect", "g", "") for name in ("bang", "loop_bang", "forest")]
    assert [plan.is_single(tmp_path, source) for source in found] == [True, False, False]


def test_tables_come_back(small, tmp_path):
    references, clips = plan.plan(small, sources.sources(small))
    write_table(tmp_path / "r.csv", ([one] for one in references))
    measured = [Measured(id=clip.id, visqol=4.5, zimtohrli=3.0, active=0.5) for clip in clips]
    labels = label(clips, measured)
    write_table(tmp_path / "l.csv", zip(clips, measured, labels, strict=True))
    assert read_table(tmp_path / "r.csv", Reference) == references
    assert read_table(tmp_path / "l.csv", DemoClip) == clips
    assert read_table(tmp_path / "l.csv", Measured) == measured
    assert read_table(tmp_path / "l.csv", Label) == labels


def test_quality_falls_with_severity_even_where_a_metric_errs():
    clips = [DemoClip(id="r", split="train", kind="speech", references=("r",))]
    clips += [
        DemoClip(id=f"r-{n}", split="train", ladder="l", kind="speech", references=("r",), degradation="noise", level=n)
        for n in range(1, 6)
    ]
    visqol = [5.0, 4.0, 4.2, 3.0, 2.0, 2.1]
    measured = [Measured(id=c.id, visqol=v, zimtohrli=v, active=1.0) for c, v in zip(clips, visqol, strict=True)]
    pq = [one.PQ for one in label(clips, measured)]
    assert pq == sorted(pq, reverse=True)
    steps = -np.diff(pq)
    assert (steps > LEAST_STEP - 0.002).all()  # labels have three decimals
    np.testing.assert_allclose(steps[[1, 4]], LEAST_STEP, atol=0.002)
    assert all(0 < score < 9 for score in pq)


def test_a_missing_program_is_named(tmp_path):
    with pytest.raises(InputError, match="no-such-program is not installed"):
        sources.run("no-such-program", cwd=tmp_path)


def test_what_a_cut_off_download_left_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PACKAGES", (sources.Package("a", "train", "speech"),))
    monkeypatch.setattr(sources, "MUSIC_BOX", ())
    (tmp_path / "a_1.0_all.deb").write_bytes(b"half")
    (tmp_path / "ab_1.0_all.deb").write_bytes(b"another's")
    commands = []

    def run(*command, cwd):
        commands.append(command)
        if command[0] == "apt-get":
            (cwd / "a_1.1_all.deb").touch()
        else:
            (cwd / "a").mkdir()

    monkeypatch.setattr(sources, "run", run)
    assert sources.fetch(tmp_path) == {"a": "1.1"} == sources.fetch(tmp_path)
    assert commands == [("apt-get", "download", "a"), ("dpkg-deb", "-x", "a_1.1_all.deb", "a")]
    assert [p.name for p in tmp_path.glob("*.deb")] == ["ab_1.0_all.deb"]


def written(small, folder):
    """The small plan's references by id, and its clips, which are written to files."""
    references, clips = plan.plan(small, sources.sources(small))
    by_id = {one.id: one for one in references}
    for clip in clips:
        write_clip(folder / f"{clip.id}.flac", render(small, by_id, clip.references, clip.degradation, clip.level))
    return by_id, clips


def test_the_baseline_fits_each_kind_of_clip(small, tmp_path):
    _, clips = written(small, tmp_path)
    of_kind = {kind: np.random.default_rng(n).normal(size=(4, 4)) for n, kind in enumerate(("speech", "mix", "other"))}
    labels, true = [], {}
    for clip in clips:
        x = np.concatenate(list(clip_blocks(Clip(str(tmp_path / f"{clip.id}.flac"))))).astype(np.float64)
        ce, cu, pc, pq = true[clip.id] = features(x) @ of_kind.get(clip.kind, of_kind["other"])
        labels.append(Label(id=clip.id, CE=ce, CU=cu, PC=pc if clip.kind in ("speech", "mix") else None, PQ=pq))
    scores = Baseline(tmp_path, clips, labels).scores(tmp_path, clips)
    for clip in clips:
        axes = [0, 1, 2, 3] if clip.kind in ("speech", "mix") else [0, 1, 3]
        np.testing.assert_allclose(scores[clip.id][axes], true[clip.id][axes], rtol=1e-6, atol=1e-6)


def test_a_noise_floor_leaves_no_silence_and_little_else(small, tmp_path):
    (tmp_path / "clips").mkdir()
    _, clips = written(small, tmp_path / "clips")
    with_noise_floor(tmp_path / "clips", clips, tmp_path / "noise")
    for clip in clips:
        x, y = (soundfile.read(tmp_path / folder / f"{clip.id}.flac")[0] for folder in ("clips", "noise"))
        noise_db = 20 * np.log10((y - x).std() / np.sqrt(np.square(x).mean()))
        assert noise_db == pytest.approx(NOISE_FLOOR_DB, abs=1.0)  # and the rounding of 16 bits
        assert np.abs(y[: len(y) // 160 * 160].reshape(-1, 160)).max(axis=1).min() > 0


def test_rows_of_a_perfect_and_of_a_reversed_scorer(small):
    references, clips = plan.plan(small, sources.sources(small))
    by_id = {one.id: one for one in references}
    labels = [Label(id=clip.id, CE=1.0, CU=1.0, PC=float(clip.layers), PQ=float(9 - clip.level)) for clip in clips]
    perfect = {one.id: np.array([0, 0, one.PC, one.PQ]) for one in labels}
    reverse = {name: -scores for name, scores in perfect.items()}
    rows = ladder_rows("test", clips, by_id, perfect, reverse, ", somehow")
    assert len(rows) >= 6
    for row in rows:
        assert "against" in row.what
        assert row.what.endswith(", somehow")
        assert (row.model, row.baseline) == (1, -1)
        assert (row.above_low, row.above_high) == (2, 2)
    for row in label_rows("test", clips, labels, perfect, reverse):
        assert (row.model, row.baseline) == ((1, -1) if row.what[-2:] in ("PC", "PQ") else (0, 0))


def test_other_versions_of_packages_are_told(tmp_path, capsys):
    account = tmp_path / "training.json"
    tell_other_versions({"a": "2"}, account)  # of a checkpoint without an account, nothing is known
    account.write_text(json.dumps({"packages": {"a": "1", "b": "1"}}))
    tell_other_versions({"a": "2", "b": "1"}, account)
    assert capsys.readouterr().err == "note: a is 2; the checkpoint's audio was of 1\n"


def test_effects_in_a_package_of_music_are_effects():
    def reference(kind, file):
        return Reference(id="r", kind=kind, group="g", level_db=-25.0, parts=(Part(file, 0.0, 4.0),))

    assert kind_heard(reference("music", "game-music/usr/share/game/sounds/bang.ogg")) == "effect"
    assert kind_heard(reference("music", "game-music/usr/share/game/music/song.ogg")) == "music"
    assert kind_heard(reference("speech", "game-data/usr/share/game/sounds/hello.ogg")) == "speech"


def test_the_interval_of_a_difference_is_that_of_a_paired_mean():
    """Against the normal approximation, which many ladders allow."""
    steps = [
        DemoClip(id=f"{n}-{layers}", split="test", ladder=f"mix-{n}", kind="mix", references=(f"r{n}",) * layers)
        for n in range(200)
        for layers in range(1, 6)
    ]
    rng = np.random.default_rng(0)
    scores = [{c.id: np.array([0, 0, c.layers + rng.normal(0, noise), 0]) for c in steps} for noise in (1, 3)]
    row = ladder_rows("test", steps, {}, *scores)[0]
    ranks = [
        [rank_metrics(np.arange(1.0, 6), np.array([one[f"{n}-{k}"][2] for k in range(1, 6)])).srcc for n in range(200)]
        for one in scores
    ]
    above = np.subtract(*ranks)
    half = 1.96 * above.std(ddof=1) / np.sqrt(200)
    assert row.count == 200
    assert row.model - row.baseline == pytest.approx(above.mean(), abs=2e-4)
    assert (row.above_low, row.above_high) == pytest.approx((above.mean() - half, above.mean() + half), abs=0.1 * half)
    # Ten ladders of each of twenty references, all ten alike: the interval is as wide as for twenty, not for 200.
    together = [msgspec.structs.replace(c, references=(f"r{int(c.id.split('-')[0]) // 10}",) * c.layers) for c in steps]
    alike = [{c.id: one[f"{int(c.id.split('-')[0]) // 10}-{c.layers}"] for c in steps} for one in scores]
    row = ladder_rows("test", together, {}, *alike)[0]
    above = above[:20]
    half = 1.96 * above.std() / np.sqrt(20)  # of the twenty themselves, as the bootstrap has it
    assert (row.above_low, row.above_high) == pytest.approx((above.mean() - half, above.mean() + half), abs=0.25 * half)


def test_the_recipe_trains_from_its_tables(small, tmp_path, monkeypatch):
    audio = tmp_path / "audio"
    audio.mkdir()
    _, clips = written(small, audio)
    measured = [Measured(id=c.id, visqol=5.0 - c.level, zimtohrli=5.0 - c.level, active=1.0) for c in clips]
    beats = msgspec.structs.replace(train.BEATS, encoder_layers=1, encoder_embed_dim=32, encoder_ffn_embed_dim=32)
    monkeypatch.setattr(train, "CONFIG", msgspec.structs.replace(train.CONFIG, epochs=1, precision="fp32"))
    out = tmp_path / "demo.safetensors"
    train.train_demo(audio, clips, label(clips, measured), tmp_path / "run", out, {"a-package": "1.0"}, beats)
    assert json.loads((tmp_path / "training.json").read_text())["packages"] == {"a-package": "1.0"}
    model = load_checkpoint(out)
    assert model.config.weights == "demo"
    scores = train.model_scores(model, audio, [clips[0].id])
    assert np.isfinite(scores[clips[0].id]).all()


# What is committed.


@pytest.fixture(scope="module")
def tables():
    return read_table(REFERENCES_FILE, Reference), read_table(LABELS_FILE, DemoClip), read_table(LABELS_FILE, Label)


def test_no_package_is_on_two_sides(tables):
    references, clips, _ = tables
    by_id = {one.id: one for one in references}
    splits = defaultdict(set)
    for clip in clips:
        for name in clip.references:
            for part in by_id[name].parts:
                splits[part.file.split("/")[0]].add(clip.split)
    listed = {package.name: {package.split} for package in sources.PACKAGES}
    assert {name: split for name, split in splits.items() if name != "synthetic"} == {
        name: split for name, split in listed.items() if name in splits
    }
    assert splits["synthetic"] == {"synthetic"}


def test_committed_labels_follow_the_ladders(tables):
    _, clips, labels = tables
    ladders = defaultdict(list)
    for clip, one in zip(clips, labels, strict=True):
        assert clip.id == one.id
        assert 0 < one.PQ <= 9
        assert (2 * clip.layers - 1 if clip.kind in ("speech", "mix") else None) == one.PC
        if clip.ladder and clip.kind != "mix":
            ladders[clip.ladder].append(one.PQ)
    assert len(ladders) > 1000
    assert all(len(steps) == 5 and steps == sorted(steps, reverse=True) for steps in ladders.values())


def test_the_checkpoint_is_small_and_says_that_it_is_a_demo():
    model = load_checkpoint(DEMO_CHECKPOINT)
    assert model.config.weights == "demo"
    assert DEMO_CHECKPOINT.stat().st_size <= 20_000_000
    assert sum(p.numel() for p in model.encoder.beats.parameters()) <= 5_000_000
    assert model.config.head == msgspec.structs.replace(type(model.config.head)())  # the full head, default sizes
    assert model.config.window == train.CONFIG.window


def test_the_checkpoint_came_from_the_committed_labels_and_settings():
    account = json.loads((DEMO_CHECKPOINT.parent / "training.json").read_text())
    assert account["config"] == msgspec.to_builtins(train.CONFIG)
    assert account["checkpoint_sha256"] == file_sha256(DEMO_CHECKPOINT)
    assert account["labels"] == {file.name: file_sha256(file) for file in (LABELS_FILE, REFERENCES_FILE)}


def demo_scores(model, x):
    x = (0.05 * x / np.sqrt(np.square(x).mean())).clip(-1, 1)
    with torch.inference_mode():
        return model(torch.from_numpy(x.astype(np.float32))[None], torch.tensor([len(x)]))[0].numpy()


@pytest.mark.parametrize("name", ["noise", "clip", "lowpass", "mp3"])
def test_damage_lowers_pq_in_order_on_held_out_recordings(name, measured):
    """All full-band speech and music among the samples that no machine made; none is from a package trained on.

    The mean of the clips, as the table's is of many ladders: in one clip, neighbouring levels may change places.
    """
    model = load_checkpoint(DEMO_CHECKPOINT)
    clips = [recording(one) for one in ("speech-ru", "speech-en-audiobook", "music-guitar", "music-piano")]
    levels = []
    for level in (0, *degrade.LEVELS):
        damaged = [degrade.DEGRADATIONS[name](x, level, np.random.default_rng(1)) if level else x for x in clips]
        levels.append(float(np.mean([demo_scores(model, x)[PQ] for x in damaged])))
    measured[f"demo PQ by level of {name}"] = " ".join(f"{score:.2f}" for score in levels)
    assert levels == sorted(levels, reverse=True)
    assert len(set(levels)) == 6
    if name == "mp3":
        assert degrade.MP3_KBIT[3] == 16


@pytest.fixture(scope="module")
def committed_rows():
    with open(ROOT / "benchmarks" / "results" / "demo.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["processor"] and row["torch"] for row in rows)
    texts = [{name: row[name] or None for name in TableRow.__struct_fields__} for row in rows]
    return msgspec.convert(texts, list[TableRow], strict=False)


def test_the_committed_table_meets_what_was_asked(committed_rows):
    rows = {(row.split, row.what): row for row in committed_rows}
    asked = {
        "PQ against severity, speech": 0.90,
        "PQ against severity, music": 0.85,
        "PC against 1-5 layers, voices and effects": 0.85,
    }
    for what, least in asked.items():
        assert rows["test", what].model >= least
        assert rows["test", what].above_low > 0


def test_the_documents_hold_the_committed_table(committed_rows):
    table = table_text(committed_rows).splitlines()
    card = (ROOT / "models" / "demo" / "README.md").read_text().splitlines()
    assert [line for line in card if line.startswith(table[0][:10])] == table[:1]
    assert [line for line in card if line in table] == table
    for file in (ROOT / "README.md", ROOT / "models" / "demo" / "README.md"):
        assert not re.search(r"@[A-Z_]+@|untrained \(random\)", file.read_text())
    front = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(("| test ", "| synth"))]
    assert len(front) >= 4
    assert set(front) <= set(table)
