"""The Triton kernels, compiled for an H100 without having one: no registers spilled, products on the tensor cores."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402

from rlvr_kernels.triton_backend import GPU  # noqa: E402
from rlvr_kernels.triton_kernels import fused_stats, tile_grad, tile_stats  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = [
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="under TRITON_INTERPRET=1 nothing is compiled"),
    pytest.mark.skipif(
        not all((TOOLS / name).exists() for name in ("ptxas", "cuobjdump")),
        reason="Triton was installed without ptxas and cuobjdump",
    ),
]

# Of the arguments of all kernels, for bfloat16 heads; integers are those that have no other type.
TYPES = {
    **dict.fromkeys(("hidden_ptr", "weight_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(("x_ptr", "inv_t_ptr", "sums_ptr", "m_ptr", "log_s0_ptr", "slope_ptr"), "*fp32"),
    "targets_ptr": "*i64",
    "scale": "fp32",
}
ALIGNED = {"x_stride", "out_stride", "hidden_row", "weight_row", "width"}
CONTIGUOUS = {"hidden_column": 1, "weight_column": 1}
# Heads with what they do to logits, and how many bytes a thread may spill because of it.
HEADS = {
    "plain": ({"bias_ptr": None, "cap": None}, 0),
    "bias_and_softcap": ({"bias_ptr": "*bf16", "cap": "fp32"}, 32),
}
ON_HEADS = pytest.mark.parametrize("head", HEADS)
WITH_MOMENTS = pytest.mark.parametrize("moments", [False, True], ids=["", "moments"])


def compiled(kernel, block: dict[str, int], **arguments) -> CompiledKernel:
    """For sm_90. block: of triton_backend.Sizes.   arguments: types, as strings, or constants."""
    constants = {name: x for name, x in (block | arguments).items() if name in kernel.arg_names and type(x) is not str}
    constants |= {name: x for name, x in CONTIGUOUS.items() if name in kernel.arg_names}
    types = {name: (TYPES | arguments).get(name, "i32") for name in kernel.arg_names}
    aligned = [name for name in types if name not in constants and (name in ALIGNED or types[name].startswith("*"))]
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else x for name, x in types.items()},
        constexprs={(kernel.arg_names.index(name),): x for name, x in constants.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {name: x for name, x in block.items() if name not in kernel.arg_names}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def dumped(kernel: CompiledKernel, option: str, folder: Path) -> str:
    """What cuobjdump prints about the machine code."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    return subprocess.run([TOOLS / "cuobjdump", option, cubin], check=True, capture_output=True, text=True).stdout


def spilled(kernel: CompiledKernel, folder: Path) -> int:
    """Bytes of each thread that are in memory because they have no register."""
    (stack,) = re.findall(r"STACK:(\d+)", dumped(kernel, "-res-usage", folder))
    return int(stack)


@ON_HEADS
@WITH_MOMENTS
def test_tile_stats_spills_nothing(moments, head, tmp_path):
    arguments, _ = HEADS[head]
    assert spilled(compiled(tile_stats, GPU.tile_stats, MOMENTS=moments, **arguments), tmp_path) == 0


@ON_HEADS
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_tile_grad_spills_nothing(degree, head, tmp_path):
    arguments, _ = HEADS[head]
    assert spilled(compiled(tile_grad, GPU.tile_grad, DEGREE=degree, **arguments), tmp_path) == 0


@ON_HEADS
@WITH_MOMENTS
@pytest.mark.parametrize("weight", ["*bf16", "*fp32"])
def test_fused_stats_uses_tensor_cores_and_spills_little(weight, moments, head, tmp_path):
    """A float32 weight is what autocast leaves to the kernel."""
    arguments, limit = HEADS[head]
    kernel = compiled(fused_stats, GPU.fused_stats, weight_ptr=weight, MOMENTS=moments, DTYPE=tl.bfloat16, **arguments)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert spilled(kernel, tmp_path) <= limit


@ON_HEADS
@WITH_MOMENTS
def test_fused_stats_of_float32_keeps_its_precision_and_spills_nothing(moments, head, tmp_path):
    arguments, _ = HEADS[head]
    float32 = {"hidden_ptr": "*fp32", "weight_ptr": "*fp32", "DTYPE": tl.float32}
    kernel = compiled(fused_stats, GPU.fused_stats_float32, MOMENTS=moments, **arguments | float32)
    assert "mma" not in kernel.asm["ptx"]
    assert spilled(kernel, tmp_path) == 0


@pytest.mark.parametrize(
    ("kernel", "block", "arguments"),
    [
        (tile_stats, GPU.tile_stats, {"MOMENTS": True}),
        (tile_grad, GPU.tile_grad, {"DEGREE": 2}),
        (fused_stats, GPU.fused_stats, {"MOMENTS": True, "DTYPE": tl.bfloat16}),
    ],
    ids=["tile_stats", "tile_grad", "fused_stats"],
)
def test_kernels_round_each_product_before_adding_it(kernel, block, arguments, tmp_path):
    """Else u = x / T - m would not be exactly 0 at the maximum: see triton_kernels."""
    plain, _ = HEADS["plain"]
    code = dumped(compiled(kernel, block, **plain, **arguments), "-sass", tmp_path)
    assert "FMUL" in code and "FADD" in code and "FFMA" not in code
