"""What records, counts or replays torch's operators follows a call into JAX, or is refused: it never keeps a branch."""

import copy
import functools
import io

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import jax
import jax.numpy as jnp
import torch
from flax import linen
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torch_bridge
from torch_bridge import BlockDiagLinear, BridgeError, SparseLinear, from_flax, jax2torch, products

pytestmark = pytest.mark.filterwarnings(  # torch's own
    "ignore:.*torch.jit.*:DeprecationWarning", "ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"
)


class Function(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3))
        self.function = jax2torch(lambda x, w: jnp.tanh(x @ w))

    def forward(self, x):
        return self.function(x, self.weight)


class Net(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(6)(x))
        return linen.Dense(2)(jnp.tanh(x))


def net():
    return from_flax(Net(), jax.jit(Net().init)(jax.random.key(0), jnp.ones((2, 8))))


MAKERS = {
    "jax2torch": Function,
    "from_flax": lambda: net().eval(),
    "from_flax in training": net,
    "entries in JAX": lambda: SparseLinear(8, 6, 0.5, backend="xla"),
    "blocks in JAX": lambda: BlockDiagLinear(8, 6, 2, backend="xla"),
    "entries": lambda: SparseLinear(8, 6, 0.5),
    "blocks": lambda: BlockDiagLinear(8, 6, 2),
}
THROUGH_JAX = [name for name in MAKERS if name not in ("entries", "blocks") or products.WHY_NOT]


@functools.cache
def template(name):
    torch.manual_seed(0)
    return MAKERS[name]()


def make_copy(name):
    """A model of its own, which shares its compiled code with the others."""
    return copy.deepcopy(template(name))


EVERY = pytest.mark.parametrize("name", MAKERS)
IN_JAX = pytest.mark.parametrize("name", THROUGH_JAX)
PURE = pytest.mark.parametrize("name", [name for name in MAKERS if "training" not in name])


def quiet(trace):
    def without_gradients(model, x):
        with torch.no_grad():
            return trace(model, x)

    return without_gradients


def fx(**options):
    return lambda model, x: make_fx(model, _allow_non_fake_inputs=True, **options)(x)


RECORDERS = {
    "jit.trace": lambda model, x: torch.jit.trace(model, (x,)),
    "jit.trace unchecked": lambda model, x: torch.jit.trace(model, (x,), check_trace=False),
    "jit.trace without gradients": quiet(lambda model, x: torch.jit.trace(model, (x,))),
    "jit.trace_module": lambda model, x: torch.jit.trace_module(model, {"forward": (x,)}),
    "make_fx": fx(),
    "make_fx without gradients": quiet(fx()),
    "make_fx before autograd": fx(pre_dispatch=True),
    "make_fx of fakes": fx(tracing_mode="fake"),
    "make_fx of symbols": fx(tracing_mode="symbolic"),
}


def assert_follows(recorded, model, sizes=(2, 5)):
    for size in sizes:
        x = torch.randn(size, 8)
        torch.testing.assert_close(recorded(x), model(x))


@EVERY
@pytest.mark.parametrize("record", RECORDERS.values(), ids=RECORDERS)
def test_a_recording_follows_inputs_of_other_values_and_sizes(record, name):
    model = make_copy(name)
    assert_follows(record(copy.deepcopy(model), torch.randn(2, 8)), model)


@EVERY
def test_a_recording_trains(name):
    model = make_copy(name)
    traced = torch.jit.trace(copy.deepcopy(model), (torch.randn(2, 8),))
    x = torch.randn(5, 8)
    for call in (traced, model):
        call(x).square().sum().backward()
    for ours, theirs in zip(traced.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_a_recorded_gradient_follows():
    f, w = jax2torch(lambda x, w: jnp.tanh(x @ w)), torch.randn(8, 3, requires_grad=True)

    def gradient(x):
        return torch.autograd.grad(f(x, w).square().sum(), w)[0]

    assert_follows(make_fx(gradient)(torch.randn(2, 8)), gradient, (2, 2))


@PURE
def test_recordings_of_transforms_follow(name):
    model = make_copy(name)
    assert_follows(make_fx(torch.func.functionalize(model))(torch.randn(2, 8)), model)
    assert_follows(torch.func.functionalize(model), model)
    mapped = torch.func.vmap(model)
    assert_follows(make_fx(mapped)(torch.randn(2, 8)), mapped)
    gradient = torch.func.grad(lambda x: model(x).square().sum())
    assert_follows(make_fx(gradient)(torch.randn(2, 8)), gradient, (2, 2))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch's own, of its folded constants
def test_a_linearized_function_follows_its_tangent():
    f, x = jax2torch(jnp.sin), torch.randn(3)
    _, linear = torch.func.linearize(f, x)
    for t in torch.randn(2, 3):
        torch.testing.assert_close(linear(t), x.cos() * t)


def test_randomness_is_drawn_anew_by_every_call_of_a_recording():
    class Noisy(linen.Module):
        @linen.compact
        def __call__(self, x):
            return x + jax.random.normal(self.make_rng("noise"), x.shape)

    model = from_flax(Noisy(), {}, rngs=("noise",))
    traced = torch.jit.trace(model, (torch.zeros(4),), check_trace=False)
    assert not torch.equal(traced(torch.zeros(4)), traced(torch.zeros(4)))


def test_a_saved_recording_runs_here_and_says_why_it_runs_nowhere_else(monkeypatch):
    model, file, x = SparseLinear(8, 6, 0.5, backend="xla"), io.BytesIO(), torch.randn(3, 8)
    torch.jit.save(torch.jit.trace(model, (x,)), file)
    loaded = torch.jit.load(io.BytesIO(file.getvalue()))
    torch.testing.assert_close(loaded(x), model(x))
    monkeypatch.setattr(torch_bridge.operator, "_OPS", {})
    with pytest.raises(Exception, match="which only the process that compiled or"):
        loaded(x)


@IN_JAX
def test_what_can_not_follow_is_refused_with_a_way_out(name):
    model, x = make_copy(name), torch.randn(2, 8)
    with pytest.raises(Exception, match="torch.export"):
        torch.jit.script(nn.Sequential(model) if not isinstance(model, Function) else net())
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    with pytest.raises(BridgeError, match="a FakeTensor says itself"):
        model(fake)


def test_symbolic_tracing_is_refused_with_a_way_out():
    for model in (Function(), net()):
        with pytest.raises(BridgeError, match=r"torch\.export\.export or torch\.compile"):
            torch.fx.symbolic_trace(model)

    class Whole(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, SparseLinear) or super().is_leaf_module(m, name)

    stack = nn.Sequential(SparseLinear(8, 6, 0.5), nn.ReLU())
    assert_follows(torch.fx.GraphModule(stack, Whole().trace(stack)), stack)
    with pytest.raises(BridgeError, match="under a torch.func transform inside"):
        torch.jit.trace(torch.func.grad(lambda x: jax2torch(jnp.sin)(x).sum()), (torch.randn(2, 8),))


@EVERY
def test_fakes_get_shapes_and_dtypes_where_their_mode_is_on(name):
    model, x = make_copy(name), torch.randn(2, 8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = model(mode.from_tensor(x))
    expected = model(x)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@IN_JAX
def test_modes_see_one_operator_in_the_forward_and_one_in_the_backward_pass(name):
    model = make_copy(name)
    twin, x = copy.deepcopy(model), torch.randn(3, 8)
    with Dispatched() as dispatched:
        twin(x).square().sum().backward()
    assert dispatched.seen.count(torch.ops.torch_bridge.call.default) == 2
    with Called() as called:
        model(x)
    assert called.seen.count(torch.ops.torch_bridge.call) == 1
    model = copy.deepcopy(twin)
    y = model(x).square().sum()
    with Dispatched() as dispatched:  # the forward pass was not seen, and kept its residuals
        y.backward()
    assert dispatched.seen.count(torch.ops.torch_bridge.call.default) == 1


@EVERY
def test_gradients_under_a_mode_or_hooks_are_the_same(name):
    torch.manual_seed(0)
    model, x = make_copy(name), torch.randn(3, 8)
    gradients = []
    for context in (Dispatched, Called, lambda: torch.autograd.graph.save_on_cpu(), lambda: torch.device("cpu")):
        twin = copy.deepcopy(model)
        with context():
            twin(x).square().sum().backward()
        gradients.append([p.grad for p in twin.parameters()])
    model(x).square().sum().backward()
    for ours in gradients:
        for g, p in zip(ours, model.parameters(), strict=True):
            torch.testing.assert_close(g, p.grad, atol=1e-5, rtol=1e-4)


def test_a_default_device_is_no_onlooker():
    with torch.device("cpu"):
        assert not torch_bridge._watch.is_seen()
        with Called():
            assert torch_bridge._watch.is_seen()
    assert not torch_bridge._watch.is_seen()
