"""`aesanet bench compare` and `report`: what files of measurements say, of each other and in documents."""

import csv
import re

import pytest

from aesanet.benchmarks.latency import LATENCY_COLUMNS, compare
from aesanet.benchmarks.throughput import THROUGHPUT_COLUMNS
from aesanet.cli.main import main
from aesanet.errors import InputError


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


def write_csv(path, *rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def latency_csv(path, **changed):
    """One row for each engine, of a p50 of 10 ms between 9 and 11."""
    row = dict.fromkeys(LATENCY_COLUMNS, "x") | {
        "engine": "a", "threads": "", "weights": "demo", "batch": "1", "clip_seconds": "10.0",
        "milliseconds_p50": "10", "p50_low": "9", "p50_high": "11",
    }  # fmt: skip
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, LATENCY_COLUMNS)
        writer.writeheader()
        writer.writerow(row | changed)
    return path


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ({"milliseconds_p50": "20", "p50_low": "18", "p50_high": "22"}, "2.000 (1.636 to 2.444), slower"),
        ({"milliseconds_p50": "5", "p50_low": "4.5", "p50_high": "5.5"}, "0.500 (0.409 to 0.611), faster"),
        ({"milliseconds_p50": "11", "p50_low": "10", "p50_high": "12"}, "1.100 (0.909 to 1.333), no difference shown"),
    ],
)
def test_files_are_compared_cell_by_cell(tmp_path, capsys, after, told):
    before = latency_csv(tmp_path / "before.csv")
    assert run("bench", "compare", before, latency_csv(tmp_path / "after.csv", **after)) == 0
    assert capsys.readouterr().out == f"a, demo, 1 x 10 s: {told}\n"


def test_a_file_that_tells_no_threads_is_of_the_engines_own(tmp_path, capsys):
    """As aesanet wrote it before."""
    before = latency_csv(tmp_path / "before.csv")
    header, row = csv.reader(before.read_text().splitlines())
    place = header.index("threads")
    before.write_text("\n".join(",".join(cells[:place] + cells[place + 1 :]) for cells in (header, row)) + "\n")
    assert run("bench", "compare", before, latency_csv(tmp_path / "after.csv")) == 0
    assert capsys.readouterr().out.startswith("a, demo, 1 x 10 s: 1.000 ")
    assert run("bench", "compare", before, latency_csv(tmp_path / "two.csv", threads="2")) == 2


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ({"engine": "b"}, "have no engine, weights, threads, batch and clip length in common"),
        ({"threads": "2"}, "have no engine, weights, threads, batch and clip length in common"),
        ({"p50_low": ""}, "p50_low is ''; it must be a time in milliseconds"),
        ({"p50_low": "-1"}, "p50_low is '-1'; it must be a time in milliseconds"),
    ],
)
def test_files_that_say_nothing_of_each_other(tmp_path, after, told):
    before = latency_csv(tmp_path / "before.csv")
    with pytest.raises(InputError, match=told):
        compare(before, latency_csv(tmp_path / "after.csv", **after))


def test_other_files_are_refused(tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"other\.csv: has no column batch, .*`aesanet bench latency` writes them"):
        compare(other, other)
    with pytest.raises(InputError, match="No such file"):
        compare(tmp_path / "none.csv", other)
    other.write_text("a,b\n1,2\n3")
    assert run("bench", "report", other) == 2
    assert "other.csv: row 2 has not as many cells as there are columns" in capsys.readouterr().err


def test_a_peak_that_nobody_knows_is_left_out(tmp_path, capsys):
    row = dict.fromkeys(THROUGHPUT_COLUMNS, "1") | {"engine": "beads cuda", "weights": "untrained"}
    unknown = {"peak_tflops": "", "peak_source": "", "mfu": ""}
    write_csv(tmp_path / "throughput.csv", row | unknown, row | {"mfu": "0.25"})
    assert run("bench", "report", tmp_path / "throughput.csv") == 0
    reported = capsys.readouterr().out.splitlines()
    assert reported[0].endswith("| useful TFLOP/s | peak | share of peak |")
    assert [line.split("|")[-2].strip() for line in reported[2:4]] == ["", "25.0%"]


def test_a_file_that_a_spreadsheet_has_saved_is_read_too(tmp_path, capsys):
    path = tmp_path / "cold.csv"
    write_csv(path, COLD)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert run("bench", "report", path) == 0
    assert "An Abacus, 3 cores; untrained weights; 2026-01-02." in capsys.readouterr().out


def test_a_cell_that_is_no_number_is_told(tmp_path, capsys):
    assert run("bench", "report", latency_csv(tmp_path / "latency.csv", milliseconds_p50="2 ms")) == 2
    assert "latency.csv: a cell is not as `aesanet bench` writes it: could not convert" in capsys.readouterr().err
    assert run("bench", "report", "--plot", latency_csv(tmp_path / "latency.csv", clip_seconds="6 s")) == 2
    assert "'6 s'" in capsys.readouterr().err


COLD = {
    "date": "2026-01-02T03:04Z",
    "processor": "An Abacus",
    "cores": "3",
    "gpu": "",
    "weights": "untrained",
    "engine": "beads 1.0",
    "import_milliseconds": "12.34",
    "open_milliseconds": "1234.5",
    "first_score_milliseconds": "0.567",
}


def test_a_report_is_of_the_files_and_says_where_they_were_measured(tmp_path, capsys):
    on_gpu = {"engine": "slide rule cuda", "gpu": "A Loom"}
    write_csv(tmp_path / "cold.csv", COLD | {"gpu": "A Loom"}, COLD | on_gpu)
    assert run("bench", "report", tmp_path / "cold.csv") == 0
    assert capsys.readouterr().out.splitlines() == [
        "| engine | import, ms | open, ms | first score, ms |",
        "| --- | --- | --- | --- |",
        "| beads 1.0 | 12.3 | 1,234 | 0.57 |",
        "| slide rule cuda | 12.3 | 1,234 | 0.57 |",
        "",
        "An Abacus, 3 cores; A Loom, 3 cores; untrained weights; 2026-01-02.",
        "",
    ]


def test_a_documents_tables_are_written_anew_and_nothing_else_is(tmp_path):
    (tmp_path / "results").mkdir()
    write_csv(tmp_path / "results" / "cold.csv", COLD)
    document = tmp_path / "document.md"
    block = "<!-- table of results/cold.csv -->\nold | table\n<!-- end of table -->"
    document.write_text(f"Before.\n{block}\nBetween.\n{block}\nAfter.\n")
    assert run("bench", "report", "--update", document) == 0
    text = document.read_text()
    assert text.count("| beads 1.0 | 12.3 | 1,234 | 0.57 |") == 2
    assert "old |" not in text
    assert re.fullmatch(r"Before\.\n<!-.*->\nBetween\.\n<!-.*->\nAfter\.\n", text, re.DOTALL)
    assert "[CSV](results/cold.csv)" in text
    assert run("bench", "report", "--update", document) == 0
    assert document.read_text() == text


def test_speeds_are_drawn_each_as_long_as_it_is_fast(tmp_path):
    rows = [
        {**COLD, "engine": engine, "batch": batch, "clip_seconds": "10.0", "milliseconds_median": "1", "x_pytorch": "1"}
        | {"x_real_time": speed}
        for engine, batch, speed in (("beads", "1", "40"), ("beads", "4", "80"), ("rule", "4", "20"))
    ]
    rows += [rows[-1] | {"batch": "1", "x_real_time": "60"}]
    write_csv(tmp_path / "speeds.csv", *rows)
    assert run("bench", "report", "--plot", tmp_path / "speeds.csv") == 0
    drawing = (tmp_path / "speeds.svg").read_text()
    bars = re.findall(
        r'<path d="M ([\d.]+) ([\d.]+) \nL ([\d.]+) .{0,80}?z\n"[^>]*style="fill: #(0b6fa4|c65102)"', drawing, re.DOTALL
    )
    assert len({top for _, top, _, _ in bars}) == len(bars) == 4 + 2  # side by side, with the legend
    lengths = {
        colour: sorted(float(end) - float(start) for start, _, end, of in bars if of == colour)
        for _, _, _, colour in bars
    }
    one, four = lengths["0b6fa4"][-2:], lengths["c65102"][-2:]
    assert one[1] / one[0] == pytest.approx(1.5, rel=0.01)
    assert four[1] / four[0] == pytest.approx(4, rel=0.01)
    again = tmp_path / "again.csv"
    again.write_bytes((tmp_path / "speeds.csv").read_bytes())
    assert run("bench", "report", "--plot", again) == 0
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "speeds.svg").read_bytes()


def test_files_of_one_length_are_not_those_of_another(tmp_path, capsys):
    """Though their batches are the same."""
    row = {name: COLD[name] for name in ("date", "processor", "cores", "gpu", "weights")}
    row |= {"contestant": "beads", "precision": "fp32", "part": "files", "batch": "4", "seconds_median": "2"}
    row |= {"x_real_time": "5", "x_pytorch": "1", "x_audiobox": "", "clips": "8"}
    encoder = row | {"part": "encoder", "audio_seconds": "80.0"}
    write_csv(tmp_path / "peers.csv", row | {"audio_seconds": "80.0"}, row | {"audio_seconds": "63.2"}, encoder)
    assert run("bench", "report", "--plot", tmp_path / "peers.csv") == 0
    lines = capsys.readouterr().out.splitlines()[2:5]
    assert [line.split(" | ")[1:4] for line in lines] == [
        ["files of 10 s", "4", "2.00 for 80.0"],
        ["files of 7.9 s", "4", "2.00 for 63.2"],
        ["encoder", "4", "2.00 for 80.0"],
    ]
    drawing = (tmp_path / "peers.svg").read_text()
    for shape in ("files of 10 s, batch 4", "files of 7.9 s, batch 4", "encoder, batch 4"):
        assert f"<!-- {shape} -->" in drawing


def test_what_is_no_file_of_bench(tmp_path, capsys):
    write_csv(tmp_path / "x.csv", {"a": 1})
    assert run("bench", "report", tmp_path / "x.csv") == 2
    assert "its columns are a; that is no file of `aesanet bench`" in capsys.readouterr().err
    (tmp_path / "d.md").write_text("<!-- table of none.csv -->\n<!-- end of table -->")
    assert run("bench", "report", "--update", tmp_path / "d.md") == 2
    assert "none.csv: No such file" in capsys.readouterr().err
    assert run("bench", "report") == 2
