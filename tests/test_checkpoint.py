"""One file for values and patterns: what comes back, what is refused, and what a kill leaves behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxsparse import BlockPattern, checkpoint, dynamic, spmm

PATTERN = BlockPattern.random(jax.random.key(0), (45, 70), density=0.3, block=(7, 5))
TREE = {
    "layer": {"kernel": jnp.ones(PATTERN.values_shape), "pattern": PATTERN, "view": PATTERN.T},
    "empty": BlockPattern.random(jax.random.key(0), (4, 4), density=0.0),
    "dtypes": {
        name: jnp.arange(5).astype(name) for name in ("bfloat16", "float16", "float8_e4m3fn", "int8", "uint32", "bool")
    },
    "step": 17,
    "nothing": {"here": {}},
    "none": np.zeros((0, 3), np.float64),
}


@pytest.fixture
def path(tmp_path):
    checkpoint.save(tmp_path / "c.safetensors", TREE)
    return tmp_path / "c.safetensors"


def assert_same(got, wanted):
    """The same tree, bit for bit, in the same dtypes, and numbers as numbers."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype and hasattr(a, "dtype") == hasattr(b, "dtype")
        np.testing.assert_array_equal(a, b)


def test_a_tree_round_trips(path):
    assert_same(checkpoint.load(path), TREE)
    assert os.listdir(path.parent) == [path.name]


def test_other_readers_of_safetensors_read_it(path):
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata()["format"] == "jaxsparse"
        np.testing.assert_array_equal(file.get_tensor("layer.kernel"), TREE["layer"]["kernel"])
        np.testing.assert_array_equal(file.get_tensor("layer.pattern.row_index"), PATTERN.row_index)


def test_torch_reads_and_writes_the_same_files(path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    import torch_bridge
    from torch_bridge import checkpoint as in_torch

    tree = in_torch.load(path)
    assert tree["dtypes"]["bfloat16"].dtype == torch.bfloat16
    layer = torch_bridge.BlockSparseLinear(45, 70, pattern=tree["layer"]["pattern"], bias=False)
    layer.weight.data = tree["layer"]["kernel"]
    np.testing.assert_allclose(layer(torch.ones(45)).detach(), spmm(jnp.ones(45), TREE["layer"]["kernel"], PATTERN))
    in_torch.save(path, tree)
    assert_same(checkpoint.load(path), TREE)


def rewritten(data: bytes, change) -> bytes:
    """The file with a changed header, of whatever length."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def meta(**changes):
    return lambda data: rewritten(data, lambda header: header["__metadata__"].update(changes))


DAMAGE = {
    "empty": (lambda data: b"", "truncated"),
    "cut in the header": (lambda data: data[:100], "truncated: the header should end at byte"),
    "cut in the arrays": (lambda data: data[:-1], "truncated: its arrays take"),
    "longer": (lambda data: data + b"\0", "too long"),
    "a flipped bit": (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "SHA-256"),
    "no JSON": (lambda data: data[:8] + b"x" + data[9:], "no JSON object"),
    "another length": (lambda data: b"\x09" + data[1:], "JSON|truncated"),
    "another format": (meta(format="pt"), "format tag is 'pt'"),
    "a newer version": (meta(version="3"), "version 3, and this jaxsparse reads up to 2"),
    "another digest": (meta(sha256="0" * 64), "SHA-256"),
    "another tree": (meta(tree="{}"), "SHA-256"),
    "another shape": (lambda data: rewritten(data, lambda header: header["none"].update(shape=[1])), "SHA-256"),
    "no offsets": (lambda data: rewritten(data, lambda header: header["none"].pop("data_offsets")), "data_offsets"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused_with_the_reason(path, name):
    change, message = DAMAGE[name]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path)


def test_every_single_cut_is_refused(path):
    data = path.read_bytes()
    for length in range(0, len(data), 61):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="truncated"):
            checkpoint.load(path)


def test_a_file_of_version_1_is_still_read():
    pattern = BlockPattern.banded((9, 6), 1, (2, 3))
    kernel = np.arange(np.prod(pattern.values_shape), dtype=np.float32).reshape(pattern.values_shape)
    layer = {"kernel": kernel, "pattern": pattern, "view": pattern.T}
    tree = {"layer": layer, "half": jnp.arange(3, dtype=jnp.bfloat16), "nothing": {"here": {}}}
    path = Path(__file__).parent / "data" / "version1.safetensors"
    assert_same(checkpoint.load(path), {**tree, "step": np.int64(17)})  # so were numbers saved
    assert_same(checkpoint.load(path, {**tree, "step": 0}), {**tree, "step": 17})


SAVER = """
import os, resource, signal, sys, numpy as np
from jaxsparse import checkpoint

def save(k):
    checkpoint.save(sys.argv[1], {"a": np.full(200_000, k), "b": np.full(50_000, k)})

save(1)
if sys.argv[2] == "write":
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # kills where the file grows too large
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
else:
    setattr(os, sys.argv[2], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
save(2)
"""


@pytest.mark.parametrize(("moment", "whole"), [("write", 1), ("fsync", 1), ("replace", 1), ("open", 2)])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, moment, whole):
    path, root = tmp_path / "c.safetensors", Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", SAVER, str(path), moment], cwd=root)
    assert -done.returncode in (signal.SIGKILL, signal.SIGXFSZ)
    assert path.with_name(path.name + ".partial").exists() == (whole == 1)  # it came in the middle of a save
    tree = checkpoint.load(path)
    assert (tree["a"] == whole).all() and (tree["b"] == whole).all()
    checkpoint.save(path, TREE)  # what is left behind is in nobody's way
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("kind", ["orbax", "safetensors"])
def test_a_rigl_run_continues_bit_by_bit(kind, tmp_path):
    optimizer, x, target = optax.adam(1e-2), jax.random.normal(jax.random.key(1), (16, 32)), jnp.ones((16, 24))

    def fresh(seed):
        pattern = BlockPattern.random(jax.random.key(seed), (32, 24), density=0.2)
        kernel = jax.random.normal(jax.random.key(seed), pattern.values_shape)
        return {"kernel": kernel, "pattern": pattern, "state": optimizer.init(kernel), "step": jnp.int32(0)}

    @jax.jit
    def step(run):
        kernel, pattern, state, t = (run[name] for name in ("kernel", "pattern", "state", "step"))
        loss = lambda kernel, probe: jnp.square(spmm(x, kernel, pattern) + probe - target).mean()  # noqa: E731
        grads, dy = jax.grad(loss, (0, 1))(kernel, jnp.zeros_like(target))
        updates, state = optimizer.update(grads, state)
        move = lambda k, p, s: dynamic.rigl(k, p, s, x=x, dy=dy, drop_fraction=0.3)  # noqa: E731
        args = (optax.apply_updates(kernel, updates), pattern, state)
        kernel, pattern, state = jax.lax.cond(t % 2 == 1, move, lambda *same: same, *args)
        return {"kernel": kernel, "pattern": pattern, "state": state, "step": t + 1}

    run = fresh(0)
    for _ in range(5):
        run = step(run)
    other = fresh(1)
    if kind == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "c", run)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "c", other)
    else:
        checkpoint.save(tmp_path / "c", run)
        restored = checkpoint.load(tmp_path / "c", other)
    assert (np.asarray(other["pattern"].row_index) != np.asarray(run["pattern"].row_index)).any()
    for _ in range(5):
        run, restored = step(run), step(restored)
    assert_same(restored, run)
