"""What to do when memory runs out, in one line."""

import torch

from vaegan_dist.config import Config
from vaegan_dist.errors import VaeganError
from vaegan_dist.training.graphs import captures


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is the device's or the machine's memory at its end."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def advice(config: Config, world_size: int, device: torch.device) -> VaeganError:
    """An error that names the setting which computes the same with less memory."""
    rows, now = config.training.batch_size // world_size, config.training.gradient_accumulation_steps
    more = next((n for n in range(2 * now, rows + 1) if rows % n == 0), None)
    at_once = rows // now
    if more is not None:
        remedy = (
            f"set training.gradient_accumulation_steps={more}: {rows // more} at once, and the same results up to "
            f"rounding"
        )
    else:
        remedy = "use more workers, a smaller network, or a node with more memory"
    if captures(config.training, device, world_size):
        remedy += "; or set training.cuda_graphs=false, which keeps no memory for graphs"
    return VaeganError(
        f"out of memory on {device} with {at_once} images at once per worker; {remedy}; the same command then "
        f"continues from the last checkpoint"
    )
