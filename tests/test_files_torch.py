"""Files of torch.save: every layout and container comes back, and damage is named."""

import io
import pickle
import zipfile

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jaxsparse import files  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support is in beta state:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
]


def weight(dtype=torch.float32):
    """An (out, in) weight in blocks of (4, 5), with an output without any."""
    torch.manual_seed(0)
    kept = (torch.rand(3, 4) < 0.5).repeat_interleave(4, 0).repeat_interleave(5, 1)
    kept[:4] = False
    return (torch.randn(12, 20) * kept).to(dtype)


LAYOUTS = {
    "coo": lambda w: w.to_sparse_coo(),
    "csr": lambda w: w.to_sparse_csr(),
    "csc": lambda w: w.to_sparse_csc(),
    "bsr": lambda w: w.to_sparse_bsr((4, 5)),
    "bsc": lambda w: w.to_sparse_bsc((4, 5)),
}


def read(saved, tmp_path, name="m"):
    torch.save(saved, tmp_path / name)
    return files.read(tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_tensor_becomes_a_matrix_in_by_out(layout, dtype, tmp_path):
    found = read({"model": {"layer.weight": LAYOUTS[layout](weight(dtype))}}, tmp_path)["model.layer.weight"]
    assert found.pattern.block == ((5, 4) if layout.startswith("bs") else (1, 1))
    assert found.values.dtype == (jnp.bfloat16 if dtype == torch.bfloat16 else np.float32)
    dense = found.pattern.to_dense(jnp.asarray(found.values)).astype(np.float32)
    np.testing.assert_array_equal(dense, weight(dtype).float().numpy().T)
    assert found.pattern.nnzb * np.prod(found.pattern.block) == weight().count_nonzero()


def test_a_tensor_by_itself_is_a_matrix(tmp_path):
    found = read(LAYOUTS["csr"](weight()), tmp_path)
    assert found.keys() == {"matrix"} and found["matrix"].pattern.shape == (20, 12)


def test_dense_tensors_numbers_and_words_keep_their_places(tmp_path):
    small = torch.arange(4.0).to(torch.float8_e4m3fn)
    saved = {"a": [torch.ones(2, 3).T, {"b": torch.tensor(2, dtype=torch.int64)}], "step": 7, "name": "x", "f8": small}
    found = read(saved, tmp_path)
    assert found.keys() == {"a.0", "a.1.b", "step", "name", "f8"} and (found["step"], found["name"]) == (7, "x")
    assert found["a.0"].shape == (3, 2) and found["a.1.b"] == 2
    np.testing.assert_array_equal(found["f8"].astype(np.float32), np.arange(4.0))


def test_weights_in_parts_are_put_together_and_folders_are_read_whole(tmp_path):
    w = weight()
    parts = {
        "compressed": w[w != 0],
        "bitmask": torch.from_numpy(np.packbits((w != 0).numpy(), axis=1, bitorder="little")),
        "shape": torch.tensor(w.shape),
    }
    torch.save({f"layer.weight.{k}": t for k, t in parts.items()}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"bias": torch.ones(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    torch.save({"no": 1}, tmp_path / "training_args.bin")
    found = files.read(tmp_path)
    assert found.keys() == {"layer.weight", "bias"}
    np.testing.assert_array_equal(found["layer.weight"].pattern.to_dense(found["layer.weight"].values), w.numpy().T)


def test_a_file_cut_at_any_tenth_byte_is_refused(tmp_path):
    read({"w": LAYOUTS["csr"](weight())}, tmp_path)
    data = (tmp_path / "m").read_bytes()
    for end in range(0, len(data) - 1, 10):
        (tmp_path / "cut").write_bytes(data[:end])
        with pytest.raises(ValueError, match="cut can't be read"):
            files.read(tmp_path / "cut")


WRONG = {
    "csr falls": lambda: torch.sparse_csr_tensor([0, 2, 1, 3], [0, 1, 0], [1.0, 2, 3], (3, 4), check_invariants=False),
    "csr beyond": lambda: torch.sparse_csr_tensor([0, 1, 2, 3], [0, 4, 0], [1.0, 2, 3], (3, 4), check_invariants=False),
    "csr sizes swapped": lambda: torch.sparse_csr_tensor(
        [0, 1, 2, 3], [0, 3, 0], [1.0, 2, 3], (4, 3), check_invariants=False
    ),
    "csc negative": lambda: torch.sparse_csc_tensor(
        [0, 1, 2, 3], [0, -1, 0], [1.0, 2, 3], (4, 3), check_invariants=False
    ),
    "csr endless": lambda: torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 2**40), check_invariants=False),
    "coo endless": lambda: torch.sparse_coo_tensor([[0], [0]], [1.0], (2**40, 1)),
    "coo hybrid": lambda: torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (3, 2)),
    "expanded": lambda: torch.ones(1).expand(2**20, 2**20),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_matrix_is_refused_by_its_name(name, tmp_path):
    with pytest.raises(ValueError, match="m can't be read: (deep.weight: |torch.load)"):
        read({"deep": {"weight": WRONG[name]()}}, tmp_path)


class Hostile:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_code_is_not_run(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"torch.load\(weights_only=True\) says"):
        read({"w": Hostile()}, tmp_path)
    (tmp_path / "old").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match="no archive of torch.save"):
        files.read(tmp_path / "old")
    assert "must not run" not in capsys.readouterr().out


def test_an_archive_that_is_compressed_is_refused_before_it_is_read(tmp_path):
    data = io.BytesIO()
    torch.save({"w": torch.zeros(2**16)}, data)
    with zipfile.ZipFile(data) as old, zipfile.ZipFile(tmp_path / "m", "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    with pytest.raises(ValueError, match="is compressed, as torch writes none"):
        files.read(tmp_path / "m")
