"""From Flax to PyTorch and back: trained with Optax, fine-tuned in a plain PyTorch loop, and the same numbers in Flax.

pip install 'jaxsparse[examples,torch]' && python examples/flax_and_back.py
"""

import sys

import flax.linen as nn
import jax
import numpy as np
import optax
import torch
from _data import batches, load

from jaxsparse import BlockDiagDense
from torch_bridge import from_flax

EPOCHS = 4 if "--quick" in sys.argv else 15
data, test = load(None)


class Model(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Dense(512)(images))
        x = BlockDiagDense(512, num_blocks=8, activation="relu")(x)
        return nn.Dense(10)(x)


def accuracy(logits) -> float:
    return float((np.asarray(logits).argmax(-1) == test.labels).mean())


# In Flax, with Optax.
model, optimizer = Model(), optax.adam(1e-3)
variables = model.init(jax.random.key(0), test.images)
opt_state = optimizer.init(variables)


@jax.jit
def step(variables, opt_state, batch):
    def loss(variables):
        logits = model.apply(variables, batch.images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    updates, opt_state = optimizer.update(jax.grad(loss)(variables), opt_state)
    return optax.apply_updates(variables, updates), opt_state


rng = np.random.default_rng(0)
for batch in (batch for _ in range(EPOCHS) for batch in batches(data, 128, rng)):
    variables, opt_state = step(variables, opt_state, batch)
in_flax = model.apply(variables, test.images)
print(f"trained in Flax           {accuracy(in_flax):.1%} of the test images")

# In PyTorch: the model is a torch.nn.Module now, and the loop any PyTorch loop.
module, images = from_flax(model, variables), torch.from_numpy(test.images)
print(f"largest difference there  {np.abs(module(images).detach().numpy() - in_flax).max():.1e}")
adam = torch.optim.Adam(module.parameters(), lr=1e-4)
for batch in (batch for _ in range(EPOCHS) for batch in batches(data, 128, rng)):
    adam.zero_grad()
    logits = module(torch.from_numpy(batch.images))
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels).long()).backward()
    adam.step()
in_torch = module(images).detach().numpy()
print(f"fine-tuned in PyTorch     {accuracy(in_torch):.1%}")

# And back: what `variables()` gives is what `init` gave, with the new values.
back = model.apply(module.variables(), test.images)
print(f"largest difference back   {np.abs(back - in_torch).max():.1e}")
print(f"equal bit for bit         {np.array_equal(jax.jit(model.apply)(module.variables(), test.images), in_torch)}")
