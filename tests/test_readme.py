"""The README's code runs, block after block, in one namespace; code by line 8; links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest
from blocks import blocks, run

import jaxsparse
from jaxsparse import _backends

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
NO_KERNELS = _backends.why_not("cpu")  # the README says what a machine with a compiler prints
BLOCKS = blocks("README.md")


def test_the_code_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of them writes a file
    namespace: dict = {}
    without_torch = [code for code in BLOCKS if "import torch" not in code and not ("why_not" in code and NO_KERNELS)]
    run("README.md", without_torch, namespace)
    if not importlib.util.find_spec("torch"):
        pytest.skip("torch is not installed: the README's PyTorch block did not run")
    run("README.md", [code for code in BLOCKS if code not in without_torch], namespace)


def test_runnable_code_starts_by_line_8():
    lines = TEXT.split("\n")
    assert any(line.startswith(("import", "from")) for line in lines[:8])


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_every_public_name_is_in_the_table():
    for name in jaxsparse.__all__:
        assert f"`{name}`" in TEXT, name
        assert getattr(jaxsparse, name)
