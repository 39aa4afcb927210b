"""The documentation does what it says: code runs, commands parse, links resolve, the site builds."""

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import docs_cases
import fake_verl
import pytest
import torch
import yaml
from browser import Browser, needs_browser
from docs_cases import GENERATED, PAGES, RECORDS, ROOT, blocks, docstrings, name_of, text_of
from test_recipes import eight_processes
from trl import ModelConfig

import rlvr
from rlvr.controls import CONTROLS
from rlvr.monitor.metrics import METRICS
from rlvr.surrogates import SURROGATES
from rlvr.tasks import TaskConfig

# Python blocks that need what a test cannot have: only their imports are run.
IMPORTS_ONLY = {("docs/reliability.md", 0): "a skipped batch", ("docs/security.md", 1): "bubblewrap"}
# Pages whose blocks go on from one another, and speak of a model, rows or tensors that the reader has.
GIVEN = {"docs/kernels.md", "docs/mole.md", "docs/ppo.md", "docs/security.md"}
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture
def workplace(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory where the names of the documents are a tiny model and a recorded run; registers are put back."""
    kept = [(table, dict(table)) for table in (CONTROLS, SURROGATES, METRICS)]
    for place in ("models/SmolLM2-135M-Instruct", "runs/quickstart/model"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(tiny_model_dir, tmp_path / place)
    shutil.copytree(
        ROOT / "tests" / "data" / "recorded" / "grpo", tmp_path / "runs" / "quickstart", dirs_exist_ok=True
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    if importlib.util.find_spec("verl") is None:
        fake_verl.install(monkeypatch)
    yield tmp_path
    for table, before in kept:
        table.clear()  # type: ignore[attr-defined]
        table.update(before)  # type: ignore[attr-defined]


def given(model: Path) -> dict[str, Any]:
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": f"{i}+1="} for i in range(32)])
    reward = lambda completions, **_: [float(len(text)) for text in completions]  # noqa: E731
    args = rlvr.GRPOConfig(output_dir="runs/given", report_to="none", bf16=False)
    made = {"rlvr": rlvr, "model": str(model), "reward": reward, "args": args, "rows": rows, "train_dataset": rows}
    tensors = {"hidden": torch.randn(4, 8), "targets": torch.arange(4), "advantages": torch.randn(4)}
    tensors["lm_head"] = torch.nn.Linear(8, 16, bias=False)
    return {**made, **tensors}


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_blocks_run(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = given(workplace / "models" / "SmolLM2-135M-Instruct") if name_of(page) in GIVEN else {}
    for number, block in enumerate(blocks(page, "python")):
        if (name_of(page), number) in IMPORTS_ONLY:
            compile(block, name_of(page), "exec")
            block = "\n".join(line for line in block.splitlines() if line.startswith(("import ", "from ")))
        module = ModuleType("docs_block")  # a dataclass with slots looks for its module
        monkeypatch.setitem(sys.modules, module.__name__, module)
        module.__dict__.update(shared)
        exec(compile(block, f"{name_of(page)}:block {number}", "exec"), module.__dict__)
        if name_of(page) in GIVEN:
            shared = module.__dict__


@pytest.mark.parametrize(("page", "line"), docs_cases.all_commands())
def test_command_is_understood(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if re.search(r"accelerate/(zero|ddp)", line) and "--num_processes" not in line and "RECIPE" not in line:
        eight_processes(monkeypatch)
    docs_cases.check(line)


def test_commands_in_sentences_exist() -> None:
    from rlvr.cli import _parser

    subcommands = set(_parser()._subparsers._group_actions[0].choices)  # type: ignore[union-attr,arg-type]
    for page in PAGES:
        for line in docs_cases.INLINE.findall(text_of(page)):
            program, word = line.split()[:2]
            if program == "rlvr":
                assert word in subcommands, f"{name_of(page)}: {line}"
            elif program == "make":
                docs_cases.make([word])
            elif word.endswith(".py"):
                assert (ROOT / word).is_file(), f"{name_of(page)}: {line}"


@pytest.mark.parametrize(
    "line", ["metrics", "summary runs/quickstart", "report runs/quickstart", "watch --once runs/quickstart"]
)
def test_cheap_commands_run(line: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rlvr.cli import main

    assert main(line.split()) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_data_blocks_are_read(page: Path) -> None:
    for block in blocks(page, "json"):
        json.loads(block)
    known = {f.name for of in (rlvr.GRPOConfig, TaskConfig, ModelConfig) for f in fields(of)}
    for block in blocks(page, "yaml"):
        settings = yaml.safe_load(block)
        if "actor_rollout_ref" in settings:
            from rlvr.integrations.verl import objective

            section = settings["actor_rollout_ref"]["actor"]["policy_loss"]
            objective(section.get("surrogate"), section["controls"])
        else:
            assert set(settings) <= known


# -------------------------------------------------------------------------------------------------- links and names


@pytest.mark.parametrize("page", [*PAGES, *RECORDS, *GENERATED], ids=name_of)
def test_links_resolve(page: Path) -> None:
    for target, anchor in docs_cases.links(page):
        assert target.exists() or target in GENERATED, f"{name_of(page)}: no {target}"
        if anchor:
            assert anchor in docs_cases.anchors(target), f"{name_of(page)}: no #{anchor} in {name_of(target)}"


@pytest.mark.parametrize("page", [*PAGES, *GENERATED], ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    for path in re.findall(
        r"(?<![\w/])((?:recipes|scripts|tests|rlvr|docs)/[\w/.-]*\.(?:yaml|py|md|json))\b", text_of(page)
    ):
        assert (ROOT / path).is_file(), f"{name_of(page)}: no {path}"


# -------------------------------------------------------------------------------------------------------------- site


def test_reference_names_what_exists() -> None:
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for path in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE):
            try:
                importlib.import_module(path)
            except ModuleNotFoundError:
                module, _, name = path.rpartition(".")
                assert hasattr(importlib.import_module(module), name), path
        for path in re.findall(r"<!-- fields: ([\w.]+) -->", page.read_text()):
            assert docstrings.fields(ROOT, path).count("\n") > 1, path


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    assert all(str(page.relative_to(ROOT / "docs")) in menu for page in (ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does; skips where mkdocs is not installed."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (make docs installs it)")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert run.returncode == 0 and "WARNING" not in run.stderr, run.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_site_has_every_page_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES) + len(GENERATED)
    for page in pages:
        text = page.read_text()
        for tag in re.findall(r"<(?:script|img|iframe|link)\b[^>]*>", text):
            loads = not tag.startswith("<link") or re.search(r"rel=[\"']?(?:stylesheet|preconnect|preload|icon)", tag)
            assert not (loads and re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag)), f"{page}: {tag}"
        assert 'class="mermaid"' not in text, page  # for which the theme would fetch a program
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text()), sheet


@pytest.mark.slow
@needs_browser
def test_search_works_from_a_file_system(site: Path, browser: Browser) -> None:
    browser.driver.get((site / "start.html").as_uri())
    browser.until("return document.documentElement.classList.contains('js')")
    browser.run("document.querySelector('#__search').click()")
    browser.driver.find_element("css selector", ".md-search__input").send_keys("thermostat")
    found = "return [...document.querySelectorAll('.md-search-result__link')].map((link) => link.href)"
    browser.until(f"return ({found.replace('return ', '')}).length > 0")
    assert any("methods/thermostat.html" in link for link in browser.run(found))
    assert browser.complaints() == []
