"""The laboratory's page: one file, escaped, in two themes, made of the records alone."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from lab_records import exponential, on_its_way, record, suite

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
    for anchor in ("collapse", "law", "spending", "methods", "mechanics", "estimators", "lengths", "knobs", "pareto"):
        assert (tmp_path / "figures" / f"{anchor}.png").read_bytes().startswith(PNG)
        assert f'id="{anchor}"' in page
    assert page.count("data:image/png") == 2 * 9
    assert 'id="recommendation"' in page and "<td>KL-Cov</td><td>helps here</td>" in re.sub(r">\s+<", "><", page)


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
    assert [cells[1] for cells in rows] == ["no effect shown here"] * 2
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


# By section: its answer, and a row of each of its tables, of suite(); by hand from what suite() says of itself.
SAID = {
    "collapse": (
        "From 0.600 ± 0.000 to 0.560 ± 0.000 nats in the first quarter of the run and to 0.260 ± 0.000 at its end, "
        "over 3 seeds.",
        [("KL-Cov", "0.651 ± 0.002", "0.641 ± 0.002", "0.611 ± 0.002", "0.511 ± 0.002", "0.311 ± 0.002")],
    ),
    "spending": (
        "After 50% of the run 0.333 ± 0.000 of the entropy is spent and 0.333 ± 0.000 of the gain is made.",
        [("50%", "0.333 ± 0.000", "0.333 ± 0.000")],
    ),
    "methods": (
        "Holding entropy, by the rules below the last table: KL-Cov.",
        [
            ("KL-Cov", "3", "0.311 ± 0.002", "+0.051 ± 0.002 *", "0.612 ± 0.030", "+0.102 ± 0.005 *",
             "0.800 ± 0.000", "0.000 ± 0.000", "0.900 ± 0.000", "0.000 ± 0.000"),
            ("KL-Cov", "2.000 ± 0.000", "0.690 ± 0.000", "0.000 ± 0.000", "2.0%", "10.0%"),
        ],
    ),
    "mechanics": (
        "Over 6 steps of GRPO, in nats: spent by rewarded, likely -0.120 ± 0.000; punished, unlikely -0.096 ± 0.015; "
        "returned by rewarded, unlikely +0.030 ± 0.000; punished, likely +0.060 ± 0.000.",
        [("without an advantage", "-0.084 ± 0.015")],
    ),
    "estimators": (
        "Best over the tokens of a step: discriminator, correlation 0.410 ± 0.025; over steps it has 1.000 ± 0.000. "
        "Less covariance: +0.200 ± 0.000 over tokens, +0.707 ± 0.000 over steps.",
        [("discriminator", *("0.410 ± 0.025",) * 3, "1.000 ± 0.000", "1.000 ± 0.000", "2.000 ± 0.000")],
    ),
    "lengths": (
        "A change of their scatter is not shown in the tokens of a step (0.000 ± 0.000), shown in the norm of the "
        "gradient (-0.046 ± 0.000), not shown in the time of an update (0.000 ± 0.000).",
        [("norm of the gradient", "0.046 ± 0.000", "0.000 ± 0.000", "-0.046 ± 0.000 *")],
    ),
    "knobs": (
        "Between the smallest value and the largest entropy differs, shown, with KL-Cov; not shown with none.",
        [("KL-Cov", "coef", "10", "0.3, 1 (own), 3", "0.468, 0.510, 0.495", "+0.027 ± 0.000 *", "0.482, 0.490, 0.455",
          "-0.027 ± 0.000 *")],
    ),
    "pareto": ("By their means: KL-Cov.", []),
    "recommendation": (
        "for pass@1: KL-Cov; for pass@64: none shown; for holding entropy: KL-Cov.",
        [
            ("pass@1", "KL-Cov", "KL-Cov"),
            ("KL-Cov", "helps here", "pass@1, holding entropy", "entropy +0.051; pass@1 +0.102", "none", "{}",
             "as it was run",
             "recipes/kl_cov.yaml: average of seven sets 38.6 to 40.6 (7B), 45.8 to 52.2 (32B) (arXiv 2505.22617, "
             "Table 2)"),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("anchor", SAID)
def test_page_says_what_the_records_hold(anchor: str):
    section = next(one for one in sections(suite()) if one.anchor == anchor)
    answer, rows = SAID[anchor]
    assert section.answer == answer
    assert len(section.tables) == len(rows)
    for table, row in zip(section.tables, rows, strict=True):
        assert row in table.rows and len(row) == len(table.head)


def test_page_tells_how_far_the_law_saw():
    """Runs exactly on the law: it foresees their end, where a line in H expects too much."""
    section = next(one for one in sections([exponential(seed) for seed in range(3)]) if one.anchor == "law")
    assert section.answer == (
        "Of training reward: R² 1.000 ± 2e-07 for the law, 0.997 ± 2e-04 for a straight line in H. Told the entropy "
        "at the end, the law of the first 35% of the rollouts misses the reward there by 8e-05 ± 3e-05 (mean absolute "
        "error), the line by 0.070 ± 4e-04."
    )
    ahead, fits = section.tables
    assert [cells[3] for cells in ahead.rows] == ["+0.070 ± 4e-04"]
    assert fits.rows == (("GRPO", "1.000 ± 2e-07", "0.997 ± 2e-04", "1.203 ± 0.001", "2.203 ± 0.001"),)


def test_page_says_what_was_not_run_at_equal_compute():
    section = next(one for one in sections(suite()) if one.anchor == "methods")
    assert section.tables[1].notes[1].endswith("compared at it above; KL-Cov: not run at it.")


def test_page_compares_at_equal_compute_and_with_grpo_that_is_stopped():
    """PPO, twice as dear, after 10 of 20 rollouts; GRPO's pass@64 after 10 is .95, at its end .90."""
    records = [on_its_way(seed) for seed in range(3)]
    records += [on_its_way(seed, name="ppo", algorithm="ppo", seconds=(2.0,) * 20) for seed in range(3)]
    records += [record("kl-cov", seed, entropy=tuple(h + 0.2 for h in records[0].entropy)) for seed in range(3)]
    found = {section.anchor: section for section in sections(records)}
    (ppo,) = found["methods"].tables[2].rows
    assert ppo[:2] == ("PPO", "10") and ppo[-2:] == ("0.950 ± 0.000", "+0.050 ± 0.000 *")
    assert found["methods"].tables[1].notes[1].endswith("compared at it above, PPO below.")
    against, way = found["stopped"].tables
    assert [cells[:3] for cells in against.rows] == [("PPO", "20", "3"), ("KL-Cov", "10", "3")]
    assert against.rows[1][-2:] == ("0.900 ± 0.000", "-0.050 ± 0.000 *")
    assert [cells[0] for cells in way.rows] == ["0", "5", "10", "15", "20"]
    assert way.rows[2] == ("10", "0.460 ± 0.000", "0.410 ± 0.025", "0.800 ± 0.000", "0.950 ± 0.000")
    assert found["stopped"].answer == (
        "Less GRPO that is stopped where it has as much entropy: pass@1 is higher, shown, with KL-Cov; pass@64 is "
        "higher, shown, with none."
    )


@pytest.mark.parametrize(
    ("x", "text"),
    [(0.12345, "0.123"), (float("nan"), "?"), (0.0, "0.000"), (0.0001234, "1e-04"), (1e-16, "0.000"), (4e5, "4e+05")],
)
def test_number_is_short(x: float, text: str):
    assert number(x) == text


def test_differences_are_starred_where_the_interval_excludes_zero():
    sure, unsure = Interval(0.1, 0.05, 5), Interval(-0.1, 0.2, 5)
    assert compared(Compared(sure, sure)) == ("0.100 ± 0.050", "+0.100 ± 0.050 *")
    assert compared(Compared(unsure, unsure)) == ("-0.100 ± 0.200", "-0.100 ± 0.200")
    assert compared(Compared(sure, Interval(0.0, 0.0, 5)), reference=True) == ("0.100 ± 0.050", "")
    assert stated(Interval(0.5, float("nan"), 1)) == "0.500"
