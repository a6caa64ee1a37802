"""Sparse models of transformers saved and loaded by its own functions."""

import copy
import io
import json
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="torch_bridge needs torch")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from torch.nn.utils import prune  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
)

from torch_bridge import BlockDiagLinear, BlockSparseLinear, SparseLinear, exporting, hugging_face, sparsify  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")  # torch's own
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(14).reshape(2, 7)
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=50), IDS, r"model\..*_proj"),
    "roberta": (RobertaForMaskedLM, RobertaConfig(**SMALL, vocab_size=50), IDS, r"roberta\.encoder\..*"),
    "vit": (
        ViTForImageClassification,
        ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3),
        torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16),
        r"vit\.encoder\..*|vit\.layers\..*",
    ),
}


def dense(name):
    kind, config, x, where = MODELS[name]
    torch.manual_seed(0)
    return kind(copy.deepcopy(config)).eval(), x, where


RULES = [
    (r".*\.down_proj", {"kind": "block_diag", "num_blocks": 4}),
    (r".*\.(up|gate)_proj", {"kind": "block_sparse", "density": 0.25, "block": 16}),
    (r".*\.o_proj", {"kind": "sparse", "density": 0.1}),
]


def patched(tmp_path, **options):
    model, x, _ = dense("llama")
    sparsify(model, RULES)
    model.save_pretrained(tmp_path, **options)
    return model, x


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_model_is_converted_saved_loaded_and_trained(name, tmp_path):
    model, x, where = dense(name)
    linear = [m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and path.startswith(where[:3])]
    prune.global_unstructured([(m, "weight") for m in linear], prune.L1Unstructured, amount=0.8)
    before = model(x).logits
    report = sparsify(model, [(where, {"kind": "sparse", "keep": "nonzero"})])
    assert len(report) >= 8 and all(row.relative_error == 0 for row in report)
    torch.testing.assert_close(model(x).logits, before)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(again(x).logits, model(x).logits)
    optimizer = torch.optim.SGD(again.parameters(), 0.1)
    newest = getattr(again, "activation_checkpointing_enable", None)  # its name from transformers 5.20 or so on
    (newest or again.gradient_checkpointing_enable)()
    again.train()
    again(x).logits.square().mean().backward()
    optimizer.step()
    again.eval().save_pretrained(tmp_path / "tuned")
    tuned = type(model).from_pretrained(tmp_path / "tuned")
    assert torch.equal(tuned(x).logits, again(x).logits)
    tuned.config.use_cache = False  # of which torch.export knows no type
    program = torch.export.export(tuned, (x,), strict=False).run_decompositions(exporting.decompositions())
    assert "jaxsparse" not in str(program.graph)
    torch.testing.assert_close(program.module()(x).logits, again(x).logits)


@pytest.mark.slow  # a whole model
def test_a_whole_model_becomes_an_onnx_file():
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, x, where = dense("roberta")
    sparsify(model, [(where, {"kind": "sparse", "density": 0.2})])
    file = io.BytesIO()
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (y, *_) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).logits.detach(), atol=1e-5, rtol=1e-4)


def test_every_kind_of_layer_comes_back_in_several_files_and_in_another_dtype(tmp_path):
    model, x = patched(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    mlp, attention = again.model.layers[1].mlp, again.model.layers[1].self_attn
    kinds = [type(m) for m in (mlp.down_proj, mlp.up_proj, attention.o_proj, attention.q_proj)]
    assert kinds == [BlockDiagLinear, BlockSparseLinear, SparseLinear, torch.nn.Linear]
    assert torch.equal(again(x).logits, model(x).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half(x).logits.float(), model.bfloat16()(x).logits.float(), rtol=0.05, atol=0.02)
    assert again.half().model.layers[0].mlp.up_proj.weight.dtype == torch.float16  # no cast is refused


def test_the_base_model_of_a_checkpoint_with_a_head_is_sparse_too(tmp_path):
    model, x = patched(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base.layers[0].mlp.up_proj, BlockSparseLinear)
    assert torch.equal(base(x).last_hidden_state, model.model(x).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    whole, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"} and isinstance(
        whole.model.layers[0].mlp.up_proj, BlockSparseLinear
    )


def test_a_dense_checkpoint_becomes_sparse_while_it_is_loaded(tmp_path):
    model, x, _ = dense("llama")
    model.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=hugging_face.SparseConfig(RULES)
    )
    sparsify(model, RULES)
    assert torch.equal(again(x).logits, model(x).logits)
    again.save_pretrained(tmp_path / "sparse")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")(x).logits, model(x).logits)


def test_what_was_put_back_or_made_dense_is_saved_dense(tmp_path):
    model, x, _ = dense("llama")
    before = model(x).logits
    sparsify(model, RULES).revert()
    model.save_pretrained(tmp_path / "reverted")
    assert "quantization_config" not in json.loads((tmp_path / "reverted/config.json").read_text())
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "reverted")(x).logits, before)
    sparsify(model, RULES)
    after = model(x).logits
    hugging_face.densify(model)
    assert not hugging_face.layers_of(model)
    torch.testing.assert_close(model(x).logits, after)
    model.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(x).logits, after)


def test_a_patched_part_is_saved_once_the_whole_is_marked(tmp_path):
    model, x, _ = dense("llama")
    sparsify(model.model, RULES)
    hugging_face.mark(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(x).logits, model(x).logits)


def test_a_model_with_another_quantizer_keeps_it():
    model, _, _ = dense("llama")
    model.hf_quantizer = other = object()
    with pytest.warns(UserWarning, match="LlamaForCausalLM has a object, and .* save_pretrained will not say which"):
        sparsify(model, RULES)
    assert model.hf_quantizer is other


def test_a_layer_keeps_its_activation(tmp_path):
    model, x, _ = dense("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = SparseLinear.from_linear(layer.mlp.down_proj, 0.3, activation="silu")
    hugging_face.mark(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[1].mlp.down_proj.activation == "silu"
    assert torch.equal(again(x).logits, model(x).logits)
    hugging_face.densify(again)
    torch.testing.assert_close(again(x).logits, model(x).logits)


@pytest.mark.slow  # a process of its own
def test_a_fresh_process_loads_it_after_one_import(tmp_path):
    model, x = patched(tmp_path)
    torch.save(model(x).logits, tmp_path / "logits")
    code = f"""
import torch, torch_bridge.hugging_face
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
assert torch.equal(model(torch.arange(14).reshape(2, 7)).logits, torch.load({str(tmp_path / "logits")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        ({"nnzb": 10**12}, "density"),
        ({"nnzb": -1}, "density"),
        ({"block": [0, 1]}, "layers.0.self_attn.o_proj"),
        ({"kind": "odd", "block": [7]}, "layers.0.self_attn.o_proj"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_the_path_of_the_layer(change, message, tmp_path):
    patched(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layers"]["model.layers.0.self_attn.o_proj"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_bad_rules_are_refused_when_the_config_is_made():
    with pytest.raises(ValueError, match="Did you mean 'density'"):
        hugging_face.SparseConfig([(".*", {"kind": "sparse", "densty": 0.5})])
