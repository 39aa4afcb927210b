"""The dependency rule, executed: imports point down, and heavy libraries stay where they belong.

    rlvr.trainers, rlvr.cli  ->  rlvr.{rollout, monitor, rewards, tasks, verifier*, mole}  ->  pure core

The core is torch and the standard library. rlvr_kernels stands beside all of this and never imports rlvr.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

CORE = {
    "types",
    "errors",
    "alarm",
    "advantages",
    "surrogates",
    "objective",
    "budget",
    "theory",
    "law",
    "diagnostics",
    "thermostat",
    "controls",
}
# Each part may import the core, itself and what stands here.
PARTS: dict[str, set[str]] = {
    "child_process": set(),
    "integrations": set(),
    "mole": set(),
    "monitor": set(),
    "planning": set(),
    "rewards": {"verifier_pool"},
    "rollout": set(),
    "tasks": {"child_process", "rewards", "verifier_fence", "verifier_pool", "verifiers"},
    "verifier_fence": {"child_process"},
    "verifier_pool": {"child_process", "verifier_fence", "verifier_process"},
    "verifier_process": {"child_process"},
    "verifier_worker": {"child_process", "verifier_fence", "verifiers"},
    "verifiers": {"child_process"},
}
TOP = {"trainers", "cli"}

# Heavy libraries, and the modules that may import them. vLLM only inside functions: importing it makes
# torch.set_num_threads a no-op for the rest of the process. verl too: it is no dependency of ours.
HEAVY = {"trl", "transformers", "accelerate", "deepspeed", "vllm", "peft", "verl"}
HEAVY_AT_HOME = ("rlvr.trainers", "rlvr.rollout", "rlvr.mole.model", "rlvr.integrations")
ONLY_INSIDE_FUNCTIONS = {"vllm", "verl"}
CORE_ALLOWED = {"torch", *sys.stdlib_module_names} - {"logging"}
KERNELS_ALLOWED = {"torch", "triton", "rlvr_kernels", *sys.stdlib_module_names}
KERNELS_INSIDE_FUNCTIONS = {"deepspeed"}  # for a weight that it has partitioned


class Import(NamedTuple):
    name: str  # dotted; for `from a import b` it is a.b
    line: int
    lazy: bool  # inside a function, or only for the type checker


def imports(source: str) -> Iterator[Import]:
    """Every import statement of a module, nested ones too."""
    yield from _imports(ast.parse(source), lazy=False)


def _imports(node: ast.AST, *, lazy: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        yield from (Import(f"{module}.{alias.name}", node.lineno, lazy) for alias in node.names)
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        for child in node.body:
            yield from _imports(child, lazy=True)
        for child in node.orelse:
            yield from _imports(child, lazy=lazy)
    else:
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, lazy=lazy)


def violations(module: str, source: str) -> list[str]:
    """What a module of this dotted name imports against the rule, one line each."""
    part = module.split(".")[1] if "." in module else ""
    found = []
    if module.startswith("rlvr.") and part not in CORE | PARTS.keys() | TOP:
        found.append(
            f"{module} has no place in the rule yet: add {part!r} to CORE, PARTS or TOP in {Path(__file__).name}"
        )
    for item in imports(source):
        why = _refusal(module, part, item)
        if why:
            found.append(f"{module}:{item.line} imports {item.name}: {why}")
    return found


def _refusal(module: str, part: str, item: Import) -> str | None:
    package = item.name.split(".")[0]
    if item.name.startswith("."):
        return "write the absolute name"
    if module.split(".")[0] == "rlvr_kernels":
        allowed = KERNELS_ALLOWED | (KERNELS_INSIDE_FUNCTIONS if item.lazy else set())
        return None if package in allowed else "rlvr_kernels rests on torch and triton alone"
    if package == "rlvr":
        return _refusal_inside(module, part, item)
    if part in CORE:
        allowed = package in CORE_ALLOWED and not item.name.startswith("torch.distributed")
        return None if allowed else "the core is torch and the standard library, without logging or torch.distributed"
    if package in HEAVY:
        if not any(module == home or module.startswith(home + ".") for home in HEAVY_AT_HOME):
            return f"only {', '.join(HEAVY_AT_HOME)} know {package}"
        if package in ONLY_INSIDE_FUNCTIONS and not item.lazy:
            return f"import {package} inside the function that needs it"
    return None


def _refusal_inside(module: str, part: str, item: Import) -> str | None:
    target = item.name.split(".")[1] if "." in item.name else ""
    if target == "__version__" or part in TOP:
        return None
    if module == "rlvr":
        return None if item.lazy else "`import rlvr` stays cheap: load it in __getattr__"
    allowed = CORE if part in CORE else CORE | {part} | PARTS.get(part, set())
    return None if target in allowed else f"imports point down: {part} may use {', '.join(sorted(allowed))}"


def module_files() -> dict[str, Path]:
    """Dotted name of every module of the two packages, with its file."""
    files = {}
    for root, package in ((ROOT, "rlvr"), (ROOT / "kernels", "rlvr_kernels")):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


@pytest.mark.parametrize("module", module_files())
def test_imports_follow_the_rule(module):
    found = violations(module, module_files()[module].read_text())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rlvr.types", "import numpy"),
        ("rlvr.types", "import logging"),
        ("rlvr.theory", "from torch import distributed"),
        ("rlvr.controls.base", "def f():\n    from transformers import AutoModel"),
        ("rlvr.controls.base", "from rlvr.rollout import engine"),
        ("rlvr.objective", "import rlvr"),
        ("rlvr.objective", "from rlvr import GRPOTrainer"),
        ("rlvr.objective", "from .types import Tokens"),
        ("rlvr.rewards", "from rlvr.trainers.grpo import GRPOTrainer"),
        ("rlvr.monitor.recorder", "import rlvr.rollout.engine"),
        ("rlvr.tasks", "def f():\n    import trl"),
        ("rlvr.mole.router", "from transformers.activations import ACT2FN"),
        ("rlvr.mole.modelling", "import peft"),
        ("rlvr.rollout.engine", "class A:\n    from vllm import LLM"),
        ("rlvr.integrations.verl", "from verl import protocol"),
        ("rlvr", "from rlvr.trainers.grpo import GRPOTrainer"),
        ("rlvr.cli", "import transformers"),
        ("rlvr.something_new", "import math"),
        ("rlvr_kernels.reference", "def f():\n    import rlvr.types"),
        ("rlvr_kernels.reference", "import transformers"),
        ("rlvr_kernels.sharded", "import deepspeed"),
    ],
)
def test_violations_are_found(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rlvr.controls.base", "import math\nimport torch.nn.functional as F\nfrom rlvr.types import Tokens"),
        (
            "rlvr.monitor.recorder",
            "import pyarrow\nfrom rlvr import __version__\nfrom rlvr.monitor.metrics import METRICS",
        ),
        ("rlvr.trainers.grpo", "import trl\nfrom rlvr.mole.model import x\nfrom rlvr.rollout import engine"),
        ("rlvr.rollout.engine", "import transformers\ndef f():\n    from vllm import LLM"),
        ("rlvr.rollout.engine", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vllm import LLM"),
        ("rlvr.mole.model", "import peft"),
        ("rlvr", "def __getattr__(name):\n    import rlvr.trainers.grpo"),
        ("rlvr_kernels.sharded", "def f():\n    import deepspeed"),
        ("rlvr_kernels.fused", "import torch\nimport triton\nfrom rlvr_kernels.reference import token_stats"),
    ],
)
def test_violations_leaves_the_permitted_alone(module, source):
    assert violations(module, source) == []


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in sys.modules after the statement, in a fresh interpreter."""
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]!r}; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    return {name.split(".")[0] for name in run.stdout.split()}


def test_import_rlvr_loads_nothing_heavy():
    assert loaded_by("import rlvr") & (HEAVY | {"torch"}) == set()


@pytest.mark.parametrize(
    "module", ["rlvr.monitor", "rlvr.monitor.dashboard.server", "rlvr.cli", "rlvr.verifier_worker", "rlvr.law"]
)
def test_import_of_light_modules_needs_no_torch(module):
    assert loaded_by(f"import {module}") & (HEAVY | {"torch"}) == set()


def test_import_kernels_loads_nothing_heavy():
    assert loaded_by("import rlvr_kernels") & (HEAVY | {"rlvr"}) == set()


def test_import_integrations_needs_torch_alone():
    assert loaded_by("import rlvr.integrations.verl") & HEAVY == set()


def test_every_folder_of_modules_is_a_package():
    """Without __init__.py a folder still imports from a clone, but is missing from the wheel."""
    folders = {path.parent for path in module_files().values()}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_kernels_is_a_folder_and_not_a_package():
    """transformers imports a PyPI package named `kernels`; one of ours on sys.path would be taken for it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
