import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
import tarfile
import tracemalloc
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from conftest import RECORDINGS, ROOT
from helpers import failed, scored, write_lines
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from scipy import signal, stats

from aesanet.axes import AXES
from aesanet.benchmarks.charts import histogram, pairs, score_range
from aesanet.benchmarks.page import AXIS_COLOURS, text
from aesanet.benchmarks.players import Players
from aesanet.benchmarks.score_page import clip_name, score_page
from aesanet.benchmarks.score_summary import QUANTILES, Summary
from aesanet.cli.main import main
from aesanet.errors import InputError
from aesanet.runtime.audio.decode import clip_blocks
from aesanet.runtime.rows.parquet import write_parquet
from aesanet.runtime.rows.results import Result, read_results, score_files
from aesanet.runtime.rows.row import Clip

HOSTILE = "</title><script>alert(1)</script>'\"><img src=http://x.example/a onerror=alert(2)>\u202e\x1b[31m\n.wav"
NOT_UTF8 = os.fsdecode(b"caf\xe9 \xe4\xbd\xa0.wav")


def report(*arguments):
    with pytest.raises(SystemExit) as done:
        main(["report", *map(str, arguments)])
    return done.value.code


class Parsed(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.texts = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = "".join(self.texts)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def rows():
    """Five hundred clips that are not here, the recordings at both ends of every axis, and what goes wrong."""
    rng = np.random.default_rng(0)
    quality = rng.normal(size=(500, 1))
    scores = (5 + quality * (1, 1.2, -0.3, 1.5) + 0.5 * rng.normal(size=(500, 4))).clip(0.5, 9.5).round(6)
    seconds = np.exp(rng.normal(2, 1, 500)).round(3)
    made = [scored(f"no/{i}.flac", s, t) for i, (s, t) in enumerate(zip(scores, seconds.tolist(), strict=True))]
    ends = [scored(path, [9.9 if i % 2 else 0.1] * 4, channels=2) for i, path in enumerate(RECORDINGS)]
    made[3] |= {"silence": "digital", "truncated": True, "header_seconds": 99.0, "sample_rate": 44_100}
    bad = [failed(HOSTILE), failed(NOT_UTF8, "undecodable"), {"line": "{", **failed("x", "bad_row")}]
    del bad[2]["path"]
    return [*made[:250], *bad, *ends, *made[250:]]


def test_figures_are_those_of_numpy_and_scipy(rows, tmp_path, capsys):
    write_lines(tmp_path / "a.jsonl", rows[:100])
    write_lines(tmp_path / "b.jsonl", rows[100:])
    write_parquet(tmp_path / "b.jsonl", tmp_path / "b.parquet")
    assert report(tmp_path / "a.jsonl", tmp_path / "b.par*", "--out", tmp_path / "r.html") == 0
    out = capsys.readouterr().out
    good = [row for row in rows if "error" not in row]
    scores = np.array([[row[axis] for axis in AXES] for row in good])
    seconds = np.array([row["seconds"] for row in good])
    assert (
        f"{len(good)} clips scored, {seconds.sum() / 3600:.2f} h of audio, 3 rows failed, 1 truncated, 1 silent" in out
    )
    for name, values in (*zip(AXES, scores.T, strict=True), ("seconds", seconds)):
        figures = (values.mean(), values.std(), *np.percentile(values, [100 * q for q in QUANTILES]))
        assert re.search(rf"^{name} +" + " +".join(f"{figure:.3f}" for figure in figures) + "$", out, re.MULTILINE)
    for i, a in enumerate(AXES):
        for j, b in list(enumerate(AXES))[i + 1 :]:
            for name, measure in (("SRCC", stats.spearmanr), ("Pearson", stats.pearsonr)):
                found = measure(scores[:, i], scores[:, j]).statistic
                assert re.search(rf"^{name} .*\b{a}-{b} {found:.3f}\b", out, re.MULTILINE)
                assert f"{found:.2f}" in (tmp_path / "r.html").read_text()
    assert "1 row not_found: </title>" in out
    assert "1 row undecodable: caf\\udce9 \u4f60.wav" in out


def test_the_page_holds_all_and_needs_nothing_else(rows, tmp_path):
    page = tmp_path / "r.html"
    assert report(write_lines(tmp_path / "s.jsonl", rows), "--out", page) == 0
    parsed = Parsed(page)
    assert parsed.tags.count("svg") == len(AXES) + 1
    assert parsed.tags.count("audio") == 2 * len(AXES) * len(RECORDINGS) // 2  # half at each end, the rest is not here
    assert parsed.text.count("no player: not_found") == 2 * len(AXES) * (5 - len(RECORDINGS) // 2)
    assert parsed.links
    assert all(link.startswith("data:audio/mpeg;base64,") for link in parsed.links)
    assert not {"script", "img", "link", "iframe"} & set(parsed.tags)
    assert text(HOSTILE) in page.read_text()
    assert r"\u202e\x1b[31m\n.wav" in parsed.text
    assert r"caf\udce9 " in parsed.text
    assert "bad_row" in parsed.text
    for told in ("16,000 Hz", "44,100 Hz", "silent (digital)", "3-10 s", "truncated"):
        assert told in parsed.text
    assert page.stat().st_size < 2e6


def test_players_give_what_the_network_heard(tmp_path):
    row = {"path": str(RECORDINGS[2]), "start_time": 1, "end_time": None}
    players = Players(seconds=1.5, limit_bytes=10**6)
    (source,) = re.fullmatch(
        r"<audio controls src='data:audio/mpeg;base64,([\w+/=]+)'></audio>", players.player(row)
    ).groups()
    assert players.left_bytes < 10**6 - len(source)
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(source)))
    expected = np.concatenate(list(clip_blocks(Clip(row["path"], 1.0, 2.5))))
    assert rate == 16_000
    assert len(heard) == pytest.approx(len(expected), abs=0.1 * rate)
    together = signal.correlate(heard, expected)
    assert together.max() > 0.9 * np.linalg.norm(heard) * np.linalg.norm(expected)
    assert "no player: not_found" in players.player({"path": "none.wav"})
    assert "no player: bad_row" in players.player({"line": "{"})
    assert "the page is full" in Players(1.5, 1_000).player(row)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(row["path"], "b.wav")
    assert source in players.player(row | {"path": str(tmp_path / "a.tar"), "member": "b.wav"})


@given(st.text(st.characters(codec=None, exclude_categories=())), st.sampled_from(("<b>{}</b>", "<b title='{}'>x</b>")))
def test_text_is_never_markup(value, place):
    parser = HTMLParser()
    tags = []
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, len(attributes)))
    parser.feed(place.format(text(value)))
    assert [tag for tag, _ in tags] == ["b"]
    text(value).encode()  # whatever a name holds, the page can be written


scores_of_few = st.lists(st.tuples(*[st.integers(0, 3).map(float)] * 4), max_size=30)


@given(scores_of_few, st.integers(0, 6))
def test_a_summary_is_what_sorting_gives(scores, num_clips):
    """With many ties: the earlier clips of equal ones are kept, and ranks are averages."""
    made = [Result(scored(i, s), s, 2.0) for i, s in enumerate(scores)]
    summary = Summary(iter(made), num_clips)
    for column, axis in enumerate(AXES):
        in_order = sorted(made, key=lambda result: -result.scores[column])
        assert summary.best(axis) == [result.row for result in in_order[:num_clips]]
        in_order = sorted(made, key=lambda result: result.scores[column])
        assert summary.worst(axis) == [result.row for result in in_order[:num_clips]]
    table = np.array(scores).reshape(-1, 4)
    for i in range(4):
        for j in range(4):
            spread = len(table) > 1 and np.ptp(table[:, i]) > 0 and np.ptp(table[:, j]) > 0
            for found, measure in ((summary.srcc, stats.spearmanr), (summary.pearson, stats.pearsonr)):
                expected = measure(table[:, i], table[:, j]).statistic if spread else math.nan
                np.testing.assert_allclose(found[i, j], expected, atol=1e-9)
    if made:
        score_page(["s.jsonl"], summary, Players(1.0, 0))


def test_charts_are_drawn_upwards_from_zero():
    scores = np.array([[1.0, 9.0, 5.0, 5.0]] * 3)
    assert score_range(scores) == (0.0, 10.0)
    assert score_range(np.array([[-0.5, 9.0, 5.0, 12.2]])) == (-1.0, 13.0)
    none = np.full((4, 4), np.nan)
    drawn = pairs(scores, (0.0, 10.0), none, none)
    # 30 squares a side, the first of them leftmost and on top: CE 1 is the fourth from the left, CU 9 the third from
    # above; PC 5 and PQ 5 are just right of and above the middle.
    first, *_, last = re.findall(r"<path d='(M[^']*)'", drawn)
    assert (first, last) == ("M3 2h1v1h-1z", "M15 14h1v1h-1z")


def test_a_million_rows_need_little_memory():
    row = scored("a.wav", (1, 2, 3, 4))
    few, many = 20_000, 100_000
    peaks = []
    for count in (few, many):
        tracemalloc.start()
        Summary((Result(dict(row), (float(i), 2.0, 3.0, 4.0), 2.0) for i in range(count)), 5)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (many - few) < 100  # bytes a row: five doubles, and room to grow


def test_scores_outside_0_to_10_are_in_the_charts(tmp_path):
    page = tmp_path / "r.html"
    rows = [scored("a", (-1.5, 12.2, 3, 4)), scored("b", (1, 2, 3, 4))]
    assert report(write_lines(tmp_path / "s.jsonl", rows), "--out", page) == 0
    assert "goes from -2 to 13" in Parsed(page).text
    assert page.read_text().count("no spread") == 5  # PC and PQ are constant
    bars = re.findall(r": ([\d,]+) clips \(", histogram(np.array([-1.5, 1.0]), (-2.0, 13.0), "CE"))
    assert bars == ["1", "1"]


def test_failed_rows_alone_and_one_clip_alone_have_a_page_too(tmp_path, capsys):
    assert report(write_lines(tmp_path / "f.jsonl", [failed("a"), failed("b")]), "--out", tmp_path / "f.html") == 0
    assert capsys.readouterr().out.startswith("0 clips scored, 0.00 h of audio, 2 rows failed")
    assert "svg" not in Parsed(tmp_path / "f.html").tags
    assert report(write_lines(tmp_path / "o.jsonl", [scored("a", (1, 2, 3, 4))]), "--out", tmp_path / "o.html") == 0
    told = capsys.readouterr().out
    assert "nan" not in told
    assert "SRCC     of no two axes, as none varies" in told  # there is no correlation of one


def test_a_torn_last_line_is_left_out_with_a_note_and_any_other_is_an_error(tmp_path, capsys):
    lines = [json.dumps(scored(i, (1, 2, 3, 4))) for i in range(3)]
    (tmp_path / "torn.jsonl").write_text("\n".join(lines)[:-9])
    assert report(tmp_path / "torn.jsonl", "--out", tmp_path / "r.html") == 0
    captured = capsys.readouterr()
    assert "2 clips scored" in captured.out
    assert "torn.jsonl: line 3, the last, is torn and left out" in captured.err
    (tmp_path / "torn.jsonl").write_text("\n".join([lines[0][:-9], *lines]))
    assert report(tmp_path / "torn.jsonl", "--out", tmp_path / "q.html") == 2
    assert "torn.jsonl: line 1: not a JSON object" in capsys.readouterr().err
    assert not (tmp_path / "q.html").exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[1]\n", "line 1: a JSON list"),
        ('{"path": "a"}\n', "line 1: CE is None"),
        ('{"CE": 1, "CU": 2, "PC": 3, "PQ": NaN, "seconds": 1}\n', "not a JSON object: NaN is not a number"),
        ('{"CE": 1, "CU": 2, "PC": 3, "PQ": true, "seconds": 1}\n', "PQ is True"),
        ('{"CE": 1, "CU": 2, "PC": 3, "PQ": 1' + "0" * 400 + ', "seconds": 1}\n', "PQ is 1000"),
        ('{"CE": 1, "CU": 2, "PC": 3, "PQ": 4, "seconds": -1}\n', "seconds is -1"),
        ('{"error": "bad"}\n', "error is 'bad'; it must be an object"),
        ("path,CE\na,1\n", "line 1: not a JSON object"),
        ("[" * 100_000 + "\n", "not a JSON object"),
    ],
)
def test_what_is_no_score_file(tmp_path, line, told):
    (tmp_path / "s.jsonl").write_text(line)
    with pytest.raises(InputError, match=re.escape(told)):
        list(read_results([str(tmp_path / "s.jsonl")]))


def test_what_cannot_run_is_one_line_and_status_2(tmp_path, capsys):
    scores = write_lines(tmp_path / "s.jsonl", [scored("a", (1, 2, 3, 4))])
    (tmp_path / "empty.jsonl").touch()
    before = scores.read_text()
    for arguments, told in (
        ((tmp_path / "empty.jsonl", "--out", tmp_path / "r.html"), "no rows in"),
        ((tmp_path / "none.jsonl", "--out", tmp_path / "r.html"), "none.jsonl: no such file"),
        ((tmp_path / "none*.jsonl", "--out", tmp_path / "r.html"), "none*.jsonl: no such files"),
        ((tmp_path, "--out", tmp_path / "r.html"), "a folder; give the score files in it"),
        ((scores, "--out", scores), "a page is .html or .htm"),
        ((scores, "--out", tmp_path / "no" / "r.html"), "there is no folder "),
    ):
        assert report(*arguments) == 2
        captured = capsys.readouterr()
        assert told in captured.err
        assert captured.out == ""
        assert "Traceback" not in captured.err
    assert report(scores, "--out", tmp_path / "r.html") == 0
    assert report(scores, "--out", tmp_path / "r.html") == 2
    assert "exists; give --overwrite" in capsys.readouterr().err
    assert report(scores, "--out", tmp_path / "r.html", "--overwrite") == 0
    assert scores.read_text() == before
    assert sorted(os.listdir(tmp_path)) == ["empty.jsonl", "r.html", "s.jsonl"]


def test_globs_that_are_names_and_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "a[1].jsonl"):
        (tmp_path / name).touch()
    found = score_files([str(tmp_path / "a[1].jsonl"), str(tmp_path / "*.jsonl"), "-"])
    assert [os.path.basename(name) for name in found] == ["a[1].jsonl", "a.jsonl", "a[1].jsonl", "b.jsonl", "-"]


def test_clips_are_called_by_what_is_meant():
    assert clip_name({"path": "a.tar", "member": "b.wav"}) == "a.tar/b.wav"
    assert clip_name({"path": "a.wav", "start_time": 1.5, "end_time": "3"}) == "a.wav [1.5-3 s]"
    assert clip_name({"path": "a.wav", "start_time": 1.5, "end_time": ""}) == "a.wav [from 1.5 s]"
    assert clip_name({"path": "a.wav", "start_time": 0, "end_time": None}) == "a.wav"
    assert clip_name({"line": "[1]"}) == "[1]"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(page, profile, *options):
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = "--disable-component-update --disable-sync --window-size=1200,5100 --virtual-time-budget=5000"
    command = [CHROMIUM, *quiet.split(), *more.split(), f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_charts_and_can_play_every_clip(rows, tmp_path, scheme):
    (ROOT / "build").mkdir(exist_ok=True)
    page, picture = tmp_path / "report.html", ROOT / "build" / f"report-{scheme}.png"
    assert report(write_lines(tmp_path / "s.jsonl", rows), "--out", page) == 0
    dark = ("--blink-settings=preferredColorScheme=0",) if scheme == "dark" else ()
    picture.unlink(missing_ok=True)
    browse(page, tmp_path / "profile", f"--screenshot={picture}", *dark)
    pixels = imread(picture)[..., :3]
    assert (pixels[5, 5].mean() > 0.5) == (scheme == "light")
    if scheme == "dark":
        return
    for axis, colour in AXIS_COLOURS.items():
        drawn = (abs(pixels - to_rgb(colour)).max(axis=-1) < 0.01).sum()
        assert drawn > 5_000, axis
    # The page itself lets no script run; a copy that does asks the browser what it could load.
    copy = page.read_text().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    load = "<script>onload = () => setTimeout(() => document.title = [...document.querySelectorAll('audio')]"
    load += ".map(a => a.duration).join(' '), 2000)</script>"
    page.write_text(copy.replace("</body>", f"{load}</body>"))
    shown = browse(page, tmp_path / "profile", "--dump-dom")
    durations = [float(value) for value in re.search("<title>(.*?)</title>", shown)[1].split()]
    assert len(durations) == shown.count("<audio") == 2 * len(AXES) * len(RECORDINGS) // 2
    assert all(1 < duration < 6.5 for duration in durations)
