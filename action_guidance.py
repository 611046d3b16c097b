"""One action per frame, dropped at random in training, amplified in sampling.

A video model continues a clip by habit: it has seen many drawers close, so drawers close. To steer it, every
frame learns which action led to it, as a vector added to that frame's noise-level embedding. And so that
sampling can tell the action from the habit, training hides each frame's action now and then, independently of
the others (p = 0.2). The network then knows two velocities for the newest frame, with and without its action,
and the difference between them is what the action does:

    v = v_uncond + λ (v_cond - v_uncond)          λ = 1: as trained    λ > 1: the action, exaggerated

Both see the same history with its actions; only the newest action is hidden in v_uncond. That is why
the dropout has to be independent per frame: had training hidden whole clips of actions, "everything known but the last"
would be a question that the network was never asked. This is classifier-free guidance, per frame.
Paper: section 4.2 (causal action guidance).

A hidden action and an action of zeros are not the same. The first adds nothing to the embedding; the second
("hold still") goes through the layers and adds what comes out.
"""
import torch
from torch import Tensor, nn


class MultiHotEmbedding(nn.Embedding):
    """Sum of the table's rows that a multi-hot vector names: how keys and mouse bins (CS:GO) enter the network."""

    def forward(self, actions: Tensor) -> Tensor:  # [..., A] of 0 and 1
        return actions @ self.weight


def action_embedding(action_dim: int, model_channels: int) -> nn.Sequential:
    """[..., A] -> [..., 4·model_channels], with PyTorch's default start. Paper: section 4.2."""
    hidden = 4 * model_channels
    return nn.Sequential(nn.Linear(action_dim, model_channels), nn.SiLU(),
                         nn.Linear(model_channels, hidden), nn.SiLU(), nn.Linear(hidden, hidden))


def align_actions(actions: Tensor) -> Tensor:
    """From "taken at frame t", as data files store them, to "led to frame t", as the network reads them.

    actions [B, T, A]: row t was taken at frame t
    returns [B, T, A]: row t was taken at frame t-1; row 0 is zeros, and the last action falls out of the clip
    """
    return torch.cat([torch.zeros_like(actions[:, :1]), actions[:, :-1]], dim=1)


def drop_actions(actions: Tensor, probability: float = 0.2, generator: torch.Generator | None = None) -> Tensor:
    """Draw which actions of a batch stay visible, every frame for itself.

    actions [B, T, A]; returns action_mask [B, T]: 1 keeps the frame's action, 0 hides it. Paper: section 4.2.
    """
    draw = torch.rand(actions.shape[:2], generator=generator, device=generator.device if generator else actions.device)
    return (draw >= probability).to(actions)


def guide(v_cond: Tensor, v_uncond: Tensor, guidance: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance on the action.

    v_cond, v_uncond [B, T, C, h, w]: velocities with the action and without it
    guidance   λ: 0 ignores the action, 1 follows it as trained, more exaggerates it
    rescale    0..1: how far each frame's standard deviation is pulled back to that of v_cond, which λ > 1
               overshoots (Lin et al. 2023, "Common diffusion noise schedules …", section 3.4)

    Paper: section 4.2.
    """
    v = v_uncond + guidance * (v_cond - v_uncond)
    if rescale == 0:
        return v
    frame = (-3, -2, -1)
    as_conditional = v * (v_cond.std(frame, keepdim=True) / v.std(frame, keepdim=True))
    return rescale * as_conditional + (1 - rescale) * v
