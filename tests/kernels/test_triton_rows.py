"""The Triton kernels: under the interpreter, compiled for GPUs without one, and on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CASES = ("triton_rows_cases.py", "triton_layer_cases.py")


def run(cases: str, environment: dict[str, str]) -> None:
    """In a process of its own: Triton decides at import whether it interprets, and others may have imported it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(HERE / cases),
    ]
    # the interpreter computes with numpy, which warns of the infinities and NaN that are tested here
    command += ["-W", "ignore::RuntimeWarning"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**clean, **environment})
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("cases", CASES)
def test_in_the_interpreter(cases: str) -> None:
    run(cases, {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cases", CASES)
def test_on_the_gpu(cases: str) -> None:
    run(cases, {"TRITON_INTERPRET": "0"})


ROWS_32, HALF = "*fp32", "*bf16"
SOFTMAX = {
    "logits": ROWS_32,
    "target": "*i64",
    "cotangent": "*fp32",
    "nll": "*fp32",
    "classes": "i32",
    "logits_stride": "i32",
    "out_stride": "i32",
    "out": HALF,
    "scale": "fp32",
    "first": "fp32",
    "second": "fp32",
}
SCORES = {
    **{name: SOFTMAX[name] for name in ("logits", "target", "cotangent", "classes", "logits_stride")},
    **{"out_stride": "i32", "out": HALF, "scores": "*fp32"},
    **dict.fromkeys(("a", "b", "eps", "rounding"), "fp32"),
}
VARIANTS = {
    "cross_entropy": ("_softmax_rows", SOFTMAX, {"KIND": "cross_entropy"}),
    "in place": ("_softmax_rows", {**SOFTMAX, "out": ROWS_32}, {"KIND": "cross_entropy"}),
    "half-precision logits": ("_softmax_rows", {**SOFTMAX, "logits": HALF}, {"KIND": "cross_entropy"}),
    "comp_sum": ("_softmax_rows", SOFTMAX, {"KIND": "comp_sum"}),
    "focal": ("_softmax_rows", SOFTMAX, {"KIND": "focal"}),
    "symmetric": ("_softmax_rows", {**SOFTMAX, "out": "*fp16"}, {"KIND": "symmetric"}),
    "capped": ("_softmax_rows", {**SOFTMAX, "bias": "*fp32", "softcap": "fp32"}, {"KIND": "cross_entropy"}),
    "smoothed": ("_softmax_rows", {**SOFTMAX, "smoothing": "fp32"}, {"KIND": "cross_entropy"}),
    "entropy": (
        "_softmax_rows",
        {**SOFTMAX, "entropy": "*fp32", "entropy_cotangent": "*fp32"},
        {"KIND": "cross_entropy"},
    ),
    "values alone": (
        "_softmax_rows",
        {name: kind for name, kind in SOFTMAX.items() if name not in ("out", "cotangent")},
        {"KIND": "cross_entropy"},
    ),
    # Triton takes an integer argument of 1 for a constant
    "one class": ("_softmax_rows", SOFTMAX, {"KIND": "cross_entropy", "classes": 1, "logits_stride": 1}),
    "z_loss": ("_z_rows", SCORES, {}),
    "z_loss capped": ("_z_rows", {**SCORES, "bias": "*fp32", "softcap": "fp32"}, {}),
    "z_loss of one class": ("_z_rows", SCORES, {"classes": 1}),
    "scale": ("_scale", {"tensor": HALF, "factor": "*fp32", "count": "i64"}, {}),
}


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets, so it compiles nothing"
)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_a_gpu(variant, capability, tmp_path, monkeypatch) -> None:
    """To machine code of that GPU, by the compiler inside Triton: the interpreter accepts what types forbid."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from telos.kernels import triton_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name, given, constants = VARIANTS[variant]
    kernel = getattr(triton_rows, name)
    signature, constexprs, attributes = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in given and argument not in constants:
            signature[argument] = given[argument]
            if given[argument].startswith(("*", "i")):
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "constexpr"
            constexprs[(place,)] = 4096 if argument == "BLOCK" else constants.get(argument)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert len(built.asm["cubin"]) > 0
    if name != "_scale":  # rows are read 16 bytes at a time
        assert "ld.global.v4" in built.asm["ptx"] or "classes" in constants or given["logits"] == HALF
