import contextlib
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
import threading
import time

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from conftest import RECORDINGS, ROOT

from aesanet import __version__
from aesanet.axes import AXES
from aesanet.cli.main import cli, main
from aesanet.errors import CLIP_ERROR_CODES

COMMAND = [sys.executable, "-c", "from aesanet.cli.main import main; main()"]


def aesanet(*arguments, stdin=None, status=0):
    """Run the command as users do; stdout's text, and stderr's."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, input=stdin, timeout=300)
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


KILLED_WORKER = """
import os, signal, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import click
from aesanet.commands import run

@click.command()
def command():
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        busy, idle = pool.submit(time.sleep, 600), pool.submit(os.getpid)
        os.kill(idle.result(), signal.SIGKILL)
        busy.result()

run(command, "pool", [])
"""


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def audio(tmp_path):
    """Two clips and a file that is no audio, in a folder."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "audio"
    folder.mkdir()
    for name in ("a.wav", "b.flac"):
        soundfile.write(folder / name, rng.normal(0, 0.1, 24_000), 16_000)
    (folder / "c.mp3").write_text("no audio")
    return folder


def test_rows_on_stdout_notes_on_stderr_and_a_status_for_failed_rows(tiny_bundle, audio):
    out, err = aesanet("score", tiny_bundle, audio, status=1)
    rows = rows_of(out)
    assert [os.path.basename(row["path"]) for row in rows] == ["a.wav", "b.flac", "c.mp3"]
    for row in rows[:2]:
        assert list(row)[:5] == ["path", *AXES]
        assert row["seconds"] == 1.5
    assert rows[2]["error"]["code"] == "undecodable"
    assert "untrained" in err
    assert "2 of 3 clips scored" in err
    aesanet("score", tiny_bundle, audio / "a.wav", audio / "b.flac", status=0)


def test_a_manifest_of_audiobox_aesthetics_runs_unchanged(tiny_bundle, audio, tmp_path):
    lines = [
        {"path": str(audio / "a.wav"), "start_time": 0, "end_time": 1},
        {"path": str(audio / "b.flac"), "start_time": 0.5, "label": "\u00e9"},
    ]
    manifest = tmp_path / "in.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = rows_of(aesanet("score", tiny_bundle, manifest)[0])
    assert [row["seconds"] for row in rows] == [1.0, 1.0]
    assert [{key: row[key] for key in line} for row, line in zip(rows, lines, strict=True)] == lines

    piped = rows_of(aesanet("score", tiny_bundle, "-", stdin=manifest.read_text())[0])
    assert piped == rows
    names = rows_of(aesanet("score", tiny_bundle, "-", stdin=f"{audio / 'a.wav'}\n\n{audio / 'b.flac'}\n")[0])
    assert [row["path"] for row in names] == [str(audio / "a.wav"), str(audio / "b.flac")]


def test_out_is_a_file_that_is_not_replaced_by_chance(tiny_bundle, audio, tmp_path):
    out = tmp_path / "scores.jsonl"
    assert aesanet("score", tiny_bundle, audio / "a.wav", "--out", out)[0] == ""
    first = out.read_text()
    assert len(rows_of(first)) == 1
    _, err = aesanet("score", tiny_bundle, audio / "b.flac", "--out", out, status=2)
    assert "exists; give --overwrite" in err
    assert out.read_text() == first
    aesanet("score", tiny_bundle, audio / "b.flac", "--out", out, "--overwrite")
    assert rows_of(out.read_text())[0]["path"].endswith("b.flac")
    assert "there is no folder " in aesanet("score", tiny_bundle, audio, "--out", tmp_path / "no" / "x", status=2)[1]


def test_the_table_is_for_people(tiny_bundle, audio):
    out, _ = aesanet("score", tiny_bundle, audio, "--format", "table", status=1)
    header, first, _, failed = out.splitlines()
    assert header.split() == ["clip", *AXES, "seconds"]
    assert first.split()[0].endswith("audio/a.wav")
    assert len(first.split()) == 6
    assert "undecodable: not a format" in failed


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_engine_can_be_chosen(tiny_bundle, audio, backend):
    chosen = ("--backend", backend, "--precision", "fp32", "--threads", 1, "--device", "cpu")
    out, err = aesanet("score", tiny_bundle, audio / "a.wav", *chosen)
    assert f"aesanet: {backend} " in err
    assert len(rows_of(out)) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["score", "no.bundle", "a.wav"], "no bundle here"),
        (["score", "BUNDLE", "none.csv"], "none.csv: No such file"),
        (["score", "BUNDLE", "EMPTY"], "no audio in"),
        (["export", "none.pt", "--out", "x"], "none.pt: no such file"),
        (["score", "BUNDLE", "a.wav", "--backend", "abacus"], "'abacus' is not one of"),
        (["sing"], "No such command 'sing'"),
    ],
)
def test_what_cannot_run_is_one_line_and_status_2(tiny_bundle, tmp_path, arguments, told):
    places = {"BUNDLE": tiny_bundle, "EMPTY": tmp_path}
    out, err = aesanet(*(places.get(a, a) for a in arguments), status=2)
    assert out == ""
    assert told in err
    assert "Traceback" not in err


def test_export_prints_its_parity(tiny_checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        main(["export", str(tiny_checkpoint), "--out", str(tmp_path / "b")])
    assert done.value.code == 0
    captured = capsys.readouterr()
    assert "parity with PyTorch over 4 batches: features" in captured.out
    assert "exporting encoder" in captured.err


def test_a_reader_that_goes_away_ends_the_run_quietly(tiny_bundle, audio):
    script = f"{' '.join(map(repr, COMMAND))} score {tiny_bundle} {' '.join([str(audio / 'a.wav')] * 200)} | head -n 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300)
    assert len(rows_of(done.stdout)) == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_an_interrupt_keeps_the_rows_and_says_so(tiny_bundle, audio, tmp_path):
    out = tmp_path / "scores.jsonl"
    command = [*COMMAND, "score", tiny_bundle, *[audio / "a.wav"] * 5_000, "--out", out]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (out.exists() and out.stat().st_size):
        assert running.poll() is None
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert f"interrupted after {len(rows_of(out.read_text()))} rows of 5000, all of them written" in err
    assert "--resume" in err


def test_a_build_that_cannot_be_compiled_exports_nothing(tiny_checkpoint, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has packages for x86-64 only")
    short = ["--flavour", "rtx", "--profiles", "1:4"]
    _, err = aesanet("build", tiny_checkpoint, "--out", tmp_path / "b", *short, status=2)
    assert "the longest is 1 s, and this bundle's windows have 4 s" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full is Linux's")
def test_an_output_that_is_full_is_one_line():
    command = f"{shlex.join([*COMMAND, 'doctor'])} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "aesanet: stdout, or a file: No space left on device\n"


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_nothing(kind, tiny_checkpoint, tmp_path):
    command = [*COMMAND, "export", tiny_checkpoint, "--out", tmp_path / "new.bundle"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "exporting encoder" not in (line := running.stderr.readline()):
        assert line
    assert list(tmp_path.iterdir())  # what is written beside where it goes
    running.send_signal(kind)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tiny_bundle, audio):
    _, err = aesanet("score", tiny_bundle, audio, "--out", "/dev/full", "--overwrite", status=2)
    assert "/dev/full: No space left on device after 0 rows" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "no name of a file"),
        ("/", "no name of a file"),
        ("rows.csv", "as JSON lines, or as .parquet"),
        ("rows.TSV", "as JSON lines, or as .parquet"),
    ],
)
def test_rows_go_to_files_that_can_be_read_again(tiny_bundle, audio, name, told):
    _, err = aesanet("score", tiny_bundle, audio, "--out", name, status=2)
    assert told in err
    assert "Traceback" not in err


def test_standard_input_that_is_closed_or_empty_has_no_audio(tiny_bundle):
    _, err = aesanet("score", tiny_bundle, "-", stdin="", status=2)
    assert "aesanet: no audio on standard input" in err
    for command, status in (("score $1 -", 2), ("select -", 0), ("report - --out r.html", 2)):
        line = f"{shlex.join(COMMAND)} {command} <&-"
        done = subprocess.run(["sh", "-c", line, "sh", tiny_bundle], capture_output=True, text=True, timeout=300)
        assert done.returncode == status
        assert "Traceback" not in done.stderr


def test_a_worker_that_is_killed_ends_its_pool_and_the_command(tmp_path):
    """Others are ended by SIGTERM then, which would be their work's error if it were an interrupt there, too."""
    (tmp_path / "pool.py").write_text(KILLED_WORKER)
    done = subprocess.run([sys.executable, tmp_path / "pool.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "BrokenProcessPool" in done.stderr


def test_doctor_tells_versions_engines_and_codecs():
    out = CliRunner().invoke(cli, ["doctor"]).output
    for told in (
        __version__,
        "onnxruntime",
        "openvino",
        "cpu fp32",
        "aesanet[parquet]: pyarrow ",
        "torch 2.",
        "polygraphy 0.",
        "decodes wav, flac, vorbis, opus, mp3",
    ):
        assert told in out


def test_help_lists_every_command():
    out = CliRunner().invoke(cli, ["--help"]).output
    for command in ("export", "compile", "build", "score", "report", "select", "doctor"):
        assert command in out
        assert CliRunner().invoke(cli, [command, "--help"]).exit_code == 0
    assert CliRunner().invoke(cli, ["--version"]).output.strip() == f"aesanet, version {__version__}"


def test_the_readme_lists_every_error_code():
    readme = (ROOT / "README.md").read_text()
    for code, meaning in CLIP_ERROR_CODES.items():
        assert f"| `{code}` | {meaning} |" in readme


def test_recordings_are_few_and_small():
    assert 5 <= len(RECORDINGS) <= 8
    assert sum(path.stat().st_size for path in RECORDINGS) < 3e6
    sources = (RECORDINGS[0].parent / "SOURCES.md").read_text()
    assert all(path.name in sources for path in RECORDINGS)


def test_out_is_never_one_of_the_inputs(tiny_bundle, audio, tmp_path):
    manifest = tmp_path / "list.jsonl"
    manifest.write_text(json.dumps({"path": str(audio / "a.wav")}))
    before = (audio / "a.wav").read_bytes()
    for name in (manifest, audio / "a.wav"):
        _, err = aesanet("score", tiny_bundle, name, "--out", name, "--overwrite", status=2)
        assert "is one of the inputs" in err
    assert manifest.read_text()
    assert (audio / "a.wav").read_bytes() == before


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_stream_closed_by_the_caller_does_not_stop_the_run(tiny_bundle, audio, tmp_path, closed):
    out = tmp_path / "scores.jsonl"
    command = " ".join(map(shlex.quote, [*COMMAND, "score", str(tiny_bundle), str(audio / "a.wav"), "--out", str(out)]))
    done = subprocess.run(["bash", "-c", f"{command} {closed}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(out.read_text())) == 1


def test_the_second_interrupt_stops_a_run_that_waits(tiny_bundle):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen([*COMMAND, "score", str(tiny_bundle), "-"], text=True, **pipes)
    watchdog = threading.Timer(120, running.kill)  # reading waits for ever
    watchdog.start()
    while "never verified" not in (line := running.stderr.readline()):  # the last note
        assert line
    time.sleep(1)  # from the note to the loop
    running.send_signal(signal.SIGINT)
    assert "Ctrl-C once more" in running.stderr.readline()
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    watchdog.cancel()
    assert running.returncode == 130
    assert "Traceback" not in err


def test_on_a_terminal_it_is_a_table(tiny_bundle, audio):
    """A real pseudo-terminal, with the progress bar on it too."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, 120))
    running = subprocess.Popen([*COMMAND, "score", str(tiny_bundle), str(audio)], stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen = b""
    with contextlib.suppress(OSError):  # a terminal whose other side was closed
        while chunk := os.read(ours, 4096):
            screen += chunk
    os.close(ours)
    assert running.wait() == 1
    text = screen.decode()
    for told in (r"clip +CE +CU +PC +PQ +seconds", r"a\.wav +\d+\.\d{3}", r"c\.mp3 +undecodable", r"h of audio/s"):
        assert re.search(told, text), told


def test_file_names_cannot_paint_the_terminal(tiny_bundle, tmp_path):
    soundfile.write(tmp_path / "red\x1b[31m\n.wav", np.zeros(8_000), 16_000)
    out, _ = aesanet("score", tiny_bundle, tmp_path, "--format", "table")
    assert "red\\x1b[31m\\n.wav" in out


def test_a_profile_says_where_the_time_went(tiny_bundle, audio):
    _, err = aesanet("score", tiny_bundle, audio, "--profile", "--workers", 3, "--max-batch-seconds", 2.5, status=1)
    for told in (
        r"batches of up to 2\.5 s of audio, decoded in 3 threads",
        r"engine \d+\.\d\d s \(\d+\.\d%\), in 2 batches with 0\.0% padding",
        r"waiting for decoded audio \d",
        r"planning, writing and the rest \d",
        r"decoders, beside all that, .* of 3 threads",
    ):
        assert re.search(told, err), told


def test_what_of_several_channels_is_scored_can_be_chosen(tiny_bundle, tmp_path):
    rng = np.random.default_rng(0)
    left, right = rng.normal(0, 0.05, 24_000), rng.normal(0, 0.2, 24_000)
    for name, wave in (("left", left), ("loudest", right), ("mean", (left + right) / 2)):
        soundfile.write(tmp_path / f"{name}.wav", wave, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "both.wav", np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    exact = ("--precision", "fp32", "--device", "cpu")
    for policy in ("left", "loudest", "mean"):
        (found,) = rows_of(aesanet("score", tiny_bundle, tmp_path / "both.wav", "--channels", policy, *exact)[0])
        (alone,) = rows_of(aesanet("score", tiny_bundle, tmp_path / f"{policy}.wav", *exact)[0])
        assert [found[axis] for axis in AXES] == pytest.approx([alone[axis] for axis in AXES], abs=1e-4)
        assert (found["channels"], alone["channels"]) == (2, 1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--resume"], "--resume is of a file: name one with --out"),
        (["--overwrite"], "--overwrite is of a file: name one with --out"),
        (["--resume", "--overwrite", "--out", "x.jsonl"], "--resume and --overwrite: give one of them"),
        (["--workers", "0"], "Invalid value for '--workers'"),
        (["--max-batch-seconds", "0"], "Invalid value for '--max-batch-seconds'"),
    ],
)
def test_options_that_make_no_sense_together(tiny_bundle, audio, options, told):
    assert told in aesanet("score", tiny_bundle, audio, *options, status=2)[1]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["bench", "latency", "B", "--seconds", "1e30"], "--batches times --seconds are at most 100,000 s of audio"),
        (["bench", "throughput", "B", "--batches", "1e30"], "--batches times --seconds are at most 100,000 s of audio"),
        (["bench", "end-to-end", "B", "A", "--max-batch-seconds", "1e308"], "is not in the range"),
        (["report", "A", "--out", "R", "--audio-megabytes", "1e308"], "is not in the range"),
        (["score", "B", "A", "--max-batch-seconds", "nan"], "is not a finite number"),
        (["train", "--learning-rate", "inf"], "is not a finite number"),
        (["train", "--seed", "99999999999999999999"], "is not in the range"),
    ],
)
def test_numbers_are_such_as_can_be_meant(command, told, tiny_bundle, capsys):
    places = {"B": str(tiny_bundle), "A": str(RECORDINGS[0]), "R": "report.html"}
    with pytest.raises(SystemExit) as stopped:
        main([places.get(word, word) for word in command])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
