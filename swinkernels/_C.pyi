from typing import Any

def build_info() -> dict[str, Any]:
    """Return the build information of this installation.

    version, compiler, torch_version and torch_cuda (None for a torch without CUDA); cuda (True with CUDA kernels),
    cuda_missing (the reason without them, or None), cuda_version (of nvcc, or None), arch_list (in the form of
    TORCH_CUDA_ARCH_LIST), cuda_sources (the files compiled); cpu_instruction_sets; window_attention_limits of the CUDA
    kernels (max_window_volume, and max_window_volume_in_less where a block has less shared memory than
    shared_bytes_of_longest; max_head_dim; with axis_tables max_axis_tables_window, in tokens per axis,
    max_axis_tables_head_dim and max_axis_tables_volume_in_less), or None; layer_norm_limits (max_row, or None).
    """
