import csv
import sys

import pytest
from conftest import DEMO_CHECKPOINT

from aesanet.benchmarks import backends
from aesanet.runtime.backends import supported_backends


@pytest.mark.slow
def test_every_engine_has_a_row_with_its_scores_beside_pytorchs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "backends.csv"
    arguments = ["--checkpoint", DEMO_CHECKPOINT, "--batches", 2, "--passes", 1, "--rounds", 1, "--threads", 1]
    monkeypatch.setattr(sys, "argv", ["backends", "--out", str(out), *map(str, arguments)])
    backends.main()
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    engines = sum(len(support.runs) for support in supported_backends().values())
    assert len({row["engine"] for row in rows}) == len(rows) >= engines + 2
    assert list(rows[0]) == backends.COLUMNS
    for row in rows:
        assert row["weights"] == "demo"
        assert float(row["milliseconds_median"]) > 0
        assert float(row["scores_max_abs_difference"]) < (1e-4 if "fp32" in row["engine"] else 0.2)
    assert "pytorch eager cpu fp32" in capsys.readouterr().out
