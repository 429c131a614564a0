"""Runs that are killed at any instant and gone on with, as users do it: by command, with real files of every kind."""

import json
import os
import random
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from conftest import RECORDINGS

from aesanet.runtime.pipeline import GroupEnd
from aesanet.runtime.rows.inputs import read_rows
from aesanet.runtime.rows.output import state_of
from aesanet.runtime.rows.results import read_results
from aesanet.runtime.scorer import Scorer

COMMAND = [sys.executable, "-c", "from aesanet.cli.main import main; main()"]
BATCHES = ("--max-batch-seconds", "4", "--workers", "2")  # small ones, so that a short run has many groups


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Some 400 rows: recordings, short clips, segments of one file, repeated ones, and rows of no use."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(120):
        path = folder / f"{number}.{rng.choice(['wav', 'flac', 'ogg'])}"
        soundfile.write(path, rng.normal(0, 0.1, rng.integers(1_000, 60_000)), 16_000)
        rows.append({"path": str(path), "id": number})
        rows += [{"path": str(path), "start_time": start, "end_time": start + 0.7} for start in (0.0, 0.4)]
    (folder / "broken.mp3").write_text("no audio")
    for path in RECORDINGS:
        rows.append({"path": str(path)})
        rows += [{"path": str(path), "start_time": start / 2} for start in range(4)]
    rows += [{"path": str(folder / "broken.mp3")}, {"path": "nothing.wav"}, {"id": "no path"}] * 3
    random.Random(0).shuffle(rows)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{torn\n")
    return path


def command(bundle, manifest, out, *options):
    engine = ("--backend", "onnxruntime", "--device", "cpu", "--threads", "1")
    return [*COMMAND, "score", str(bundle), str(manifest), "--out", str(out), *BATCHES, *engine, *options]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def finished(bundle, manifest, out, *options):
    done = subprocess.run(command(bundle, manifest, out, *options), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr  # some rows fail
    return done.stderr


def stopped(signum, status, bundle, manifest, out, heard=True):
    """Begin a run and stop it once it has written something; what it said, if it was heard to the end.

    On a busy machine it may come to its end before: then once more.
    """
    for _ in range(10):
        running = subprocess.Popen(command(bundle, manifest, out), stderr=subprocess.PIPE, text=True)
        while running.poll() is None and not written(out):
            time.sleep(0.005)
        if not heard:
            running.stderr.close()
        running.send_signal(signum)
        err = running.communicate(timeout=120)[1] if heard else None
        if running.wait(timeout=120) == status:
            return err
        assert running.returncode == 1, err
        for path in out.parent.glob(out.name + "*"):
            path.unlink()
    raise AssertionError("it always ends before it can be stopped")


def written(out):
    """Has a run written rows, and not only begun?"""
    return any(path.exists() and path.stat().st_size for path in (out, out.with_name(out.name + ".partial.jsonl")))


class Forked:
    """Runs the command in forks of a process that has imported everything, so that they begin at once."""

    def __init__(self):
        code = """
import os, sys, shlex
import numpy, onnxruntime, soundfile, soxr, tqdm
import aesanet.cli.score, aesanet.cli.sinks, aesanet.cli.watch, aesanet.runtime.scorer
from aesanet.cli.main import main
for line in sys.stdin:
    if not (child := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            main(shlex.split(line))
        except SystemExit as ended:
            os._exit(ended.code)  # what was made before the fork cannot be taken down after it
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, arguments, kill_after):
        """The exit status: -9 where it was killed."""
        self.process.stdin.write(shlex.join(arguments) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        ended = select.select([self.process.stdout], [], [], kill_after)[0]
        if not ended:
            os.kill(child, signal.SIGKILL)
        return int(self.process.stdout.readline())

    def close(self):
        self.process.communicate(timeout=60)
        assert self.process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("options", "kills"), [((), 50), (("--unordered", "--per-window"), 10)])
def test_a_run_killed_at_any_instant_ends_with_the_same_bytes(
    tiny_bundle, manifest, tmp_path, options, kills, measured
):
    def arguments(out, *more):
        return command(tiny_bundle, manifest, tmp_path / out, *options, *more)[len(COMMAND) :]

    forked = Forked()
    began = time.monotonic()
    assert forked.run(arguments("whole.jsonl"), kill_after=300) == 1  # some rows fail
    seconds = time.monotonic() - began
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert len(whole.splitlines()) == len(manifest.read_text().splitlines())

    instants = random.Random(len(options))
    out = tmp_path / "rows.jsonl"
    killed, ended, kept = 0, 0, set()
    while killed < kills:
        status = forked.run(arguments("rows.jsonl", "--resume"), instants.uniform(0.01, 0.6) * seconds)
        if status == -signal.SIGKILL:
            killed += 1
            if state_of(out).exists():
                kept.add(json.loads(state_of(out).read_bytes())["rows"])
        else:
            assert status == 1
            assert out.read_bytes() == whole
            ended += 1
            out.unlink()  # and so the next one begins anew
    assert forked.run(arguments("rows.jsonl", "--resume"), kill_after=300) == 1
    forked.close()
    assert out.read_bytes() == whole
    assert json.loads(state_of(out).read_bytes())["finished"]
    assert len(kept) > 3  # it was killed in many places, and went on from them
    told = f"{killed} times, {len(kept)} different groups, {ended} whole runs between"
    measured[f"kill -9 {' '.join(options)}"] = told


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on_and_does(kind, tiny_bundle, manifest, tmp_path):
    finished(tiny_bundle, manifest, tmp_path / "whole.jsonl")
    out = tmp_path / "rows.jsonl"
    err = stopped(kind, 130, tiny_bundle, manifest, out)
    rows = out.read_bytes().splitlines()
    assert f"interrupted after {len(rows)} rows of {len(manifest.read_text().splitlines())}" in err
    assert "--resume" in err
    assert all(json.loads(row) for row in rows)
    state = json.loads(state_of(out).read_bytes())
    assert not state["finished"]
    scorer = Scorer.open(tiny_bundle, "cpu", backend="onnxruntime")
    run = scorer.pipeline(read_rows([str(manifest)]), scorer.settings(2, 4.0)).run()
    assert state["rows"] in {0, *(found.rows for found in run if isinstance(found, GroupEnd))}
    assert f"without --overwrite, goes on after row {state['rows']}\n" in err
    assert f"going on after {state['rows']} rows" in finished(tiny_bundle, manifest, out, "--resume")
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_finished_file_is_left_as_it_is(tiny_bundle, manifest, tmp_path):
    out = tmp_path / "rows.jsonl"
    finished(tiny_bundle, manifest, out)
    before = out.read_bytes(), os.stat(out).st_mtime_ns
    assert "nothing to do: " in finished(tiny_bundle, manifest, out, "--resume")
    assert (out.read_bytes(), os.stat(out).st_mtime_ns) == before
    done = subprocess.run(
        command(tiny_bundle, manifest, out, "--resume", "--per-window"), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "begun with --per-window false, and this is true" in done.stderr
    assert (out.read_bytes(), os.stat(out).st_mtime_ns) == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--channels", "left"), 'begun with --channels "mean", and this is "left"'),
        (("--per-window",), "begun with --per-window false, and this is true"),
        (("--max-batch-seconds", "5"), "begun with --max-batch-seconds 4.0, and this is 5.0"),
        (("--backend", "openvino", "--precision", "fp32"), "begun with the engine"),
    ],
)
def test_another_run_does_not_go_on(tiny_bundle, manifest, tmp_path, options, told):
    out = tmp_path / "rows.jsonl"
    stopped(signal.SIGKILL, -9, tiny_bundle, manifest, out)
    done = subprocess.run(
        command(tiny_bundle, manifest, out, "--resume", *options), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert told in done.stderr
    done = subprocess.run(command(tiny_bundle, manifest, out), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "an unfinished run is there; give --resume to go on, or --overwrite" in done.stderr


def test_windows_of_another_length_do_not_go_on(tiny_bundle, manifest, tmp_path):
    """Which are a matter of bundle.json alone: the graphs are the same."""
    bundle, out = shutil.copytree(tiny_bundle, tmp_path / "b"), tmp_path / "rows.jsonl"
    stopped(signal.SIGKILL, -9, bundle, manifest, out)
    about = json.loads((bundle / "bundle.json").read_text())
    about["window"] = {"window_seconds": 2.0, "hop_seconds": 2.0}
    (bundle / "bundle.json").write_text(json.dumps(about))
    done = subprocess.run(command(bundle, manifest, out, "--resume"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "was begun with the windows [4.0, 3.0], and this is [2.0, 2.0]" in done.stderr


def test_an_interrupt_counts_though_nobody_reads_what_is_said(tiny_bundle, manifest, tmp_path):
    """As in `aesanet ... 2>&1 | tee log`, where Ctrl-C ends tee too."""
    out = tmp_path / "rows.jsonl"
    stopped(signal.SIGINT, 130, tiny_bundle, manifest, out, heard=False)
    assert out.stat().st_size
    assert all(json.loads(row) for row in out.read_bytes().splitlines())


def test_a_disk_that_is_full_from_the_start(tiny_bundle, manifest, tmp_path):
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); "
    arguments = command(tiny_bundle, manifest, tmp_path / "rows.jsonl")[len(COMMAND) :]
    done = subprocess.run([sys.executable, "-c", limit + COMMAND[-1], *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "rows.jsonl: File too large" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_stops_cleanly_and_goes_on_when_there_is_room(tiny_bundle, manifest, tmp_path):
    """A limit on the size of files stands for a disk that is full: the write that passes it fails."""
    out = tmp_path / "rows.jsonl"
    finished(tiny_bundle, manifest, tmp_path / "whole.jsonl")
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
    limited = [sys.executable, "-c", limit + COMMAND[-1], *command(tiny_bundle, manifest, out)[len(COMMAND) :]]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "File too large after" in done.stderr
    assert "with room again, --resume goes on" in done.stderr
    assert "Traceback" not in done.stderr
    assert out.stat().st_size == 40_000
    finished(tiny_bundle, manifest, out, "--resume")
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_no_order_gives_the_same_rows(tiny_bundle, manifest, tmp_path):
    finished(tiny_bundle, manifest, tmp_path / "ordered.jsonl")
    finished(tiny_bundle, manifest, tmp_path / "unordered.jsonl", "--unordered")
    ordered, unordered = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("ordered", "unordered"))
    assert ordered != unordered
    assert sorted(ordered) == sorted(unordered)


def test_parquet_is_resumed_through_its_lines_and_left_alone_when_finished(tiny_bundle, manifest, tmp_path):
    finished(tiny_bundle, manifest, tmp_path / "whole.jsonl")
    out = tmp_path / "rows.parquet"
    left = ["rows.parquet", "rows.parquet.state", "whole.jsonl", "whole.jsonl.state"]
    stopped(signal.SIGKILL, -9, tiny_bundle, manifest, out)
    assert not out.exists()
    finished(tiny_bundle, manifest, out, "--resume")
    assert names(tmp_path) == left
    found = [row.row for row in read_results([str(out)])]
    for row, line in zip(found, (tmp_path / "whole.jsonl").read_text().splitlines(), strict=True):
        assert row == json.loads(line)
    before = out.read_bytes()
    assert "nothing to do: " in finished(tiny_bundle, manifest, out, "--resume")
    assert out.read_bytes() == before
    assert names(tmp_path) == left
    done = subprocess.run(
        [*command(tiny_bundle, manifest, out, "--resume"), RECORDINGS[0]], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "is finished with" in done.stderr
    assert names(tmp_path) == left


@pytest.mark.parametrize("stage", ["unfinished", "finished"])
def test_parquet_of_another_input_is_refused_and_named(tiny_bundle, tmp_path, stage):
    """As JSON lines are: a segment that has moved, or a row's own value that is another."""
    paths = [str(path) for path in RECORDINGS[:3]]
    rows = [
        {"path": path, "start_time": start, "end_time": start + 0.5, "take": take, "of": {"n": 1}, "none": None}
        for path in paths
        for take, start in enumerate((0, 0.5))
    ]
    rows.append({"path": "nothing.wav"})
    if stage == "finished":
        rows[1]["take"] = 0.5  # so that the column is of floats
    manifest, out = tmp_path / "rows.jsonl", tmp_path / "rows.PARQUET"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished(tiny_bundle, manifest, out)
    if stage == "unfinished":  # as a kill right before the end leaves it
        state = json.loads((tmp_path / "rows.PARQUET.state").read_text())
        lines = subprocess.run(command(tiny_bundle, manifest, tmp_path / "lines.jsonl"), timeout=300)
        assert lines.returncode == 1
        partial = (tmp_path / "lines.jsonl").rename(tmp_path / "rows.PARQUET.partial.jsonl")
        state |= {"finished": False, "bytes": partial.stat().st_size}
        (tmp_path / "rows.PARQUET.state").write_text(json.dumps(state))
        out.unlink()
    else:
        assert "nothing to do: " in finished(tiny_bundle, manifest, out, "--resume")
    for key, value in (("end_time", 0.7), ("take", 7), ("of", {"n": 2}), ("more", "x")):
        manifest.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:2], rows[2] | {key: value}, *rows[3:]]))
        done = subprocess.run(
            command(tiny_bundle, manifest, out, "--resume"), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 2
        assert "row 3 is of" in done.stderr
        assert key in done.stderr
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished(tiny_bundle, manifest, out, "--resume")
    assert [row.row["path"] for row in read_results([str(out)])] == [row["path"] for row in rows]
