"""Sparse matrices from the files of other libraries: what is in them comes back, and damage is named."""

import io
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io
import scipy.sparse
from safetensors.numpy import save_file

from jaxsparse import BlockPattern, NMPattern, files


def matrix(shape=(13, 21), dtype=np.float32):
    """A dense matrix with empty rows and columns, most of it zero."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=shape) * (rng.random(shape) < 0.2)
    w[shape[0] // 4], w[:, shape[1] // 4], w[-1, -1] = 0, 0, 1.5
    return w.astype(dtype)


def same(found, w):
    assert found.pattern.shape == w.shape
    assert found.pattern.nnzb * np.prod(found.pattern.block) >= np.count_nonzero(w)
    np.testing.assert_array_equal(np.asarray(found.pattern.to_dense(jnp.asarray(found.values))), w)


# ---- one matrix --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "dia", "bsr"])
def test_every_npz_of_scipy_is_read_by_its_content(kind, compressed, tmp_path):
    w = matrix((12, 20))
    sparse = scipy.sparse.bsr_array(w, blocksize=(4, 5)) if kind == "bsr" else scipy.sparse.coo_array(w).asformat(kind)
    with (tmp_path / "no ending").open("wb") as file:
        scipy.sparse.save_npz(file, sparse, compressed=compressed)
    found = files.read(tmp_path / "no ending")
    same(found["matrix"], w)
    assert found["matrix"].pattern.block == ((4, 5) if kind == "bsr" else (1, 1))


@pytest.mark.parametrize("symmetry", ["general", "symmetric", "skew-symmetric", "hermitian"])
@pytest.mark.parametrize("field", ["real", "integer", "pattern"])
@pytest.mark.parametrize("layout", ["coordinate", "array"])
def test_every_matrix_market_file_is_read(layout, field, symmetry, tmp_path):
    w = np.round(matrix((9, 9)) * 4)
    if symmetry == "skew-symmetric":
        w = np.tril(w, -1) - np.tril(w, -1).T
    elif symmetry != "general":
        w = np.tril(w) + np.tril(w, -1).T
    if field == "pattern":
        w = (w != 0).astype(np.float32)
    if (layout, field) == ("array", "pattern") or (field, symmetry) == ("pattern", "skew-symmetric"):
        return  # the format has no such files
    kept = np.tril(w, -1 if symmetry == "skew-symmetric" else 0) if symmetry != "general" else w
    lines = [f"%%MatrixMarket matrix {layout} {field} {symmetry}", "% a remark", ""]
    if layout == "coordinate":
        at = np.argwhere(kept)
        lines += [f"9 9 {len(at)}"] + [f"{i + 1} {j + 1}" + f" {kept[i, j]:g}" * (field != "pattern") for i, j in at]
    else:
        first = {"general": lambda j: 0, "skew-symmetric": lambda j: j + 1}.get(symmetry, lambda j: j)
        lines += ["9 9"] + [f"{kept[i, j]:g}" for j in range(9) for i in range(first(j), 9)]
    (tmp_path / "m").write_text("\n".join(lines) + "\n")
    same(files.read(tmp_path / "m")["matrix"], w)


def test_entries_that_a_matrix_market_file_has_twice_are_summed(tmp_path):
    (tmp_path / "m").write_text("%%MatrixMarket matrix coordinate real general\n2 2 3\n1 2 1\n1 2 2.5\n2 1 4\n")
    same(files.read(tmp_path / "m")["matrix"], np.array([[0, 3.5], [4, 0]], np.float32))


def smtx(w):
    sparse = scipy.sparse.csr_array(w)
    numbers = (" ".join(map(str, a)) for a in (sparse.indptr, sparse.indices))
    return f"{w.shape[0]}, {w.shape[1]}, {sparse.nnz}\n" + "\n".join(numbers) + "\n"


def test_an_smtx_file_gives_a_pattern_without_values(tmp_path):
    (tmp_path / "m.smtx").write_text(smtx(matrix()))
    pattern, values = files.read(tmp_path / "m.smtx")["matrix"]
    assert values is None
    np.testing.assert_array_equal(pattern.to_mask(), matrix() != 0)


# ---- checkpoints -------------------------------------------------------------------------------------------


def bitmask(w, name="layer.weight", offsets=True):
    """A weight (out, in) as compressed-tensors stores it."""
    counts = np.count_nonzero(w, axis=1)
    parts = {"compressed": w[w != 0], "bitmask": np.packbits(w != 0, axis=1, bitorder="little")}
    parts |= {"shape": np.array(w.shape), **({"row_offsets": np.cumsum(counts) - counts} if offsets else {})}
    return {f"{name}.{part}": a for part, a in parts.items()}


def block_mask(w, side, name="layer.weight"):
    """A weight (out, in) as pytorch_block_sparse stores it."""
    grid = w.reshape(w.shape[0] // side, side, w.shape[1] // side, side)
    mask = grid.any(axis=(1, 3))
    rows, cols = np.nonzero(mask)
    blocks = grid.transpose(0, 2, 3, 1)[rows, cols]  # (in, out) within a block
    ptr = np.concatenate([[0], np.cumsum(mask.sum(1))])
    parts = {"data": blocks.reshape(-1, side), "block_mask": mask, "row_start_ends_a": ptr.astype(np.int32)}
    parts["cols_a"] = np.stack([cols, np.arange(len(cols))], 1).astype(np.int32)
    return {f"{name}.{part}": a for part, a in parts.items()}


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("offsets", [True, False])
def test_bitmasks_of_compressed_tensors_become_weights_in_by_out(offsets, dtype, tmp_path):
    w = matrix(dtype=dtype)
    save_file({**bitmask(w, offsets=offsets), "layer.bias": np.ones(13, np.float32)}, tmp_path / "model.safetensors")
    found = files.read(tmp_path / "model.safetensors")
    assert found.keys() == {"layer.weight", "layer.bias"} and found["layer.bias"].shape == (13,)
    assert found["layer.weight"].values.dtype == dtype
    same(found["layer.weight"], w.T)


def test_two_of_four_by_bitmask_has_its_values_as_a_matrix():
    w = np.tile([0, 1.5, 2.5, 0, 3.5, 0, 0, 4.5], (6, 1)).astype(np.float32)
    parts = bitmask(w, offsets=False)
    parts["layer.weight.compressed"] = parts["layer.weight.compressed"].reshape(6, 4)
    parts["layer.weight.shape"] = parts["layer.weight.shape"][:, None]
    found = files.gather(parts)["layer.weight"]
    same(found, w.T)
    pattern, values = NMPattern.from_pattern(found.pattern, found.values, n=2, m=4)
    np.testing.assert_array_equal(values[..., 0], [[1.5, 2.5], [3.5, 4.5]])
    np.testing.assert_array_equal(pattern.to_dense(values), w.T)


def test_blocks_of_pytorch_block_sparse_become_blocks_in_by_out():
    w = np.kron(matrix((3, 5)) != 0, np.ones((32, 32))).astype(np.float32)
    w *= np.random.default_rng(1).normal(size=w.shape).astype(np.float32)
    found = files.gather(block_mask(w, 32))["layer.weight"]
    assert found.pattern.block == (32, 32)
    same(found, w.T)


def test_a_checkpoint_in_several_files_is_read_as_one(tmp_path):
    parts = bitmask(matrix())
    for k, name in enumerate(parts):
        save_file({name: parts[name]}, tmp_path / f"model-{k}.safetensors")
    same(files.read(tmp_path)["layer.weight"], matrix().T)


# ---- damage ------------------------------------------------------------------------------------------------


def whole(kind, tmp_path):
    """A right file of each kind, as bytes."""
    if kind == "mtx":
        file = io.BytesIO()
        scipy.io.mmwrite(file, scipy.sparse.coo_array(matrix()))
        return file.getvalue()
    if kind == "smtx":
        return smtx(matrix()).encode()
    if kind == "safetensors":
        save_file(bitmask(matrix()), tmp_path / "whole")
        return (tmp_path / "whole").read_bytes()
    file = io.BytesIO()
    scipy.sparse.save_npz(file, scipy.sparse.csr_array(matrix()), compressed=kind == "npz")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["npz", "stored npz", "mtx", "smtx", "safetensors"])
def test_a_file_cut_at_any_tenth_byte_is_refused(kind, tmp_path):
    data, path = whole(kind, tmp_path), tmp_path / "cut"
    path.write_bytes(data)
    right = files.read(path)
    for end in range(0, len(data) - 1, 10):
        path.write_bytes(data[:end])
        try:
            got = files.read(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # a text without its last digits may be a right one, of other numbers
            assert kind in ("mtx", "smtx") and end > len(data) - 40, (end, len(data))
            assert got["matrix"].pattern.nnzb == right["matrix"].pattern.nnzb


MM = "%%MatrixMarket matrix"
TEXTS = {
    "empty": ("", "no SciPy"),
    "something else": ("hello world\n", "no SciPy .npz, no Matrix Market"),
    "mtx without words": ("%%MatrixMarket\n1 1 1\n1 1 1\n", "first line"),
    "mtx of a vector": ("%%MatrixMarket vector coordinate real general\n1 1 1\n", "first line"),
    "mtx with complex numbers": (f"{MM} coordinate complex general\n1 1 1\n1 1 1 1\n", "complex"),
    "mtx with too few sizes": (f"{MM} coordinate real general\n2 2\n1 1 1\n", "line of sizes"),
    "mtx with words for sizes": (f"{MM} coordinate real general\n2 two 1\n1 1 1\n", "line of sizes"),
    "mtx with more entries than bytes": (f"{MM} coordinate real general\n9 9 1000000000000\n1 1 1\n", "can hold"),
    "mtx with a larger array than bytes": (f"{MM} array real general\n1000000 1000000\n1\n", "can hold"),
    "mtx with an endless side": (f"{MM} coordinate real general\n999999999 2 1\n1 1 1\n", "pointers"),
    "mtx with a row beyond": (f"{MM} coordinate real general\n2 2 1\n3 1 1\n", "row index 2 .* outside 0 to 1"),
    "mtx with row 0": (f"{MM} coordinate real general\n2 2 1\n0 1 1\n", "row index -1 .* outside 0 to 1"),
    "mtx with a word for a number": (f"{MM} coordinate real general\n2 2 1\n1 1 x\n", "else than numbers"),
    "mtx with a fraction of a row": (f"{MM} coordinate real general\n2 2 1\n1.5 1 1\n", "no integer"),
    "mtx with NaN for a row": (f"{MM} coordinate real general\n2 2 1\nnan 1 1\n", "no integer"),
    "mtx with a number too many": (f"{MM} coordinate real general\n2 2 1\n1 1 1 1\n", "4 follow"),
    "mtx symmetric and not square": (f"{MM} coordinate real symmetric\n2 3 1\n1 1 1\n", "is square"),
    "mtx symmetric with both halves": (f"{MM} coordinate real symmetric\n2 2 2\n1 2 1\n2 1 1\n", "above the diagonal"),
    "mtx skew with a diagonal": (f"{MM} coordinate real skew-symmetric\n2 2 1\n1 1 1\n", "above the diagonal"),
    "mtx with sizes swapped": (f"{MM} coordinate real general\n2 5 1\n5 2 1\n", "row index 4 .* outside 0 to 1"),
    "smtx with more entries than bytes": ("9, 9, 100000000000\n0 1\n", "can hold"),
    "smtx with an endless side": ("1, 99999999999, 1\n0 1\n0\n", "pointers"),
    "smtx with falling offsets": ("2, 3, 2\n0 2 1\n0 1\n", "falls"),
    "smtx with offsets that end early": ("2, 3, 2\n0 1 1\n0 1\n", "runs from 0 to 1"),
    "smtx with a column beyond": ("2, 3, 2\n0 1 2\n0 3\n", "outside 0 to 2"),
    "smtx with a negative column": ("2, 3, 2\n0 1 2\n0 -1\n", "outside 0 to 2"),
    "smtx with a column twice": ("2, 3, 2\n0 2 2\n1 1\n", "duplicate"),
    "smtx with words": ("2, 3, 2\n0 1 2\n0 x\n", "else than integers"),
    "smtx with too many numbers": ("2, 3, 2\n0 1 2\n0 1 1\n", "6 follow"),
    "smtx with sizes swapped": ("3, 2, 2\n0 1 2\n0 2\n", "can hold"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_wrong_text_is_refused_with_what_is_wrong(name, tmp_path):
    text, message = TEXTS[name]
    (tmp_path / "m").write_text(text)
    with pytest.raises(ValueError, match=message):
        files.read(tmp_path / "m")


def changed(change):
    """The arrays of a right CSR .npz, with a change."""
    m = scipy.sparse.csr_array(matrix())
    arrays = {"format": b"csr", "shape": np.array(m.shape), "data": m.data, "indices": m.indices, "indptr": m.indptr}
    change(arrays)
    return arrays


NPZ = {
    "no format": (lambda a: a.pop("format"), "have format"),
    "another format": (lambda a: a.update(format=b"xyz"), "xyz|format"),
    "no indices": (lambda a: a.pop("indices"), "indices"),
    "no shape": (lambda a: a.pop("shape"), "have format"),
    "three sizes": (lambda a: a.update(shape=np.array([1, 2, 3])), "shape|unpack"),
    "sizes swapped": (lambda a: a.update(shape=a["shape"][::-1]), "indptr|index"),
    "an endless side": (lambda a: a.update(shape=np.array([13, 2**40])), "pointers"),
    "falling offsets": (lambda a: a["indptr"].__setitem__(3, 40), "falls|indptr"),
    "a column beyond": (lambda a: a["indices"].__setitem__(3, 21), "outside 0 to 20|index"),
    "a negative column": (lambda a: a["indices"].__setitem__(3, -1), "outside 0 to 20|index"),
    "fewer values": (lambda a: a.update(data=a["data"][:-1]), "data|values"),
    "pickled values": (lambda a: a.update(data=np.array([{}], object)), "pickle|Object|object"),
}


@pytest.mark.parametrize("name", NPZ)
def test_a_wrong_npz_is_refused(name, tmp_path):
    change, message = NPZ[name]
    np.savez(tmp_path / "m.npz", **changed(change))
    with pytest.raises(ValueError, match=message):
        files.read(tmp_path / "m.npz")


def test_an_npz_that_states_more_than_it_holds_is_refused_before_it_is_read(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**50,)})
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "m.npz", "w", method) as file:
            file.writestr("data.npy", header.getvalue() + bytes(100))
        with pytest.raises(ValueError, match="don't hold"):
            files.read(tmp_path / "m.npz")


PARTS = {
    "a bit beyond the columns": (lambda p: p["bitmask"].__setitem__((0, -1), p["bitmask"][0, -1] | 0x80), "beyond"),
    "a bit too many": (lambda p: p["bitmask"].__setitem__((3, 0), 1), "bits set, but"),
    "a value too few": (lambda p: p.update(compressed=p["compressed"][1:]), "bits set, but"),
    "sizes swapped": (lambda p: p.update(shape=p["shape"][::-1]), "takes a bitmask"),
    "an endless side": (lambda p: p.update(shape=np.array([13, 2**60])), "takes a bitmask"),
    "a negative size": (lambda p: p.update(shape=np.array([13, -21])), "positive"),
    "three sizes": (lambda p: p.update(shape=np.array([13, 21, 1])), "positive"),
    "no values": (lambda p: p.pop("compressed"), "lacks compressed"),
    "no shape": (lambda p: p.pop("shape"), "lacks shape"),
    "offsets of another": (lambda p: p["row_offsets"].__setitem__(4, 0), "row_offsets"),
    "a bitmask of floats": (lambda p: p.update(bitmask=p["bitmask"].astype(np.float32)), "takes a bitmask"),
}


@pytest.mark.parametrize("name", PARTS)
def test_wrong_parts_of_a_bitmask_are_refused_by_the_name_of_the_weight(name, tmp_path):
    change, message = PARTS[name]
    parts = {key.removeprefix("layer.weight."): np.array(a) for key, a in bitmask(matrix()).items()}
    change(parts)
    save_file({f"layer.weight.{key}": np.ascontiguousarray(a) for key, a in parts.items()}, tmp_path / "m")
    with pytest.raises(ValueError, match=f"layer.weight.*{message}"):
        files.read(tmp_path / "m")


BLOCKS = {
    "a block too many": (lambda p: p["block_mask"].__setitem__((0, 0), not p["block_mask"][0, 0]), "take"),
    "a column of another": (lambda p: p["cols_a"].__setitem__((0, 0), 4), "cols_a"),
    "offsets of another": (lambda p: p["row_start_ends_a"].__setitem__(1, 9), "row_start_ends_a"),
    "no data": (lambda p: p.pop("data"), "lacks data"),
    "flat data": (lambda p: p.update(data=p["data"].ravel()), "matrices needed"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_wrong_parts_of_blocks_are_refused_by_the_name_of_the_weight(name):
    change, message = BLOCKS[name]
    w = np.kron(matrix((3, 5)) != 0, np.ones((16, 16), np.float32))
    parts = {key.removeprefix("layer.weight."): np.array(a) for key, a in block_mask(w, 16).items()}
    change(parts)
    with pytest.raises(ValueError, match=f"layer.weight.*{message}"):
        files.gather({f"layer.weight.{key}": a for key, a in parts.items()})


def test_a_safetensors_header_that_states_more_than_the_file_has_is_refused(tmp_path):
    (tmp_path / "m").write_bytes(struct.pack("<Q", 2**50) + b"{" + bytes(50))
    with pytest.raises(ValueError, match="can't be read"):
        files.read(tmp_path / "m")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no .safetensors"):
        files.read(tmp_path)


def test_what_is_read_multiplies(tmp_path):
    from jaxsparse import spmm

    scipy.sparse.save_npz(tmp_path / "m.npz", scipy.sparse.csr_array(matrix()))
    pattern, values = files.read(tmp_path / "m.npz")["matrix"]
    assert isinstance(pattern, BlockPattern)
    np.testing.assert_allclose(spmm(jnp.eye(13), jnp.asarray(values), pattern), matrix(), rtol=1e-6)
