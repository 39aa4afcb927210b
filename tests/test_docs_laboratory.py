"""What the documentation tells of the laboratory is what its kept results say."""

import re

from docs_cases import GENERATED, ROOT, laboratory, methods

from scripts.lab.comparison import DEARER
from scripts.lab.methods import AT_EQUAL_COMPUTE, METHODS


def test_results_of_the_laboratory_are_those_of_its_data() -> None:
    assert (ROOT / "docs" / "lab" / "results.md").read_text() == laboratory.page()


def test_numbers_that_are_told_of_the_laboratory_are_its() -> None:
    for mean, half in re.findall(r"(?<![+−\d])(\.\d{3}) ± (\.\d{3})", (ROOT / "docs" / "instruments.md").read_text()):
        assert f"0{mean} ± 0{half}" in laboratory.page(), mean
    told = re.findall(r"([+−])\.(\d{3}) ± \.(\d{3})", (ROOT / "docs" / "concepts.md").read_text())
    assert len(told) > 20
    for sign, mean, half in told:
        number = f"{sign}0.{mean} ± 0.{half}".replace("−", "-")
        assert number in laboratory.page(), number


def test_what_is_dearer_than_grpo_was_compared_at_equal_compute() -> None:
    """Rollouts at equal compute were chosen before: they agree with the time that the kept results measured."""
    times = laboratory.table("methods", 1)
    at_equal = laboratory.table("methods", 2)
    for name, method in METHODS.items():
        said = times[method.title]["time per rollout / GRPO's"]
        if not said:
            assert name == "grpo"
            continue
        mean, half = map(float, said.split(" ± "))
        assert (mean > DEARER) == (name in AT_EQUAL_COMPUTE) == (method.title in at_equal), name
        if name in AT_EQUAL_COMPUTE:
            assert abs(100 / AT_EQUAL_COMPUTE[name] - mean) <= half, name


def test_every_method_of_the_laboratory_is_on_a_page() -> None:
    told = "".join(GENERATED.values())
    assert len(laboratory.titles()) == 16 and all(laboratory.evidence(title) in told for title in laboratory.titles())


def test_papers_tell_what_the_laboratory_found() -> None:
    assert all(laboratory.ours(title) in methods.standing("PAPERS.md") for title in laboratory.titles())


def numbers(text: str) -> set[str]:
    """Measured numbers as they are written, such as .740 or 4.67; not those of settings and sentences."""
    return set(re.findall(r"(?<![\w.])\d*\.\d\d+(?![\w.]*\w)", text))


def test_measured_numbers_are_in_the_log_or_the_laboratory() -> None:
    log = numbers((ROOT / "LOG.md").read_text())
    log |= {number.removeprefix("0") for number in numbers(laboratory.page())}
    for method in methods.read_methods():
        assert numbers(method.measured) <= log, method.name
