"""`aesanet bench peers`: who takes part, in turns, and what is said of their times."""

import csv
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import RECORDINGS
from hypothesis import given
from hypothesis import strategies as st

from aesanet.benchmarks import audiobox, peers
from aesanet.benchmarks.contestants import Alone, Contestant
from aesanet.benchmarks.peers import AUDIOBOX, PYTORCH, Seen, compare, take_turns, write_clips
from aesanet.benchmarks.records import MACHINE
from aesanet.cli.main import main
from aesanet.runtime.backends import supported_backends

ENGINES = [f"aesanet {n} {p}" for n, support in supported_backends().items() for d, p in support.runs if d == "cpu"]


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Scripted:
    """A contestant whose n-th call takes what a function says, and does what it does."""

    def __init__(self, name, calls, seconds):
        self.name, self.calls, self.seconds = name, calls, seconds

    def __call__(self):
        number = self.calls.count(self.name)
        self.calls.append(self.name)
        return self.seconds(number), np.full((2, 4), float(number))


def test_all_take_turns_and_warming_up_does_not_count():
    calls, told = [], []
    seen = take_turns({name: Scripted(name, calls, float) for name in "abc"}, 1, 3, told.append)
    assert calls == [*"cab", *"abc", *"bca", *"cab"]
    assert [(name, one.seconds) for name, one in seen.items()] == [(name, [1.0, 2.0, 3.0]) for name in "abc"]
    assert told == ["warmed up", "round 1 of 3", "round 2 of 3", "round 3 of 3"]


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("value", [None, np.nan])
def test_who_fails_is_named_and_does_not_stop_the_rest(at, value):
    def failing(number):
        if number == at and value is None:
            raise OSError("no more memory")
        return 1.0

    def found():
        seconds, scores = failing_one()
        return seconds, np.where(scores == at, value, scores) if value is not None else scores

    calls, told = [], []
    failing_one = Scripted("b", calls, failing)
    others = {name: Scripted(name, calls, float) for name in "ac"}
    seen = take_turns({"a": others["a"], "b": found, "c": others["c"]}, 1, 4, told.append)
    assert list(seen) == ["a", "c"]
    assert [calls.count(name) for name in "abc"] == [5, at + 1, 5]
    (left_out,) = [line for line in told if line.startswith("left out")]
    assert left_out == f"left out: b: {'no more memory' if value is None else 'not all that it finds are numbers'}"


times = st.lists(st.floats(1e-2, 100), min_size=1, max_size=12)


@given(times, times, times)
def test_ratios_are_of_medians(ours, theirs, pytorch):
    scores = np.arange(8.0).reshape(2, 4)
    seen = {
        "aesanet openvino bf16": Seen(ours, scores + 0.25),
        PYTORCH: Seen(pytorch, scores),
        AUDIOBOX: Seen(theirs, scores + 1),
    }
    speeds = compare(seen, audio_seconds=20.0)
    row = speeds["aesanet openvino bf16"]
    assert row["seconds_median"] == pytest.approx(np.median(ours), abs=1e-4)
    assert row["seconds_low"] <= row["seconds_median"] <= row["seconds_high"]
    assert row["x_real_time"] == pytest.approx(20 / np.median(ours), abs=0.01)
    assert row["x_audiobox"] == pytest.approx(np.median(theirs) / np.median(ours), abs=1e-3)
    assert row["x_pytorch"] == pytest.approx(np.median(pytorch) / np.median(ours), abs=1e-3)
    assert speeds[AUDIOBOX]["x_audiobox"] == speeds[PYTORCH]["x_pytorch"] == 1.0
    assert row["max_abs_difference"] == "2.50e-01"
    assert speeds[AUDIOBOX]["max_abs_difference"] == ""  # another network


def test_nothing_is_held_against_who_did_not_take_part():
    (row,) = compare({"aesanet openvino bf16": Seen([1.0], np.zeros(4))}, 10.0).values()
    assert row["x_audiobox"] == row["x_pytorch"] == row["max_abs_difference"] == ""


def test_clips_have_the_recordings_formats_and_ten_seconds(tmp_path):
    written = list(write_clips(RECORDINGS, len(RECORDINGS) + 1, tmp_path))
    assert len(set(written)) == len(RECORDINGS) + 1
    for clip, recording in zip(written, [*RECORDINGS, RECORDINGS[0]], strict=True):
        ours, theirs = soundfile.info(clip), soundfile.info(recording)
        assert (ours.format, ours.samplerate, ours.channels) == (theirs.format, theirs.samplerate, theirs.channels)
        assert len(soundfile.read(clip)[0]) == 10 * ours.samplerate
    first, again = soundfile.read(written[0])[0], soundfile.read(written[-1])[0]
    rate = soundfile.info(written[0]).samplerate
    assert np.allclose(first[rate : 2 * rate], again[:rate], atol=1e-3)


def _broken(work):
    raise OSError("cannot be opened")


def test_who_cannot_be_opened_says_why():
    work = SimpleNamespace(device="cpu", threads=1)
    with pytest.raises(OSError, match="cannot be opened"):
        Alone(Contestant("broken", "fp32", _broken), work)


@pytest.fixture
def invited(monkeypatch, tiny_bundle):
    """Of all contestants, those whom a test names; exporting and compiling anew would take minutes."""
    everybody, names = peers._contestants, []
    monkeypatch.setattr(peers, "_contestants", lambda *given: [one for one in everybody(*given) if str(one) in names])
    monkeypatch.setattr(peers, "export_bundle", lambda _, out, **how: shutil.copytree(tiny_bundle, out))
    return names


STAND_IN = {
    "audiobox_aesthetics/__init__.py": "",
    "audiobox_aesthetics/infer.py": """
import torch, torchaudio
class AesMultiOutput(torch.nn.Linear):
    def __init__(self, precision, target_transform, **sizes):
        assert sizes["proj_num_layer"] == 5 and set(target_transform) == {"CE", "CU", "PC", "PQ"}
        super().__init__(1000, 1000)
def read_wav(row):
    return torchaudio.load(row["path"])
class Predictor:
    def __init__(self, path):
        saved = torch.load(path)
        self.model = AesMultiOutput(**saved["model_cfg"], target_transform=saved["target_transform"])
        self.model.load_state_dict(saved["state_dict"])
    def forward(self, rows):
        assert len(rows) <= 2
        levels = [float(read_wav(row)[0].abs().mean()) for row in rows]
        return [dict.fromkeys(("CE", "CU", "PC", "PQ"), level) for level in levels]
def initialize_predictor(ckpt):
    return Predictor(ckpt)
""",
    "torchaudio/__init__.py": """
from . import _extension
def load(path):
    assert not _extension._IS_TORCHAUDIO_EXT_AVAILABLE
    raise ImportError("TorchCodec is required")
""",
    "torchaudio/_extension.py": "raise OSError('libc10_cuda.so: cannot open shared object file')",
    "audiobox_aesthetics-0.0.4.dist-info/METADATA": "Name: audiobox_aesthetics\nVersion: 0.0.4\n",
    "torchaudio-2.11.0.dist-info/METADATA": "Name: torchaudio\nVersion: 2.11.0\n",
}


@pytest.fixture
def audiobox_package(tmp_path, monkeypatch):
    """The package where it is installed, else one that has the names that are used of it."""
    if not audiobox.is_installed():
        for name, text in STAND_IN.items():
            path = tmp_path / "packages" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(sys, "path", [str(tmp_path / "packages"), *sys.path])


@pytest.mark.slow
@pytest.mark.usefixtures("audiobox_package")
def test_from_files_everybody_scores_the_same_clips(tiny_checkpoint, invited, tmp_path, capsys):
    invited += ["aesanet openvino fp32", PYTORCH, AUDIOBOX]
    out = tmp_path / "peers.csv"
    small = ["--checkpoint", tiny_checkpoint, "--clips", "3", "--batches", "2", "--rounds", "2", "--threads", "1"]
    assert run("bench", "peers", *small, "--out", out) == 0
    rows = rows_of(out)
    assert list(rows[0]) == list(peers.PEERS_COLUMNS)
    told = [f"{row['contestant']} {row['precision']}" for row in rows]
    assert told == invited
    for row in rows:
        assert all(row[name] for name in MACHINE if name != "gpu")
        assert (row["part"], row["clips"], row["audio_seconds"], row["rounds"]) == ("files", "3", "30.0", "2")
        assert min(float(row[name]) for name in ("x_real_time", "x_audiobox", "x_pytorch")) > 0
        assert float(row["seconds_low"]) <= float(row["seconds_median"]) <= float(row["seconds_high"])
    assert float(rows[0]["max_abs_difference"]) < 1e-2  # FP32's own, where mel bins are nearly empty
    assert rows[-1]["max_abs_difference"] == ""
    assert float(rows[-1]["parameters_millions"]) >= 1.0
    assert "audiobox_aesthetics 0.0.4" in rows[-1]["versions"]
    captured = capsys.readouterr()
    assert "files: 3 clips, 30.0 s of audio, 1 threads, medians of 2 rounds" in captured.out
    assert "left out" not in captured.err


class Here:
    """A contestant in the test's own process, where it is opened sooner."""

    def __init__(self, contestant, work):
        assert len(work.waveform) == len(work.fbank) == len(work.num_samples) == work.batch
        self.opened = contestant.open(work)
        self.about = self.opened.about

    def run(self):
        return 1.0, self.opened.run()

    def close(self):
        pass


@pytest.mark.parametrize("part", ["waveforms", "encoder"])
def test_in_memory_engines_agree_with_pytorch(part, tiny_checkpoint, invited, tmp_path, monkeypatch):
    invited += [*ENGINES, "polygraphy onnxruntime fp32", PYTORCH, "pytorch eager bf16 autocast"]
    monkeypatch.setattr(peers, "Alone", Here)
    monkeypatch.setattr("aesanet.benchmarks.records.processor_clock_mhz", lambda: 1234.4)
    out = tmp_path / "peers.csv"
    small = ["--part", part, "--checkpoint", tiny_checkpoint, "--batches", "2,1", "--rounds", "1", "--threads", "1"]
    assert run("bench", "peers", RECORDINGS[0], *small, "--out", out) == 0
    rows = rows_of(out)
    assert [f"{row['contestant']} {row['precision']}" for row in rows] == 2 * invited
    for number, row in enumerate(rows):
        clips = 2 if number < len(invited) else 1
        assert (row["part"], row["batch"], row["clips"]) == (part, str(clips), str(clips))
        assert float(row["audio_seconds"]) == 10.0 * clips
        assert row["processor_mhz"] == "1234"
        assert row["x_audiobox"] == ""
        assert float(row["max_abs_difference"]) < (1e-2 if row["precision"] == "fp32" else 0.5)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("segment.jsonl", '{"path": "a.wav", "start_time": 1}', "only whole files can be compared"),
        ("bad.jsonl", '{"path": "a.wav", "start_time": -1}', "start_time is -1"),
        ("empty.jsonl", "", "empty.jsonl: no audio files"),
        ("damaged.wav", "RIFF", "damaged.wav: "),
        ("none.jsonl", '{"path": "/none.wav"}', "/none.wav: "),
    ],
)
def test_what_not_everybody_can_read_is_refused(name, text, told, tmp_path, capsys):
    path = tmp_path / name
    path.write_text(text)
    for part in ("files", "encoder"):
        assert run("bench", "peers", path, "--part", part) == 2
        assert told in capsys.readouterr().err


def test_a_csv_of_something_else_is_refused_before_anything_is_timed(tmp_path, capsys):
    out = tmp_path / "other.csv"
    out.write_text("a,b\n1,2\n")
    assert run("bench", "peers", tmp_path / "none.wav", "--out", out) == 2
    assert "has other columns; give --out another name" in capsys.readouterr().err


def test_a_note_says_how_to_install_who_is_absent(monkeypatch):
    monkeypatch.setattr(peers, "is_installed", lambda: False)
    told = []
    plan = peers.Plan("files", "cpu", 1, (1,), 1, 1, None)
    assert not any(one.name.startswith("audiobox") for one in peers._contestants(plan, told.append))
    assert told == [f"left out: audiobox-aesthetics, which is not installed: {audiobox.INSTALL}"]


def test_nobody_takes_no_turns():
    told = []
    assert take_turns({}, 3, 6, told.append) == {}
    assert told == []
