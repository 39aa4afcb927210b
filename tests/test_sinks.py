"""What goes to wandb, trackio and TensorBoard, by its names and shapes, and what `report_to` may say."""

import html
import importlib.util
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sink_cases import ROOT, SYSTEMS, needs
from sinks_run import HOSTILE
from test_imports import imports

import rlvr
from rlvr.alarm import Alert
from rlvr.errors import ConfigError
from rlvr.monitor.histograms import HISTOGRAMS
from rlvr.trainers.sink_values import (
    COLUMNS,
    LONGEST,
    finite_edges,
    inert,
    markdown,
    own_names,
    raw_histogram,
    sample_row,
)
from rlvr.trainers.sinks import TRACKERS, Sink, _known, check_report_to

# ---------------------------------------------------------------------------------------------- names and shapes


def test_own_names_are_those_of_the_records_and_nothing_is_lost() -> None:
    logs = {
        "loss": 1.0,
        "entropy/mean": 2.0,
        "kl_cov/effect": 3.0,
        "eval_heldout/reward": 4.0,
        "eval_math_heldout/reward": 5.0,
        "eval_runtime": 6.0,
        "law/a": None,
    }
    ours, theirs = own_names(logs)
    assert ours == {"entropy/mean": 2.0, "kl_cov/effect": 3.0, "heldout/reward": 4.0}
    assert theirs == {"loss": 1.0, "eval_math_heldout/reward": 5.0, "eval_runtime": 6.0}


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_finite_edges_hold_the_bins_of_the_table_and_increase(name: str) -> None:
    edges = finite_edges(name)
    assert tuple(edges[1:-1]) == HISTOGRAMS[name].edges
    assert all(a < b for a, b in pairwise(edges)) and all(map(math.isfinite, edges))
    assert edges[0] >= 0 or HISTOGRAMS[name].edges[0] < 0


@needs("tensorboard")
@given(st.lists(st.sampled_from([0, 0, 1, 2**24]), min_size=16, max_size=16).filter(any))
def test_histograms_in_tensorboard_keep_every_bin_between_those_that_hold_something(counts: list[int]) -> None:
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
    from tensorboard.data_compat import migrate_value
    from tensorboard.util.tensor_util import make_ndarray

    edges = finite_edges("entropy")
    raw = raw_histogram(counts, edges)
    histo = HistogramProto(
        **{name: raw[name] for name in ("min", "max", "num", "sum", "sum_squares")},
        bucket_limit=raw["bucket_limits"],
        bucket=raw["bucket_counts"],
    )
    drawn = make_ndarray(migrate_value(Summary.Value(tag="x", histo=histo)).tensor)
    held = [i for i, count in enumerate(counts) if count]
    shown = range(held[0], held[-1] + 1)
    assert drawn[:, 2].tolist() == [counts[i] for i in shown]
    assert drawn[:, 0] == pytest.approx([edges[i] for i in shown])
    assert drawn[:, 1] == pytest.approx([edges[i + 1] for i in shown])


@needs("tensorboard")
@given(st.text(st.characters(blacklist_categories=("Cs", "Cc"))) | st.sampled_from([HOSTILE, "![i](http://e/)|<b>"]))
def test_inert_text_is_shown_as_it_is_by_tensorboard(text: str) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    row = [1, 2, "p", text, 0.5, None, 0.25, 3]
    shown = markdown_to_safe_html(markdown([row]))
    assert set(re.findall(r"<(\w+)", shown)) <= {"table", "thead", "tbody", "tr", "th", "td"}
    cell = html.unescape(re.findall(r"<td>(.*?)</td>", shown, re.DOTALL)[3])
    assert cell.split() == text.replace("\n", "⏎").split()


def test_long_texts_are_cut_and_say_so() -> None:
    row = {"sequence": 0, "prompt": "p", "completion": "x" * (LONGEST + 5), "reward": 1.0, "advantage": 0.0}
    made = dict(zip(COLUMNS, sample_row(3, {**row, "entropy": None, "token_ids": [1, 2]}), strict=True))
    assert made["completion"] == "x" * LONGEST + "… (5 more characters)"
    assert made["entropy"] is None and made["length"] == 2 and made["prompt"] == "p"


def test_numbers_that_are_not_known_are_none() -> None:
    row = {"sequence": 0, "prompt": "p", "completion": "c", "reward": math.nan, "advantage": math.nan}
    made = sample_row(3, {**row, "entropy": [math.nan], "token_ids": [1]})
    assert made == [3, 0, "p", "c", None, None, None, 1]


class Silent(Sink):
    name = "wandb"

    def log_alert(self, step: int, alert: Alert) -> None:
        """Nobody is told."""


def test_trackers_of_a_copied_directory_are_those_of_another_run(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / TRACKERS
    one = Silent(SimpleNamespace())
    one.file = file
    one.remember("abc")
    assert _known(file)["wandb"] == "abc" and str(tmp_path) not in file.read_text()
    shutil.copytree(tmp_path / "mine", tmp_path / "copy")
    copied = tmp_path / "copy" / TRACKERS
    assert _known(copied) == {}
    one.file = copied
    one.remember("def")
    assert (_known(copied)["wandb"], _known(file)["wandb"]) == ("def", "abc")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    assert _known(tmp_path / "link" / TRACKERS)["wandb"] == "abc"


def test_control_characters_are_inert() -> None:
    assert inert("\x02klzzwxh:0000\x03\r\0") == "&#2;klzzwxh&#58;0000&#3;&#13;&#0;"


# ---------------------------------------------------------------------------------------------- report_to


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("tensorbord", "report_to='tensorbord' is not known; did you mean tensorboard"),
        (["wand"], "report_to='wand' is not known; did you mean wandb"),
        (None, r"report_to=\[None\]: write `none` alone"),
        (["none", "tensorboard"], "write `none` alone"),
    ],
)
@pytest.mark.parametrize("config", [rlvr.GRPOConfig, rlvr.PPOConfig])
def test_unknown_systems_are_refused_when_the_settings_are_read(
    config: Any, report_to: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        config(output_dir=str(tmp_path), report_to=report_to, use_cpu=True, bf16=False)
    assert "\n" not in str(error.value)


def test_absent_packages_are_refused_when_the_settings_are_read(tmp_path: Path) -> None:
    packages = {name: name for name in (*SYSTEMS, "clearml", "dvclive", "swanlab")}
    for name, package in (packages | {"flyte": "flytekit", "azure_ml": "azureml"}).items():
        if importlib.util.find_spec(package) is None:
            with pytest.raises(ConfigError, match=f"report_to='{name}': its package is not installed"):
                rlvr.GRPOConfig(output_dir=str(tmp_path), report_to=[name], use_cpu=True, bf16=False)


def test_every_system_of_transformers_can_be_checked() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in INTEGRATION_TO_CALLBACK:
        try:
            check_report_to(SimpleNamespace(report_to=[name]))
        except ConfigError as error:
            assert "its package is not installed" in str(error)


def test_rlvr_imports_none_of_the_systems_itself() -> None:
    for path in sorted((ROOT / "rlvr").rglob("*.py")):
        found = {item.name.split(".")[0] for item in imports(path.read_text())}
        assert not found & {*SYSTEMS, "tensorboardX"}, path
