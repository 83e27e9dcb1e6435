"""Running statistics of batch normalisation, which each rank gathers from its own samples."""

import torch
import torch.distributed as dist
from torch import nn


def share_running_statistics(model: nn.Module) -> None:
    """Give all ranks the mean of their running means and variances, before a model is evaluated or saved.

    Each rank normalises by its own micro batch while it trains; without this, a checkpoint would hold rank 0's
    statistics and every rank would evaluate another model.
    """
    buffers = [
        buffer
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if not buffers:
        return
    together = torch.cat([buffer.double().flatten() for buffer in buffers])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    for buffer, part in zip(buffers, torch.split(together, [buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))
