"""The corpus as two CSVs: `references.csv`, and `labels.csv` with a row a clip."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from aesanet.training.demo.label import Label, Measured
from aesanet.training.demo.plan import DemoClip
from aesanet.training.demo.render import Reference

REFERENCES_FILE: Final = Path(__file__).parent / "references.csv"
LABELS_FILE: Final = Path(__file__).parent / "labels.csv"

Record = TypeVar("Record", Reference, DemoClip, Measured, Label)


def write_table(path: Path, rows: Iterable[Sequence[msgspec.Struct]]) -> None:
    """A row for each group of structs, their fields side by side; tuples as JSON, None as an empty cell."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        for number, structs in enumerate(rows):
            fields = {name: getattr(one, name) for one in structs for name in one.__struct_fields__}
            if not number:
                writer.writerow(fields)
            writer.writerow(_cell(value) for value in fields.values())


def read_table(path: Path, kind: type[Record]) -> list[Record]:
    """One kind of struct from every row; an empty cell is its field's default."""
    records = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            cells = {
                name: msgspec.json.decode(text) if text.startswith("[") else text for name, text in row.items() if text
            }
            records.append(msgspec.convert(cells, kind, strict=False))
    return records


def _cell(value: object) -> object:
    return msgspec.json.encode(value).decode() if isinstance(value, tuple) else value
