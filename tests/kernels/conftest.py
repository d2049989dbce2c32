"""Where the Triton kernels can run: on a GPU, or in a process that set TRITON_INTERPRET before Triton was imported.

Triton decides at import, for the whole process, and transformers imports it. So `test_interpreter.py` starts processes
of its own for the files of `on_triton/`, and no other test ever sees the variable.
"""

import os

import torch

collect_ignore = [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else ["on_triton"]
