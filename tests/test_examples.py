"""Every example runs as its user would run it, in a process of its own, with sizes small enough for a test."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
FORUM = ["masked", "to_sparse()", "SparseLinear"]
LAYERS = ["dense", "block-diagonal", "block-sparse", "unstructured"]
needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")


@pytest.fixture
def picture_and_bar():
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the picture, is not installed")
    pytest.importorskip("tqdm", reason="tqdm, which draws the progress bar, is not installed")


@pytest.fixture
def digits():
    pytest.importorskip("sklearn", reason="scikit-learn, which brings the digits, is not installed")


@pytest.fixture
def mnist_like(tmp_path):
    """A file with MNIST's arrays: each class is a bright square of its own place, in noise."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 256), ("test", 64)):
        labels = rng.integers(0, 10, count).astype(np.uint8)
        images = rng.integers(0, 60, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 4)
            image[7 * row : 7 * row + 7, 7 * column : 7 * column + 7] = 255
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    return path


def run(name: str, *args, cwd: Path, extra_path: str = "", fails: bool = False) -> str:
    """Standard output of an example, which must succeed; what it says as an error of one that must fail."""
    paths = [extra_path, str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, args)],
        cwd=cwd,
        # Its user has no cache of compiled programs.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 1) if fails else (done.returncode == 0), f"{name}.py:\n{done.stdout}\n{done.stderr}"
    assert "step/s" not in done.stderr, "a progress bar was drawn where nobody looks"
    return done.stderr if fails else done.stdout


def hidden_from_python(package: str, folder: Path) -> str:
    """A folder that, first on PYTHONPATH, makes a package look as if it were not installed."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    return str(folder)


def table(output: str) -> dict[str, dict[str, float]]:
    """The rows of the classifier's table; it must hold all four."""
    number = r"([\d.,]+)"
    row = rf"{number}% +{number} +{number}x +{number} MB +{number}x +{number} MB +{number} ms +{number}x"
    names = ["accuracy", "parameters", "of_dense", "state", "state_of_dense", "pattern", "ms", "ms_of_dense"]
    rows = {}
    for layer in LAYERS:
        found = re.search(rf"^{layer} +{row}$", output, re.MULTILINE)
        assert found, f"no row for {layer} in\n{output}"
        rows[layer] = {name: float(x.replace(",", "")) for name, x in zip(names, found.groups(), strict=True)}
    return rows


def check_picture(path: Path, least: int = 800) -> None:
    """A PNG of plausible size, with more than an empty page on it."""
    pixels = picture(path)
    height, width, _ = pixels.shape
    assert least < height < 4000 and least < width < 4000
    assert 0.1 < (pixels.min(axis=2) < 0.9).mean() < 0.9


def picture(path: Path) -> np.ndarray:
    """[height, width, 3] of a PNG."""
    import matplotlib.image

    return matplotlib.image.imread(path)[..., :3]


@pytest.mark.slow
@needs_torch
def test_the_classifier_trains_four_models_and_goes_on_in_torch(digits, picture_and_bar, tmp_path):
    out = run("train_classifier", "--width", 320, "--epochs", 6, "--out", "sub/picture.png", cwd=tmp_path)
    rows = table(out)
    for layer in LAYERS:
        assert rows[layer]["accuracy"] > 80
    for layer in LAYERS[1:]:
        assert rows[layer]["parameters"] < 0.3 * rows["dense"]["parameters"]
        assert rows[layer]["state_of_dense"] == pytest.approx(rows[layer]["of_dense"], abs=0.02)
    difference = re.search(r"logits +(\S+)$", out, re.MULTILINE)
    assert difference and float(difference[1]) < 1e-4
    after = re.search(r"test accuracy after it +(\S+)%$", out, re.MULTILINE)
    assert after and float(after[1]) > 80
    check_picture(tmp_path / "sub" / "picture.png")


@pytest.mark.slow
def test_the_classifier_takes_a_file_like_mnist_and_does_without_torch(mnist_like, picture_and_bar, tmp_path):
    hidden = hidden_from_python("torch", tmp_path)
    args = ["--data", mnist_like, "--width", 320, "--epochs", 8, "--batch", 32, "--out", "picture.png"]
    out = run("train_classifier", *args, cwd=tmp_path, extra_path=hidden)
    assert "784 pixels" in out
    assert "PyTorch is not installed" in out
    assert min(row["accuracy"] for row in table(out).values()) > 80
    check_picture(tmp_path / "picture.png")


@pytest.mark.slow
def test_the_ensemble_is_no_worse_than_its_members(digits, tmp_path):
    out = run("ensemble", "--members", 4, "--width", 32, "--epochs", 12, cwd=tmp_path)
    members = re.search(r"members: (\S+)% to (\S+)%, mean (\S+)%; ensemble: (\S+)%", out)
    assert members, out
    worst, best, mean, ensemble = map(float, members.groups())
    assert 70 < worst <= mean <= best and ensemble >= worst
    assert re.search(r"every other step +\S+ ms +\S+ ms +\S+$", out, re.MULTILINE)


@pytest.mark.slow
def test_the_own_mask_learns_as_the_masked_dense_layer_does(tmp_path):
    out = run("own_mask", 10, cwd=tmp_path)
    lines = re.findall(r"loss (\S+) -> (\S+) +(\S+) parameters +\S+ ms per step$", out, re.MULTILINE)
    (first, last, sparse), (_, dense_last, dense) = lines
    assert float(last) < 0.9 * float(first)
    assert float(last) == pytest.approx(float(dense_last), rel=0.01)
    assert int(sparse.replace(",", "")) < 0.11 * int(dense.replace(",", ""))


@pytest.mark.slow
@needs_torch
def test_roberta_trains_as_well_with_half_of_its_blocks(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the picture, is not installed")
    pytest.importorskip("transformers", reason="transformers, which has RoBERTa, is not installed")
    out = run("roberta", "--quick", "--steps", 20, "--out", "sub/picture.png", cwd=tmp_path)
    assert re.search(r"^whole model +156,844 -> 119,980$", out, re.MULTILINE), out
    rows = re.findall(r"^(dense|block-sparse) +([\d,]+) +\S+ +(\S+)$", out, re.MULTILINE)
    assert [row[:2] for row in rows] == [("dense", "156,844"), ("block-sparse", "119,980")]
    dense, sparse = (float(row[2]) for row in rows)
    assert dense < 4 and sparse == pytest.approx(dense, rel=0.05)  # 5.7 at the start
    pixels = picture(tmp_path / "sub" / "picture.png")
    assert pixels.shape[1] == 1440 and 0.005 < (pixels.min(axis=2) < 0.9).mean() < 0.2


@pytest.mark.slow
@needs_torch
def test_a_model_goes_from_flax_to_torch_and_back_with_equal_outputs(digits, tmp_path):
    out = run("flax_and_back", "--quick", cwd=tmp_path)
    flax, torch = map(float, re.findall(r"^(?:trained in Flax|fine-tuned in PyTorch) +(\S+)%", out, re.MULTILINE))
    assert 85 < flax <= torch
    assert max(map(float, re.findall(r"^largest difference .* (\S+)$", out, re.MULTILINE))) < 1e-4
    assert out.endswith("equal bit for bit         True\n")


@needs_torch
def test_one_changed_line_learns_the_same_with_a_tenth_of_the_parameters(tmp_path):
    out = run("forum_question", "--quick", cwd=tmp_path)
    rows = {name: re.search(rf"^{re.escape(name)} +(\S+) +(\S+) +(\S+) +\S+$", out, re.MULTILINE) for name in FORUM}
    assert all(rows.values()), out
    losses = [[float(x) for x in row.groups()[1:]] for row in rows.values()]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=2e-4) and other[1] < other[0]
    sizes = [int(row[1].replace(",", "")) for row in rows.values()]
    assert sizes[2] < 0.11 * sizes[0] == 0.11 * sizes[1]


@pytest.mark.slow
def test_moving_patterns_keep_the_budget_and_draw(digits, picture_and_bar, tmp_path):
    out = run("moving_patterns", "--quick", "--out", "numbers.json", "--picture", "sub/p.png", cwd=tmp_path)
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    rows = {row["method"]: row["seeds"][0] for row in numbers["table"]}
    assert list(rows) == ["dense", "static", "SET", "RigL"] and "RigL" in out and "--quick" in numbers["command"]
    sparse = [rows[name] for name in ("static", "SET", "RigL")]
    assert len({(r["parameters"], r["optimizer_bytes"], r["pattern_bytes"]) for r in sparse}) == 1
    assert sparse[0]["parameters"] < 0.12 * rows["dense"]["parameters"]
    assert all(r["accuracy"] > 0.6 for r in rows.values())
    check_picture(tmp_path / "sub" / "p.png", least=600)


@pytest.mark.slow
def test_the_three_layers_learn(tmp_path):
    out = run("three_layers", "--quick", cwd=tmp_path)
    found = re.findall(r"^(\w+) +loss +(\S+) -> +(\S+) +(\S+) parameters", out, re.MULTILINE)
    assert [name for name, *_ in found] == ["RandomSparse", "TopK", "Moving"]
    losses = [(float(first), float(last)) for _, first, last, _ in found]
    assert all(last < first for first, last in losses) and losses[2][1] < losses[0][1]


@pytest.mark.slow
def test_the_small_gpt_runs_with_every_mlp(tmp_path):
    out = run("byte_gpt", "--quick", cwd=tmp_path)
    found = re.findall(r"^(dense|block-\S+(?: wide)?) +(\S+) +(\S+) +(\S+) +\S+ MB +\S+ ms$", out, re.MULTILINE)
    assert [name for name, *_ in found] == ["dense", "block-sparse", "block-sparse, wide", "block-diagonal, wide"]
    dense, small, wide, diagonal = (int(of_mlps.replace(",", "")) for *_, of_mlps in found)
    assert 4 * small == dense == wide == diagonal
    assert all(float(bits) < 6 for _, bits, *_ in found)  # 8 without having learned anything


PROCESSES = ["--width", 160, "--batch", 64, "--steps", 8, "--save-every", 3]
LOSSES = r"^(dense|block-diagonal) +loss (\S+) -> (\S+)$"


@pytest.fixture
def orbax():
    pytest.importorskip("orbax.checkpoint", reason="Orbax, which writes the checkpoints, is not installed")


@pytest.mark.slow
def test_four_processes_learn_as_one_does(digits, picture_and_bar, orbax, tmp_path):
    out = run("many_processes", "--processes", 4, "--compare", *PROCESSES, cwd=tmp_path)
    assert "mesh {'batch': 2, 'blocks': 2}" in out and "mesh {'batch': 1, 'blocks': 1}" in out
    names = [name for name, *_ in re.findall(LOSSES, out, re.MULTILINE)]
    assert names == 2 * ["dense", "block-diagonal"]
    differences = dict(re.findall(r"^(\S+) +largest difference to one process (\S+)$", out, re.MULTILINE))
    floor = 4 * np.finfo(np.float32).eps * 3  # losses are below 3
    assert float(differences["block-diagonal"]) <= max(2 * float(differences["dense"]), floor)


@pytest.mark.slow
def test_a_killed_process_ends_all_and_training_goes_on_with_another_number(digits, picture_and_bar, orbax, tmp_path):
    said = run("many_processes", "--processes", 2, "--kill-at", 5, *PROCESSES, cwd=tmp_path, fails=True)
    ended = re.search(r"all ended within (\S+) of 20 s; process 0: ended with code \S+, process 1: was killed", said)
    assert ended and float(ended[1]) < 20 and "goes on from the last checkpoint" in said
    again = run("many_processes", "--processes", 1, *PROCESSES, cwd=tmp_path)
    assert "training from step 3" in again
    whole = run("many_processes", "--processes", 1, *PROCESSES, "--folder", "whole", cwd=tmp_path)
    after, never_killed = ([float(row[2]) for row in re.findall(LOSSES, s, re.MULTILINE)] for s in (again, whole))
    assert len(after) == 2 and after == pytest.approx(never_killed, abs=2e-4)


@pytest.mark.slow
@needs_torch
def test_ddp_and_fsdp_learn_as_one_process_does(tmp_path):
    out = run("torch_distributed", "--steps", 8, "--width", 64, cwd=tmp_path)
    found = re.findall(r"^(DDP|FSDP2) +loss (\S+) -> (\S+) +largest difference (\S+)$", out, re.MULTILINE)
    assert [name for name, *_ in found] == ["DDP", "FSDP2"]
    for _, first, last, difference in found:
        assert float(last) < float(first) and float(difference) < 1e-5
