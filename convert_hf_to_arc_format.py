#!/usr/bin/env python3
"""One range of a dataset -> one stream file of ARC tasks; also importable."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import dropwhile
from pathlib import Path

from qwen_jax.cli import FlagParser, log_to_terminal, non_negative_int, run_script
from qwen_jax.data.arc import DEFAULT_COLUMN, Row
from qwen_jax.data.convert import Rejected, stream_lines
from qwen_jax.data.sources import DEFAULT_DATASET, iter_source_rows
from qwen_jax.data.streams import stream_files
from qwen_jax.errors import BadDataError, UsageError

log = logging.getLogger(__name__)


def convert_hf_dataset_to_arc_format(
    dataset_name: str,
    column_name: str,
    output_filename: str | Path,
    start_index: int = 0,
    end_index: int | None = None,
    split: str = "train",
    revision: str | None = None,
) -> int:
    """Writes rows start_index to end_index (exclusive; None is the end) of a dataset as ARC tasks.

    dataset_name: a Hugging Face id, a local .jsonl/.json/.parquet file, or a folder (see iter_source_rows).
    column_name: the column that holds the [input, output] pairs; rows that are ARC tasks already pass.
    output_filename: appears whole or not at all. Rows that cannot be used are logged with their index.
    Returns the number of tasks written. Raises UsageError for an empty range, BadDataError if no row in it is
    usable, and what iter_source_rows raises.
    """
    if start_index < 0 or (end_index is not None and end_index <= start_index):
        raise UsageError(
            f"the range {start_index} to {end_index} holds no row; start_index must be below end_index"
        )
    rows = dropwhile(lambda row: row[0] < start_index, iter_source_rows(dataset_name, split, revision))
    if end_index is not None:
        rows = _until(rows, end_index)

    def reject(row: Rejected) -> None:
        log.warning("%s row %d skipped: %s", dataset_name, row.row, row.reason)

    with stream_files([Path(output_filename)]) as (file,):
        for line in stream_lines(rows, column_name, reject):
            file.write(line)
        if file.lines == 0:
            raise BadDataError(
                f"{dataset_name} has no usable row from {start_index} to {end_index or 'its end'}; check "
                "column_name and the range"
            )
    return file.lines


def _until(rows: Iterable[Row], end_index: int) -> Iterator[Row]:
    """Rows before `end_index`; stops without asking for the row at it."""
    for row in rows:
        yield row
        if row[0] + 1 >= end_index:
            return


def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="convert_hf_to_arc_format.py", description=__doc__)
    parser.flag("dataset_name", "Hugging Face id, local file or folder", default=DEFAULT_DATASET)
    parser.flag(
        "column_name", "column that holds the pairs of grids, a text or a dialogue", default=DEFAULT_COLUMN
    )
    parser.flag("output_filename", "stream file to write", required=True)
    parser.flag("start_index", "first row", default=0, type=non_negative_int)
    parser.flag("end_index", "row after the last one; without it all rows", type=non_negative_int)
    parser.flag("split", "split of a Hugging Face dataset", default="train")
    parser.flag("revision", "branch, tag or commit of a Hugging Face dataset")
    args = parser.parse_args(argv)
    log_to_terminal("%(levelname)s %(message)s")
    written = convert_hf_dataset_to_arc_format(**vars(args))
    print(f"{written} tasks written to {args.output_filename}")
    return 0


if __name__ == "__main__":
    run_script(main)
