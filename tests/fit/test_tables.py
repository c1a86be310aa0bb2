"""Tables are read as they are, and whatever is wrong in one is told with its run and its column."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from opmix_dist.errors import UserError
from opmix_dist.fit.tables import PRESETS, Swarm, Table, join, read_table
from tests.fit.swarms import write_csv

RATIOS = [["r1", 0.5, 0.5], ["r2", 0.25, 0.75], ["r3", 1, 0], ["r4", 0.1, 0.9]]
METRICS = [["r1", 2.0, 3.0], ["r2", 2.5, 2.0], ["r3", 1.5, 4.0], ["r4", 3.0, 1.5]]


def tables(folder: Path, ratios: Any = RATIOS, metrics: Any = METRICS) -> tuple[Table, Table]:
    return (
        read_table(write_csv(folder / "ratios.csv", ["run", "web", "code"], ratios)),
        read_table(write_csv(folder / "metrics.csv", ["run", "a", "b"], metrics)),
    )


def joined(folder: Path, ratios: Any = RATIOS, metrics: Any = METRICS) -> Swarm:
    return join(*tables(folder, ratios, metrics))


def changed(rows: list[list[Any]], row: int, column: int, value: Any) -> list[list[Any]]:
    return [
        [value if (i, j) == (row, column) else cell for j, cell in enumerate(r)] for i, r in enumerate(rows)
    ]


def test_rows_are_matched_by_run_in_the_order_of_the_ratios(tmp_path: Path) -> None:
    swarm = joined(tmp_path, metrics=METRICS[::-1])
    assert swarm.runs == ("r1", "r2", "r3", "r4")
    assert (swarm.domains, swarm.metrics, swarm.notes) == (("web", "code"), ("a", "b"), ())
    assert swarm.ratios.tolist() == [[0.5, 0.5], [0.25, 0.75], [1, 0], [0.1, 0.9]]
    assert swarm.losses.tolist() == [row[1:] for row in METRICS]


@pytest.mark.parametrize("run", ["run", "run_id"])
def test_columns_that_are_no_data_are_left_out(tmp_path: Path, run: str) -> None:
    header = ["", run, "name", "index", "Unnamed: 0.1", "dclm:code"]
    table = read_table(write_csv(tmp_path / "t.csv", header, [[0, "a b", "n", 7, 0, "1e-3"]]))
    assert (table.run_column, table.runs, table.names) == (run, ("a b",), ("dclm:code",))
    assert table.values.tolist() == [[0.001]]
    assert table.notes == ()


def test_parquet_is_read_as_csv_is(tmp_path: Path) -> None:
    columns = {
        "index": pa.array([1.0, 2.0]),
        "name": ["x", "y"],
        "web": pa.array([1, 0], pa.int32()),
        "code": pa.array(["0.25", None]),
    }
    parquet.write_table(pa.table({**columns, "run": ["r1", "r2"]}), tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet")
    assert (table.runs, table.names) == (("r1", "r2"), ("web", "code"))
    np.testing.assert_array_equal(table.values, [[1, 0.25], [0, np.nan]])
    assert read_table(tmp_path / "t.parquet", run_column="index").runs == ("1", "2")
    parquet.write_table(pa.table({"run": ["r"], "web": [[0.5]]}), tmp_path / "nested.parquet")
    with pytest.raises(UserError, match=r"nested.parquet: column web holds list<.*>, not numbers"):
        read_table(tmp_path / "nested.parquet")


def test_regmix_columns_lose_what_they_all_have(tmp_path: Path) -> None:
    preset = PRESETS["regmix"]
    header = ["index", "train_the_pile_arxiv", "train_the_pile_github", "other"]
    rows: list[list[float]] = [[1, 0.334, 0.662, 0], [2, 0.5, 0.503, 0], [3, 0, 1, 0]]
    ratios = read_table(
        write_csv(tmp_path / "r.csv", header, rows), run_column=preset.run, prefix=preset.ratio_prefix
    )
    header = ["index", "metric/the_pile_arxiv_val_loss", "metric/the_pile_github_val_loss"]
    metrics = read_table(
        write_csv(tmp_path / "m.csv", header, [[i, 5, 6] for i in (1, 2, 3)]),
        run_column=preset.run,
        prefix=preset.metric_prefix,
        suffix=preset.metric_suffix,
    )
    swarm = join(ratios, metrics)
    assert swarm.domains == swarm.metrics == ("the_pile_arxiv", "the_pile_github")
    np.testing.assert_allclose(swarm.ratios[0], [0.334 / 0.996, 0.662 / 0.996], rtol=1e-12)
    assert swarm.ratios.sum(axis=1) == pytest.approx(1, abs=1e-15)
    assert swarm.notes == (
        f"{tmp_path}/r.csv: columns left out: other",
        f"{tmp_path}/r.csv: the weights of 2 runs sum to 0.996 at least and 1.003 at most: each run's were "
        "divided by their sum",
    )


def test_rows_with_gaps_are_left_out_by_name(tmp_path: Path) -> None:
    ratios = [*changed(RATIOS, 1, 2, ""), ["r5", 0.3, 0.7], ["only here", 1, 0]]
    metrics = [*changed(METRICS, 2, 1, "NaN"), ["r5", "inf", "n/a"], ["and here", 1, 1]]
    ratios += [["r6", 0.2, 0.8]]
    metrics += [["r6", 1, 2]]
    swarm = joined(tmp_path, ratios, metrics)
    assert swarm.runs == ("r1", "r4", "r6")
    assert [note.replace(f"{tmp_path}/", "") for note in swarm.notes] == [
        "runs of ratios.csv that are not in metrics.csv, left out: only here",
        "runs of metrics.csv that are not in ratios.csv, left out: and here",
        "runs left out, as cells are empty or not finite: r2 (code), r3 (a), r5 (a, b)",
    ]


def test_a_domain_whose_share_never_changes_is_named(tmp_path: Path) -> None:
    (note,) = joined(tmp_path, [[f"r{i}", 0.5, 0.5] for i in range(1, 5)]).notes
    assert "ratios.csv: columns with one value for all runs: web, code; what a change" in note


@pytest.mark.parametrize(
    ("ratios", "metrics", "message"),
    [
        (
            changed(RATIOS, 2, 1, 0.9),
            METRICS,
            "ratios.csv: the weights of run r3 sum to 0.9: they must sum to 1",
        ),
        (changed(RATIOS, 2, 1, 1.02), METRICS, "the weights of run r3 sum to 1.02"),
        ([[r, 0.3, 0.3] for r, *_ in RATIOS], METRICS, "of run r1 sum to 0.6, and 3 more runs': they must"),
        (changed(RATIOS, 0, 2, -0.1), METRICS, "run r1, column code: the weight is -0.1, below 0"),
        (changed(RATIOS, 0, 2, "half"), METRICS, "ratios.csv: run r1, column code: `half` is no number"),
        (RATIOS, changed(METRICS, 3, 1, "2,5"), "metrics.csv: run r4, column a: `2,5` is no number"),
        (RATIOS, changed(METRICS, 3, 1, 0), "metrics.csv: run r4, column a: 0 is not above 0, as a loss is"),
        ([*RATIOS, RATIOS[0]], METRICS, "ratios.csv has more than one row of a run: r1; keep one of each"),
        (RATIOS, changed(METRICS, 0, 0, " "), "metrics.csv: row 1 has no name of its run"),
        (RATIOS[:2], METRICS, "2 runs are whole in both tables, and at least 3 are needed"),
        (changed(RATIOS[:3], 0, 1, ""), METRICS, r"at least 3 are needed: runs left out, .*: r1 \(web\)"),
        (
            [[f"x{r}", *w] for r, *w in RATIOS],
            METRICS,
            r"no run is in both tables: .*ratios.csv names them xr1, .* \(column `run`\), .*metrics.csv r1",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, ratios: Any, metrics: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        joined(tmp_path, ratios, metrics)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run,web,web\nr,1,2\n", "t.csv has two columns named web: rename one"),
        ("run,run,web\nr,1,2\n", "t.csv has two columns named run: rename one"),
        (
            "id,web\nr,1\n",
            "t.csv has none of the columns run, run_id, name, index to name its runs, but id, web",
        ),
        ("run,name\nr,1\n", "t.csv has no column of numbers: it has run, name"),
        ("run,web\nr,1,2\n", "t.csv cannot be read as a table: .*Expected 2 columns, got 3"),
        ("", "t.csv cannot be read as a table: Empty CSV file"),
        ("run,web\n", "t.csv has column names but no rows"),
        ("run;web\nr;1\n", "t.csv has one column, 'run;web': put commas between cells"),
    ],
)
def test_tables_of_another_form_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "t.csv")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/none.csv is missing")):
        read_table(tmp_path / "none.csv")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no, it is not")
    with pytest.raises(UserError, match=r"t.parquet cannot be read as a table"):
        read_table(tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_bytes(b"run,web\nr,\xff\n")
    with pytest.raises(UserError, match=r"t.csv cannot be read as a table: .*invalid UTF8"):
        read_table(tmp_path / "t.csv")
    with pytest.raises(UserError, match=r"has no column `seed` to name its runs: it has run, web"):
        read_table(write_csv(tmp_path / "u.csv", ["run", "web"], [["r", 1]]), run_column="seed")
