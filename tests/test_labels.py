import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from aesanet.axes import AXES
from aesanet.errors import InputError
from aesanet.training.labels import read_labels

LABELS = Path(os.environ.get("AESANET_LABELS", ROOT.parent / "shared" / "data" / "audiobox-aesthetics"))
needs_whole_files = pytest.mark.skipif(
    not LABELS.is_dir(), reason="AESANET_LABELS names no folder with the public label files of audiobox-aesthetics"
)

# Lines of the public files of facebookresearch/audiobox-aesthetics (CC-BY 4.0).
TRACK2_CSV = """\
sample_id,data_path,Production_Quality,Production_Complexity,Content_Enjoyment,Content_Usefulness\r
audiomos2025-track2-audio-unbalanced_train_segments_audio_-6FLs0P1KaQ_30000_40000,\
/your_path/unbalanced_train_segments/audio/-6FLs0P1KaQ_30000_40000.flac,5.0,3.3,2.9,4.2\r
audiomos2025-track2-audio-unbalanced_train_segments_audio_-9VPvTfV1_4_50000_60000,\
/your_path/unbalanced_train_segments/audio/-9VPvTfV1_4_50000_60000.flac,6.5,4.1,5.1,5.0\r
"""
TRACK2_RATINGS = """\
{"data_path":"audiomos2025-track2-sys0v1wm-utt0dJodp",\
"Production_Quality":[3.0,4.0,7.0,7.0,6.0,4.0,4.0,5.0,4.0,4.0],\
"Production_Complexity":[7.0,6.0,4.0,6.0,2.0,9.0,3.0,2.0,8.0,4.0],\
"Content_Enjoyment":[2.0,1.0,3.0,5.0,1.0,4.0,4.0,3.0,4.0,4.0],\
"Content_Usefulness":[3.0,3.0,5.0,6.0,2.0,3.0,8.0,2.0,3.0,7.0]}"""
PAM = """\
{"data_path": "/your_path/PAM/human_eval/audio/audiogen_m/generated_audio_index_1.wav", \
"Production_Quality": [8.0, 7.0, 3.0, 6.0, 7.0, 5.0, 3.0, 4.0, 5.0, 7.0], \
"Production_Complexity": [2.0, 6.0, 2.0, 5.0, 3.0, 2.0, 3.0, 4.0, 3.0, 3.0], \
"Content_Enjoyment": [1.0, 4.0, 4.0, 5.0, 4.0, 0.0, 2.0, 2.0, 0.0, 5.0], \
"Content_Usefulness": [8.0, 7.0, 3.0, 6.0, 7.0, 4.0, 2.0, 3.0, 5.0, 7.0]}
"""
NATURAL = """\
{"data_path": "/your_path/MUSDB18/test/AM Contra - Heart Peripheral/bass.wav", \
"Production_Quality": [8.0, 8.0, 9.0, 8.0, 6.0, 10.0, 8.0, 5.0, 8.0, 6.0], \
"Production_Complexity": [7.0, 1.0, 1.0, 3.0, 3.0, 3.0, 7.0, 2.0, 1.0, 2.0], \
"Content_Enjoyment": [7.0, 7.0, 5.0, 6.0, 5.0, 8.0, 9.0, 5.0, 7.0, 4.0], \
"Content_Usefulness": [7.0, 6.0, 6.0, 8.0, 4.0, 10.0, 9.0, 5.0, 7.0, 7.0]}
"""


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_track_2_list_is_read_by_the_names_of_its_columns(write):
    first, second = read_labels([write("list.csv", TRACK2_CSV)])
    assert first.id == "audiomos2025-track2-audio-unbalanced_train_segments_audio_-6FLs0P1KaQ_30000_40000"
    assert first.path == "unbalanced_train_segments/audio/-6FLs0P1KaQ_30000_40000.flac"
    assert first.system is None
    assert first.ratings is None
    assert first.scores == (2.9, 4.2, 3.3, 5.0)
    assert second.scores == (5.1, 5.0, 4.1, 6.5)


def test_ratings_keep_their_raters_and_give_their_mean(write):
    (clip,) = read_labels([write("a.jsonl", TRACK2_RATINGS)])
    assert clip.id == "audiomos2025-track2-sys0v1wm-utt0dJodp"
    assert clip.path is None
    assert clip.system == "sys0v1wm"
    assert clip.scores == pytest.approx((3.1, 4.2, 5.1, 4.8))
    assert clip.ratings.shape == (4, 10)
    assert clip.ratings.dtype == np.float64
    assert clip.ratings[AXES.index("PQ")].tolist() == [3, 4, 7, 7, 6, 4, 4, 5, 4, 4]


def test_paths_of_the_other_public_files(write):
    pam, natural = read_labels([write("pam.jsonl", PAM), write("natural.jsonl", NATURAL)])
    assert pam.id == "/your_path/PAM/human_eval/audio/audiogen_m/generated_audio_index_1.wav"
    assert pam.path == "PAM/human_eval/audio/audiogen_m/generated_audio_index_1.wav"
    assert pam.system == "audiogen_m"
    assert natural.path == "MUSDB18/test/AM Contra - Heart Peripheral/bass.wav"
    assert natural.system is None


@needs_whole_files
@pytest.mark.parametrize(
    ("name", "rows", "means", "deviations"),
    [
        ("audiomos2025-track2-train_list.csv", 2700, (5.184, 5.853, 3.351, 6.280), (1.642, 1.417, 1.826, 1.300)),
        (
            "audiomos2025_track2_human_annotations.jsonl",
            3060,
            (4.302, 5.265, 3.099, 6.023),
            (1.776, 1.862, 1.539, 1.464),
        ),
    ],
)
def test_means_and_deviations_are_the_documented_ones(name, rows, means, deviations):
    clips = read_labels([LABELS / name])
    scores = np.array([clip.scores for clip in clips])
    assert scores.shape == (rows, 4)
    assert scores.mean(axis=0).round(3) == pytest.approx(means)
    assert scores.std(axis=0).round(3) == pytest.approx(deviations)


@needs_whole_files
def test_all_seven_public_files_are_read_together():
    names = [*LABELS.glob("*.csv"), *LABELS.glob("*.jsonl")]
    clips = read_labels(sorted(names))
    assert len(clips) == 3060 + 950 + 3 * 1000  # AudioMOS' 2,950 for training and validation are among the others
    assert all(clip.ratings is not None for clip in clips)
    assert sum("track2" in clip.id for clip in read_labels(sorted(names, reverse=True))) == 2950 + 3060
    track2 = [clip for clip in clips if clip.path is None]
    assert len(track2) == 3060
    systems = [clip.system for clip in track2]
    assert {systems.count(system) for system in systems} == {85}
    assert {clip.system for clip in clips if clip.path and clip.path.startswith("PAM/")} == set(
        "audiogen_m audiolm_l audiolm_l2 e2edef real audioldm2 musicgen_large musicgen_melody musicldm".split()
    )


def test_ones_own_table_by_code_or_name_with_gaps(write):
    text = "PQ,note,Content Enjoyment,system,path\n7,x,,A,a.wav\n,x,2.5,,d/b.wav\n10,x,0,B,/abs/c.wav\n"
    for path in (write("own.csv", "\ufeff" + text), write("own.TSV", text.replace(",", "\t"))):
        a, b, c = read_labels([path])
        assert (a.id, a.path, a.system, a.ratings) == ("a.wav", "a.wav", "A", None)
        assert (b.id, b.path, b.system) == ("d/b.wav", "d/b.wav", None)
        assert (c.path, c.system) == ("/abs/c.wav", "B")
        np.testing.assert_array_equal(a.scores, (math.nan, math.nan, math.nan, 7))
        np.testing.assert_array_equal(b.scores, (2.5, math.nan, math.nan, math.nan))
        np.testing.assert_array_equal(c.scores, (0, math.nan, math.nan, 10))


def test_ones_own_json_lines(write):
    rows = [
        {"path": "a.wav", "CE": 1, "PQ": None, "more": {"x": [1]}},
        {"data_path": "b.wav", "sample_id": "b", "Production Quality": [1, 2, 6]},
    ]
    a, b = read_labels([write("own.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")])
    np.testing.assert_array_equal(a.scores, (1, math.nan, math.nan, math.nan))
    assert a.ratings is None
    assert (b.id, b.path) == ("b", "b.wav")
    assert b.scores[3] == 3
    np.testing.assert_array_equal(b.ratings, [*[[math.nan] * 3] * 3, [1, 2, 6]])


@given(st.permutations(["path", "system", *AXES]))
def test_the_order_of_columns_means_nothing(tmp_path_factory, order):
    values = {"path": "a.wav", "system": "s", "CE": "1", "CU": "2", "PC": "3", "PQ": "4"}
    path = tmp_path_factory.getbasetemp() / "order.csv"
    path.write_text(",".join(order) + "\n" + ",".join(values[name] for name in order) + "\n")
    (clip,) = read_labels([path])
    assert (clip.id, clip.system, clip.scores) == ("a.wav", "s", (1, 2, 3, 4))


def test_a_clip_may_stand_twice_if_it_says_the_same(write):
    first, again = write("one.jsonl", PAM), write("two.jsonl", NATURAL + PAM)
    assert len(read_labels([first, again])) == 2
    gap = write("gap.csv", "path,PQ,CE\na.wav,1,\n")
    assert len(read_labels([gap, gap])) == 1
    for other in (PAM.replace("8.0", "9.0"), PAM.replace("[1.0, 4.0, 4.0, 5.0, 4.0, 0.0, 2.0, 2.0, 0.0, 5.0]", "null")):
        with pytest.raises(InputError, match=r"two.jsonl: line 1: .*index_1.wav stands at .*one.jsonl: line 1 too"):
            read_labels([first, write("two.jsonl", other)])


def test_a_clip_with_an_id_is_the_clip_with_its_path(write):
    """As a clip of AudioMOS stands in the files of audiobox-aesthetics too."""
    ratings = '{"path": "/your_path/d/a.wav", "PQ": [1, 2, 4], "CE": [3, 3, 3]}\n'
    for rounded in ("2.333", "2.3333333333"):
        means = f"sample_id,data_path,PQ,CE,system\nthe-id,/your_path/d/a.wav,{rounded},3,s\nother,b.wav,1,1,s\n"
        names = write("ratings.jsonl", ratings), write("means.csv", means)
        for order in (names, names[::-1]):
            clips = {clip.path: clip for clip in read_labels(order)}
            assert clips.keys() == {"d/a.wav", "b.wav"}
            both = clips["d/a.wav"]
            assert both.id == ("/your_path/d/a.wav" if order == names else "the-id")
            assert both.system == "s"
            assert both.scores[3] == pytest.approx(7 / 3)
            np.testing.assert_array_equal(both.ratings[[0, 3]], [[3, 3, 3], [1, 2, 4]])
    for wrong in ("the-id,/your_path/d/a.wav,2.4,3,s", "the-id,/your_path/d/a.wav,2.333,,s"):
        with pytest.raises(InputError, match=r"means.csv: line 2: the-id stands at .*ratings.jsonl: line 1 too"):
            read_labels([names[0], write("means.csv", f"sample_id,data_path,PQ,CE,system\n{wrong}\n")])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.txt", "path,PQ\na.wav,1\n", "a.txt: its suffix is '.txt'; a label file is .csv, .tsv, .jsonl"),
        ("a.csv", "file,PQ\na.wav,1\n", "a.csv: line 2: has ['file', 'PQ']; it must have a sample_id, a path or"),
        ("a.csv", "path,PQ\n,1\n", "line 2: has ['path', 'PQ']; it must have"),
        ("a.csv", "path,note\na.wav,1\n", "line 2: a.wav has no value on any axis"),
        ("a.csv", "path,PQ\na.wav,\n", "line 2: a.wav has no value on any axis"),
        ("a.csv", "path,PQ\na.wav,good\n", "line 2: PQ is 'good'; it must be a number from 0 to 10"),
        ("a.csv", "path,PQ\na.wav,1\nb.wav,10.1\n", "line 3: PQ is 10.1; it must be a number from 0 to 10"),
        ("a.csv", "path,PQ\na.wav,nan\n", "line 2: PQ is nan; it must be"),
        ("a.csv", "path,PQ\na.wav,-0.1\n", "line 2: PQ is -0.1; it must be"),
        ("a.csv", "path,PQ,PQ\na.wav,1,2\n", "line 1: its columns are"),
        ("a.csv", "path,PQ,Production_Quality\na.wav,1,2\n", "columns 'PQ' and 'Production_Quality' both mean PQ"),
        ("a.csv", "path,data_path,PQ\na.wav,b.wav,2\n", "columns 'path' and 'data_path' both mean path"),
        ("a.csv", "path,PQ\na.wav\n", "line 2: 1 fields; the header has 2"),
        ("a.csv", 'path,PQ\n"a.wav,1\n', "line 2: unexpected end of data"),
        ("a.csv", "path,PQ\n", "a.csv: has no rows"),
        ("a.jsonl", "", "a.jsonl: has no rows"),
        ("a.csv", b"path,PQ\n\xff.wav,1\n", "line 2: not UTF-8"),
        ("a.jsonl", '{"path": "a.wav"', "line 1: not a JSON object"),
        ("a.jsonl", "\n[1]\n", "line 2: a JSON list; it must be an object"),
        ("a.jsonl", '{"path": "a.wav", "PQ": 1, "PQ": 2}', "a key stands twice"),
        ("a.jsonl", '{"path": "a.wav", "PQ": "1"}', "line 1: PQ is '1'; it must be"),
        ("a.jsonl", '{"path": "a.wav", "PQ": true}', "line 1: PQ is True"),
        ("a.jsonl", '{"path": "a.wav", "PQ": NaN}', "line 1: PQ is nan"),
        ("a.jsonl", '{"path": "a.wav", "PQ": []}', "PQ is an empty list"),
        ("a.jsonl", '{"path": "a.wav", "PQ": [1, [2]]}', "line 1: PQ is [1, [2]]"),
        ("a.jsonl", '{"path": 7, "PQ": 1}', "line 1: path is 7; it must be text"),
        (
            "a.jsonl",
            '{"path": "a.wav", "PQ": [1, 2], "Content_Enjoyment": [1]}',
            "numbers of ratings differ: PQ 2, Content_Enjoyment 1; all axes of a clip must have as many",
        ),
        ("a.jsonl", '{"path": "a.wav", "PQ": [1], "CE": 1}', "differ: PQ 1, CE one number"),
    ],
)
def test_a_faulty_file_is_refused_with_its_place(write, name, text, told):
    with pytest.raises(InputError) as error:
        read_labels([write(name, text)])
    assert told in str(error.value)
    assert str(error.value).startswith(str(write(name, text)))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv: No such file"):
        read_labels([tmp_path / "none.csv"])
