"""`jax2torch`: values and gradients against torch's own, and every way to share memory wrongly."""

import gc
import threading
import weakref

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from torch_bridge import BridgeError, jax2torch
from torch_bridge._views import Views
from torch_bridge.dlpack import kept_operand
from torch_bridge.function import TracedFunction


def layer(x, w):
    return jnp.tanh(x @ w)


def torch_layer(x, w):
    return torch.tanh(x @ w)


def inputs(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def only_op(traced):
    (op,) = traced.ops.values()
    return op


# ---- values and gradients ----------------------------------------------------------


def test_values_and_gradients_are_those_of_torch():
    x, w = inputs((5, 4), (4, 3))
    y, z = jax2torch(layer)(x, w), torch_layer(x, w)
    torch.testing.assert_close(y, z)
    cotangent = torch.randn(5, 3)
    ours, theirs = (torch.autograd.grad(out, (x, w), cotangent) for out in (y, z))
    torch.testing.assert_close(ours, theirs)


def test_an_expanded_cotangent_is_fine():
    x, w = inputs((5, 4), (4, 3))
    jax2torch(layer)(x, w).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(torch_layer(x, w).sum(), x)[0])


def test_only_the_gradients_that_are_wanted_are_computed():
    x, w = inputs((5, 4), (4, 3))
    traced = TracedFunction(layer, "layer")
    traced((x.detach(), w), {}).sum().backward()
    assert x.grad is None and w.grad is not None
    assert list(only_op(traced)._forward) == [(False, True)]


def test_trees_keywords_and_constants_go_through():
    def f(tree, *, mode, scale=2.0):
        out = tree["a"] * scale + tree["b"][0] if mode == "sum" else tree["a"]
        return {"out": out, "best": jnp.argmax(tree["a"]), "n": 3}

    a, b = inputs((4,), (4,))
    got = jax2torch(f)({"a": a, "b": (b, None)}, mode="sum")
    torch.testing.assert_close(got["out"], a * 2 + b)
    assert got["best"].dtype == torch.int32 and not got["best"].requires_grad and got["n"].item() == 3
    got["out"].sum().backward()
    assert torch.equal(a.grad, torch.full((4,), 2.0))


def test_unused_outputs_and_unused_inputs_get_zeros():
    x, w = inputs((3,), (3,))
    jax2torch(lambda x, w: (x**2, x**3))(x, w)[1].sum().backward()
    torch.testing.assert_close(x.grad, 3 * x.detach() ** 2)
    assert torch.equal(w.grad, torch.zeros(3))


def test_numpy_and_jax_arrays_are_traced_not_constant():
    traced = TracedFunction(lambda x, y: x * y, "product")
    for value in (2.0, 3.0):
        for array in (np.full(2, value, np.float32), jnp.full(2, value)):
            assert torch.equal(traced((torch.ones(2), array), {}), torch.full((2,), value))
    assert len(traced.ops) == 1


@pytest.mark.parametrize("a, b", [(0.0, -0.0), (1, True), (1, 1.0)])
def test_equal_constants_that_differ_are_told_apart(a, b):
    seen = []
    f = jax2torch(lambda x, c: x + len(seen) if seen.append(repr(c)) is None else x)
    for c in (a, b, a, b):
        f(torch.zeros(1), c)
    assert seen == [repr(a), repr(b)]


def test_integer_tensors_arrive_as_int32():
    table, index = inputs((5, 2))[0], torch.tensor([3, 3, 1])
    rows = jax2torch(lambda table, index: table[index])
    rows(table, index).sum().backward()
    assert table.grad[3].tolist() == [2.0, 2.0]
    with pytest.raises(BridgeError, match="argument 1: torch.int64 holds 1 values outside"):
        rows(table, torch.tensor([2**40]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradients_keep_their_dtype(dtype):
    x = torch.ones(3, dtype=dtype, requires_grad=True)
    jax2torch(lambda x: x * x)(x).sum().backward()
    assert x.grad.dtype == dtype and x.grad.tolist() == [2.0] * 3


# ---- memory: nothing that torch writes may change what JAX holds, nor the other way ------------------


def test_a_change_in_place_between_forward_and_backward_raises_as_in_torch():
    for changed in (0, 1):
        pair = inputs((5, 4), (4, 3))
        y = jax2torch(layer)(*pair).sum()
        with torch.no_grad():
            pair[changed].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_a_change_of_the_output_in_place_is_harmless():
    (x,) = inputs((4,))
    y = jax2torch(jnp.tanh)(x)
    y.mul_(2.0)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * (1 - torch.tanh(x.detach()) ** 2))


@pytest.mark.parametrize("views", [Views(), Views(["0"])], ids=["no views", "kept views"])
def test_outputs_never_share_memory_with_inputs_constants_or_each_other(views):
    constant = jnp.ones(4)
    traced = TracedFunction(lambda x: (x, constant, x, x.reshape(2, 2)), "same")
    x = torch.zeros(4)
    for _ in range(2):
        first, second, third, fourth = traced((x,), {}, views)
        first.add_(5), second.add_(7)
        assert x.sum() == third.sum() == fourth.sum() == 0 and constant.sum() == 4


def test_inputs_may_be_overwritten_as_soon_as_a_long_call_returns():
    def slow(x, w):
        return (jax.lax.fori_loop(0, 6, lambda i, a: jnp.tanh(a @ a) * 0.5, x) * 0).sum() + w.sum()

    f, x, w = jax2torch(slow), torch.full((500, 500), 1e-3), torch.ones(1024)
    f(x, w)
    for _ in range(3):
        w.fill_(1.0)
        y = f(x, w)
        w.fill_(100.0)
        assert y.item() == 1024.0


def test_residuals_that_are_inputs_are_not_copied():
    x, w = inputs((5, 4), (4, 3))
    node = jax2torch(lambda x, w: jnp.tanh(x @ w))(x, w).grad_fn
    assert set(node.plan.inputs) == {0, 1}
    assert {tuple(r.shape) for r in node.computed} == {(5, 3)}


def test_residuals_are_freed_by_backward():
    (x,) = inputs((4,))
    y = jax2torch(jnp.tanh)(x)
    node = y.grad_fn
    (residual, *_) = node.computed
    alive = weakref.ref(residual)
    del residual
    y.sum().backward()
    gc.collect()
    assert alive() is None


def moved(p):
    p.data = torch.randn_like(p)


def transposed_in_place(p):
    p.data = p.data.t()


def negated_lazily(p):
    p.data = torch._neg_view(p.data)


def realigned(p):
    p.data = torch.randn(17)[1:].reshape(4, 4)


UPDATES = [lambda p: p.mul_(1.5), moved, transposed_in_place, negated_lazily, realigned]


@pytest.mark.parametrize("update", UPDATES, ids=lambda u: u.__name__)
def test_kept_views_follow_every_kind_of_update(update):
    p, views = torch.nn.Parameter(torch.randn(4, 4)), Views(["0"])
    traced = TracedFunction(lambda w: w * 1, "weight")
    for _ in range(3):
        assert torch.equal(traced((p,), {}, views), p)
        with torch.no_grad():
            update(p)
        assert torch.equal(traced((p,), {}, views), p)
        with torch.no_grad():
            p.mul_(1.5)
    assert torch.equal(traced((p,), {}, views), p)


def test_a_kept_view_is_the_parameters_own_memory_and_is_kept():
    p, views = torch.nn.Parameter(torch.randn(4, 4)), Views(["0"])
    first = kept_operand(views, "0", p)
    assert kept_operand(views, "0", p) is first and first.unsafe_buffer_pointer() == p.data_ptr()


# ---- autograd's other features ----------------------------------------------------------


def test_second_derivatives_are_those_of_torch():
    x, w = inputs((3,), (3,))

    def mixed(f):
        (g,) = torch.autograd.grad(f(x * w).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (x, w))

    torch.testing.assert_close(mixed(jax2torch(jnp.sin)), mixed(torch.sin))


def test_third_derivatives_work():
    x = torch.tensor(0.7, requires_grad=True)
    y = jax2torch(jnp.sin)(x)
    for _ in range(3):
        (y,) = torch.autograd.grad(y, x, create_graph=True)
    torch.testing.assert_close(y, -torch.cos(x))


def test_gradcheck_and_gradgradcheck_pass(x64):
    torch.manual_seed(0)
    pair = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (4, 2))]
    f = jax2torch(lambda x, w: jnp.tanh(x @ w) * jnp.sin(w.sum()))
    assert torch.autograd.gradcheck(f, pair) and torch.autograd.gradgradcheck(f, pair)


@pytest.mark.parametrize(
    "fn",
    [lambda z: jnp.exp(z) * z, jnp.abs, lambda z: z * z.conj() + 1j * z.real],
    ids=["exp", "abs", "mixed"],
)
def test_complex_gradients_follow_torchs_convention(x64, fn):
    torch.manual_seed(0)
    z = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(jax2torch(fn), (z,)) and torch.autograd.gradgradcheck(jax2torch(fn), (z,))


def test_a_retained_graph_gives_the_same_bits_and_a_freed_one_raises():
    (x,) = inputs((3,))
    y = jax2torch(lambda x: jnp.sin(x) ** 2)(x).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_works(reentrant):
    x, w = inputs((5, 4), (4, 3))
    y = checkpoint(jax2torch(layer), x, w, use_reentrant=reentrant)
    assert reentrant or y.grad_fn.computed is None  # torch holds the residuals, and has dropped them
    y.sum().backward()
    torch.testing.assert_close(w.grad, torch.autograd.grad(torch_layer(x, w).sum(), w)[0])


def test_saved_tensor_hooks_see_the_residuals():
    x, w = inputs((5, 4), (4, 3))
    shapes = []

    def pack(t):
        shapes.append(tuple(t.shape))
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = jax2torch(layer)(x, w)
    y.sum().backward()
    assert shapes[:2] == [(5, 4), (4, 3)] and set(shapes[2:]) == {(5, 3)}  # inputs, then what was computed
    torch.testing.assert_close(w.grad, torch.autograd.grad(torch_layer(x, w).sum(), w)[0])


def test_threads_do_not_mix_things_up():
    f, wrong = jax2torch(layer), []

    def work(i):
        x, w = torch.randn(3 + i, 4), torch.randn(4, 3, requires_grad=True)
        for _ in range(10):
            ours, theirs = (torch.autograd.grad(g(x, w).sum(), w)[0] for g in (f, torch_layer))
            if not torch.allclose(ours, theirs, atol=1e-5):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_repeated_calls_trace_once_and_keep_nothing():
    x, w = inputs((5, 4), (4, 3))
    traced = TracedFunction(layer, "layer")
    for _ in range(5):
        traced((x, w), {}).sum().backward()
    assert only_op(traced).traces == 1
    alive = weakref.ref(traced((x, w), {}).grad_fn)
    gc.collect()
    assert alive() is None


# ---- errors ----------------------------------------------------------


def test_an_unhashable_constant_is_refused():
    with pytest.raises(BridgeError, match="bytearray is neither an array nor hashable"):
        jax2torch(lambda x, s: x)(torch.ones(1), bytearray(b"a"))


def test_an_error_inside_the_function_says_what_was_traced():
    with pytest.raises(TypeError) as error:
        jax2torch(layer)(torch.ones(2, 3), torch.ones(2, 3))
    assert any("tracing layer for float32[2, 3], float32[2, 3]" in note for note in error.value.__notes__)


@pytest.mark.parametrize("place", ["args", "kwargs"])
def test_an_argument_that_cannot_cross_is_named_by_its_path(place):
    bad = {"deep": [torch.eye(2).to_sparse()]}
    with pytest.raises(BridgeError, match=r"layer: argument (1|w)\['deep'\]\[0\]"):
        jax2torch(layer)(torch.ones(2), bad) if place == "args" else jax2torch(layer)(torch.ones(2), w=bad)


def test_many_constants_are_warned_about():
    f = jax2torch(lambda x, s: x * s)
    with pytest.warns(UserWarning, match="torch.tensor"):
        for i in range(20):
            f(torch.ones(2), float(i))


def test_shapes_that_go_on_varying_are_warned_about_once():
    f = jax2torch(lambda x: x * 2)
    with pytest.warns(UserWarning, match="16 different shapes.*drop_last") as seen:
        for size in range(20):
            f(torch.ones(size))
    assert len(seen) == 1
