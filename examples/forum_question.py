"""A layer of 2048 features with a tenth of its weights, in PyTorch: four ways to write one line, timed side by side.

The three sparse ones start from the same weights, and learn the same.

pip install 'jaxsparse[torch]' && python examples/forum_question.py
"""

import statistics
import sys
import time

import torch
from torch import nn

from torch_bridge import SparseLinear

N, EPOCHS = (512, 3) if "--quick" in sys.argv else (2048, 20)
torch.manual_seed(0)
mask = torch.rand(N, N) < 0.1
x, target = torch.randn(256, N), torch.randn(256, N)


class Masked(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * mask, self.bias)


class ToSparse(nn.Linear):
    def forward(self, x):
        return torch.sparse.mm((self.weight * mask).to_sparse(), x.T).T + self.bias


layers = {
    "dense, for comparison": lambda: nn.Linear(N, N),
    "masked": lambda: Masked(N, N),
    "to_sparse()": lambda: ToSparse(N, N),
    "SparseLinear": lambda: SparseLinear.from_linear(nn.Linear(N, N), mask=mask),  # the one line that changes
}
print(f"{'':22}{'parameters':>11}{'first loss':>12}{'last loss':>11}{'ms per epoch':>14}")
for name, make in layers.items():
    torch.manual_seed(1)
    layer = make()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    losses, seconds = [], []
    for _ in range(EPOCHS):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    size, ms = sum(p.numel() for p in layer.parameters()), 1e3 * statistics.median(seconds)
    print(f"{name:22}{size:>11,}{losses[0]:>12.4f}{losses[-1]:>11.4f}{ms:>14.1f}")
