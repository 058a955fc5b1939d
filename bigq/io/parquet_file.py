"""Reading the records of a parquet file, through pyarrow where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bigq.errors import CalibrationError, ResourceError
from bigq.io.json_file import show_name
from bigq.io.text_files import FREE_EXPANSION, MOST_EXPANSION

#: Rows that are converted at once.
ROWS_AT_ONCE = 64


def require_pyarrow(name: str) -> None:
    """Raise ResourceError if pyarrow is missing. name: of the text, for the message."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ResourceError(f"{name}: reading parquet needs the package pyarrow: pip install pyarrow; or give the text as JSONL")


def parquet_records(path: Path, wanted: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Every row of a parquet file as a mapping, after its place for messages.

    wanted: the columns to read, as far as there are any; without any of them, all columns.
    Raises CalibrationError for a file that cannot be read, ResourceError without pyarrow.
    """
    require_pyarrow(str(path))
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _columns(path, file, wanted)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        said = show_name(" ".join(str(error).split())[:150])
        raise CalibrationError(f"{path}: cannot be read as parquet ({said}); fetch it again") from error


def _columns(path: Path, file: Any, wanted: Sequence[str]) -> list[str] | None:
    """The columns to read; None for all. Raises CalibrationError if they expand to far more than the file's size."""
    names = list(file.schema_arrow.names)
    columns = [name for name in wanted if name in names] or names
    size = 0
    for group in range(file.metadata.num_row_groups):
        for place in range(file.metadata.num_columns):
            column = file.metadata.row_group(group).column(place)
            if column.path_in_schema.partition(".")[0] in columns:
                size += column.total_uncompressed_size
    if size > FREE_EXPANSION + MOST_EXPANSION * path.stat().st_size:
        raise CalibrationError(f"{path}: expands to more than {MOST_EXPANSION} times its size, which text does not; give JSONL")
    return columns
