import os

import torch

# Triton reads this when it is imported: without a GPU its kernels run on the CPU, in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
