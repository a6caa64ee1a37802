"""The Mosaic kernels with no GPU: interpreted with race detection, lowered, compiled for an H100, with bugs planted.

What the interpreter can't see is the asynchrony of the tensor cores; that is for `benchmarks/gpu.py` on a GPU.
"""

import concurrent.futures
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import processes
import pytest
from processes import run

from jaxsparse import BlockPattern, spmm
from pallas_kernels import mosaic
from pallas_kernels._device import Device
from pallas_kernels._lines import Index, lines_of

HERE = Path(__file__).parent
TOO_OLD = jax.__version_info__ < (0, 11, 2)
COMPILER = os.environ.get("JAXSPARSE_GPU_COMPILER", "")  # see mosaic_compiled.py
# Errors, but for that of a process that reads from JAX's cache what another one is writing there (see conftest.py): two
# that begin together compile the same, and on a busy machine one of them has met half an entry.
WARNINGS = "-W", "error", "-W", "ignore:Error reading persistent compilation cache entry:UserWarning"
CASES = [
    "blocks of 64, every size ragged",
    "blocks of 128",
    "blocks of 64x128",
    "blocks of 16x32",
    "block-diagonal",
    "clusters",
    "lines together",
    "lines together, in parts",
    "lines together, x shared",
    "lines together, x and blocks shared",
    "lines together, x shared, in parts",
    "lines together, x in registers",
    "lines together, x shared and in registers",
    "pieces together",
    "pieces together, of several blocks",
]
# name: (file, what stands there, what is planted, the case and the product that must fail)
BUGS = {
    "a missing commit": ("gather.py", "plgpu.commit_smem()", "pass", "blocks of 64x128", "y"),
    "a tile of y off by one": (
        "gather.py",
        "pl.ds(row + mine, c.tile_m)",
        "pl.ds(row + mine + 1, c.tile_m)",
        "blocks of 64x128",
        "y",
    ),
    "a swapped index": ("gather.py", "slot_ref[stored]", "source_ref[stored]", "blocks of 64x128", "y"),
    "a stage too few": (
        "_pipeline.py",
        "pl.when(done >= self.stages)",
        "pl.when(done > self.stages)",
        "blocks of 64x128",
        "dx",
    ),
    "a wrong transposition": (
        "gather.py",
        "w.transpose((1, 0)) if transposed else w",
        "w",
        "blocks of 64, every size ragged",
        "dx",
    ),
    "a piece of the wrong row": (
        "sample.py",
        "ptr_ref[row] + entry",
        "ptr_ref[row] + entry + 1",
        "blocks of 64x128",
        "dW",
    ),
    "another part of x": (
        "union.py",
        "source * inner + k",
        "source * inner",
        "lines together, in parts",
        "y",
    ),
    "the lines of another program": (
        "union.py",
        "(group * together + first) * parts",
        "group * together * parts",
        "lines together, x shared, in parts",
        "y",
    ),
    "another part of the batch": ("supertile.py", "(first + s) * c.tile_m", "s * c.tile_m", "pieces together", "dW"),
    "another tile of dy": (
        "supertile.py",
        "row * c.pieces + position",
        "row * c.pieces",
        "pieces together, of several blocks",
        "dW",
    ),
    "another part of a block": ("union.py", "column % parts", "0", "lines together, in parts", "dx"),
}
# A race, a wrong number, or a barrier that fewer have waited for than should: which of them, timing decides.
CAUGHT = "RACE DETECTED", "AssertionError", "had only observed barrier up to phase"
# An editable install of the packages would come before the folder that holds the planted bug.
NOT_EDITABLE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
"""
needs_interpreter = pytest.mark.skipif(TOO_OLD, reason=f"mosaic: JAX {jax.__version__} has no interpreter for it")


def started_together(test):
    """Slow, and on one worker: each that asks for one case starts them all."""
    return pytest.mark.slow(pytest.mark.xdist_group("mosaic")(test))


def interpret(case: str, *products: str, packages: Path = HERE.parent) -> subprocess.CompletedProcess:
    """Runs one case in a process of its own, on the packages of a folder; all its products, or those named."""
    command = [sys.executable, *WARNINGS, HERE / "mosaic_interpreted.py", case, *products]
    return run(command, {"PYTHONPATH": str(packages)})


def plant(bug: str, folder: Path) -> Path:
    """A folder with the packages, and the bug in them."""
    name, right, wrong, *_ = BUGS[bug]
    for package in ("pallas_kernels", "jaxsparse", "cpu_kernels"):
        shutil.copytree(HERE.parent / package, folder / package)
    planted = folder / "pallas_kernels" / "mosaic" / name
    source = planted.read_text()
    assert source.count(right) == 1, f"{bug}: its line is no longer there; plant it anew"
    planted.write_text(source.replace(right, wrong))
    (folder / "sitecustomize.py").write_text(NOT_EDITABLE)
    return folder


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Case or bug to its result, to be waited for: asked for one, it begins with all of them, two at a time."""
    pool = concurrent.futures.ThreadPoolExecutor(2)
    begun = {case: pool.submit(interpret, case) for case in CASES}
    for bug, (*_, case, product) in BUGS.items():
        packages = plant(bug, tmp_path_factory.mktemp("planted"))
        begun[bug] = pool.submit(interpret, case, product, packages=packages)
    yield begun
    pool.shutdown(cancel_futures=True)


@started_together
@needs_interpreter
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_match_the_dense_product_without_a_race(case, started):
    done = started[case].result()
    assert done.returncode == 0, done.stderr[-3000:]


@started_together
@needs_interpreter
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug, started):
    done = started[bug].result()
    assert done.returncode != 0
    assert any(words in done.stderr for words in CAUGHT), done.stderr[-3000:]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system doesn't say what a process has used")
def test_what_waits_for_ever_is_stopped_and_what_works_is_not(monkeypatch):
    monkeypatch.setattr(processes, "IDLE", 2)
    waiting = run([sys.executable, "-c", "import time; time.sleep(1000)"], {})
    assert waiting.returncode == 124 and "waited for ever" in waiting.stderr
    monkeypatch.setattr(processes, "IDLE", 20)  # on a busy machine it may not come to its turn for a while
    working = run([sys.executable, "-c", "import time\nwhile time.process_time() < 4: pass\nprint('done')"], {})
    assert (working.returncode, working.stdout) == (0, "done\n")


def lower(f, *shapes) -> str:
    return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def index_of(lines: int, nnzb: int) -> Index:
    return Index(*(jax.ShapeDtypeStruct((n,), jnp.int32) for n in (lines + 1, nnzb, lines + 1, nnzb, nnzb)))


BLOCKS = [(16, 16), (32, 64), (64, 64), (128, 128), (256, 192)]


def lower_candidates(block, m, lines, nnzb, most=None):
    """Lowers up to `most` configurations of each product that may be chosen; the heuristic's choice comes first."""
    from pallas_kernels.mosaic import configs, multiply

    (i, o), index = block, index_of(lines, nnzb)
    x, dy, blocks, bias = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((m, lines * i), (m, lines * o), (nnzb, i, o), (lines * o,))
    )

    def product(config, transposed):
        how = {"transposed": transposed, "activation": None if transposed else "gelu"}
        return lambda x, w, index, b: multiply.multiply(x, w, lines_of(index, transposed), b, config, Device(), **how)

    for config in itertools.islice(configs.candidates_for_gather(m, lines * i, i, o, lines, nnzb), most):
        assert "mosaic_gpu" in lower(product(config, False), x, blocks, index, bias)
    for config in itertools.islice(configs.candidates_for_gather(m, lines * o, o, i, lines, nnzb), most):
        assert "mosaic_gpu" in lower(product(config, True), dy, blocks, index, None)
    for config in itertools.islice(configs.candidates_for_sample(m, i, o, nnzb, lines, lines), most):
        f = lambda x, dy, index, c=config: multiply.sample(x, dy, index, block, c, Device())  # noqa: E731
        assert "mosaic_gpu" in lower(f, x, dy, index)


@needs_interpreter
def test_what_is_chosen_lowers():
    lower_candidates((64, 64), 8192, 128, 4096, most=1)


@pytest.mark.slow  # a sweep
@needs_interpreter
@pytest.mark.parametrize("m", [8, 8192])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_whatever_may_be_chosen_lowers(block, m):
    lower_candidates(block, m, 128, 4096)


@needs_interpreter
def test_small_blocks_share_their_x_where_that_loads_less():
    from pallas_kernels.mosaic import configs

    def chosen(m, block, density, share=True):
        lines = 4096 // block
        return configs.for_gather(m, 4096, block, block, lines, round(density * lines**2) if share else None)

    for block in (32, 64):
        for density in (0.1, 0.25, 0.5):
            config = chosen(8192, block, density)
            assert isinstance(config, configs.Union) and config.shared_memory <= configs.SHARED_MEMORY
            with configs.line_by_line():
                assert isinstance(chosen(8192, block, density), configs.Gather)
            sizes = 8192, 4096, block, block, 4096 // block, round(density * (4096 // block) ** 2)
            most = config._replace(columns=384 // config.tile_n, lines=384 // block, cluster=2, sharing=1, registers=0)
            reached = 2 * 8192 * density * 4096**2 / configs.loaded(most, *sizes) * 6.65e12 / 989e12
            assert reached > {0.1: 0.28, 0.25: 0.46, 0.5: 0.72}[density]  # of an H100's peak, by its cache
            reached = 2 * 8192 * density * 4096**2 / configs.taken(config, *sizes) * 6.65e12 / 989e12
            at_least = {32: (0.36, 0.45, 0.65), 64: (0.49, 0.53, 0.62)}[block]  # as docs/gpu.md says
            assert reached > at_least[(0.1, 0.25, 0.5).index(density)]
            with configs.x_apart():
                apart = chosen(8192, block, density)
            assert (apart.sharing, apart.registers) == (1, 0)
            assert configs.taken(apart, *sizes) >= configs.taken(config, *sizes)
            assert (config.sharing > 1) == ((block, density) in {(32, 0.1), (32, 0.25), (64, 0.1)})
            assert (config.registers > 0) == ((block, density) in {(32, 0.1), (32, 0.5)})
    assert isinstance(chosen(8192, 128, 0.1), configs.Gather)
    assert isinstance(chosen(512, 64, 0.25), configs.Gather)  # too little work for every program
    assert isinstance(chosen(8192, 64, 0.25, share=False), configs.Gather)


@needs_interpreter
@pytest.mark.parametrize("density", [0.05, 0.1, 0.25])
@pytest.mark.parametrize("block", [32, 64])
def test_what_is_predicted_to_be_loaded_is_what_random_patterns_have_walked(block, density):
    from pallas_kernels.mosaic import configs, union

    patterns = [
        BlockPattern.random(jax.random.key(seed), (4096, 4096), density=density, block=block) for seed in range(4)
    ]
    lines, m, nnzb = 4096 // block, 8192, patterns[0].nnzb
    sizes = m, 4096, block, block, lines, nnzb
    for config in configs.candidates_for_gather(*sizes):
        if isinstance(config, configs.Union):
            walks = [union.walk(lines_of(p.index, False), lines, config.lines * config.sharing) for p in patterns]
            x = sum(int(walk.steps.sum()) for walk in walks) / len(walks) * m * block
            blocks = nnzb * block**2 * (m // 128) / config.cluster
            assert abs(configs.loaded(config, *sizes) / (2 * (x + blocks)) - 1) < 0.03, config


@needs_interpreter
def test_clusters_are_no_more_than_surely_run_at_once():
    from pallas_kernels.mosaic import configs

    assert [configs.clusters(132, size) for size in (1, 2, 4)] == [132, 66, 30]
    assert configs.clusters(2, 4) == 1


@needs_interpreter
def test_weight_gradients_of_small_blocks_share_what_they_load_where_that_is_faster():
    from pallas_kernels.mosaic import configs

    def chosen(m, block, density, several=True):
        lines = 4096 // block
        sizes = m, block, block, round(density * lines**2), lines
        return configs.for_sample(*sizes, lines if several else None), (*sizes, lines)

    shares = {16: (0.07, 0.16, 0.32), 32: (0.17, 0.24, 0.39), 64: (0.29, 0.39, 0.45)}  # as docs/gpu.md says
    for block, share in shares.items():
        for density, at_least in zip((0.1, 0.25, 0.5), share, strict=True):
            config, sizes = chosen(8192, block, density)
            assert isinstance(config, configs.Supertile) and config.shared_memory <= configs.SHARED_MEMORY
            bytes_meanwhile = configs.sampled(config, *sizes)
            assert 2 * 8192 * density * 4096**2 / bytes_meanwhile / configs.OPERATIONS > at_least
            with configs.line_by_line():
                alone, _ = chosen(8192, block, density)
            assert isinstance(alone, configs.Sample) and configs.sampled(alone, *sizes) > bytes_meanwhile
    assert isinstance(chosen(8192, 128, 0.25)[0], configs.Sample)
    assert isinstance(chosen(512, 64, 0.1)[0], configs.Sample)  # too few groups for every program
    assert isinstance(chosen(8192, 64, 0.25, several=False)[0], configs.Sample)


@needs_interpreter
def test_the_kernel_of_single_lines_is_in_the_program_where_it_is_asked_for():
    from pallas_kernels.mosaic import configs

    pattern = BlockPattern.random(jax.random.key(0), (4096, 4096), density=0.25, block=64)
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8192, 4096), pattern.values_shape))
    step = lambda x, w: jax.vjp(lambda x, w: spmm(x, w, pattern, backend="mosaic"), x, w)[1](x)  # noqa: E731
    together = lower(step, x, w)
    assert "jaxsparse_gather_union" in together and "jaxsparse_sample_supertile" in together
    with configs.line_by_line():
        alone = lower(lambda x, w: step(x, w), x, w)
    assert "jaxsparse_gather_union" not in alone and "jaxsparse_sample_supertile" not in alone
    assert "jaxsparse_gather" in alone and "jaxsparse_sample" in alone


@needs_interpreter
def test_what_was_measured_fits_a_program():
    from pallas_kernels.mosaic import configs

    for measured in json.loads(configs.MEASURED.read_text()).values() if configs.MEASURED.exists() else ():
        for name, fields in measured.items():
            assert configs.of_fields(fields).shared_memory <= configs.SHARED_MEMORY, name
    for kind in (configs.Gather, configs.Union, configs.Sample, configs.Supertile):
        config = kind(*range(len(kind._fields)))
        assert configs.of_fields(config._asdict()) == config


@pytest.mark.slow
@needs_interpreter
@pytest.mark.skipif(not COMPILER, reason="mosaic: JAXSPARSE_GPU_COMPILER names no folder with XLA's compiler for GPUs")
def test_compiled_kernels_use_tensor_cores_and_tma_and_spill_nothing():
    done = run([sys.executable, HERE / "mosaic_compiled.py", COMPILER], {"PYTHONPATH": str(HERE.parent)})
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["collectives"] == []
    assert result["chosen"] == [0, 2]  # of dx and dW; y is not asked for
    for size, products in result["kernels"].items():
        for product, said in products.items():
            assert said["kernels"] == 1, (size, product, said)
            assert said["spilled"] == said["serialised"] == 0, (size, product, said)
            assert said["tensor cores"] and said["TMA"] >= 3, (size, product, said)
    for shared in ("blocks of 128, batch 8192", "lines together"):
        assert result["kernels"][shared]["forward"]["multicast"]
    multicast = {"two share x": 1, "four share": 11, "two share blocks": 10}  # x, and each column of blocks
    for product, said in result["kernels"]["x shared, or in registers"].items():
        assert said["multicast"] == multicast[product.split(", ")[1]], (product, said)
    # Weight of zeros, weight, gradient: all three of half numbers.
    assert result["entries"]["dense"] == ["bf16"] * 3 and result["entries"]["weights"] < 3.5, result["entries"]
    for way, loops in result["XLA's loops"].items():  # none whose end a GPU has to tell the host
        assert loops["all"] == loops["of known length"], (way, loops)
        assert (loops["all"] > 0) == ("walked" in way), (way, loops)


@pytest.mark.parametrize(
    "arguments,words",
    [
        (("spmm", "float32", (64, 64), "cuda"), "float32 is not one of bfloat16, float16"),
        (("spmm", "bfloat16", (48, 64), "cuda"), "each side must be 16, 32 or a multiple of 64"),
        (("spmm", "bfloat16", (1, 1), "cuda"), "(1, 1) don't fit"),
        (("spmm", "bfloat16", (64, 64), "cpu"), "needs Python 3.12" if TOO_OLD else "an NVIDIA GPU, not on cpu"),
    ],
)
def test_why_not_says_what_is_wrong(arguments, words):
    assert words in str(mosaic.why_not(*arguments))
