"""The code of the documentation runs, page by page; links lead somewhere; every page is in the navigation."""

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import blocks
import pytest

import jaxsparse

ROOT = Path(__file__).parent.parent
PAGES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))
APART = {
    "docs/coming_from.md",
    "docs/command_line.md",
    "docs/optimizers.md",
}  # each has a test that says more of what its code leaves behind
WITH_CODE = [page for page in PAGES if blocks.blocks(page) and page not in APART]


def run(page: str) -> dict:
    """The names that the page's blocks of Python leave behind."""
    namespace: dict = {}
    blocks.run(page, blocks.blocks(page), namespace)
    return namespace


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")  # torch's own
@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs_in_order(page, tmp_path, monkeypatch):
    if any("torch" in code for code in blocks.blocks(page)):
        pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.chdir(tmp_path)  # some of them write files
    run(page)


def test_a_promise_that_is_not_kept_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text("```diff\n-y = 1\n+y = 2\n x = 3\n```\n\n```python\nprint(x + y)  # 4\n```\n")
    with pytest.raises(AssertionError, match="promises '4'"):
        run("page.md")


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_the_code_of_coming_from_runs_in_order(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="torch is not installed")
    for package in ("transformers", "peft", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    printed = blocks.run("docs/coming_from.md", blocks.blocks("docs/coming_from.md"), namespace)
    assert "whole model" in printed and {row.kind for row in namespace["report"]} == {"sparse"}
    program, x, y = (namespace[name] for name in ("program", "x", "y"))
    namespace["torch"].testing.assert_close(program.module()(x), namespace["torch"].from_numpy(y))
    assert type(namespace["dense"][0][0]) is namespace["torch"].nn.Linear
    dense, x = namespace["w"], namespace["torch"].ones(2, 64)
    namespace["torch"].testing.assert_close(namespace["layer"](x), x @ namespace["torch"].from_numpy(dense).T)


def test_the_code_of_optimizers_runs_in_order_and_does_what_it_says():
    pytest.importorskip("torch", reason="torch is not installed")
    import jax
    import optax
    import torch

    names = run("docs/optimizers.md")
    kernels = {"SparseDense_0", "BlockSparseDense_0", "Dense_0"}
    assert {layer for layer, leaves in names["mask"].items() if leaves.get("kernel")} == kernels
    assert not any(leaves["bias"] for leaves in names["mask"].values())
    # Without gradients a step is the decay alone.
    for layer, leaves in names["params"].items():
        for name, p in leaves.items():
            decayed = -1e-4 * p if name == "kernel" else 0 * p
            assert abs(names["updates"][layer][name] - decayed).max() < 1e-9
    assert [len(group["params"]) for group in names["the_rest"].param_groups] == [2, 5]
    # What the table says of the libraries.
    values = {"entries": jax.numpy.ones(8), "blocks": jax.numpy.ones((3, 4, 4))}
    adam = optax.contrib.muon(1e-3).init(values).inner_states["adam"].inner_state[0]
    assert jax.tree.map(jax.numpy.shape, adam.mu) == {"entries": (8,), "blocks": (3, 4, 4)}
    for p in (torch.ones(8), torch.ones(3, 4, 4)):
        with pytest.raises(ValueError, match="only supports 2D parameters"):
            torch.optim.Muon([torch.nn.Parameter(p)])


def test_the_code_of_command_line_runs_and_its_commands_exist(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from jaxsparse import cli

    monkeypatch.chdir(tmp_path)
    names: dict = {}
    printed = blocks.run("docs/command_line.md", blocks.blocks("docs/command_line.md"), names)
    assert [row.kind for row in names["summed"]] == ["SparseLinear", "Linear"]
    assert "SparseLinear" in printed and (tmp_path / "pattern.png").exists()
    text = (ROOT / "docs" / "command_line.md").read_text()
    assert set(re.findall(r"^## (\w+)$", text, re.MULTILINE)) == set(cli.COMMANDS)
    for line in re.findall(r"^jaxsparse (.*)", text, re.MULTILINE):
        options = re.findall(r"--[a-z]+", line.partition("|")[0].replace("'jaxsparse", ""))
        assert cli.main([line.split()[0], "--help"]) == 0
        printed = capsys.readouterr().out
        assert all(option in printed for option in options), line


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert {page.removeprefix("docs/") for page in PAGES} == listed


def test_commands_in_the_pages_name_files_and_targets_that_exist():
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = (ROOT / page).read_text()
        for script in re.findall(r"(?:python3?|bash) ((?:benchmarks|examples|tools|findings)/\S+\.(?:py|sh))", text):
            assert (ROOT / script).exists(), f"{page}: {script}"
        for target in re.findall(r"^make ([\w-]+)", text, re.MULTILINE):
            assert target in targets, f"{page}: make {target}"


def test_the_page_on_installing_has_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/installing.md").read_text(), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(project["optional-dependencies"])


def test_the_reference_has_every_public_name():
    torch_bridge = pytest.importorskip("torch_bridge", reason="torch_bridge needs torch", exc_type=ImportError)

    text = "".join((ROOT / page).read_text() for page in PAGES if page.startswith("docs/api/"))
    shown = set(re.findall(r"^::: (\S+)", text, re.MULTILINE))
    for package in (jaxsparse, torch_bridge):
        for name in package.__all__:
            home = getattr(package, name).__module__
            assert {f"{package.__name__}.{name}", home} & shown, f"{package.__name__}.{name}"


def test_a_page_that_fetches_something_is_an_error(monkeypatch):
    exceptions = pytest.importorskip("mkdocs.exceptions", reason="mkdocs is not installed")
    monkeypatch.syspath_prepend(ROOT / "tools")
    import docs_hooks

    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    fine = '<a href="https://host/page">a link</a><script src="../iframe-worker.js"></script>'
    assert docs_hooks.on_post_page(fine, page=page) == fine
    for said in ('<script async src="https://host/shim"></script>', "<link rel=stylesheet href=//host/a.css>"):
        with pytest.raises(exceptions.PluginError, match="index.md fetches .*//host"):
            docs_hooks.on_post_page(fine + said, page=page)


def test_what_stands_before_the_colon_of_a_result_is_no_sentence():
    """The reference shows it as the result's type, which the annotation gives."""
    for file in [*ROOT.glob("jaxsparse/**/*.py"), *ROOT.glob("torch_bridge/**/*.py")]:
        for said in re.findall(r"^ +Returns:\n +([^\n:]*):", file.read_text(), re.MULTILINE):
            assert "`" not in said, f"{file}: {said}"
