"""`from_flax` in less usual models: methods, modes, shared and odd names, swapped parameters; its errors."""

import copy

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import jax
import jax.numpy as jnp
import torch
from flax import linen, nnx

from torch_bridge import BridgeError, from_flax


class Plain(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Dense(16)(x))
        return linen.Dense(4)(x)


def init(module):
    return jax.jit(module.init)(jax.random.key(0), jnp.ones((2, 8)))


def wrap(kind):
    return from_flax(kind(), init(kind()))


@pytest.mark.parametrize("given, mode", [("auto", True), ("not deterministic", True), (None, False)])
def test_the_mode_reaches_the_module_by_the_argument_that_is_named(given, mode):
    class Mode(linen.Module):
        def __call__(self, x, deterministic: bool = True):
            return x * (not deterministic)

    module = from_flax(Mode(), {}, train_kwarg=given)
    assert module(torch.ones(1)).item() == mode and module.eval()(torch.ones(1)).item() == 0
    assert module(torch.ones(1), deterministic=False).item() == 1


def test_another_method_can_be_called():
    class Coder(linen.Module):
        def setup(self):
            self.inner = linen.Dense(4)

        def __call__(self, x):
            return self.inner(x)

        def encode(self, x):
            return self.inner(x) * 2

    variables = init(Coder())
    x = torch.randn(2, 8)
    both = [from_flax(Coder(), variables, method=m)(x) for m in (None, "encode")]
    torch.testing.assert_close(both[0] * 2, both[1])


def test_inputs_are_cast_under_autocast_only_if_asked():
    seen = []

    class Look(linen.Module):
        def __call__(self, x):
            seen.append(x.dtype.name)
            return x

    x = torch.ones(2)
    with torch.autocast("cpu", torch.bfloat16):
        from_flax(Look(), {})(x)
        from_flax(Look(), {}, cast_inputs=torch.bfloat16)(x)
    from_flax(Look(), {}, cast_inputs=torch.bfloat16)(x)
    assert list(dict.fromkeys(seen)) == ["float32", "bfloat16"] and seen[-1] == "float32"


def test_shared_layers_and_tied_parameters_sum_their_gradients():
    class Twice(linen.Module):
        @linen.compact
        def __call__(self, x):
            dense = linen.Dense(8, use_bias=False)
            return dense(dense(x))

    module, x = from_flax(Twice(), init(Twice())), torch.randn(2, 8)
    module(x).sum().backward()
    (w,) = module.parameters()
    want = w.detach().clone().requires_grad_()
    (x @ want @ want).sum().backward()
    torch.testing.assert_close(w.grad, want.grad, atol=1e-4, rtol=1e-4)


def test_equal_arrays_are_not_tied():
    kernel = jnp.ones((8, 8))

    class Two(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(8, use_bias=False, name="b")(linen.Dense(8, use_bias=False, name="a")(x))

    module = from_flax(Two(), {"params": {"a": {"kernel": kernel}, "b": {"kernel": kernel}}})
    assert len(list(module.parameters())) == 2


def test_flax_names_may_equal_attributes_of_a_torch_module():
    class Names(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(2, use_bias=False, name="train")(linen.Dense(2, use_bias=False, name="type")(x))

    module = from_flax(Names(), init(Names()))
    assert set(module.state_dict()) == {"params.type.kernel", "params.train.kernel"}
    module.eval().train()
    copy.deepcopy(module)(torch.ones(1, 8))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own imports
def test_functional_call_and_parametrizations_are_followed():
    module, x = wrap(Plain), torch.randn(2, 8)
    swapped = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    assert torch.func.functional_call(module, swapped, (x,)).abs().sum() == 0
    scope = module.get_submodule("params.Dense_0")
    torch.nn.utils.parametrizations.weight_norm(scope, "kernel")
    module(x).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    assert any("original" in name for name in grads) and all(g is not None for g in grads.values())
    with pytest.raises(ValueError, match="parametrized"):
        module.load_variables(init(Plain()))


def test_wrong_uses_are_refused():
    with pytest.raises(TypeError, match="pass variables=module.init"):
        from_flax(Plain())
    with pytest.raises(TypeError, match="nnx.update"):
        from_flax(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), {})
    with pytest.raises(TypeError, match="got function"):
        from_flax(lambda x: x)
    with pytest.raises(BridgeError, match="'a.b', in the Flax path"):
        from_flax(Plain(), {"params": {"a.b": jnp.ones(2)}})


def test_errors_name_the_parameter_and_the_argument():
    with pytest.raises(BridgeError, match="Plain: argument 0: torch.float64 would lose precision"):
        wrap(Plain)(torch.ones(3, 8, dtype=torch.float64))
    with pytest.raises(BridgeError, match="Plain: params.Dense_0.bias: torch.float64"):
        wrap(Plain).double()(torch.ones(3, 8))


def test_an_nnx_model_that_assigns_to_its_parameters_is_refused():
    class Assigns(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(2))

        def __call__(self, x):
            self.w[...] = self.w[...] * 2
            return x * self.w[...]

    with pytest.raises(BridgeError, match="assigns to the nnx.Param w"):
        from_flax(Assigns())(torch.ones(2))


def test_parameters_are_kept_as_views_and_neither_buffers_nor_inputs():
    class Normed(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=True)(linen.Dense(4)(x))

    module = from_flax(Normed(), init(Normed()))
    assert dict(module.named_buffers())
    for _ in range(2):
        module(torch.ones(2, 8)).sum().backward()
    kept = [view for _, view in filter(None, module._views.kept.values())]
    assert len(kept) == len(module._views.kept) == len(list(module.parameters()))
    theirs = {p.data_ptr() for p in module.parameters()}
    assert {view.unsafe_buffer_pointer() for view in kept} == theirs
