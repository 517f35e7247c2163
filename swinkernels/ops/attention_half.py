"""The attention half of a Swin block: the public function.

The function composes the ops for norm and window attention, torch's matrix products and
:mod:`swinkernels.ops._recomputed`, or runs the whole half as one op, :mod:`swinkernels.ops._fused_attention`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from swinkernels import reference
from swinkernels.ops import _arguments
from swinkernels.ops._arguments import Ints
from swinkernels.ops._backends import backend_beside, choose, norm_reasons
from swinkernels.ops._fused_attention import KernelCall, Tables, kernel_call
from swinkernels.ops._fused_attention import attention_half as fused_attention_half
from swinkernels.ops._fused_linear import Norm, fit_kernels, linear, run_on_kernels, runs_alone
from swinkernels.ops._halves import cast, check_half, finish, norm_parameters, scaled
from swinkernels.ops._library import Found, autocast_dtype, linear_dtype, looked_up
from swinkernels.ops._recomputed import norm_linear, packed
from swinkernels.ops.window_attention import spec_of, window_attention_qkvpacked, window_attention_reasons

_KNOWN = Found()
# The arguments of window attention that are tensors, or tuples of them.
TABLES = frozenset(["bias_table", "bias", "logit_scale", "region_map", "axis_tables"])


def tables_of(bias_table: Tensor | None, attention: dict[str, Any]) -> Tables:
    return bias_table, attention.get("bias"), attention.get("logit_scale"), attention.get("region_map")


class Decision(NamedTuple):
    """How attention_half computes a call: with which eps and backend of the norm, and whether on the CPU kernels."""

    eps: float
    norm_backend: str
    # The arguments of the op that computes the whole half, if it does when run_on_kernels returns True.
    call: KernelCall | None
    fit: bool  # the result of fit_kernels, if the backend allows the kernels


def decide(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weights: tuple[Tensor, ...],
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    bias_table: Tensor | None,
    *,
    num_heads: int,
    window_size: Ints,
    eps: float,
    norm: str,
    residual: bool,
    drop_path_scale: Tensor | None,
    layer_scale: Tensor | None,
    backend: str,
    attention: dict[str, Any],
) -> Decision:
    """Check the arguments of :func:`attention_half`, and decide how to compute it.

    The result depends only on the metadata of the tensors.
    """

    def check() -> Decision:
        op = "attention_half"
        _arguments.check_features(op, "x", x)
        number = check_half(
            op, x, norm, residual, eps, drop_path_scale, norm_weight=norm_weight, norm_bias=norm_bias,
            layer_scale=layer_scale,
        )  # fmt: skip
        for name, instead in (("pad_qkv", "a pad token gets qkv_bias"), ("return_attention", "call the op")):
            if name in attention:
                raise ValueError(f"{op}: {name} cannot be given here, got {attention[name]!r}: {instead}")
        heads = _arguments.check_count(op, "num_heads", num_heads)
        channels = x.shape[-1]
        if len(weights) not in (1, 3):
            raise ValueError(f"{op}: qkv_weight must be one tensor or a tuple of 3, got a tuple of {len(weights)}")
        rows = None
        for weight in weights:
            _arguments.check_linear(op, x, "qkv", weight, None, (rows, channels))
            rows = weight.shape[0]
        whole = packed(weights)
        _arguments.check_linear(op, x, "qkv", whole, qkv_bias, (None, channels))
        if whole.shape[0] % (3 * heads) != 0:
            raise ValueError(
                f"{op}: qkv_weight must have 3 * num_heads * head_dim rows, a multiple of {3 * heads} for "
                f"num_heads={heads}, got shape {tuple(whole.shape)}"
            )
        width = whole.shape[0] // 3
        _arguments.check_linear(op, x, "proj", proj_weight, proj_bias, (channels, width))
        head_dim = width // heads
        spec = spec_of(
            op, x, x.shape[1:-1], head_dim, num_heads=heads, window_size=window_size, bias_table=bias_table,
            **attention,
        )  # fmt: skip
        between = linear_dtype(x)
        choose(op, backend, x.device, lambda b: window_attention_reasons(b, spec, head_dim, between, x.device))
        dtypes = (x.dtype, between) if norm == "pre" else (between, x.dtype)

        def of_norm(b: str) -> list[str]:
            return norm_reasons(b, "layer_norm", channels, dtypes, x.device)

        chosen = choose("layer_norm", backend_beside("layer_norm", backend), x.device, of_norm)
        fit = backend in ("auto", "cpu") and chosen == "torch" and fit_kernels(x, parameters)
        call = kernel_call(x, head_dim, tables, spec, heads, residual, norm, number) if fit else None
        return Decision(number, chosen, call if drop_path_scale is None else None, fit)

    parameters = (x, norm_weight, norm_bias, *weights, qkv_bias, proj_weight, proj_bias, drop_path_scale, layer_scale)
    tables = tables_of(bias_table, attention)
    tensors: tuple[Any, ...] = (*parameters, *tables)
    axis_tables = attention.get("axis_tables")
    if isinstance(axis_tables, (tuple, list)):
        tensors += tuple(axis_tables)
    rest = tuple(item for item in attention.items() if item[0] not in TABLES)
    options = (num_heads, window_size, eps, norm, residual, backend, len(weights), type(axis_tables).__name__, rest)
    return looked_up(_KNOWN, tensors, options, check, autocast_dtype(x))


def attention_half(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor | tuple[Tensor, Tensor, Tensor],
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    bias_table: Tensor | None = None,
    *,
    num_heads: int,
    window_size: Ints,
    eps: float = 1e-5,
    norm: str = "pre",
    residual: bool = True,
    drop_path_scale: Tensor | None = None,
    layer_scale: Tensor | None = None,
    backend: str = "auto",
    **attention: Any,
) -> Tensor:
    r"""Apply layer norm, QKV projection, shifted-window attention, output projection and the residual connection.

    .. math::
        y = x + d \, \gamma \cdot proj(attention(qkv(LayerNorm(x)))) \quad \text{(pre, v1)}

        y = x + d \, \gamma \cdot LayerNorm(proj(attention(qkv(x)))) \quad \text{(post, v2)}

    The published code pads the input of the QKV projection with zeros, so a pad token's q, k and v are ``qkv_bias``:
    in v1 a pad token is zero after the norm, not before it.

    For the backward pass, the call saves x, q, k, v, the tensors that window attention saves, the input of proj and,
    with norm="post", the result of proj. With norm="pre" the norm is recomputed. In compiled code the compiler chooses
    the tensors to save.

    Args:
        x: (B, \*S, C), S = (H, W) or (D, H, W), float32, float16, bfloat16 or float64 (torch and reference only).
        norm_weight, norm_bias: (C,), of any floating dtype, or None for ones and zeros.
        qkv_weight, qkv_bias: (3A, C) and (3A,) or None, A = num_heads * head_dim, in the dtype of x, or any under
            autocast; rows are (3, num_heads, head_dim). The weight may be a tuple of the weights of q, k and v, each
            (A, C), for a block with three Linear layers.
        proj_weight, proj_bias: (C, A) and (C,) or None, likewise.
        bias_table: relative position bias, (prod(2 * window - 1), num_heads).
        num_heads, window_size: as for :func:`swinkernels.window_attention_qkvpacked`.
        eps: added to the variance of the norm.
        norm: "pre" (v1) or "post" (v2).
        residual: False omits ``x +``, but not the norm.
        drop_path_scale: d, (B,): 0 for a sample whose branch is dropped, else 1 / (1 - p). None for 1.
        layer_scale: gamma, (C,), a factor for each channel of the branch, or None for 1. With "pre" it multiplies the
            weight and bias of proj, which are then cast to the dtype of the matrix product.
        backend: backend of the attention, as for :func:`swinkernels.window_attention_qkvpacked`, and of the norm; if it
            has no norm, the norm uses "auto". torch computes the matrix products, except with "reference" and, with
            "auto" or "cpu", in float32 or bfloat16 inference on some CPUs, where one op computes the half.
        attention: the other arguments of :func:`swinkernels.window_attention_qkvpacked`, except ``pad_qkv``, which is
            ``qkv_bias``, and ``return_attention``.

    Returns:
        (B, \*S, C) in the dtype of x; with residual=False and norm="pre", in the dtype of the matrix products. An empty
        batch gives an empty result. Under autocast the matrix products and the attention use the autocast dtype.
        Differentiable in x, all parameters, tables and layer_scale, each gradient in its tensor's dtype; twice with
        backend="torch" or "reference". Also differentiable in drop_path_scale with backend="auto", "torch" or
        "reference".

    Raises:
        ValueError, TypeError: an argument is wrong; the message names the value given and the values accepted.
        NotImplementedError: the requested backend cannot run this call; the message lists the reasons.

    Source: Swin Transformer (Liu et al., 2021), equation 3; Swin Transformer V2 (Liu et al., 2022), section 3.2; first
    line of ``forward`` in the blocks of timm, torchvision and MONAI.
    """
    generator = attention.pop("generator", None)
    weights: tuple[Tensor, ...] = qkv_weight if isinstance(qkv_weight, tuple) else (qkv_weight,)

    eps, norm_backend, call, fit = decide(
        x, norm_weight, norm_bias, weights, qkv_bias, proj_weight, proj_bias, bias_table, num_heads=num_heads,
        window_size=window_size, eps=eps, norm=norm, residual=residual, drop_path_scale=drop_path_scale,
        layer_scale=layer_scale, backend=backend, attention=attention,
    )  # fmt: skip
    dtype, tables = linear_dtype(x), tables_of(bias_table, attention)
    tensors = (
        x, norm_weight, norm_bias, *weights, qkv_bias, proj_weight, proj_bias, drop_path_scale, layer_scale, *tables,
    )  # fmt: skip
    if backend == "reference":
        return reference.attention_half(
            x, norm_weight, norm_bias, packed(weights), qkv_bias, proj_weight, proj_bias, bias_table,
            num_heads=num_heads, window_size=window_size, eps=eps, norm=norm, residual=residual,
            drop_path_scale=drop_path_scale, layer_scale=layer_scale, generator=generator, **attention,
        )  # fmt: skip
    on_kernels = fit and run_on_kernels(x, (*weights, proj_weight), tensors)
    last = scaled(proj_weight, proj_bias, layer_scale, norm)
    if on_kernels and call is not None:
        of_norm = norm_parameters(norm_weight, norm_bias, layer_scale, norm)
        return fused_attention_half(x, weights, qkv_bias, last, of_norm, tables, call)
    first, bias = cast(weights[0], qkv_bias, dtype)
    weights = first, *(weight.to(dtype) for weight in weights[1:])
    on_kernels = on_kernels and runs_alone(x, proj_weight)
    if on_kernels:
        before = Norm(norm_weight, norm_bias, eps) if norm == "pre" else None
        qkv = linear(x, packed(weights), bias, norm=before, on_kernels=True)
    elif norm == "pre":
        _, qkv = norm_linear(x, norm_weight, norm_bias, weights, bias, eps=eps, backend=norm_backend)
    else:
        qkv = linear(x.to(dtype), packed(weights), bias)
    out = window_attention_qkvpacked(
        qkv, bias_table, num_heads=num_heads, window_size=window_size, pad_qkv=qkv_bias, generator=generator,
        backend=backend, **attention,
    )  # fmt: skip
    weight, bias = cast(*last, dtype)

    def project(added: Tensor | None) -> Tensor:
        return linear(out, weight, bias, residual=added, on_kernels=on_kernels)

    return finish(
        x, project, norm_weight, norm_bias, layer_scale, drop_path_scale, eps=eps, norm=norm, residual=residual,
        backend=backend_beside("residual_layer_norm", backend),
    )  # fmt: skip
