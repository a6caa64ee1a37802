"""How the torch layers get a pattern with their numbers: loaders, memory from the meta device, and what they refuse."""

import copy

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import jax
import numpy as np
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state

from jaxsparse.formats import BlockPattern
from torch_bridge import BlockSparseLinear, SparseLinear, _index
from torch_bridge._whole import NAMES

X = torch.linspace(-1, 1, 90).reshape(3, 30)


def make(seed):
    torch.manual_seed(seed)
    return nn.Sequential(SparseLinear(30, 40, 0.2), nn.Tanh(), BlockSparseLinear(40, 9, 0.5, (8, 4)))


def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(model, other):
    assert torch.equal(model(X), other(X))


# ---- parameters without their pattern ----------------------------------------------------------------------


def by_torch(model, saved):
    model.load_state_dict(saved, strict=False)


def by_assigning(model, saved):
    model.load_state_dict(saved, strict=False, assign=True)


def by_checkpoint_tools(model, saved):
    dcp_state.set_model_state_dict(model, saved, options=dcp_state.StateDictOptions(strict=False))


def by_filling_up(model, saved):
    """These put the model's own buffers beside what was saved."""
    options = dcp_state.StateDictOptions(strict=False, full_state_dict=True)
    dcp_state.set_model_state_dict(model, saved, options=options)


LOADERS = [by_torch, by_assigning, by_checkpoint_tools, by_filling_up]
each_loader = pytest.mark.parametrize("load", LOADERS, ids=lambda f: f.__name__)


@each_loader
def test_parameters_without_their_pattern_are_refused_by_whatever_uses_them(load):
    source, model = make(0), make(1)
    load(model, parameters_of(source))
    twin = copy.deepcopy(model)
    uses = [lambda: model(X), model.state_dict, model[0].to_linear, lambda: model[2].pattern, lambda: twin(X)]
    for use in uses:
        with pytest.raises(ValueError, match="loaded without its pattern.*load_state_dict"):
            use()
    load(model, source.state_dict())
    assert_same(model, source)


def test_whoever_knows_that_the_pattern_is_the_same_can_say_so_as_the_error_does():
    model = make(0)
    want, saved = model(X), parameters_of(model)
    for p in model.parameters():
        nn.init.zeros_(p)
    model.load_state_dict(saved, strict=False)
    with pytest.raises(ValueError) as error:
        model(X)
    assert "model.load_state_dict({**copy.deepcopy(dict(model.named_buffers())), **saved}, strict=False)" in str(
        error.value
    )
    model.load_state_dict({**copy.deepcopy(dict(model.named_buffers())), **saved}, strict=False)
    assert torch.equal(model(X), want)


def test_reset_parameters_forgets_what_was_loaded_without_a_pattern():
    model = make(1)
    model.load_state_dict(parameters_of(make(0)), strict=False)
    for layer in (model[0], model[2]):
        layer.reset_parameters()
    assert model(X).shape == (3, 9)


@pytest.mark.parametrize("mask", [torch.zeros(7, 30), torch.ones(7, 30)], ids=["nothing", "everything"])
def test_where_there_is_but_one_pattern_parameters_alone_are_enough(mask):
    source, model = SparseLinear(30, 7, mask=mask), SparseLinear(30, 7, mask=mask)
    model.load_state_dict(parameters_of(source), strict=False)
    assert_same(model, source)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own imports
def test_a_parametrized_weight_without_its_pattern_is_refused_too():
    layers = [make(seed)[0] for seed in range(2)]
    for layer in layers:
        nn.utils.parametrizations.weight_norm(layer, "weight", dim=None)
    layers[1].load_state_dict(parameters_of(layers[0]), strict=False)
    with pytest.raises(ValueError, match="loaded without its pattern"):
        layers[1](X)


def test_what_holds_none_of_our_weights_loads_as_before():
    model = make(0)
    want = model[2](torch.zeros(1, 40)) + 1
    model.load_state_dict({"2.bias": model[2].bias.detach() + 1}, strict=False)
    assert torch.equal(model[2](torch.zeros(1, 40)), want)


# ---- parts, and damage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 9])
@pytest.mark.parametrize("load", [by_torch, by_filling_up], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backwards", [False, True])
def test_a_checkpoint_in_parts_loads_whatever_is_in_which(load, parts, backwards):
    source, model = make(0), make(1)
    saved = list(source.state_dict().items())[:: -1 if backwards else 1]
    for k in range(parts):
        load(model, dict(saved[k::parts] if parts == 9 else saved[k * 16 // parts : (k + 1) * 16 // parts]))
    assert_same(model, source)


@pytest.mark.parametrize("missing", NAMES[1:])  # drawn patterns of equal sizes have equal col_ptr
def test_a_pattern_of_which_a_part_is_missing_is_refused_at_the_next_call(missing):
    source, model = make(0), make(1)
    saved = source.state_dict()
    del saved[f"0.{missing}"]
    model.load_state_dict(saved, strict=False)
    with pytest.raises(ValueError, match="no whole pattern"):
        model(X)


def averaged_badly(saved):
    return {k: t if t.is_floating_point() else (0.9999 * t + (1 - 0.9999) * t).int() for k, t in saved.items()}


DAMAGE = {
    "cut to integers": averaged_badly,
    "an average of two patterns": lambda s: {
        k: (t + make(1).state_dict()[k]) / 2 if "sizes" not in k else t for k, t in s.items()
    },
    "a number": lambda s: {**s, "2.order": s["2.order"].clone().index_fill_(0, torch.tensor(3), 7)},
    "a pointer": lambda s: {**s, "0.col_ptr": s["0.col_ptr"].flip(0)},
    "no numbers": lambda s: {**s, "0.order": s["0.order"] > 3},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("assign", [False, True])
def test_a_damaged_pattern_is_refused_when_it_is_loaded_and_nothing_of_it_is_taken(damage, assign):
    model = make(0)
    before, saved = [copy.deepcopy(model[k].state_dict()) for k in (0, 2)], damage(make(2).state_dict())
    with pytest.raises(RuntimeError, match="the saved pattern (is not whole|has)"):
        model.load_state_dict(saved, assign=assign)
    for k, state in zip((0, 2), before, strict=True):
        now = [torch.equal(t, state[name]) for name, t in model[k].state_dict().items()]
        assert all(now) or all(torch.equal(t, saved[f"{k}.{name}"]) for name, t in model[k].state_dict().items())
    model(X)


def test_a_large_damaged_average_is_refused_when_it_is_loaded_and_one_number_at_the_next_call():
    torch.manual_seed(0)
    layer = SparseLinear(900, 700, 0.1)
    assert layer.order.numel() > _index.SMALL
    saved = layer.state_dict()
    with pytest.raises(RuntimeError, match="not whole"):
        layer.load_state_dict(averaged_badly(saved))
    damaged = {**saved, "order": saved["order"].clone()}
    damaged["order"][[5001, 5002]] = damaged["order"][[5002, 5001]]
    layer.load_state_dict(damaged)
    with pytest.raises(ValueError, match="no whole pattern: .*at 5001|at 5002|entry 5001"):
        layer(torch.ones(1, 900))


def test_averages_of_equal_patterns_that_are_still_floats_load():
    source, model = make(0), make(1)
    model.load_state_dict({k: (t + t + t) / 3 for k, t in source.state_dict().items()})
    torch.testing.assert_close(model(X), source(X))
    assert model[0].order.dtype == torch.int32


def test_a_pattern_alone_may_be_loaded():
    source, model = make(0), make(1)
    weights = parameters_of(model)
    model.load_state_dict({k: t for k, t in source.state_dict().items() if k not in weights}, strict=False)
    assert torch.equal(model[0].row_index, source[0].row_index) and model(X).shape == (3, 9)
    assert all(torch.equal(t, weights[name]) for name, t in model.named_parameters())


# ---- memory without a pattern ------------------------------------------------------------------------------------


def on_meta(seed=0):
    with torch.device("meta"):
        return make(seed)


def empty(model):
    model.to_empty(device="cpu")
    with torch.no_grad():
        [t.zero_() for t in (*model.parameters(), *model.buffers())]
    return model


@pytest.mark.parametrize("backend", [None, "cpu", "xla"])
@pytest.mark.parametrize("fill", [0, 7, -1])
def test_memory_that_was_never_filled_is_refused_on_every_back_end(backend, fill):
    layer = empty(SparseLinear(6, 8, 1.0, backend=backend, device="meta"))
    with torch.no_grad():
        [t.fill_(fill) for t in layer.buffers()]
    with pytest.raises(ValueError, match=r"never filled: col_ptr goes from .* to .*, .*reset_parameters\(\)"):
        layer(torch.ones(2, 6))
    layer.state_dict()  # loaders ask for it


def test_reset_parameters_draws_what_the_constructor_draws_from_the_same_seed():
    model, want = empty(on_meta()), make(5)
    torch.manual_seed(5)
    for layer in model.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    assert_same(model, want)
    for ours, theirs in zip(model.state_dict().values(), want.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("view", [False, True], ids=["stored", "transposed"])
def test_reset_parameters_puts_a_given_pattern_back(view):
    pattern = BlockPattern.random(jax.random.key(0), (30, 30), density=0.3, block=(5, 3))
    pattern = pattern.T if view else pattern
    layer = empty(BlockSparseLinear(30, 30, pattern=pattern, device="meta"))
    with pytest.raises(ValueError, match="no whole pattern"):
        layer(X)
    layer.reset_parameters()
    for ours, theirs in zip(layer.pattern.index, pattern.index, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_reset_parameters_keeps_a_pattern_that_was_loaded_and_mends_one_that_was_lost():
    source = make(1)[0]
    for layer in (make(0)[0], empty(on_meta()[0])):
        layer.load_state_dict(source.state_dict())
        layer.reset_parameters()
        assert torch.equal(layer.order, source.order)
    empty(layer).reset_parameters()
    assert torch.equal(layer.order, source.order) and layer(X).shape == (3, 40)


def test_what_was_loaded_is_known_before_the_first_call_without_a_copy_of_it():
    layer, source = make(0)[0], make(1)[0]
    saved = source.state_dict()
    layer.load_state_dict(saved)
    assert layer._guard._source.tensors[1] is saved["row_index"]
    with torch.no_grad():
        for t in layer.buffers():
            t.copy_(0.9999 * t + (1 - 0.9999) * t)
    assert_same(layer, source)
    assert layer._guard._source is None


def test_loaded_tensors_that_were_written_into_are_no_record():
    layer, source = make(0)[0], make(1)[0]
    saved = source.state_dict()
    layer.load_state_dict(saved, assign=True)
    saved["row_index"].zero_()
    with pytest.raises(ValueError, match="no whole pattern"):
        layer(X)


@pytest.mark.parametrize("kind, sizes", [(SparseLinear, (30, 40, 0.2)), (BlockSparseLinear, (30, 40, 0.2, 5))])
def test_skip_init_leaves_a_layer_to_be_filled(kind, sizes):
    layer = nn.utils.skip_init(kind, *sizes)
    layer.reset_parameters()
    assert layer(X).shape == (3, 40)
    loaded = nn.utils.skip_init(kind, *sizes)
    loaded.load_state_dict(layer.state_dict())
    assert_same(loaded, layer)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is meant
def test_models_from_the_meta_device_load_by_every_way(tmp_path):
    source = make(0)
    dcp.save(source.state_dict(), checkpoint_id=tmp_path)

    def by_place(model):
        saved = empty(model).state_dict()
        dcp.load(saved, checkpoint_id=tmp_path)

    def by_broadcast(model):
        for ours, theirs in zip(empty(model).state_dict().values(), source.state_dict().values(), strict=True):
            ours.copy_(theirs)

    ways = [
        lambda m: m.load_state_dict(source.state_dict(), assign=True),
        lambda m: empty(m).load_state_dict(source.state_dict()),
        lambda m: dcp_state.set_model_state_dict(empty(m), source.state_dict()),
        by_place,
        by_broadcast,
    ]
    for load in ways:
        model = on_meta(3)
        load(model)
        assert_same(model, source)


def test_accelerate_loads_shards_and_empty_models(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="loads by accelerate")
    source = make(0)
    accelerate.Accelerator(cpu=True).save_model(source, str(tmp_path), max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = make(1)
    accelerate.load_checkpoint_in_model(model, str(tmp_path))
    assert_same(model, source)
    for buffers in (False, True):
        with accelerate.init_empty_weights(include_buffers=buffers):
            model = make(1)
        model = accelerate.load_checkpoint_and_dispatch(model, str(tmp_path), device_map={"": "cpu"})
        assert_same(model, source)


def test_transformers_loads_a_model_and_one_without_patterns_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers", reason="loads a model of transformers")

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.body = make(int(torch.randint(100, (), device="cpu")))
            self.post_init()

        def forward(self, x):
            return self.body(x)

    source = Model(transformers.PretrainedConfig())
    source.save_pretrained(tmp_path / "whole")
    assert_same(Model.from_pretrained(tmp_path / "whole"), source)
    source.save_pretrained(tmp_path / "part", state_dict=dict(source.named_parameters()))
    with pytest.raises(ValueError, match="never filled|no whole pattern"):
        Model.from_pretrained(tmp_path / "part")(X)
