"""Everything in this folder runs in Triton's interpreter: ``tests/lowerings/test_interpreter.py`` starts it.

Triton decides at its import whether kernels are compiled or interpreted, for the whole process. Without
TRITON_INTERPRET=1 nothing in here is collected.
"""

from __future__ import annotations

import os

from specc.lowerings.triton_kernels import obstacle

if os.environ.get("TRITON_INTERPRET") == "1" and obstacle() is None:
    from tests.interpreted import bf16

    bf16.repair()
else:
    collect_ignore_glob = ["test_*.py"]
