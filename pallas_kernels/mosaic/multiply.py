"""Each product by the kernel that a configuration is one of."""

from typing import Any

from pallas_kernels._device import Device
from pallas_kernels._lines import Lines
from pallas_kernels.mosaic import gather, supertile, union
from pallas_kernels.mosaic import sample as two_blocks
from pallas_kernels.mosaic.configs import Gather, Sample, Supertile, Union


def multiply(x, blocks, lines: Lines, bias, config: Gather | Union, device: Device, *, transposed: bool, activation):
    """The forward product and the input gradient, as `gather.gather` says."""
    how = {"transposed": transposed, "activation": activation}
    if isinstance(config, Union):
        return union.union(x, blocks, lines, bias, config, device, **how)
    return gather.gather(x, blocks, lines, bias, config, device, **how)


def sample(x, dy, index: Any, block: tuple[int, int], config: Sample | Supertile, device: Device):
    """The weight gradient, as `sample.sample` says."""
    if isinstance(config, Supertile):
        return supertile.supertile(x, dy, index, block, config, device)
    return two_blocks.sample(x, dy, index, block, config, device)
