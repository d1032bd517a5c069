"""Files of a program that other tools run: torch.export's and ONNX."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from pyrovae._tools import require_package
from pyrovae.compiling.graph import CaptureError
from pyrovae.exporting.programs import Program
from pyrovae.pairs.traces import Values

# The name of the metadata in a file.
ENTRY = "pyrovae.json"
Run = Callable[..., Values]
# Below, ln Γ is that of a number eight higher, less the logarithm of what lies between.
SHIFT = 8


def trace(program: Program) -> ExportedProgram:
    """A program as torch.export has it, for any number of data."""
    batch = Dim("batch", min=1)
    shapes = (tuple({0: batch} for _ in program.inputs),)
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            return torch.export.export(
                program, tuple(program.inputs.values()), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # there is no common class of what it raises
        raise CaptureError(f"torch.export refuses it: {_first_line(error)}") from error


def pt2(exported: ExportedProgram, program: Program, about: dict[str, Any]) -> bytes:
    """A ``.pt2`` file, which :func:`torch.export.load` reads."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.export.save(exported, buffer, extra_files={ENTRY: json.dumps(about)})
    return buffer.getvalue()


def run_pt2(content: bytes, program: Program) -> Run:
    """What a ``.pt2`` file computes."""
    with warnings.catch_warnings(action="ignore"):
        return torch.export.load(io.BytesIO(content)).module()


def onnx(exported: ExportedProgram, program: Program, about: dict[str, Any]) -> bytes:
    """An ``.onnx`` file."""
    table = {**torch.export.default_decompositions(), **SPELLED}
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            plain = exported.run_decompositions(table)
            found = torch.onnx.export(
                plain, dynamo=True, verbose=False,
                input_names=list(program.inputs), output_names=program.outputs,
            )  # fmt: skip
    except Exception as error:  # as above
        raise CaptureError(f"ONNX has no such program: {_first_line(error)}") from error
    assert found is not None  # it is None where a file is written
    found.model.metadata_props[ENTRY] = json.dumps(about)
    return found.model_proto.SerializeToString()


def run_onnx(content: bytes, program: Program) -> Run:
    """What an ``.onnx`` file computes in onnxruntime, on the CPU."""
    runtime = require_format("onnx")["onnxruntime"]
    try:
        session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise CaptureError(f"onnxruntime refuses it: {_first_line(error)}") from error

    def run(*inputs: Tensor) -> Values:
        given = dict(zip(program.inputs, (each.numpy() for each in inputs), strict=True))
        found = session.run(None, given)
        return {n: torch.from_numpy(v) for n, v in zip(program.outputs, found, strict=True)}

    return run


# What each format needs, and how a file is made and run.
PACKAGES: dict[str, tuple[str, ...]] = {"pt2": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}
FORMATS: dict[str, tuple[Callable[..., bytes], Callable[[bytes, Program], Run]]] = {
    "pt2": (pt2, run_pt2),
    "onnx": (onnx, run_onnx),
}


def require_format(name: str) -> dict[str, Any]:
    """The packages of a format by name, or an InputError that names one that is missing."""
    return {each: require_package(each, f"Format {name}", "export") for each in PACKAGES[name]}


def _lgamma(x: Tensor) -> Tensor:
    """ln Γ of positive numbers by Stirling's series, which ONNX lacks."""
    product = x
    for n in range(1, SHIFT):
        product = product * (x + n)
    y = x + SHIFT
    series = (1 / 12 - (1 / 360 - 1 / (1260 * y * y)) / (y * y)) / y
    high = (y - 0.5) * y.log() - y + 0.9189385332046727 + series
    return high - product.log()


def _solve(
    a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    """The solution x of a x = b for a triangular matrix, row by row; of x a = b unless ``left``."""
    if not left:
        turned = _solve(a.mT, b.mT, upper=not upper, unitriangular=unitriangular)
        return turned.mT
    if upper:
        turned = _solve(a.flip(-1, -2), b.flip(-2), upper=False, unitriangular=unitriangular)
        return turned.flip(-2)
    rows: list[Tensor] = []
    for i in range(a.shape[-1]):
        row = b[..., i, None, :]
        if rows:
            row = row - a[..., i, None, :i] @ torch.cat(rows, -2)
        rows.append(row if unitriangular else row / a[..., i, i, None, None])
    return torch.cat(torch.broadcast_tensors(*rows), -2) if len(rows) > 1 else rows[0]


def _cholesky(a: Tensor, *, upper: bool = False, check_errors: bool = False) -> list[Tensor]:
    """The Cholesky factor, column by column, and the number 0 that says that there is one."""
    columns: list[Tensor] = []
    for j in range(a.shape[-1]):
        column = a[..., j]
        for before in columns:
            column = column - before * before[..., j, None]
        column = column / column[..., j, None].sqrt()
        below = torch.arange(a.shape[-1], device=a.device) >= j
        columns.append(torch.where(below, column, 0.0))
    found = torch.stack(columns, -2 if upper else -1)
    return [found, torch.zeros(a.shape[:-2], dtype=torch.int32, device=a.device)]


def _empty(size: Sequence[int], order: Any = None, *, dtype: Any = None, **rest: Any) -> Tensor:
    """Zeros in place of a tensor that is all written before it is read."""
    return torch.zeros(size, dtype=dtype)


# Operators that ONNX lacks, and what they are of those that it has.
SPELLED = {
    # ONNX has none of whole numbers.
    torch.ops.aten.isnan.default: lambda x: x != x,
    torch.ops.aten.empty_permuted.default: _empty,
    torch.ops.aten.lgamma.default: _lgamma,
    torch.ops.aten.linalg_solve_triangular.default: _solve,
    torch.ops.aten.linalg_cholesky_ex.default: _cholesky,
}


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # what went wrong first says most
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
