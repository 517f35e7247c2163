"""Tests the public registration of adapters, and the module paths that adapters had in 0.1.0."""

from __future__ import annotations

import importlib
import pickle
import sys

import pytest
import torch

import swinkernels
import swinkernels.integrations
from swinkernels.adapters import adapter as engine

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("library", "adapters", "error", "text"),
    [
        (timm, ("x",), TypeError, "library must be the name of a module, got module"),
        ("timm.models", (), ValueError, "at least one adapter is needed for timm.models, got none"),
        (
            "timm.models",
            ("x",),
            TypeError,
            "an adapter must be a swinkernels.adapters.Adapter or a swinkernels.adapters.Form, got str",
        ),
    ],
)
def test_wrong_registrations_are_refused(library, adapters, error, text):
    before = dict(engine._ADAPTERS)
    with pytest.raises(error, match=text):
        swinkernels.adapters.register(library, *adapters)
    assert before == engine._ADAPTERS


def test_old_module_paths_import_the_moved_modules():
    for old, new in swinkernels.integrations._MOVED.items():
        sys.modules.pop(f"swinkernels.integrations.{old}", None)
        with pytest.warns(FutureWarning, match=rf"is now swinkernels\.adapters\.{new}"):
            module = importlib.import_module(f"swinkernels.integrations.{old}")
        assert module is importlib.import_module(f"swinkernels.adapters.{new}")


def test_a_model_pickled_by_the_old_paths_loads():
    model = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=16, depths=(1,), num_heads=(2,), img_size=28)
    swinkernels.accelerate(model)
    old = pickle.dumps(model, 0).replace(
        b"swinkernels.adapters.libraries.timm.swin", b"swinkernels.integrations.timm.swin"
    )
    assert b"swinkernels.integrations.timm.swin" in old
    x = torch.randn(1, 3, 28, 28)
    torch.testing.assert_close(pickle.loads(old)(x), model(x), rtol=0, atol=0)
