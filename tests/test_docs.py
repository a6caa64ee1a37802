"""The code of docs/coming_from.md runs, block after block; links in the docs lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_the_code_of_coming_from_runs_in_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch", reason="torch is not installed")
    for package in ("transformers", "peft", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs/coming_from.md").read_text(), re.DOTALL):
        exec(compile(code, "coming_from.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "whole model" in printed and {row.kind for row in namespace["report"]} == {"sparse"}
    program, x, y = (namespace[name] for name in ("program", "x", "y"))
    namespace["torch"].testing.assert_close(program.module()(x), namespace["torch"].from_numpy(y))
    assert type(namespace["dense"][0][0]) is namespace["torch"].nn.Linear
    dense, x = namespace["w"], namespace["torch"].ones(2, 64)
    namespace["torch"].testing.assert_close(namespace["layer"](x), x @ namespace["torch"].from_numpy(dense).T)


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/*.md")), ids=lambda p: p.name)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target
