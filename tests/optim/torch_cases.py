"""The configurations that torch tests its own optimizers with, so that none is forgotten here.

They stand in ``torch.testing._internal.common_optimizers``. Importing it changes the process for good (it freezes
``torch.backends`` flags and loads hypothesis' settings), so another process reads it and hands over plain values.
"""

from __future__ import annotations

import functools
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

_READ = """
import pickle, sys
import torch
from torch.testing._internal import common_optimizers as common

cases = {}
for info in common.optim_db:
    name = info.optim_cls.__name__
    if name not in sys.argv[2:]:
        continue
    errors = [
        (case.optimizer_error_input.desc, case.optimizer_error_input.params, case.optimizer_error_input.kwargs,
         case.error_on.name, case.error_type, case.error_regex)
        for case in info.optim_error_inputs_func("cpu", torch.float64)
    ]
    cases[name] = {
        "inputs": [(case.desc, case.kwargs) for case in info.optim_inputs_func("cpu")],
        "accelerator_inputs": [(case.desc, case.kwargs) for case in info.optim_inputs_func("cuda")],
        "errors": errors,
        "impls": info.supported_impls,
        "newer_flags": info.not_og_supported_flags,
        "sparse": info.supports_sparse,
        "sparse_options": info.metadata_for_sparse[0],
        "complex": info.supports_complex,
    }
with open(sys.argv[1], "wb") as file:
    pickle.dump(cases, file)
"""


class Bad(NamedTuple):
    """Arguments that torch refuses, and how; ``params`` is ``None`` where any will do."""

    what: str
    params: Any
    options: dict[str, Any]
    raised_on: str
    error: type[Exception]
    message: str


class Cases(NamedTuple):
    """What torch tests one of its optimizers with."""

    inputs: list[tuple[str, dict[str, Any]]]
    accelerator_inputs: list[tuple[str, dict[str, Any]]]
    errors: list[Bad]
    impls: tuple[str, ...]
    newer_flags: tuple[str, ...]
    sparse: bool
    sparse_options: dict[str, Any]
    complex: bool


@functools.cache
def torch_cases() -> dict[str, Cases]:
    """Name of the optimizer → its cases. Needs ``expecttest``, which torch's test machinery imports."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.pickle"
        command = [sys.executable, "-c", _READ, str(path), "SGD", "Adam", "AdamW"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"torch's test cases can't be read; pip install -e '.[dev]'\n{result.stderr}"
        found = pickle.loads(path.read_bytes())
    cases = {}
    for name, fields in found.items():
        fields["errors"] = [Bad(*error) for error in fields["errors"]]
        cases[name] = Cases(**fields)
    return cases
