"""Tables hold the same cells in every form."""

import csv
import io

from ebr_engine.evaluation.tables import table

TABLE = table(["run", "gain − input"], [["a|b_1", 3], ['50 % of "x", y', "+1.0 [0.5, 1.5]"]])


def test_markdown_escapes_pipes():
    assert TABLE.markdown().splitlines() == [
        "| run | gain − input |",
        "| --- | --- |",
        "| a\\|b_1 | 3 |",
        '| 50 % of "x", y | +1.0 [0.5, 1.5] |',
    ]


def test_csv_comes_back():
    assert list(csv.reader(io.StringIO(TABLE.render("csv")))) == [list(TABLE.header), *map(list, TABLE.rows)]


def test_latex_escapes_what_it_reads_otherwise():
    assert TABLE.render("latex").splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"run & gain $-$ input \\",
        r"\midrule",
        r"a|b\_1 & 3 \\",
        r'50 \% of "x", y & +1.0 [0.5, 1.5] \\',
        r"\bottomrule",
        r"\end{tabular}",
    ]
