"""Defines the public function for the MLP half of a Swin block.

The function composes the op for the norm, torch's matrix products and :mod:`swinkernels.ops._recomputed`, or runs the
whole half as one op, :mod:`swinkernels.ops._fused_mlp` on a GPU or fused_mlp of
:mod:`swinkernels.ops._fused_linear` on a CPU.
"""

from __future__ import annotations

from torch import Tensor

from swinkernels import reference
from swinkernels.ops import _arguments, fallback
from swinkernels.ops._backends import choose, mlp_half_reasons, norm_reasons, residual_reasons
from swinkernels.ops._fused_linear import Norm, fit_kernels, linear, mlp, run_on_kernels
from swinkernels.ops._fused_mlp import fused_mlp, lacks
from swinkernels.ops._halves import cast, check_half, finish, norm_parameters, scaled
from swinkernels.ops._library import Found, any_requires_grad, autocast_dtype, linear_dtype, looked_up
from swinkernels.ops._onednn import is_large
from swinkernels.ops._recomputed import gelu_linear, joinable_norm, norm_linear, norm_of_sum

_APPROXIMATIONS = ("none", "tanh")
_KNOWN = Found()


def mlp_half(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    norm: str = "pre",
    approximate: str = "none",
    residual: bool = True,
    drop_path_scale: Tensor | None = None,
    layer_scale: Tensor | None = None,
    branch: Tensor | None = None,
    branch_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Apply layer norm, two linear layers with GELU between them, and the residual connection.

    .. math::
        y = x + d \, \gamma \cdot fc_2(GELU(fc_1(LayerNorm(x)))) \quad \text{(pre, v1)}

        y = x + d \, \gamma \cdot LayerNorm(fc_2(GELU(fc_1(x)))) \quad \text{(post, v2)}

    For the backward pass, the call saves x, the result of fc1 and, with norm="post", the result of fc2. GELU and, with
    norm="pre", the norm are recomputed. In compiled code the compiler chooses the tensors to save.

    Args:
        x: (B, ..., C), float32, float16, bfloat16 or float64 (torch and reference only).
        norm_weight, norm_bias: (C,), of any floating dtype, or None for ones and zeros.
        fc1_weight, fc1_bias: (hidden, C) and (hidden,) or None, in the dtype of x, or any under autocast.
        fc2_weight, fc2_bias: (C, hidden) and (C,) or None, likewise.
        eps: added to the variance of the norm.
        norm: "pre" (v1) or "post" (v2).
        approximate: "none" for the exact GELU, "tanh" for its approximation, as in torch.nn.GELU.
        residual: False omits ``x +``, but not the norm.
        drop_path_scale: d, (B,): 0 for a sample whose branch is dropped, else 1 / (1 - p). None for 1.
        layer_scale: gamma, (C,), a factor for each channel of the branch, or None for 1. With "pre" it multiplies the
            weight and bias of fc2, which are then cast to the dtype of the matrix product.
        branch, branch_scale: the previous half's branch, of the shape of x, and its drop_path_scale, (B,) or None:
            x + branch_scale * branch replaces x above. The sum and the norm take one pass if norm is "pre", branch
            has the dtype of the matrix products and branch_scale needs no gradient. Without a branch, x is unchanged.
        backend: backend of the norm, "auto", "cuda", "torch" or "reference"; torch computes the matrix products, except
            with "reference" and in float32 or bfloat16 inference on some CPUs, where one op computes the half. "triton"
            runs the whole half as one kernel, without a derivative, for C of 96 or 192 and products in float16 or
            bfloat16. "auto" does not choose it, because it has not been measured on a GPU.

    Returns:
        (B, ..., C) in the dtype of x; with residual=False and norm="pre", in the dtype of the matrix products. An empty
        batch gives an empty result. Under autocast the matrix products use the autocast dtype. Differentiable in x,
        branch, all parameters and layer_scale, each gradient in its tensor's dtype; twice with backend="torch" or
        "reference". Also differentiable in drop_path_scale and branch_scale with backend="auto", "torch" or
        "reference".

    Raises:
        ValueError, TypeError: an argument is wrong; the message names the value given and the values accepted.
        NotImplementedError: the requested backend cannot run this call; the message lists the reasons.

    Source: Swin Transformer (Liu et al., 2021), equation 3; Swin Transformer V2 (Liu et al., 2022), section 3.2; second
    line of ``forward`` in the blocks of timm, torchvision and MONAI.
    """

    def check() -> tuple[float, str, bool]:
        op = "mlp_half"
        _arguments.check_rows(op, "x", x, batched=True)
        number = check_half(
            op, x, norm, residual, eps, drop_path_scale, norm_weight=norm_weight, norm_bias=norm_bias,
            layer_scale=layer_scale,
        )  # fmt: skip
        if branch is not None:
            _arguments.check_rows(op, "branch", branch, batched=True)
            _arguments.check_device(op, "branch", branch, x.device)
            if branch.shape != x.shape:
                raise ValueError(
                    f"{op}: branch must have the shape of x, {tuple(x.shape)}, got shape {tuple(branch.shape)}"
                )
        elif branch_scale is not None:
            raise ValueError(f"{op}: branch_scale must be None without the branch that it scales")
        _arguments.check_parameters(op, x, (x.shape[0],), branch_scale=branch_scale)
        _arguments.check_choice(op, "approximate", approximate, _APPROXIMATIONS)
        channels = x.shape[-1]
        _arguments.check_linear(op, x, "fc1", fc1_weight, fc1_bias, (None, channels))
        _arguments.check_linear(op, x, "fc2", fc2_weight, fc2_bias, (channels, fc1_weight.shape[0]))
        between = linear_dtype(x)

        def reasons(b: str) -> list[str]:
            if b == "triton":
                if backend != b:
                    return ["it has not been measured on a GPU, so it runs only if it is named"]
                widths = (channels, fc1_weight.shape[0])
                return mlp_half_reasons(b, widths, (x.dtype, between), x.device, lacking)
            if residual if norm == "post" else is_summed:
                return residual_reasons(b, channels, (x.dtype, between), x.device)
            dtypes = (x.dtype, between) if norm == "pre" else (between, x.dtype)
            return norm_reasons(b, "layer_norm", channels, dtypes, x.device)

        found = choose(op, backend, x.device, reasons)
        return number, found, found == "torch" and fit_kernels(x, tensors)

    dtype = linear_dtype(x)
    # The kernel that adds the branch and normalises the sum requires a branch of this dtype and computes no gradient
    # for branch_scale.
    learns_scale = getattr(branch_scale, "requires_grad", False)
    is_summed = norm == "pre" and not learns_scale and getattr(branch, "dtype", None) == dtype
    tensors = (
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, drop_path_scale, layer_scale, branch,
        branch_scale,
    )  # fmt: skip
    lacking = lacks(tensors, norm, residual, drop_path_scale, layer_scale, branch_scale) if backend == "triton" else ()
    options = (eps, norm, approximate, residual, backend, learns_scale, lacking)
    eps, chosen, fit = looked_up(_KNOWN, tensors, options, check, autocast_dtype(x))
    if chosen == "reference":
        return reference.mlp_half(
            x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps=eps, norm=norm,
            approximate=approximate, residual=residual, drop_path_scale=drop_path_scale, layer_scale=layer_scale,
            branch=branch, branch_scale=branch_scale,
        )  # fmt: skip
    if branch is not None and not is_summed:
        x, branch, branch_scale = fallback.add(x, branch, branch_scale), None, None
    fc1 = cast(fc1_weight, fc1_bias, dtype)
    fc2 = cast(*scaled(fc2_weight, fc2_bias, layer_scale, norm), dtype)
    if chosen == "triton":
        return fused_mlp(x, branch, (norm_weight, norm_bias), fc1, fc2, eps, norm, approximate)
    if any_requires_grad(tensors):
        if norm == "pre":
            x, hidden = norm_linear(
                x, norm_weight, norm_bias, *fc1, eps=eps, backend=chosen, branch=branch, branch_scale=branch_scale
            )
        else:
            hidden = linear(x.to(dtype), *fc1)

        def last(added: Tensor | None) -> Tensor:
            y = gelu_linear(hidden, *fc2, approximate=approximate)  # the backward pass recomputes GELU
            return y if added is None else fallback.add(added, y, None)

    else:
        on_kernels = fit and run_on_kernels(x, (fc1_weight, fc2_weight), tensors) and is_large(x, fc1_weight)
        parameters = norm_parameters(norm_weight, norm_bias, layer_scale, norm)
        joined = None
        if branch is None:
            joined = Norm(*parameters, eps) if on_kernels else joinable_norm(x, *parameters, eps, chosen, dtype)
        z = x
        if joined is not None and norm == "post" and drop_path_scale is None:
            joined, added = joined._replace(place=norm), x if residual else None
            return mlp(x, fc1, fc2, gelu=approximate, residual=added, norm=joined, on_kernels=on_kernels)
        if norm == "post":
            joined, z = None, x.to(dtype)
        elif joined is None:
            x, z = norm_of_sum(x, branch, branch_scale, norm_weight, norm_bias, dtype, eps, chosen)

        def last(added: Tensor | None) -> Tensor:
            return mlp(z, fc1, fc2, gelu=approximate, residual=added, norm=joined, on_kernels=on_kernels)

    return finish(
        x, last, norm_weight, norm_bias, layer_scale, drop_path_scale, eps=eps, norm=norm, residual=residual,
        backend=backend,
    )  # fmt: skip
