"""The training engine on one accelerator, proven and timed by one command within a quarter of an hour.

    python benchmarks/gpu.py [--small] [--seconds 900] [--parts check,stack,whole,...] [--out gpu.json]

Parts run in the order of `PARTS`, each in a process of its own that is stopped at its limit, so that neither a crash nor a hang
costs more than that part. Every figure is printed and written to the JSON as soon as it is known; what fails is written down with
its reason. Needs torch with CUDA, triton and transformers, and keural's sources on PYTHONPATH; no network.

- `check`: roof and copy bandwidth; every CUDA path against its CPU twin, bfloat16 against float64, nothing that waits, same bits
  twice.
- `stack`: four layers and the head at the real shapes, by what is kept for the backward pass; 24 layers by difference of 4 and 2.
- `whole`: all 24 layers with the optimizer that fits the card, and a profile by part.
- `baselines`: the same four layers by the trainer's present step and by a published-style one.
- `parts`: attention by backend, head by piece, experts, optimizer.
- `align`: steps of SFT and DPO by the trainer itself on packed conversations and pairs: real tokens and pairs per second.
- `toy`: `keural run recipes/toy --until sft-1`, and its first stage in each precision.
- `serve`: the server's slots by CUDA graphs: right, tokens per second at 1, 8 and 32 streams, and what a step's kernels take.
- `engines`: the same without graphs, and by transformers' continuous batching.

FLOPs are those of the model, recomputation not counted: 3 x forward. `causal` counts the keys a query sees, `square` all T of them
in every layer (as Megatron prints). MFU is against 989.5 TFLOP/s.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Before torch is imported: whether there is CUDA is asked without starting it, since the parts are forks of this process.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault(
        "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
    )
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # in place of this folder, so that its files have their whole names
    from benchmarks.gpu_parts.command import main

    main(str(__doc__))
