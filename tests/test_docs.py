"""The code of the pages in docs runs, block after block; links in the docs lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(page: str) -> dict:
    """The names that the page's blocks of Python leave behind."""
    namespace: dict = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL):
        exec(compile(code, page, "exec"), namespace)
    return namespace


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_the_code_of_coming_from_runs_in_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch", reason="torch is not installed")
    for package in ("transformers", "peft", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    namespace = run("coming_from.md")
    printed = capsys.readouterr().out
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

    names = run("optimizers.md")
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
    assert [row.kind for row in run("command_line.md")["summed"]] == ["SparseLinear", "Linear"]
    assert "SparseLinear" in capsys.readouterr().out and (tmp_path / "pattern.png").exists()
    text = (ROOT / "docs" / "command_line.md").read_text()
    assert set(re.findall(r"^## (\w+)$", text, re.MULTILINE)) == set(cli.COMMANDS)
    for line in re.findall(r"^jaxsparse (.*)", text, re.MULTILINE):
        options = re.findall(r"--[a-z]+", line.partition("|")[0].replace("'jaxsparse", ""))
        assert cli.main([line.split()[0], "--help"]) == 0
        printed = capsys.readouterr().out
        assert all(option in printed for option in options), line


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/*.md")), ids=lambda p: p.name)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target
