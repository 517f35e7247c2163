"""Tests the accelerated entrypoints in timm's model registry."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", reason="timm is not installed")

import timm

import swinkernels.integrations.timm
from swinkernels.adapters.adapter import Accelerated
from swinkernels.integrations.timm import registry

MODULES = ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr")
ORIGINALS = [name for module in MODULES for name in timm.list_models(module=module)]
# One model for each of timm's model files; two blocks in two stages are enough.
SMALL = {"depths": (1, 1), "embed_dim": 24, "num_heads": (2, 2), "num_classes": 5, "img_size": 64}
NAMES = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224")


def accelerated_modules(model: torch.nn.Module) -> int:
    return sum(isinstance(m, Accelerated) for m in model.modules())


def test_there_is_one_for_every_model_with_its_tags():
    assert len(ORIGINALS) > 30
    assert sorted(timm.list_models("swinkernels_*")) == sorted(f"swinkernels_{name}" for name in ORIGINALS)
    for arguments in ({"include_tags": True}, {"pretrained": True}):
        theirs = [n for module in MODULES for n in timm.list_models(module=module, **arguments)]
        ours = timm.list_models("swinkernels_*", **arguments)
        assert sorted(ours) == sorted(f"swinkernels_{name}" for name in theirs)
    assert timm.list_models(module="registry") == timm.list_models("swinkernels_*")
    assert all(
        name in registry.__all__ and callable(getattr(registry, name)) for name in timm.list_models("swinkernels_*")
    )


@pytest.mark.parametrize("name", ORIGINALS)
def test_configurations_are_those_of_the_original(name):
    ours = f"swinkernels_{name}"
    assert timm.is_model_pretrained(ours) == timm.is_model_pretrained(name)
    theirs = timm.models.get_arch_pretrained_cfgs(name)
    for tagged, cfg in timm.models.get_arch_pretrained_cfgs(ours).items():
        expected = theirs[tagged.removeprefix("swinkernels_")]
        assert cfg.architecture == ours
        assert {**cfg.to_dict(), "architecture": None} == {**expected.to_dict(), "architecture": None}


def number_accelerated(name: str) -> int:
    """Return the number of blocks and patch mergings and, except in v2-CR, of patch embeddings."""
    return 2 + 1 + ("_cr_" not in name)


@pytest.mark.parametrize("name", NAMES)
def test_create_model_gives_timms_model_accelerated(name):
    models = []
    for prefix in ("", "swinkernels_"):
        torch.manual_seed(0)
        models.append(timm.create_model(prefix + name, **SMALL, drop_path_rate=0.1).eval())
    plain, fast = models
    assert accelerated_modules(plain) == 0
    assert accelerated_modules(fast) == number_accelerated(name)
    assert fast.default_cfg == plain.default_cfg
    assert list(fast.state_dict()) == list(plain.state_dict())
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("feature_cls", [None, "getter"])
def test_features_only(name, feature_cls):
    options = {k: v for k, v in SMALL.items() if k != "num_classes"}
    models = []
    for prefix in ("", "swinkernels_"):
        torch.manual_seed(0)
        model = timm.create_model(
            prefix + name, **options, features_only=True, feature_cls=feature_cls, out_indices=(0, 1)
        )
        models.append(model.eval())
    plain, fast = models
    assert accelerated_modules(fast) == number_accelerated(name)
    assert fast.feature_info.channels() == plain.feature_info.channels()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for got, expected in zip(fast(x), plain(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_the_original_is_loaded(tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model(NAMES[0], **SMALL)
    torch.save(plain.state_dict(), tmp_path / "checkpoint.pth")
    fast = timm.create_model(f"swinkernels_{NAMES[0]}", **SMALL, checkpoint_path=str(tmp_path / "checkpoint.pth"))
    again = timm.create_model(
        f"swinkernels_{NAMES[0]}.ms_in1k",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "checkpoint.pth"), "num_classes": 5},
        **SMALL,
    )
    for model in (fast, again):
        assert accelerated_modules(model) == 1 + 2 + 1
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, q)
    assert again.pretrained_cfg["tag"] == "ms_in1k"
    assert again.pretrained_cfg["architecture"] == NAMES[0]


def test_a_wrong_tag_is_refused_as_timm_does():
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model(f"swinkernels_{NAMES[0]}.no_such_tag", **SMALL)


def test_it_says_when_nothing_could_be_accelerated(monkeypatch):
    monkeypatch.setattr(
        registry, "accelerate", lambda model: swinkernels.accelerate(torch.nn.Sequential(copy.deepcopy(model).head))
    )
    with pytest.warns(UserWarning, match="runs timm's own code"):
        timm.create_model(f"swinkernels_{NAMES[0]}", **SMALL)


def test_importing_again_changes_nothing(monkeypatch):
    for name in ("__all__", "default_cfgs"):  # restored after the test
        monkeypatch.setattr(registry, name, getattr(registry, name))
    before = {name: timm.models.model_entrypoint(name) for name in timm.list_models("swinkernels_*")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(registry)
    assert {name: timm.models.model_entrypoint(name) for name in timm.list_models("swinkernels_*")} == before


SCRIPT = """
import sys
import timm
print(__name__, sys.argv[1:], len(timm.list_models("swinkernels_*")), sys.path[0])
"""


def test_a_script_that_imports_only_timm(tmp_path):
    """``-m swinkernels.integrations.timm`` registers the models for the script; ``import timm`` alone does not."""
    script = tmp_path / "validate.py"
    script.write_text(SCRIPT)
    root = Path(swinkernels.__file__).parent.parent
    command = [sys.executable, "-m", "swinkernels.integrations.timm", str(script), "--model", "x"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.strip() == f"__main__ ['--model', 'x'] {len(ORIGINALS)} {tmp_path}"


@pytest.mark.parametrize("arguments", [[], ["no_such_script.py"]])
def test_a_script_that_is_not_there(arguments, monkeypatch):
    from swinkernels.integrations.timm import __main__ as entry

    monkeypatch.setattr(sys, "argv", ["timm", *arguments])
    with pytest.raises(SystemExit, match=r"no_such_script\.py" if arguments else "torchrun"):
        entry.main()
