import json
import math

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import label_of, labelled_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from aesanet.axes import AXES, AXIS_NAMES
from aesanet.cli.main import cli, main
from aesanet.errors import InputError
from aesanet.metrics import rank_metrics
from aesanet.models.checkpoint import load_checkpoint
from aesanet.runtime.rows.parquet import write_parquet
from aesanet.training.evaluation import evaluate, write_scatter
from aesanet.training.joining import ScoredClips, join
from aesanet.training.labels import LabelledClip


def row(path, scores=(5, 6, 7, 8), **more):
    return {"path": path, **more, **dict(zip(AXES, map(float, scores), strict=True)), "seconds": 1.0}


def failed(path):
    return {"path": path, "error": {"code": "not_found", "message": "no such file"}}


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="scores.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


# Joining


@pytest.mark.parametrize(
    ("label", "score"),
    [
        (label_of("d/a.wav"), row("d/a.wav")),
        (label_of("d/a.wav"), row("/data/all/d/a.wav")),
        (label_of("/your_path/d/a.wav", path="d/a.wav"), row("root/d/a.wav")),
        (label_of("d/a.wav"), row("/converted/d/a.flac")),
        (label_of("d/a"), row("x/d/a.flac")),
        (label_of("d/a.b.wav"), row("x/d/a.b")),
        (label_of("/abs/a.wav"), row("/abs/a.wav")),
        (label_of("id-7", path=None), row("x/id-7.wav")),
        (label_of("id-7.5", path=None), row("x/id-7.5.wav")),
        (label_of("id-7", path=None), row("x/id-7")),
        (label_of("id-7", path="d/a.wav"), row("elsewhere.wav", sample_id="id-7")),
        (label_of("id-7", path="d/a.wav"), row("elsewhere.wav", id="id-7")),
        (label_of("id-7", path="d/a.wav"), row("d/a.wav", id="another")),
    ],
)
def test_a_score_finds_its_label(write, label, score):
    pairs = join([label], write(score))
    assert [found.id for found in pairs.clips] == [label.id]
    assert pairs.scores.tolist() == [[5, 6, 7, 8]]
    assert pairs.true.tolist() == [[1, 2, 3, 4]]
    assert (pairs.missing, pairs.unused) == (0, 0)


@pytest.mark.parametrize("path", ["xd/a.wav", "a.wav", "d/a.wav/b", "d/A.wav", "other/a.wav"])
def test_folders_are_compared_whole(write, path):
    with pytest.raises(InputError, match="1 of 1 labels have no score"):
        join([label_of("d/a.wav")], write(row(path)))


def test_the_exact_name_goes_before_the_name_without_its_suffix(write):
    labels = [label_of("a.wav", (1, 1, 1, 1)), label_of("a.mp3", (2, 2, 2, 2))]
    pairs = join(labels, write(row("x/a.mp3", (2, 2, 2, 2)), row("x/a.wav", (1, 1, 1, 1))))
    np.testing.assert_array_equal(pairs.true, pairs.scores)


@pytest.mark.parametrize(
    ("labels", "rows", "told"),
    [
        (["a.wav", "d/a.wav"], [row("d/a.wav")], r"line 1 \(d/a.wav\): fits 2 labels, a.wav and d/a.wav"),
        (["a.wav", "a.mp3"], [row("a.flac")], "fits 2 labels, a.mp3 and a.wav"),
        (["a.wav"], [row("x/a.wav"), row("y/a.wav")], r"line 2 \(y/a.wav\): fits label a.wav, as .*line 1 \(x/a.wav\)"),
        (["a.wav"], [row("a.wav"), failed("y/a.wav")], "leave one of the two rows"),
        (["a", "b"], [row("c.wav", id="a", sample_id="b")], "fits 2 labels, a and b"),
    ],
)
def test_what_fits_two_is_refused_with_both(write, labels, rows, told):
    with pytest.raises(InputError, match=told):
        join([label_of(name) for name in labels], write(*rows))


def test_labels_without_a_score_are_counted_and_named(write):
    labels = [label_of(f"{name}.wav") for name in "abcdef"]
    scores = write(row("b.wav"), failed("a.wav"), row("z.wav"), {"line": "[", **failed("")})
    told = (
        r"5 of 6 labels have no score \(1 have an error row, 4 no row\): a.wav, c.wav, d.wav, \.\.\.; .*allow missing"
    )
    with pytest.raises(InputError, match=told):
        join(labels, scores)
    pairs = join(labels, scores, allow_missing=True)
    assert [found.id for found in pairs.clips] == ["b.wav"]
    assert (pairs.missing, pairs.unused) == (5, 2)
    with pytest.raises(InputError, match=r"6 of 6 labels have no score .* are these the scores of other clips"):
        join(labels, write(row("z.wav")), allow_missing=True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "line 1: not a JSON object"),
        ("\n[]", "line 2: a JSON list; it must be an object"),
        (b"\xff", "line 1: not a JSON object"),
        ('{"path": "a.wav", "CE": 1, "CU": 1, "PC": 1}', "line 1: PQ is None; it must be a finite score"),
        ('{"path": "a.wav", "CE": NaN, "CU": 1, "PC": 1, "PQ": 1}', "NaN is not a number that JSON can hold"),
        ('{"path": "a.wav", "CE": true, "CU": 1, "PC": 1, "PQ": 1}', "CE is True"),
        ('{"path": "a.wav", "CE": 1, "CU": "1", "PC": 1, "PQ": 1}', "CU is '1'"),
        ('{"path": "a.wav", "CE": 1e300, "CU": 1, "PC": 1, "PQ": 1}', r"CE is 1e\+300"),
    ],
)
def test_what_is_no_row_of_scores_is_refused(tmp_path, text, told):
    path = tmp_path / "scores.jsonl"
    path.write_bytes((text if isinstance(text, bytes) else text.encode()) + b"\n")
    with pytest.raises(InputError, match=told):
        join([label_of("a.wav")], path)


@settings(max_examples=10)
@given(random=st.randoms())
def test_the_order_of_rows_and_labels_changes_nothing(tmp_path_factory, random):
    pairs = labelled_pairs(12, 3)
    rows = [row(f"/x/{c.id}", s) for c, s in zip(pairs.clips, pairs.scores, strict=True)]
    labels = list(pairs.clips)
    random.shuffle(rows)
    random.shuffle(labels)
    path = tmp_path_factory.getbasetemp() / "shuffled.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    joined = join(labels, path)
    np.testing.assert_array_equal(joined.scores, pairs.scores)
    np.testing.assert_array_equal(joined.true, pairs.true)
    assert evaluate(joined, resamples=2) == evaluate(pairs, resamples=2)


def test_scores_in_parquet_and_of_a_run_that_goes_on(write, tmp_path):
    path = write(row("a.wav", member=None), failed("b.wav"))
    write_parquet(path, tmp_path / "scores.parquet")
    labels = [label_of("a.wav"), label_of("b.wav")]
    assert join(labels, tmp_path / "scores.parquet", allow_missing=True).scores.tolist() == [[5, 6, 7, 8]]
    said = []
    path.write_text(json.dumps(row("a.wav")) + '\n{"path": "b.w')
    assert join(labels, path, allow_missing=True, note=said.append).missing == 1
    assert "line 2, the last, is torn and left out" in said[0]
    with pytest.raises(InputError, match="line 2: not a JSON object"):
        join(labels, path, allow_missing=True)
    path.write_text("junk")
    with pytest.raises(InputError, match="line 1: not a JSON object"):
        join(labels, path, allow_missing=True, note=said.append)


# Evaluation


def test_the_32_numbers_are_those_of_the_metrics():
    pairs = labelled_pairs()
    result = evaluate(pairs, resamples=50)
    assert (result.clips, result.systems) == (40, 5)
    assert tuple(result.axes) == AXES
    systems = {
        name: [i for i, c in enumerate(pairs.clips) if c.system == name] for name in {"s0", "s1", "s2", "s3", "s4"}
    }
    for a, axis in enumerate(AXES):
        levels = result.axes[axis]
        means = np.array([[m[rows, a].mean() for rows in systems.values()] for m in (pairs.true, pairs.scores)]).round(
            9
        )
        for level, (true, scores) in (
            (levels.utterance, (pairs.true[:, a], pairs.scores[:, a])),
            (levels.system, means),
        ):
            expected = rank_metrics(true, scores)
            assert level.count == len(true)
            for name in ("mse", "lcc", "srcc", "ktau"):
                found = getattr(level, name)
                assert found.value == pytest.approx(getattr(expected, name), abs=1e-12)
                assert found.low <= found.value <= found.high or level is levels.system
                assert found.low <= found.high
                assert found.reason is None


def test_intervals_are_percentiles_of_seeded_draws():
    pairs = labelled_pairs()
    rng = np.random.default_rng(3)
    draws = [rank_metrics(*(m[i, 0] for m in (pairs.true, pairs.scores))).srcc for i in rng.integers(40, size=(60, 40))]
    found = evaluate(pairs, resamples=60, seed=3).axes["CE"].utterance.srcc
    assert [found.low, found.high] == pytest.approx(np.percentile(draws, [2.5, 97.5]))
    assert evaluate(pairs, resamples=60, seed=3) == evaluate(pairs, resamples=60, seed=3)
    assert evaluate(pairs, resamples=60, seed=4).axes["CE"].utterance.srcc.low != found.low


def test_systems_weigh_the_same_whatever_their_clips():
    labels = [label_of(str(i), (i, 0, 0, 0), system=s) for i, s in enumerate("AAAABC")]
    scores = np.array([[0.0, 0, 0, 0]] * 4 + [[4.0, 0, 0, 0], [6.0, 0, 0, 0]])
    level = evaluate(ScoredClips(labels, scores, 0, 0), resamples=5).axes["CE"].system
    assert level.count == 3
    assert level.mse.value == pytest.approx((1.5**2 + 0 + 1) / 3)


def test_what_has_no_number_has_a_reason_and_json_has_no_nan():
    nan = math.nan
    labels = [
        label_of("a", (1, 5, nan, nan), system="A"),
        label_of("b", (2, 5, 3, nan), system="B"),
        label_of("c", (3, 5, nan, nan)),
    ]
    scores = np.array([[1.0, 1, 1, 1], [1.0, 2, 1, 1], [1.0, 3, 1, 1]])
    result = evaluate(ScoredClips(labels, scores, 0, 0), resamples=5)
    text = msgspec.json.encode(result).decode()
    assert "NaN" not in text
    axes = json.loads(text)["axes"]
    assert axes["CE"]["utterance"]["mse"]["value"] == pytest.approx(5 / 3)
    assert axes["CE"]["utterance"]["lcc"]["value"] is None
    assert axes["CE"]["utterance"]["lcc"]["reason"] == "all 3 scores are 1, and a constant has no correlation"
    assert axes["CU"]["utterance"]["ktau"]["reason"] == "all 3 labels are 5, and a constant has no correlation"
    assert axes["PC"]["utterance"]["count"] == 1
    assert "there is 1" in axes["PC"]["utterance"]["srcc"]["reason"]
    assert axes["PQ"]["utterance"]["mse"]["reason"] == "no clip has a label on this axis"
    assert "3 systems or more; the labels of this axis name 2" in axes["CE"]["system"]["mse"]["reason"]
    assert "name 1" in axes["PC"]["system"]["srcc"]["reason"]
    assert axes["CE"]["utterance"]["ceiling_srcc"] is None


def test_a_missing_label_leaves_a_clip_out_on_that_axis_alone():
    pairs = labelled_pairs()
    gap = list(pairs.clips)
    first = gap[0]
    ratings = first.ratings.copy()
    ratings[0] = math.nan
    gap[0] = LabelledClip(first.id, first.path, first.system, (math.nan, *first.scores[1:]), ratings)
    whole, gapped, without = (
        evaluate(p, resamples=3)
        for p in (
            pairs,
            ScoredClips(gap, pairs.scores, 0, 0),
            ScoredClips(pairs.clips[1:], pairs.scores[1:], 0, 0),
        )
    )
    assert gapped.axes["CE"].utterance.mse == without.axes["CE"].utterance.mse
    assert gapped.axes["CE"].system.ktau == without.axes["CE"].system.ktau
    assert gapped.axes["CE"].utterance.ceiling_srcc is not None
    for axis in AXES[1:]:
        assert gapped.axes[axis] == whole.axes[axis]


def test_an_interval_that_no_draw_gives_says_so():
    labels = [label_of("a", (1, 1, 1, 1)), label_of("b", (2, 2, 2, 2))]
    seed = next(s for s in range(99) if len(set(np.random.default_rng(s).integers(2, size=2))) == 1)
    level = evaluate(ScoredClips(labels, np.array([[1.0] * 4, [2.0] * 4]), 0, 0), resamples=1, seed=seed).axes["CE"]
    assert level.utterance.srcc.value == pytest.approx(1)
    assert level.utterance.srcc.low is None
    assert "no interval" in level.utterance.srcc.reason


def test_the_ceiling_is_what_the_raters_agree_on():
    rng = np.random.default_rng(1)

    def pairs(noise, raters=(10,), clips=200):
        quality = rng.uniform(2, 8, (clips, 4, 1))
        ratings = [quality[i] + noise * rng.normal(size=(4, raters[i % len(raters)])) for i in range(clips)]
        labels = [label_of(str(i), r.mean(axis=1), system=str(i % 20), ratings=r) for i, r in enumerate(ratings)]
        return ScoredClips(labels, np.array([c.scores for c in labels]), 0, 0)

    agreed = evaluate(pairs(0.0), resamples=1).axes["PQ"]
    assert agreed.utterance.ceiling_srcc == pytest.approx(1)
    assert agreed.system.ceiling_srcc == pytest.approx(1)
    # Quality has the variance 3; each half of 10 raters errs by 2^2 / 5: Pearson's r is 3 / 3.8, Spearman's near it.
    noisy = evaluate(pairs(2.0, clips=1000), resamples=1).axes["PQ"].utterance.ceiling_srcc
    assert noisy == pytest.approx(3 / 3.8, abs=0.05)
    # Raters may differ in number; padding must not look like agreement.
    mixed = evaluate(pairs(2.0, raters=(10, 11, 12), clips=1000), resamples=1).axes["PQ"].utterance.ceiling_srcc
    assert mixed == pytest.approx(noisy, abs=0.05)
    assert evaluate(pairs(1.0, raters=(10, 3)), resamples=1).axes["PQ"].utterance.ceiling_srcc is None


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_the_plot_is_a_picture(tmp_path, name, start):
    pairs = labelled_pairs()
    write_scatter(pairs, evaluate(pairs, resamples=1), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_plot_of_one_axis_without_systems(tmp_path):
    labels = [label_of(str(i), (i, math.nan, math.nan, math.nan)) for i in range(3)]
    pairs = ScoredClips(labels, np.ones((3, 4)), 0, 0)
    write_scatter(pairs, evaluate(pairs, resamples=1), tmp_path / "a.svg")
    for wrong in (tmp_path / "a.jpg", tmp_path / "none" / "a.png"):
        with pytest.raises(InputError, match=r"\.png or \.svg|No such file"):
            write_scatter(pairs, evaluate(pairs, resamples=1), wrong)


def test_equal_means_of_systems_are_ties():
    """Means of tenths, summed in floating point, would differ in their last digit."""
    tenths = {"A": (0.1, 0.2, 0.3), "B": (0.3, 0.2, 0.1), "C": (0.5, 0.5, 0.5)}
    assert len({sum(values) for values in tenths.values()}) == 3
    labels = [label_of(f"{s}{i}", (v, 1, 1, 1), system=s) for s, values in tenths.items() for i, v in enumerate(values)]
    scores = np.array([[ord(c.system)] * 4 for c in labels], dtype=float)
    level = evaluate(ScoredClips(labels, scores, 0, 0), resamples=1).axes["CE"].system
    assert level.ktau.value == pytest.approx(2 / math.sqrt(2 * 3))


# The commands


@pytest.fixture
def files(write, tmp_path):
    """A label file with ratings and systems, and scores that follow it at half the slope."""
    pairs = labelled_pairs()
    labels = write(
        *(
            {"path": c.path, "system": c.system}
            | {AXIS_NAMES[axis]: c.ratings[a].tolist() for a, axis in enumerate(AXES)}
            for c in pairs.clips
        ),
        name="labels.jsonl",
    )
    scores = write(*(row(f"/audio/{c.path}", s) for c, s in zip(pairs.clips, pairs.scores, strict=True)))
    return labels, scores


def run(*arguments, status=0):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


def test_evaluate_prints_a_table_and_writes_numbers_and_a_plot(files, tmp_path):
    labels, scores = files
    to = tmp_path / "out.json", tmp_path / "out.png"
    result = run(
        "evaluate", "--labels", labels, "--scores", scores, "--resamples", 20, "--json", to[0], "--plot", to[1]
    )
    lines = result.stdout.splitlines()
    assert lines[0] == "40 clips, 5 systems; 95 % intervals of 20 bootstrap resamples"
    assert lines[1].split() == ["axis", "level", "n", "MSE", "LCC", "SRCC", "KTAU"]
    assert [line.split()[:3] for line in lines[2:10]] == [
        [axis, level, count] for axis in AXES for level, count in (("utterance", "40"), ("system", "5"))
    ]
    written = json.loads(to[0].read_text())
    srcc = written["axes"]["CE"]["utterance"]["srcc"]
    assert f"{srcc['value']:.3f} [{srcc['low']:.3f}, {srcc['high']:.3f}]" in lines[2]
    assert lines[10].startswith("ceiling utterance  SRCC of two halves of the raters:  CE ")
    assert len(lines) == 12
    assert to[1].stat().st_size > 1000


def test_what_is_read_is_not_written_over(files, capsys):
    labels, scores = files
    for path in (labels, scores):
        before = path.read_bytes()
        with pytest.raises(SystemExit) as stopped:
            main(["evaluate", "--labels", str(labels), "--scores", str(scores), "--json", str(path)])
        assert stopped.value.code == 2
        assert "is one of the inputs" in capsys.readouterr().err
        assert path.read_bytes() == before
        command = ["calibrate", "any.safetensors", "--labels", str(labels), "--scores", str(scores), "--out", str(path)]
        with pytest.raises(SystemExit):
            main(command)
        assert "is one of the inputs" in capsys.readouterr().err


def test_evaluate_says_why_a_number_is_missing(write, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("path,PQ\na.wav,1\nb.wav,2\nc.wav,3\n")
    scores = write(row("a.wav"), row("b.wav"), row("z.wav"))
    result = run("evaluate", "--labels", labels, "--scores", scores, "--allow-missing", "--resamples", 2)
    assert "1 labels have no score and are left out" in result.stderr
    assert "1 rows of " in result.stderr
    assert "- CE utterance, CU utterance, PC utterance: no clip has a label on this axis" in result.stdout
    assert "- PQ utterance: all 2 scores are 8, and a constant has no correlation" in result.stdout
    assert "ceiling" not in result.stdout
    assert "nan" not in result.stdout


def test_calibrate_writes_a_checkpoint_and_prints_its_lines(files, tiny_checkpoint, tmp_path):
    labels, scores = files
    out = tmp_path / "new.safetensors"
    result = run("calibrate", tiny_checkpoint, "--labels", labels, "--scores", scores, "--out", out)
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["scale", "offset", "MSE", "before", "after"]
    assert [line.split()[0] for line in lines] == list(AXES)
    for line in lines:
        scale, _, before, after = map(float, line.split()[1:])
        assert 1 < scale < 3  # the scores were made at half the slope
        assert after < before
    assert load_checkpoint(out)
    assert "that it was fitted to" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["evaluate", "--labels", "none.csv", "--scores", "SCORES"], "none.csv: No such file"),
        (["evaluate", "--labels", "LABELS", "--scores", "none"], "none: No such file"),
        (["evaluate", "--labels", "LABELS", "--scores", "SCORES", "--plot", "a.gif"], "a.gif: a plot is .png or .svg"),
        (
            ["evaluate", "--labels", "LABELS", "--scores", "SCORES", "--resamples", "1", "--json", "no/a"],
            "no/a: there is no folder no; make it, or give another name",
        ),
        (
            ["evaluate", "--labels", "LABELS", "--scores", "SCORES", "--resamples", "1", "--plot", "no/a.png"],
            "no/a.png: there is no folder no;",
        ),
        (
            ["calibrate", "a.pt", "--labels", "LABELS", "--scores", "SCORES", "--out", "no/a.safetensors"],
            "no/a.safetensors: there is no folder no;",
        ),
        (["evaluate", "--scores", "SCORES"], "Missing option '--labels'"),
        (
            ["calibrate", "a.pt", "--labels", "LABELS", "--scores", "SCORES", "--out", "NEW"],
            "a.pt: not one of aesanet's",
        ),
    ],
)
def test_what_cannot_run_is_one_line_and_status_2(files, tmp_path, capsys, arguments, told):
    places = {"LABELS": files[0], "SCORES": files[1], "NEW": tmp_path / "new.safetensors"}
    with pytest.raises(SystemExit) as done:
        main([str(places.get(argument, argument)) for argument in arguments])
    assert done.value.code == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert "Traceback" not in captured.err
