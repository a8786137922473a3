"""Triton's launcher takes every kernel: what neither the interpreter nor compiling ahead of time goes through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from proteus_kernels import beta, decide, disentangled, pooling, scoring

KERNELS = {
    "sample_beta": beta._sample_beta_kernel,
    "masked_mean": pooling._masked_mean_kernel,
    "varlen_mean": pooling._varlen_mean_kernel,
    "best_candidate": scoring._best_candidate_kernel,
    "decide": decide.decide_kernel,
    "disentangled_attention": disentangled._disentangled_attention_kernel,
}


def test_every_kernel_is_launched_twice_and_compiled_once() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("launcher.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {name.split()[0] for name in report} == set(KERNELS)
    for name, found in report.items():
        assert found["compiled"] == 1, name
        wanted = len(KERNELS[name.split()[0]].arg_names)
        assert found["arguments"] == [wanted, wanted], name
