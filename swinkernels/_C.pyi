from typing import Any

def build_info() -> dict[str, Any]:
    """What was compiled into this installation.

    version, compiler, torch_version and torch_cuda (None for a torch without CUDA); cuda (whether there are CUDA
    kernels), cuda_missing (why not, or None), cuda_version (of nvcc, or None), arch_list (as TORCH_CUDA_ARCH_LIST
    writes it), cuda_sources (the files compiled); cpu_instruction_sets; window_attention_limits (max_window_volume,
    max_head_dim and head_dim_multiple of the CUDA kernels, or None); layer_norm_limits (max_row, or None).
    """
