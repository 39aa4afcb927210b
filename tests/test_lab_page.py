"""The laboratory's page: one file, escaped, in two themes, made of the records alone."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from lab_records import record, suite

from scripts.lab.cells import Section, Table, compared, number, stated
from scripts.lab.comparison import Compared
from scripts.lab.intervals import Interval
from scripts.lab.page import html, sections, write_page
from scripts.lab.records import Kept, load_kept, write_kept

PNG = b"\x89PNG\r\n\x1a\n"


def test_records_survive_being_written(tmp_path: Path):
    kept = Kept(suite(), {"runs": "12"}, ["grpo-seed9: it failed"])
    write_kept(kept, tmp_path / "records.json")
    assert load_kept(tmp_path / "records.json") == kept


def test_page_is_one_file_with_both_themes(tmp_path: Path):
    page = write_page(Kept(suite(), {"runs": "12"}), tmp_path).read_text()
    assert not re.search(r"""(src|href|srcset)=["'](?!data:|#)""", page)  # nothing is fetched
    assert "<script" not in page and "prefers-color-scheme: dark" in page
    for anchor in ("collapse", "law", "spending", "methods", "estimators", "lengths", "knobs", "pareto"):
        assert (tmp_path / "figures" / f"{anchor}.png").read_bytes().startswith(PNG)
        assert f'id="{anchor}"' in page
    assert page.count("data:image/png") == 2 * 8
    assert 'id="recommendation"' in page and "holds entropy" in page


def test_page_is_the_same_for_the_same_records(tmp_path: Path):
    first, second = (write_page(Kept(suite(), {}), tmp_path / name).read_bytes() for name in ("a", "b"))
    assert first == second


def test_page_escapes_whatever_it_is_given():
    bad = '<script>alert("x")</script>'
    section = Section(
        anchor="a", title=bad, answer=bad, claim=bad, tables=(Table((bad,), ((bad,),), (bad,)),), notes=(bad,)
    )
    page = html([section], {bad: bad}, [bad], {})
    assert "<script" not in page and page.count("&lt;script&gt;") == 10


def test_page_without_runs_says_so(tmp_path: Path):
    assert "nothing can be compared" in write_page(Kept([], {}, ["grpo-seed0: it failed"]), tmp_path).read_text()
    assert "missing: grpo-seed0: it failed" in (tmp_path / "report.html").read_text()


def test_page_of_one_seed_claims_nothing():
    """No interval, hence no star, no method that helps."""
    found = {section.anchor: section for section in sections([one for one in suite() if one.seed == 0])}
    assert found["methods"].answer.endswith("none.")
    rows = found["recommendation"].tables[1].rows
    assert [cells[1] for cells in rows] == ["does not help here"] * 2
    assert not any("*" in cell for table in found["methods"].tables for cells in table.rows for cell in cells)


def test_page_of_grpo_alone_has_no_recommendation():
    found = [section.anchor for section in sections([record(seed=seed) for seed in range(3)])]
    assert found == ["collapse", "law", "spending", "methods"]


def test_page_numbers_follow_the_records():
    """Another result, another verdict: nothing is written by hand."""
    worse = [
        replace(one, pass_at={k: v - 0.3 for k, v in one.pass_at.items()}) if one.name == "kl-cov" else one
        for one in suite()
    ]
    verdict = {
        which: next(
            cells[1]
            for section in sections(records)
            if section.anchor == "recommendation"
            for cells in section.tables[1].rows
            if cells[0] == "KL-Cov"
        )
        for which, records in (("as made", suite()), ("worse", worse))
    }
    assert verdict == {"as made": "helps here", "worse": "holds entropy at a price"}


@pytest.mark.parametrize(
    ("x", "text"), [(0.12345, "0.123"), (float("nan"), "?"), (0.0, "0.000"), (0.0001234, "0.000123"), (4e5, "4e+05")]
)
def test_number_is_short(x: float, text: str):
    assert number(x) == text


def test_differences_are_starred_where_the_interval_excludes_zero():
    sure, unsure = Interval(0.1, 0.05, 5), Interval(-0.1, 0.2, 5)
    assert compared(Compared(sure, sure)) == ("0.100 ± 0.050", "+0.100 ± 0.050 *")
    assert compared(Compared(unsure, unsure)) == ("-0.100 ± 0.200", "-0.100 ± 0.200")
    assert compared(Compared(sure, Interval(0.0, 0.0, 5)), reference=True) == ("0.100 ± 0.050", "")
    assert stated(Interval(0.5, float("nan"), 1)) == "0.500"
