"""The table of the tests under other seeds."""

from __future__ import annotations

from pathlib import Path

from scripts import seeds

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one[a b]"><failure/></testcase>
<testcase classname="tests.test_a" name="test_two"><skipped/></testcase>
<testcase classname="tests.test_a" name="test_three"/>
<testcase classname="" name="tests.test_b"><error/></testcase>
</testsuite></testsuites>
"""


def test_read_report_counts_skipped_tests_as_neither_passed_nor_failed(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    passed, failed = seeds.read_report(report)
    assert passed == ["tests.test_a::test_three"]
    assert failed == ["tests.test_a::test_one[a b]", "tests.test_b"]


def test_read_table_returns_what_was_written(tmp_path: Path) -> None:
    failed = ["tests.test_a::test_one[a b]", "tests.test_b"]
    rows: seeds.Rows = {
        (2, "tests/test_*.py"): (1, failed),
        (11, "tests/cells"): (268, []),
        (11, "tests/other"): (3, []),
    }
    seeds.write_table(rows, tmp_path / "table.md")
    assert seeds.read_table(tmp_path / "table.md") == rows
    assert seeds.read_table(tmp_path / "absent.md") == {}
