"""HTML pages that need nothing else: their shell, and text that stays text."""

import html
from collections.abc import Iterable, Sequence

from aesanet.words import printable

_AXIS_COLOURS = {  # in light and in dark
    "CE": ("#0b6fa4", "#4fb3e8"),
    "CU": ("#c65102", "#f5924e"),
    "PC": ("#2f7d32", "#6cc070"),
    "PQ": ("#7b3fa0", "#c193e0"),
}
AXIS_COLOURS = {axis: light for axis, (light, _) in _AXIS_COLOURS.items()}
"""For pictures on white; in a page, the CSS variables --CE to --PQ, which also know the dark."""


def _variables(dark: int) -> str:
    return ";".join(f"--{axis}:{colours[dark]}" for axis, colours in _AXIS_COLOURS.items())


_STYLE = f"""
:root {{ color-scheme: light dark; --text: #222; --faint: #6a6a6a; --line: #ddd; --back: #fff; --card: #f6f6f7;
  --good: #17692c; --bad: #b3261e; {_variables(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #e4e4e4; --faint: #9a9a9a; --line: #3a3a3c; --back: #161618;
  --card: #212124; --good: #7ccf90; --bad: #ff8a80; {_variables(1)} }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: var(--text);
  background: var(--back) }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid var(--line) }}
td:first-child, th:first-child {{ text-align: left }} .passed {{ color: var(--good) }} .failed {{ color: var(--bad) }}
svg {{ max-width: 100%; height: auto }}
"""

# Nothing is loaded and nothing runs, even if a file name could become a tag.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"


def page(title: str, body: str, style: str = "") -> str:
    """A whole page: `title` is text, `body` HTML and `style` CSS that is added to the common one."""
    head = (
        f'<meta charset=utf-8><meta http-equiv=Content-Security-Policy content="{_POLICY}">'
        f'<meta name=viewport content="width=device-width"><title>{text(title)}</title><style>{_STYLE}{style}</style>'
    )
    return f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML."""
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def text(value: str) -> str:
    """Text as HTML: nothing in it is markup, and what cannot be printed, or is not UTF-8, is shown as an escape."""
    return html.escape(printable(value))
