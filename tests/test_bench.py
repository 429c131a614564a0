"""`aesanet bench`: what is timed, when it is enough, and what rows say of it."""

import csv
import math
import re
import subprocess
import sys

import msgspec
import numpy as np
import pytest
import soundfile
import torch
from helpers import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from aesanet.benchmarks.latency import (
    COLD_COLUMNS,
    LATENCY_COLUMNS,
    Cell,
    latency_row,
    measure_cold_start,
    measure_latency,
    median_interval,
)
from aesanet.benchmarks.matrix_product import best_tflops
from aesanet.benchmarks.peak import Peak, device_peak
from aesanet.benchmarks.throughput import (
    THROUGHPUT_COLUMNS,
    Rounds,
    measure_throughput,
    throughput_row,
    throughput_rows,
)
from aesanet.bundle import read_manifest
from aesanet.cli.main import main
from aesanet.errors import BackendError, BundleError
from aesanet.hashing import file_sha256
from aesanet.models.flops import clip_flops
from aesanet.runtime.backends.base import Backend
from aesanet.runtime.scorer import Scorer


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


class Scripted(Backend):
    """An engine, and the clock that its calls move on, by what a function says of each call."""

    name = kind = "scripted"
    device, precision, form = "cpu", "fp32", "fp32"

    def __init__(self, seconds):
        self.seconds, self.now, self.shapes = seconds, 0.0, []

    def scores(self, waveform, num_samples):
        assert waveform.shape == (len(num_samples), num_samples[0])
        assert waveform.std() > 0.05
        self.now += self.seconds(len(self.shapes))
        self.shapes.append(waveform.shape)
        return np.zeros((len(waveform), 4), np.float32)


CELLS = [Cell(1, 1.0), Cell(3, 0.5)]


def test_cells_take_turns_until_their_medians_have_settled():
    backend = Scripted(lambda call: 0.25)
    times = measure_latency(backend, CELLS, 1e9, clock=lambda: backend.now)
    assert times == {cell: [0.25] * 20 for cell in CELLS}
    timed = backend.shapes[-40:]
    assert timed == [(1, 16_000), (3, 8_000)] * 20
    assert len(backend.shapes) == 40 + 2 * 9  # warm-ups, none of them counted


@given(st.floats(1, 200))
def test_times_that_do_not_settle_are_cut_off(most):
    """Each call takes a tenth longer than the one before it."""
    backend = Scripted(lambda call: 0.01 * 1.1**call)
    (times,) = measure_latency(backend, CELLS[:1], most, clock=lambda: backend.now).values()
    assert len(times) >= 20
    assert sum(times) >= most
    assert len(times) == 20 or sum(times[:-1]) < most


class Ahead(Scripted):
    """The same, which computes a batch when its scores are asked for, or when it holds too many."""

    def __init__(self, seconds):
        super().__init__(seconds)
        self.held, self.most_held = [], 0

    def submit(self, waveform, num_samples):
        assert not any(waveform is other for other in self.held), "an array that is under way"
        self.held.append(waveform)
        self.most_held = max(self.most_held, len(self.held))

        def pending():
            assert self.held.pop(0) is waveform
            return self.scores(waveform, num_samples)

        return pending


def test_throughput_keeps_distinct_batches_under_way_in_rounds_that_take_turns():
    """Batches of half a second: four make the round of two seconds that is aimed at."""
    backend = Ahead(lambda call: 0.5)
    rounds = measure_throughput(backend, CELLS, 1e9, clock=lambda: backend.now)
    assert rounds == {cell: Rounds(4, [2.0] * 6) for cell in CELLS}
    assert backend.most_held == 3
    assert not backend.held
    shapes = [(1, 16_000), (3, 8_000)]
    assert backend.shapes == [shapes[0]] * 9 + [shapes[1]] * 9 + ([shapes[0]] * 4 + [shapes[1]] * 4) * 6


@pytest.mark.parametrize(("most", "batches"), [(1e9, 200), (6.0, 100), (0.0, 4)])
def test_rounds_are_of_as_many_batches_as_there_is_time_for(most, batches):
    """Batches of .01 s, once the first six have warmed up."""
    backend = Ahead(lambda call: 0.5 if call < 6 else 0.01)
    (found,) = measure_throughput(backend, CELLS[:1], most, clock=lambda: backend.now).values()
    assert found.batches == pytest.approx(batches, abs=1)  # sums of .01 are not exact
    assert found.seconds == pytest.approx([0.01 * found.batches] * 6)


@pytest.mark.parametrize("peak", [Peak(0.5, "who says so"), Peak(None, "")])
@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=30))
def test_a_row_of_throughput(peak, seconds):
    row = throughput_row(Cell(4, 5.0), Rounds(8, seconds), 10**9, peak)
    rate = 32 / np.median(seconds)
    assert row["clips_per_second"] == pytest.approx(rate, abs=1e-3)
    assert row["clips_per_second_low"] <= row["clips_per_second"] <= row["clips_per_second_high"]
    assert row["clips_per_second_high"] <= 32 / min(seconds) + 1e-3
    assert row["x_real_time"] == pytest.approx(5 * rate, abs=1e-2)
    assert row["hours_of_audio_per_second"] == pytest.approx(rate / 720, rel=1e-3)
    assert row["useful_tflops"] == pytest.approx(rate / 1000, rel=1e-3)
    assert row["mfu"] == (pytest.approx(rate / 500, rel=1e-3) if peak.tflops else None)
    assert (row["peak_tflops"], row["peak_source"]) == (peak.tflops, peak.source)


def test_matrix_products_grow_until_one_takes_a_tenth_of_a_second(monkeypatch):
    """On a clock on which products of 1,024 are the fastest for their work, and the last of each size the fastest."""
    sizes, now = [], [0.0]
    seconds_of = {512: 0.02, 1024: 0.05, 2048: 0.5}

    class Matrix:
        def __init__(self, size):
            self.size = size

        def to(self, dtype):
            assert dtype == torch.bfloat16
            return self

        def __matmul__(self, other):
            assert self.size == other.size
            sizes.append(self.size)
            now[0] += seconds_of[self.size] * (6 - sizes.count(self.size))

    monkeypatch.setattr(torch, "randn", lambda rows, columns: Matrix(rows))
    assert best_tflops(torch.bfloat16, clock=lambda: now[0]) == pytest.approx(2 * 1024**3 / 0.05e12)
    assert sizes == [512] * 5 + [1024] * 5 + [2048] * 5


def test_a_peak_that_cannot_be_measured_is_an_error(monkeypatch):
    backend = Scripted(lambda call: 0.0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(BackendError, match="the peak cannot be measured: exit status 1"):
        device_peak(backend, 1)


@given(st.integers(1, 300))
def test_the_interval_of_a_median_holds_it_as_often_as_it_says(count):
    """And no narrower one of order statistics would. Of fewer than six values there is none."""
    low, high = median_interval(np.random.default_rng(count).permutation(count))
    assert low == count - 1 - high

    def missed(index):
        return 2 * sum(math.comb(count, k) for k in range(int(index) + 1)) / 2**count

    if count >= 6:
        assert missed(low) <= 0.05 < missed(low + 1)
    else:
        assert low == 0


@given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=60))
def test_a_row_has_the_quantiles_of_the_times(times):
    row = latency_row(Cell(4, 2.5), times)
    ordered = sorted(1000 * time for time in times)
    assert row["milliseconds_max"] == pytest.approx(ordered[-1], abs=1e-3)
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert row[f"milliseconds_{name}"] == pytest.approx(np.quantile(ordered, share), abs=1e-3)
    assert row["p50_low"] <= row["milliseconds_p50"] <= row["p50_high"]
    assert row["x_real_time"] == pytest.approx(10_000 / np.median(ordered), rel=1e-2)
    assert row["repeats"] == len(times)


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    monkeypatch.setattr("aesanet.benchmarks.records.processor_clock_mhz", lambda: 1234.4)


def rows_of(path):
    """Of what was timed, with the clock that it was timed at."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["processor_mhz"] for row in rows} == {"1234"}
    return rows


def test_latencies_are_appended_with_where_they_come_from(tiny_bundle, tmp_path, capsys):
    out = tmp_path / "latency.csv"
    command = ["bench", "latency", tiny_bundle, "--batches", "1,2", "--seconds", "0.5", "--most", "0", "--out", out]
    assert run(*command, "--backend", "onnxruntime") == 0
    assert run(*command, "--backend", "openvino", "--precision", "fp32") == 0
    assert run(*command, "--backend", "onnxruntime", "--threads", "1") == 0
    rows = rows_of(out)
    assert list(rows[0]) == list(LATENCY_COLUMNS)
    assert [(row["engine"].split()[0], row["batch"]) for row in rows] == [
        ("onnxruntime", "1"), ("onnxruntime", "2"), ("openvino", "1"), ("openvino", "2"),
        ("onnxruntime", "1"), ("onnxruntime", "2"),
    ]  # fmt: skip
    assert [row["threads"] for row in rows] == ["", "", "", "", "1", "1"]
    for row in rows:
        assert row["bundle_sha256"] == file_sha256(tiny_bundle / "bundle.json")[:16]
        assert row["weights"] == "untrained"
        assert row["processor"]
        assert int(row["repeats"]) >= 20
        assert 0 < float(row["milliseconds_p50"]) <= float(row["milliseconds_p99"]) <= float(row["milliseconds_max"])
    assert "p50 ms" in capsys.readouterr().out
    assert run("bench", "compare", out, out) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 6
    assert sum(", 1 threads, untrained" in line for line in told) == 2
    assert all(re.search(r": 1\.000 \(\d\.\d+ to \d+\.\d+\), no difference shown$", line) for line in told)


def test_throughput_beside_what_the_processor_could_do(tiny_bundle, tmp_path, capsys):
    out = tmp_path / "throughput.csv"
    command = ["bench", "throughput", tiny_bundle, "--batches", "1,3", "--seconds", "0.5", "--most", "0", "--out", out]
    assert run(*command, "--backend", "onnxruntime", "--threads", "1") == 0
    rows = rows_of(out)
    assert list(rows[0]) == list(THROUGHPUT_COLUMNS)
    assert [row["batch"] for row in rows] == ["1", "3"]
    for row in rows:
        assert row["peak_source"] == "measured matrix product, fp32, 1 threads"
        assert float(row["peak_tflops"]) > 0
        useful_tflops = float(row["clips_per_second"]) * clip_flops(tiny_config(), 8_000).total / 1e12
        assert float(row["useful_tflops"]) == pytest.approx(useful_tflops, rel=1e-2)
        assert float(row["mfu"]) == pytest.approx(useful_tflops / float(row["peak_tflops"]), rel=1e-2)
        assert int(row["memory_mib"]) > 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].split()[-2:] == ["peak", "MFU"]
    assert len(told) == 3


@pytest.mark.parametrize("backend", ["auto", "onnxruntime", "tensorrt"])
def test_a_processor_has_no_cuda_graphs(tiny_bundle, capsys, backend):
    assert run("bench", "latency", tiny_bundle, "--cuda-graphs", "--backend", backend, "--device", "cpu") == 2
    assert "CUDA graphs need a CUDA GPU" in capsys.readouterr().err


def test_operations_of_a_config_that_is_none_are_refused(tiny_bundle):
    manifest = read_manifest(tiny_bundle)
    other = msgspec.structs.replace(manifest, source=msgspec.structs.replace(manifest.source, config={"beats": 1}))
    with pytest.raises(BundleError, match=r"source\.config: Expected `object`.*; export the checkpoint again"):
        throughput_rows(Scorer(other, Scripted(lambda call: 0.0)), CELLS, 0.0, 1, None)


def test_a_cold_start_is_of_a_fresh_process(tiny_bundle, tmp_path, capsys):
    out = tmp_path / "cold.csv"
    assert run("bench", "cold", tiny_bundle, "--repeats", "1", "--backend", "onnxruntime", "--out", out) == 0
    (row,) = rows_of(out)
    assert list(row) == list(COLD_COLUMNS)
    parts = [float(row[f"{part}_milliseconds"]) for part in ("import", "open", "first_score")]
    assert min(parts) > 0
    assert f"import {row['import_milliseconds']} ms, open" in capsys.readouterr().out


def test_a_process_that_ends_without_a_word_is_told(tiny_bundle, monkeypatch):
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr("aesanet.benchmarks.latency.subprocess.run", lambda *arguments, **options: killed)
    with pytest.raises(BackendError, match="a fresh process cannot score: it ended with status -9 and said nothing"):
        measure_cold_start(tiny_bundle, {}, 1)


def test_other_files_are_refused_before_anything_is_measured(tiny_bundle, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    monkeypatch.setattr("aesanet.benchmarks.latency.measure_latency", lambda *given: pytest.fail("it was measured"))
    command = ["bench", "latency", tiny_bundle, "--batches", "1", "--seconds", "0.5", "--most", "0", "--out", other]
    assert run(*command) == 2
    assert "has other columns; give --out another name" in capsys.readouterr().err
    assert other.read_text() == "a,b\n1,2\n"
    for place in (tmp_path / "none" / "out.csv", tmp_path):
        assert run(*command[:-1], place) == 2
        assert f"{place}: cannot be written; give --out a file in a folder that is there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batches", "0"], "give positive numbers, such as 1,8,64"),
        (["--batches", "one"], "give positive numbers"),
        (["--batches", "1.5"], "whole numbers of clips"),
        (["--seconds", "0.1"], "must be 0.175 or more"),
    ],
)
def test_grids_that_make_no_sense(tiny_bundle, capsys, arguments, told):
    for command in ("latency", "throughput"):
        assert run("bench", command, tiny_bundle, *arguments) == 2
        assert told in capsys.readouterr().err


def test_files_to_rows_beside_both_halves_alone(tiny_bundle, tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "audio").mkdir()
    for number, seconds in enumerate((0.5, 1.0, 4.0, 9.5)):
        soundfile.write(tmp_path / "audio" / f"{number}.wav", rng.normal(0, 0.1, round(16_000 * seconds)), 16_000)
    (tmp_path / "audio" / "broken.mp3").write_text("no audio")
    out = tmp_path / "end-to-end.csv"
    options = ("--rounds", 3, "--workers", 2, "--max-batch-seconds", 8, "--out", out)
    assert run("bench", "end-to-end", tiny_bundle, tmp_path / "audio", *options) == 0
    assert "5 clips, 15.0 s of audio: decoding alone" in capsys.readouterr().out
    (row,) = rows_of(out)
    assert (row["clips"], row["failed"], row["audio_seconds"], row["workers"]) == ("5", "1", "15.0", "2")
    # Windows of 4 s every 3 s: 4, 4, 4, 3.5 and 4, 1, .5; two full ones a batch.
    assert int(row["batches"]) == 4
    decoding, engine, whole = (float(row[f"{part}_seconds"]) for part in ("decoding", "engine", "end_to_end"))
    assert float(row["share_of_slower"]) == pytest.approx(max(decoding, engine) / whole, rel=0.05)
    assert float(row["x_real_time"]) == pytest.approx(15 / whole, rel=0.05)
    shares = [float(row[f"{part}_share"]) for part in ("engine", "waiting", "decoders")]
    assert all(0 <= share <= 1 for share in shares)
    assert run("bench", "end-to-end", tiny_bundle, tmp_path / "audio" / "broken.mp3", "--out", out) == 2
    assert "no row can be scored; the first, " in capsys.readouterr().err


@pytest.mark.parametrize("says", ["", "import sys; print('aesanet: loading', file=sys.stderr); "])
def test_a_run_that_is_killed_is_told(tiny_bundle, tmp_path, monkeypatch, capsys, says):
    """As by a system without memory for it."""
    killed = (sys.executable, "-c", f"{says}import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr("aesanet.benchmarks.memory._COMMAND", killed)
    assert run("bench", "memory", tiny_bundle, "--out", tmp_path / "m.csv") == 2
    told = f"aesanet score {tiny_bundle} long.flac` ended with status -9{': aesanet: loading' * bool(says)}"
    assert capsys.readouterr().err.splitlines()[-1] == f"aesanet: `{told}"
    assert not (tmp_path / "m.csv").exists()


@pytest.mark.slow
def test_memory_of_a_run_is_its_own(tiny_bundle, tmp_path, capsys):
    out = tmp_path / "memory.csv"
    ballast = np.ones(60_000_000)  # 480 MB, which a child does not have
    engine = ("--backend", "onnxruntime", "--threads", "1", "--no-cuda-graphs")
    assert run("bench", "memory", tiny_bundle, "--rows", "40", "--hours", "0.003", "--out", out, *engine) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert re.fullmatch(r"one clip of 10 s: \d+ MiB, 0 more than for one clip; 10 s of audio in [\d.]+ s", lines[0])
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["rows"]) for row in rows] == [1, 1, 1, 1, 40, 2]
    assert all(50 < int(row["peak_memory_mib"]) < ballast.nbytes / 2**20 for row in rows)
    assert rows[0]["above_one_clip_mib"] == "0"
