"""Tests that the demo runs to the end, reports that the numbers agree, and writes its files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")

from swinkernels.demo import measure
from swinkernels.demo.__main__ import main, parse

PARTS = {"stage 1", "stage 2", "stage 3", "stage 4", "total"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the output folder of a small demo run that would fail if it opened a socket."""
    folder = tmp_path_factory.mktemp("demo")
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise OSError('the demo opened a socket')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from swinkernels.demo.__main__ import main\n"
        "sys.exit(main())"
    )
    options = ["--device", "cpu", "--image-size", "64", "--batch", "1", "--repeats", "2", "--out", str(folder)]
    run = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (folder / "stdout.txt").write_text(run.stdout)
    return folder


def test_logits_agree(folder):
    agreement = json.loads((folder / "results.json").read_text())["agreement"]
    assert agreement["within_budget"]
    assert 0.1 < agreement["largest_logit"] < 100
    assert agreement["largest_logit_difference"] <= 1e-5 * agreement["largest_logit"]


def test_times_and_memory_of_both_models_and_both_steps(folder):
    results = json.loads((folder / "results.json").read_text())
    for mode in (measure.INFERENCE, measure.TRAINING):
        for model in ("timm", "swinkernels"):
            times = results["median_ms"][mode][model]
            assert times.keys() == PARTS
            assert all(t > 0 for t in times.values())
            assert sum(times[part] for part in PARTS - {"total"}) < 1.5 * times["total"]
            assert results["peak_memory_bytes"][mode][model] > 2**20
    training, inference = (results["peak_memory_bytes"][mode]["timm"] for mode in (measure.TRAINING, measure.INFERENCE))
    assert training > 4 * 28e6  # at least the float32 gradients of Swin-T's 28 million parameters
    assert inference < training / 4
    assert len(results["backends"]) == 1 + 12 + 3


def test_pictures(folder):
    import matplotlib.image

    for name, ratio in (("stages.png", 2.08), ("times.png", 2.78)):
        image = matplotlib.image.imread(folder / name)
        assert image.shape[1] > 1500
        assert image.shape[1] / image.shape[0] == pytest.approx(ratio, rel=0.02)
        assert len({tuple(pixel) for pixel in image[::7, ::7, :3].reshape(-1, 3)}) > 5, "the picture is blank"


def test_what_is_printed(folder):
    text = (folder / "stdout.txt").read_text()
    for expected in (
        "16 replaced",
        "layers.3.blocks.1",
        "within twice timm's own error",
        "speed-up",
        "MiB",
    ):
        assert expected in text


def test_conclusion(folder):
    """The demo ends with a summary of the measurements, the backend of each module class, file paths and duration."""
    results = json.loads((folder / "results.json").read_text())
    *_, sentence, embedding, blocks, merging, files, seconds = (folder / "stdout.txt").read_text().splitlines()
    difference = results["agreement"]["largest_logit_difference"]
    assert sentence.startswith(f"swinkernels against timm: same logits to {difference:.1g}; ")
    for mode, by_model in results["median_ms"].items():
        ratio = by_model["timm"]["total"] / by_model["swinkernels"]["total"]
        assert f"{max(ratio, 1 / ratio):.2f}x {'faster' if ratio >= 1 else 'slower'} in {mode.split()[0]}" in sentence
    (backend,) = {b for path, b in results["backends"].items() if "blocks" in path}
    assert blocks == f"12 SwinTransformerBlock: backend {backend}; Residual and norm: torch"
    assert embedding == "1 PatchEmbed: backend torch"
    assert merging == "3 PatchMerging: backend torch"
    stages, times, figures = (folder / name for name in ("stages.png", "times.png", "results.json"))
    assert files == f"pictures: {stages}, {times}; every figure: {figures}"
    assert seconds.startswith("The demo took ")


def test_a_model_without_supported_blocks_is_told(tmp_path, capsys):
    options = ["--device", "cpu", "--model", "vit_tiny_patch16_224", "--image-size", "224", "--out", str(tmp_path)]
    assert main(options) == 1
    assert "Nothing to replace" in capsys.readouterr().out


def test_a_model_without_swins_stages_is_told(tmp_path, capsys):
    options = ["--device", "cpu", "--model", "swinv2_cr_tiny_ns_224", "--image-size", "224", "--out", str(tmp_path)]
    assert main(options) == 1
    assert "swinv2_cr_tiny_ns_224 has no stages that the demo can find" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch and --repeats must be at least 1"),
        (["--repeats", "-1"], "--batch and --repeats must be at least 1"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--backend", "gpu"], "invalid choice: 'gpu'"),
    ],
)
def test_wrong_options(options, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(options)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_peak_memory_on_a_cpu_is_that_of_the_tensors():
    """The peak is the size of the two 4 MiB tensors that exist at the same time, plus that of some small ones."""
    import torch

    class Two(torch.nn.Module):
        def forward(self, x):
            first = torch.ones(2**20)
            second = first + 1
            del first
            return second.sum() + x.new_zeros(1, 3)

    peak = measure.peak_memory(Two(), torch.zeros(1), torch.float32, measure.INFERENCE)
    assert 2 * 2**22 <= peak < 2 * 2**22 + 2**16
