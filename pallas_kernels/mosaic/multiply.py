"""The forward product and the input gradient by the kernel that a configuration is one of."""

from pallas_kernels._device import Device
from pallas_kernels._lines import Lines
from pallas_kernels.mosaic import gather, union
from pallas_kernels.mosaic.configs import Gather, Union


def multiply(x, blocks, lines: Lines, bias, config: Gather | Union, device: Device, *, transposed: bool, activation):
    """What `gather.gather` says."""
    how = {"transposed": transposed, "activation": activation}
    if isinstance(config, Union):
        return union.union(x, blocks, lines, bias, config, device, **how)
    return gather.gather(x, blocks, lines, bias, config, device, **how)
