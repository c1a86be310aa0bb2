"""Tables of runs: the mixture that each was trained on, and what it was measured at.

CSV or Parquet, a row for each run, as allenai/olmix and sail-sg/regmix publish them. Everything that is wrong
with a cell is told with its run and its column.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from opmix_dist.bounded import require_ordinary
from opmix_dist.data.printable import first_words
from opmix_dist.errors import UserError

MAX_TABLE_BYTES = 256 << 20
RUN_COLUMNS = ("run", "run_id", "name", "index")
"""Columns that name runs; the first that a table has is taken, and all are left out of what is fitted."""
SUM_TOLERANCE = 0.01
"""As olmix has it: RegMix's 17 weights, rounded to three decimals, are off by up to 0.004."""
EXACT = 1e-6
"""Sums that are off by less were written with six decimals and are divided out without a word."""
FEWEST_RUNS = 3
"""Two runs to draw a line through, and one to tell whether it holds."""
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none"})
SHOWN = 5


@dataclass(frozen=True)
class Columns:
    """How a pair of tables names its columns. The prefixes and the suffix are cut off; other columns are left
    out where there is one."""

    run: str | None = None
    ratio_prefix: str = ""
    metric_prefix: str = ""
    metric_suffix: str = ""


PRESETS: Mapping[str, Columns] = {
    "olmix": Columns(),
    "regmix": Columns("index", "train_", "metric/", "_val_loss"),
}


@dataclass(frozen=True)
class Table:
    """values [R, N] of R runs in N columns, nan where a cell is empty or not finite.

    names: of the columns, without prefix and suffix; run_column: the one that names the runs.
    notes: what the user should know of how it was read.
    """

    path: Path
    run_column: str
    runs: tuple[str, ...]
    names: tuple[str, ...]
    values: np.ndarray
    notes: tuple[str, ...] = ()

    def column(self, name: str) -> np.ndarray:
        """Values [R] of one column."""
        return self.values[:, self.names.index(name)]

    def with_columns(self, columns: Mapping[str, np.ndarray], notes: Iterable[str] = ()) -> Table:
        """Other columns [R] of the same runs."""
        values = np.column_stack(list(columns.values()))
        return replace(self, names=tuple(columns), values=values, notes=(*self.notes, *notes))

    def take(self, runs: Sequence[str]) -> Table:
        """The rows of these runs, in this order."""
        row = {run: i for i, run in enumerate(self.runs)}
        return replace(self, runs=tuple(runs), values=self.values[[row[run] for run in runs]])


@dataclass(frozen=True)
class Swarm:
    """M runs that have both: ratios [M, X], rows on the simplex, and losses [M, D], above 0.

    notes: what was left out or changed, a line each.
    """

    runs: tuple[str, ...]
    domains: tuple[str, ...]
    metrics: tuple[str, ...]
    ratios: np.ndarray
    losses: np.ndarray
    notes: tuple[str, ...] = ()


def read_table(path: Path, *, run_column: str | None = None, prefix: str = "", suffix: str = "") -> Table:
    """Read a CSV file, or Parquet by its name.

    Args:
        run_column: names the runs; None: the first of ``RUN_COLUMNS`` that is there.
        prefix, suffix: of the columns to read.

    Raises:
        UserError: a file that is missing, too large or damaged, no rows, no column of runs or of numbers, a
            column or run twice, a run without a name, or a cell that is no number.
    """
    arrow = _read_arrow(path)
    header = arrow.column_names
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise UserError(f"{path} has one column, {first_words(header[0], 60)!r}: put commas between cells")
    if not arrow.num_rows:
        raise UserError(f"{path} has column names but no rows: a row for each run is needed")
    run_column = _run_column(path, header, run_column)
    skipped = {*RUN_COLUMNS, run_column}
    data = [name for name in header if name and name not in skipped and not name.startswith("Unnamed")]
    chosen = [name for name in data if _matches(name, prefix, suffix)]
    if not chosen:
        wanted = f" named {prefix}...{suffix}" if prefix or suffix else " of numbers"
        raise UserError(f"{path} has no column{wanted}: it has {_some(header)}")
    repeated = [name for name, count in Counter([run_column, *chosen]).items() if count > 1]
    if repeated or header.count(run_column) > 1:
        raise UserError(f"{path} has two columns named {(repeated or [run_column])[0]}: rename one")
    runs = _run_names(path, arrow[run_column])
    values = np.column_stack([_numbers(path, runs, name, arrow[name]) for name in chosen])
    ignored = [name for name in data if name not in chosen]
    notes = (f"{path}: columns left out: {_some(ignored)}",) if ignored else ()
    names = tuple(name.removeprefix(prefix).removesuffix(suffix) for name in chosen)
    return Table(path, run_column, runs, names, values, notes)


def join(ratios: Table, metrics: Table) -> Swarm:
    """The runs that are in both tables, in the order of the ratios.

    Raises:
        UserError: no run in common, fewer than ``FEWEST_RUNS`` that are whole, weights that are negative or
            do not sum to 1 within 0.01, or a loss that is not above 0.
    """
    notes = [*ratios.notes, *metrics.notes]
    common = [run for run in ratios.runs if run in set(metrics.runs)]
    if not common:
        raise UserError(
            f"no run is in both tables: {ratios.path} names them {_some(ratios.runs)} (column "
            f"`{ratios.run_column}`), {metrics.path} {_some(metrics.runs)} (column `{metrics.run_column}`)"
        )
    for table, other in ((ratios, metrics), (metrics, ratios)):
        alone = [run for run in table.runs if run not in set(other.runs)]
        if alone:
            notes.append(f"runs of {table.path} that are not in {other.path}, left out: {_some(alone)}")
    ratios, metrics = ratios.take(common), metrics.take(common)
    whole = np.isfinite(ratios.values).all(axis=1) & np.isfinite(metrics.values).all(axis=1)
    if not whole.all():
        notes.append(_left_out(ratios, metrics, np.flatnonzero(~whole)))
    runs = [run for run, keep in zip(common, whole, strict=True) if keep]
    if len(runs) < FEWEST_RUNS:
        raise UserError(
            f"{len(runs)} runs are whole in both tables, and at least {FEWEST_RUNS} are needed"
            + (f": {notes[-1]}" if not whole.all() else "")
        )
    ratios, metrics = ratios.take(runs), metrics.take(runs)
    weights, note = _weights(ratios)
    _require_positive(metrics)
    notes += [*note, *_constant(ratios)]
    return Swarm(tuple(runs), ratios.names, metrics.names, weights, metrics.values, tuple(notes))


def _read_arrow(path: Path) -> pa.Table:
    """CSV cells as text, so that what is wrong in one can be shown."""
    try:
        require_ordinary(path, MAX_TABLE_BYTES)
        if path.suffix in (".parquet", ".pq"):
            return parquet.read_table(path)
        with csv.open_csv(path) as reader:
            names = reader.schema.names
        as_text = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
        return csv.read_csv(path, convert_options=as_text)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, pa.ArrowException) as error:  # bytes that are no UTF-8 are a ValueError
        raise UserError(f"{path} cannot be read as a table: {first_words(str(error), 200)}") from None


def _run_column(path: Path, header: Sequence[str], wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in header:
            raise UserError(f"{path} has no column `{wanted}` to name its runs: it has {_some(header)}")
        return wanted
    found = [name for name in RUN_COLUMNS if name in header]
    if not found:
        raise UserError(
            f"{path} has none of the columns {', '.join(RUN_COLUMNS)} to name its runs, but {_some(header)}: "
            "give --run-column"
        )
    return found[0]


def _matches(name: str, prefix: str, suffix: str) -> bool:
    fits = name.startswith(prefix) and name.endswith(suffix)
    return fits and len(name) > len(prefix) + len(suffix)


def _run_names(path: Path, column: pa.ChunkedArray) -> tuple[str, ...]:
    cells = column.to_pylist()
    whole = [int(cell) if isinstance(cell, float) and cell.is_integer() else cell for cell in cells]
    names = tuple("" if cell is None else str(cell).strip() for cell in whole)
    if "" in names:
        raise UserError(f"{path}: row {names.index('') + 1} has no name of its run")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"{path} has more than one row of a run: {_some(repeated)}; keep one of each")
    return names


def _numbers(path: Path, runs: Sequence[str], name: str, column: pa.ChunkedArray) -> np.ndarray:
    """Values [R], nan where a cell is empty or not finite."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        cells = column.to_pylist()
        values = np.array([_number(path, run, name, cell) for run, cell in zip(runs, cells, strict=True)])
    elif pa.types.is_null(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        values = np.array([np.nan if cell is None else float(cell) for cell in column.to_pylist()])
    else:
        raise UserError(f"{path}: column {name} holds {kind}, not numbers")
    return np.where(np.isfinite(values), values, np.nan)


def _number(path: Path, run: str, name: str, cell: str | None) -> float:
    text = (cell or "").strip()
    if text.lower() in MISSING:
        return np.nan
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{path}: run {run}, column {name}: `{first_words(text)}` is no number") from None


def _left_out(ratios: Table, metrics: Table, rows: np.ndarray) -> str:
    parts = []
    for row in rows[:SHOWN]:
        cells = [table.names[i] for table in (ratios, metrics) for i in _gaps(table, row)]
        parts.append(f"{ratios.runs[row]} ({_some(cells)})")
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"runs left out, as cells are empty or not finite: {', '.join(parts)}{more}"


def _gaps(table: Table, row: int) -> np.ndarray:
    return np.flatnonzero(~np.isfinite(table.values[row]))


def _weights(ratios: Table) -> tuple[np.ndarray, list[str]]:
    """Rows divided by their sums [M, X], and a note where that changed something."""
    values = ratios.values
    negative = np.argwhere(values < 0)
    if negative.size:
        row, column = negative[0]
        raise UserError(
            f"{ratios.path}: run {ratios.runs[row]}, column {ratios.names[column]}: the weight is "
            f"{values[row, column]:g}, below 0"
        )
    sums = values.sum(axis=1)
    off = np.abs(sums - 1)
    wrong = np.flatnonzero(off > SUM_TOLERANCE + EXACT)
    if wrong.size:
        others = f", and {len(wrong) - 1} more runs'" if len(wrong) > 1 else ""
        raise UserError(
            f"{ratios.path}: the weights of run {ratios.runs[wrong[0]]} sum to {sums[wrong[0]]:.6g}{others}: "
            "they must sum to 1; is the column of a domain missing?"
        )
    notes = []
    if (rounded := off > EXACT).any():
        notes.append(
            f"{ratios.path}: the weights of {rounded.sum()} runs sum to {sums.min():.4g} at least and "
            f"{sums.max():.4g} at most: each run's were divided by their sum"
        )
    return values / sums[:, None], notes


def _require_positive(metrics: Table) -> None:
    bad = np.argwhere(metrics.values <= 0)
    if bad.size:
        row, column = bad[0]
        raise UserError(
            f"{metrics.path}: run {metrics.runs[row]}, column {metrics.names[column]}: "
            f"{metrics.values[row, column]:g} is not above 0, as a loss is (nats per token, bits per byte); "
            "leave out such a column with filtering.drop_metrics, or take another measure"
        )


def _constant(ratios: Table) -> list[str]:
    """Domains of which the runs say nothing. Of losses that never change, the law's own warning tells."""
    spreads = np.ptp(ratios.values, axis=0)
    same = [name for name, spread in zip(ratios.names, spreads, strict=True) if not spread]
    if not same:
        return []
    return [
        f"{ratios.path}: columns with one value for all runs: {_some(same)}; what a change of such a share "
        "does is not known (bounds.caps keeps it small)"
    ]


def _some(names: Iterable[str]) -> str:
    """The first few, and how many there are besides."""
    all_names = [first_words(name) or "''" for name in names]
    more = f" and {len(all_names) - SHOWN} more" if len(all_names) > SHOWN else ""
    return ", ".join(all_names[:SHOWN]) + more
