"""Plants faults, one at a time, in a copy of this tree, and asks of each that its test fails: `make mutants`.

A fault that no test sees shows a check that can't fail. Each is a replacement of text that stands once in its file, and
names the test that must fail; without faults all of these tests must pass. Not a part of CI: it takes minutes.

    python tools/mutants.py [NAME ...]
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    """A fault: `right` in `file` becomes `wrong`, and `test` must fail."""

    name: str
    file: str
    right: str
    wrong: str
    test: str


MUTANTS = [
    Mutant(
        "random patterns: what a column drew is not rotated",
        "jaxsparse/_indices.py",
        "drawn_row = rotated(drawn, phase[entry_col], rows)",
        "drawn_row = drawn",
        "tests/test_formats.py::test_every_place_is_equally_likely",
    ),
    Mutant(
        "random patterns: the first columns are always the longer ones",
        "jaxsparse/_indices.py",
        "turn, phase = turns[cols], turns[:cols]",
        "turn, phase = jnp.int32(0), turns[:cols]",
        "tests/test_formats.py::test_every_place_is_equally_likely",
    ),
    Mutant(
        "random patterns in torch: no rotation",
        "torch_bridge/_draw.py",
        "row = (drawn + _below(np.full(cols, rows))[column]) % rows",
        "row = drawn",
        "tests/test_bridge_draw.py::test_every_place_is_equally_likely",
    ),
    Mutant(
        "containers: row pointers may fall",
        "jaxsparse/_indices.py",
        "    if (counts < 0).any():\n        k = int(np.argmax(counts < 0))",
        "    if False:\n        k = int(np.argmax(counts < 0))",
        "tests/test_interop.py::test_row_pointers_that_are_none_are_refused",
    ),
    Mutant(
        "Flax layers: values beyond the edge are drawn like others",
        "jaxsparse/_flax.py",
        "jnp.where(inside, values, 0)",
        "values",
        "tests/test_linen.py::test_what_lies_beyond_the_edge_starts_at_zero",
    ),
    Mutant(
        "Flax layers: a layer in float32 computes in bfloat16",
        "jaxsparse/linen.py",
        "        x, kernel, pattern, bias, activation=layer.activation",
        "        x.astype(jnp.bfloat16).astype(x.dtype), kernel, pattern, bias, activation=layer.activation",
        "tests/test_linen.py::test_one_block_or_density_1_is_nn_dense",
    ),
    Mutant(
        "n of m: values beyond the edge are drawn like others",
        "jaxsparse/formats/n_m.py",
        "        if self._stored_shape[0] % self.m == 0:\n            return None\n",
        "        if True:\n            return None\n",
        "tests/test_n_m.py::test_a_layer_computes_its_dense_matrix_and_starts_at_zero_beyond_the_edge",
    ),
    Mutant(
        "cpu: one row has its indices of 16 bits widened",
        "cpu_kernels/__init__.py",
        "elif x.shape[0] == 1 and tuple(block) == (1, 1):",
        "elif False:",
        "tests/test_backends.py::test_a_program_of_one_row_reads_indices_of_16_bits_as_they_are",
    ),
    Mutant(
        "products: a batch of rows is a loop over them",
        "jaxsparse/products/_rules.py",
        "        if mapped != list(rows):",
        "        if True:",
        "tests/test_backends.py::test_rows_under_vmap_are_one_call_of_the_kernel",
    ),
    Mutant(
        "torch through JAX: the input is kept as a view",
        "torch_bridge/_product.py",
        'KEPT = ("bias", "weight", *(',
        'KEPT = ("bias", "weight", "x", "a_first_name", *(',
        "tests/test_bridge_nn.py::test_parameters_and_patterns_are_kept_as_views_and_inputs_never",
    ),
    Mutant(
        "checkpoints: the bits of n of m are not looked at",
        "jaxsparse/formats/n_m.py",
        "wrong = (marks.sum(-1) != n) | marks[..., m:].any(-1)",
        "wrong = marks[..., m:].any(-1)",
        "tests/test_n_m.py::test_bad_input_raises_with_the_numbers",
    ),
    Mutant(
        "parts: joined in the order of rows",
        "jaxsparse/formats/_parts.py",
        "jnp.lexsort((rows, cols, ~real))",
        "jnp.lexsort((cols, rows, ~real))",
        "tests/test_parts.py::test_pieces_join_bit_for_bit",
    ),
    Mutant(
        "replicas: what is chosen by scores is chosen from a share of them",
        "jaxsparse/training/_replicas.py",
        "return _whole_p.bind(jax.lax.stop_gradient(array)) if jnp.ndim(array) else array",
        "return array",
        "tests/test_mesh.py::test_moving_patterns_choose_the_same_on_every_device",
    ),
    Mutant(
        "exporting: one custom call is not vouched for",
        "jaxsparse/exporting.py",
        "for name in _library.products()]",
        'for name in _library.products() if name != "spmm"]',
        "tests/test_exporting.py::test_an_exported_program_takes_any_batch",
    ),
    Mutant(
        "files: bits of a bitmask are read from the other end",
        "jaxsparse/files/weights.py",
        'bitorder="little"',
        'bitorder="big"',
        "tests/test_files.py::test_bitmasks_of_compressed_tensors_become_weights_in_by_out",
    ),
    Mutant(
        "files: a skew-symmetric matrix is mirrored without its sign",
        "jaxsparse/files/_text.py",
        "np.concatenate([data, sign * data[off]])",
        "np.concatenate([data, data[off]])",
        "tests/test_files.py::test_every_matrix_market_file_is_read",
    ),
    Mutant(
        "torch: the backward pass of a sampled product doubles a gradient",
        "torch_bridge/products.py",
        "multiply(matrix, x, g) if wanted[1] else None",
        "2 * multiply(matrix, x, g) if wanted[1] else None",
        "tests/test_bridge_products.py::test_derivatives_of_first_and_second_order_in_both_modes",
    ),
    Mutant(
        "torch: the backward pass of a half-precision product forgets the bias",
        "torch_bridge/_matrix.py",
        "self._plain_index(), dx, dw, db, self.sizes, self.transposed)\n"
        "        return dx, dw, db if is_wide or not for_bias else sum_of_rows(dy)",
        "self._plain_index(), dx, dw, db, self.sizes, self.transposed)\n        return dx, dw, db",
        "tests/test_bridge_products.py::test_the_bias_of_a_half_precision_product_gets_the_sum_of_its_cotangents",
    ),
    Mutant(
        "torch through JAX: complex cotangents are not conjugated",
        "torch_bridge/flat_op.py",
        "(_conjugate(cotangents)))",
        "(cotangents))",
        "tests/test_bridge_autograd.py::test_complex_gradients_follow_torchs_convention",
    ),
    Mutant(
        "products: the gradient of a transposed view is sampled as it is",
        "jaxsparse/products/sparse.py",
        "    if transposed:  # (x^T dy)^T = dy^T x\n        x, dy = dy, x\n",
        "",
        "tests/test_parts.py::test_pieces_make_the_product_and_padding_gets_no_gradient",
    ),
    Mutant(
        "moving patterns: a place that is stored already may be drawn",
        "jaxsparse/training/_places.py",
        'jnp.searchsorted(free_before, number, side="right")',
        'jnp.searchsorted(free_before, number, side="left")',
        "tests/test_dynamic.py::test_set_drops_the_smallest_and_grows_everywhere_alike",
    ),
    Mutant(
        "weight decay: single entries are exempt",
        "jaxsparse/training/roles.py",
        'return name == "kernel" or path in values',
        "return path in values",
        "tests/test_roles.py::test_kernels_of_linen_decay_whatever_their_rank",
    ),
]


# An editable install would come before the copy, and no fault would be found.
NOT_EDITABLE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
"""


def copied(folder: Path) -> None:
    """Copies what git knows of, and the built library of the CPU kernels."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for packages in (ROOT, Path(sysconfig.get_path("purelib"))):
        for library in packages.glob("cpu_kernels/*.so"):
            shutil.copy2(library, folder / "cpu_kernels")
    (folder / "sitecustomize.py").write_text(NOT_EDITABLE)


def failed(tests: list[str], folder: Path) -> tuple[set[str], str]:
    """The tests, without their parameters, that fail in a copy, and what pytest said."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    words = [line.split(" ", 2) for line in run.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    found = {word[1].partition("[")[0] for word in words}
    if run.returncode not in (0, 1) or (run.returncode == 1 and not found):
        raise SystemExit(f"pytest ended with {run.returncode}:\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}")
    return found, run.stdout


def survives(mutant: Mutant, folder: Path) -> bool:
    """Plants the fault, runs its test, and puts the file back."""
    path = folder / mutant.file
    source = path.read_text()
    if source.count(mutant.right) != 1:
        raise SystemExit(
            f"{mutant.name}: {mutant.file} has {source.count(mutant.right)} times what is to be replaced, and must "
            f"have it once:\n{mutant.right}"
        )
    path.write_text(source.replace(mutant.right, mutant.wrong))
    try:
        return mutant.test not in failed([mutant.test], folder)[0]
    finally:
        path.write_text(source)


def main(names: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copied(folder)
        broken, said = failed(sorted({mutant.test for mutant in chosen}), folder)
        if broken:
            raise SystemExit(f"without any fault, these fail already: {', '.join(sorted(broken))}\n{said[-3000:]}")
        survivors = 0
        for mutant in chosen:
            start = time.monotonic()
            alive = survives(mutant, folder)
            survivors += alive
            verdict = "SURVIVES" if alive else "found   "
            print(f"{verdict} {time.monotonic() - start:5.0f} s  {mutant.name}: {mutant.test}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} faults were found")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
