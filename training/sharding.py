"""Trainable parameters sharded over processes (train.py --shard): PyTorch's FSDP2.

    without    every process holds 16 bytes for every trainable parameter: the weight, its
               gradient, and the two moments of AdamW
    --shard    n processes hold 16/n bytes each. A layer's weights are gathered just before it runs
               and let go after it; its gradients are added up and each process keeps its piece

What is computed is the same. Checkpoints are too: the pieces are gathered when one is written and
cut again when one is read, so a run may resume with another number of processes, or with one.
"""
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynamicrafter.layers import CrossAttention
from model.vid2world import Model
from support.errors import RequestError

try:
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # before 2.6
    fully_shard = None


def shard(model: Model, bf16: bool) -> None:
    """Shard the trainable parts over the processes, before there is an optimizer. The frozen ones
    stay whole everywhere.

    bf16  gather weights in half precision; gradients are added up in float32 all the same

    Raises RequestError without torchrun, for other than world models, or with a PyTorch without
    `fully_shard`.
    """
    if fully_shard is None:
        raise RequestError(f"--shard needs PyTorch 2.6, this is {torch.__version__}")
    if type(model) is not Model:
        raise RequestError("--shard knows the parts of world models, not of a "
                           f"{type(model).__name__}")
    if not dist.is_initialized():
        raise RequestError("--shard spreads a run over processes: start it with torchrun "
                           "--nproc_per_node=N train.py …")
    warnings.filterwarnings("ignore", ".*returned a view tensor")  # which nothing here changes
    for tensor in model.state_dict().values():  # all begin with what the first process has
        dist.broadcast(tensor, 0)
    options = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32,
                                                 cast_forward_inputs=False)}
    unet = model.unet
    blocks = [*unet.input_blocks, unet.init_attn, unet.middle_block, *unet.output_blocks]
    layers = [layer for block in blocks for layer in block]
    cross_attentions = [layer for layer in unet.modules() if isinstance(layer, CrossAttention)]
    others = [part for part in (model.resampler, model.image_tower)
              if any(parameter.requires_grad for parameter in part.parameters())]
    parts = [*cross_attentions, *layers, unet, *others]  # from the inside out
    for part in parts:
        fully_shard(part, **options)
    # Weights are gathered when `forward` is called, or one of these.
    for method in ("project_context", "forward_projected"):
        register_fsdp_forward_method(unet, method)
    for layer in cross_attentions:
        register_fsdp_forward_method(layer, "project")
    # The tensors that gathered weights are put into are made once. If that happened in the
    # inference mode of a strip, nothing could be trained afterwards.
    for part in reversed(parts):
        part.unshard()
        part.reshard()


def gather(state: object) -> object:
    """A state dict with its pieces put together, in main memory. Every process has to call this;
    the first has the result."""
    if isinstance(state, dict):
        return {name: gather(value) for name, value in state.items()}
    if fully_shard is not None and isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if dist.get_rank() == 0 else None
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Give an optimizer the whole state of another, cut as its parameters are."""
    parameters = optimizer.param_groups[0]["params"]

    def cut(number: int, value: Tensor) -> Tensor:
        whole = parameters[number]
        if fully_shard is None or not isinstance(whole, DTensor) or value.shape != whole.shape:
            return value
        return distribute_tensor(value.to(whole.device), whole.device_mesh, whole.placements)

    optimizer.load_state_dict(state | {"state": {
        number: {name: cut(number, value) for name, value in moments.items()}
        for number, moments in state["state"].items()}})


def clip_gradients(parameters: list[nn.Parameter], longest: float) -> float:
    """Keep the direction of the gradient and limit its length, that of all pieces together; gives
    the length that it had."""
    if fully_shard is None or not isinstance(parameters[0], DTensor):
        return nn.utils.clip_grad_norm_(parameters, longest).item()
    pieces = [parameter.grad.to_local() for parameter in parameters if parameter.grad is not None]
    length = torch.stack(torch._foreach_norm(pieces)).square().sum()
    dist.all_reduce(length)
    torch._foreach_mul_(pieces, (longest / (length.sqrt() + 1e-6)).clamp(max=1))
    return length.sqrt().item()
