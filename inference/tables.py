"""A table that is written batch by batch, continues where it was stopped, and ends as a CSV or parquet file.

Until it is complete, the rows are in FILE.part, an Arrow stream, which also says what they were computed from.
"""

import csv
import json
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from ..files import UserError, errors_that_name

try:
    import fcntl
except ImportError:  # on Windows, where files are not locked
    fcntl = None

SUFFIXES = (".csv", ".parquet")


def check_output(output: Path):
    """Raises UserError if a table cannot be written there."""
    if output.suffix.lower() not in SUFFIXES:
        raise UserError(f"--output: expected a file name that ends in {' or '.join(SUFFIXES)}, got {output}")
    if not output.parent.is_dir():
        raise UserError(f"--output: there is no folder {output.parent}")
    if output.exists():
        raise UserError(f"--output: {output} exists already; delete it or choose another name")


class Table:
    """The rows of a table on the disk.

    Args:
        output: the file that the complete table gets.
        schema: its columns.
        origin: what the rows are computed from; a table that was begun with another origin does not continue.

    Raises:
        UserError: the origin is another one, or another process writes this table.
    """

    def __init__(self, output: Path, schema: pa.Schema, origin: dict[str, str]):
        self.output, self.part = output, output.with_name(f"{output.name}.part")
        self.schema = schema.with_metadata({"origin": json.dumps(origin)})
        with errors_that_name(self.part):
            self.part.touch()
            self.file: BinaryIO = open(self.part, "r+b")  # noqa: SIM115 until the table is complete
            self.lock()
            size, self.num_rows = self.complete_batches(origin)
            self.file.truncate(size)
            self.file.seek(size)
            if not size:
                self.write(self.schema)

    def lock(self):
        """Raises UserError if another process writes this table."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing {self.output}") from error
        except OSError:
            return  # a file system without locks

    def complete_batches(self, origin: dict[str, str]) -> tuple[int, int]:
        """Bytes and rows of the batches that were written completely before."""
        size = num_rows = 0
        try:
            with pa.memory_map(str(self.part)) as source, pa.ipc.open_stream(source) as stream:
                begun = json.loads((stream.schema.metadata or {}).get(b"origin", b"{}"))
                if changed := [name for name in origin if begun.get(name) != origin[name]]:
                    raise UserError(
                        f"{self.part} was begun with another {' and another '.join(changed)}: delete it, or choose "
                        "another --output"
                    )
                size = source.tell()
                for batch in stream:
                    size, num_rows = source.tell(), num_rows + len(batch)
        except (pa.ArrowInvalid, OSError):  # a stop or a full disk cut the last batch off
            pass
        return size, num_rows

    def write(self, message: pa.Schema | pa.RecordBatch):
        with errors_that_name(self.part):
            self.file.write(message.serialize())
            self.file.flush()

    def append(self, rows: list[dict]):
        """Adds a batch; missing values are empty."""
        self.write(pa.RecordBatch.from_pylist(rows, self.schema))

    def finish(self, sort_by: str | None = None) -> pa.Table:
        """Writes the complete table, sorted by a column, if one is named, with empty values last."""
        self.file.close()
        with pa.memory_map(str(self.part)) as source:
            table = pa.ipc.open_stream(source).read_all().replace_schema_metadata(None)
            if sort_by is not None:
                order = pa.compute.sort_indices(table, [(sort_by, "ascending")])  # stable, nulls last
                table = table.take(order)
            unfinished = self.output.with_name(f".{self.output.name}")
            try:
                with errors_that_name(self.output):
                    (write_csv if self.output.suffix.lower() == ".csv" else pq.write_table)(table, unfinished)
                unfinished.replace(self.output)
            finally:
                unfinished.unlink(missing_ok=True)
        self.part.unlink()
        return table


def write_csv(table: pa.Table, path: Path):
    """With quotes only where a value needs them."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.column_names)
        for batch in table.to_batches(1000):
            writer.writerows(zip(*(column.to_pylist() for column in batch.columns)))
