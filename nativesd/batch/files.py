"""Files of jobs to rows, one at a time: JSON lines, CSV, Parquet, and plain text with a prompt a line.

What a cell holds is not looked at here; that a row can be read at all is, and errors say at which line it cannot.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nativesd.errors import SourceError, UsageError, install_line, quote
from nativesd.reading import open_regular, parse_json

MAX_LINE = 1 << 20
"""Bytes of a line: a thousand times a long prompt."""
ROWS = 1024
"""Of a Parquet file that are decoded at a time."""


@dataclass(frozen=True)
class Row:
    """A row of a jobs file: the line that it begins at, from 1, and its cells by the names of their columns.

    line   of a Parquet file: the number of the row
    texts  whether all cells are texts, as CSV's are; an empty one is then none at all
    """

    line: int
    cells: Mapping[str, Any]
    texts: bool = False


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a jobs file, by its suffix. Raises SourceError, with the line, for what cannot be read.

    Blank lines are none. A file without a row is refused.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path} is not a jobs file: name one that ends in {', '.join(READERS)}")
    found = False
    for row in reader(path):
        found = True
        yield row
    if not found:
        raise SourceError(f"{path} has no row: a row is a picture")


def at(path: Path, line: int) -> str:
    """A place in a jobs file, for messages."""
    return f"{path}, {'row' if path.suffix.lower() == '.parquet' else 'line'} {line}"


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file in UTF-8, with their ends; a byte order mark is left out."""
    with io.BufferedReader(open_regular(path, "jobs file")) as file:
        number = 0
        while raw := file.readline(MAX_LINE + 1):
            number += 1
            if len(raw) > MAX_LINE:
                raise SourceError(f"{at(path, number)} has more than {MAX_LINE} bytes: pictures go in as files' paths")
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise SourceError(
                    f"{at(path, number)} is not UTF-8, by its byte {error.start + 1}: save the file as UTF-8"
                ) from None


def _prompts(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), 1):
        if prompt := line.strip():
            yield Row(number, {"prompt": prompt})


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield Row(number, parse_json(line.encode(), at(path, number)))


def _table(path: Path) -> Iterator[Row]:
    """The rows below a CSV's header (RFC 4180): cells in quotes may have commas, quotes and line breaks."""
    reader = csv.reader(_lines(path), strict=True)
    begins, header = 1, None
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise SourceError(f"{at(path, begins)} cannot be read as CSV: {error}") from None
        if cells is None:
            return
        if header is None and cells:
            header = _checked_header(cells, at(path, begins))
        elif header is not None and cells:
            if len(cells) != len(header):
                raise SourceError(f"{at(path, begins)} has {len(cells)} cells, and the header {len(header)}")
            yield Row(begins, dict(zip(header, cells, strict=True)), texts=True)
        begins = reader.line_num + 1


def _checked_header(cells: list[str], where: str) -> list[str]:
    (name, count), *_ = Counter(cells).most_common(1)
    if "" in cells:
        raise SourceError(
            f"{where}: column {cells.index('') + 1} has no name: give it one, or write the table without its index"
        )
    if count > 1:
        raise SourceError(f"{where} names the column {quote(name)} twice")
    return cells


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise UsageError(f"{path}: Parquet files need {error.name}: {install_line('batch')}") from None
    open_regular(path, "jobs file").close()
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS):
                for cells in batch.to_pylist():
                    number += 1
                    yield Row(number, {name: plain(cell) for name, cell in cells.items()})
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: of cells, such as dates
        reason = str(error).partition("\n")[0]
        raise SourceError(f"{path} cannot be read as Parquet, after row {number}: {reason}") from error


def plain(cell: Any) -> Any:
    """A cell of a table as JSON has it: numpy's numbers as Python's, and as null what stands for none (pandas' too)."""
    if getattr(cell, "ndim", None) == 0 and hasattr(cell, "item"):
        cell = cell.item()
    if (isinstance(cell, float) and math.isnan(cell)) or type(cell).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(cell, Mapping):
        return {name: plain(each) for name, each in cell.items()}
    if isinstance(cell, list | tuple):
        return [plain(each) for each in cell]
    return cell


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _table,
    ".txt": _prompts,
    ".parquet": _parquet,
}
"""By suffix."""
