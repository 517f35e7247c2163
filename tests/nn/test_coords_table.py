"""Tests that v2's relative_coords_table, a non-persistent buffer, is correct after any way of loading weights."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from swinkernels.models import SwinTransformer
from swinkernels.nn import WindowAttentionV2


def published_table(window: int, pretrained: int = 0) -> Tensor:
    """Return Microsoft's relative_coords_table, (1, 2 * window - 1, 2 * window - 1, 2) in float32."""
    offset = torch.arange(-(window - 1), window, dtype=torch.float32)
    table = torch.stack(torch.meshgrid(offset, offset, indexing="ij"), dim=-1)[None] / ((pretrained or window) - 1) * 8
    return table.sign() * torch.log2(table.abs() + 1.0) / 3.0


def make(**options) -> WindowAttentionV2:
    torch.manual_seed(0)
    return WindowAttentionV2(16, 8, 2, **options)


def make_model(**options) -> SwinTransformer:
    torch.manual_seed(0)
    given = {"version": 2, "img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
    return SwinTransformer(**{**given, "window_size": 4, "num_classes": 3, **options}).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_published_table_of_the_same_windows_loads(dtype):
    attn = make(pretrained_window_size=6)
    weights = {**attn.state_dict(), "relative_coords_table": published_table(8, 6).to(dtype)}
    before = attn.relative_coords_table.clone()
    attn.load_state_dict(weights)
    assert torch.equal(attn.relative_coords_table, before)
    torch.testing.assert_close(before.reshape(1, 15, 15, 2), published_table(8, 6))


@pytest.mark.parametrize("table", [published_table(8), published_table(8, 12), published_table(12, 6)])
def test_a_table_of_another_pretrained_window_is_refused(table):
    attn = make(pretrained_window_size=6)
    with pytest.raises(RuntimeError, match=r"relative_coords_table does not belong to .*window_size \(6, 6\)"):
        attn.load_state_dict({**attn.state_dict(), "relative_coords_table": table})


def test_a_model_built_on_the_meta_device_and_loaded_by_assigning():
    plain = make_model()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.device("meta"):
        empty = make_model()
    empty.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(empty(x), plain(x))
    assert not any(t.is_meta for t in empty.buffers())


def test_a_checkpoint_of_another_dtype_loaded_by_assigning():
    plain = make_model()
    with torch.device("meta"):
        empty = make_model()
    empty.load_state_dict(copy.deepcopy(plain).bfloat16().state_dict(), assign=True)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(empty(x), plain.bfloat16()(x))


def test_to_empty_and_load():
    plain = make_model()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.device("meta"):
        empty = make_model()
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        empty.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    empty.load_state_dict(plain.state_dict())
    assert torch.equal(empty(x), plain(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how):
    attn = make(pretrained_window_size=6)
    if how == "deepcopy":
        twin = copy.deepcopy(attn)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(attn))
    else:
        file = io.BytesIO()
        torch.save(attn, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    twin.relative_coords_table.zero_()
    twin.load_state_dict(attn.state_dict())
    assert torch.equal(twin.relative_coords_table, attn.relative_coords_table)


def test_the_table_follows_the_module():
    attn = make()
    exact = attn.double().relative_coords_table.clone()
    assert torch.equal(attn.half().double().relative_coords_table, exact)
    assert isinstance(attn.cpb_mlp[0], nn.Linear)
    torch.testing.assert_close(exact.float().reshape(1, 15, 15, 2), published_table(8))
