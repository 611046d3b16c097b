"""One action per frame, dropped at random in training, amplified in sampling.

A video model continues a clip from its prior: it has seen many drawers close, so drawers close. To
steer it, every frame is conditioned on the action that led to it, as a vector added to that frame's
noise-level embedding. And so that sampling can tell the action from the prior, training hides each
frame's action at random, independently of the others (p = 0.2). The network then predicts two
velocities for the newest frame, conditional and unconditional: with and without its action. Their
difference is what the action does:

    v = v_uncond + λ (v_cond - v_uncond)        λ = 1: as trained    λ > 1: the action, amplified

Both see the same history with its actions; v_uncond hides the newest action alone:

    frame       0  1  2  3        Hence dropout is independent per frame. A network that has only
    v_cond      1  1  1  1        seen all actions of a clip hidden at once would meet the mask of
    v_uncond    1  1  1  0        v_uncond for the first time at inference.

This is classifier-free guidance, per frame. The formula in the paper calls λ - 1 what its
algorithm, its code and this file call λ. An action of zeros ("hold still") is not a hidden one: it
goes through the layers of the embedding and adds what comes out; a hidden action adds nothing.

    python action_guidance.py        shows both on numbers

Paper: section 4.2 (causal action guidance), Theorem 4.1 and appendix A.4.
"""
import torch
from torch import Tensor, nn


def align_actions(actions: Tensor) -> Tensor:
    """From "taken at frame t", as data files store actions, to "led to frame t", for the network.

    actions  [B, T, A], row t was taken at frame t
    returns  [B, T, A], row t was taken at frame t-1; row 0 is zeros, the last action is left out

    Paper: section 4.2.
    """
    return torch.cat([torch.zeros_like(actions[:, :1]), actions[:, :-1]], dim=1)


def drop_actions(actions: Tensor, probability: float = 0.2,
                 generator: torch.Generator | None = None) -> Tensor:
    """Draw the mask that hides actions, for each frame independently; the actions do not change.

    actions [B, T, A]; returns action_mask [B, T]: 1 keeps the frame's action, 0 hides it.
    Paper: section 4.2 and Algorithm 1.
    """
    device = generator.device if generator else actions.device
    u = torch.rand(actions.shape[:2], generator=generator, device=device)
    action_mask = (u >= probability).to(actions)  # m_t ~ Bernoulli(1 - p), each frame's own
    return action_mask


def guide(v_cond: Tensor, v_uncond: Tensor, guidance: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance on the action.

    v_cond, v_uncond [B, T, C, h, w]: velocities with the newest action and without it
    guidance   λ: 0 ignores the action, 1 follows it as trained, more amplifies it
    rescale    0..1: how far each frame's standard deviation is pulled back to that of v_cond, which
               λ > 1 overshoots (Lin et al. 2023, "Common diffusion noise schedules …", section 3.4)

    Paper: section 4.2 and Algorithm 2.
    """
    # v = v_uncond + λ (v_cond - v_uncond)
    v = v_uncond + guidance * (v_cond - v_uncond)
    if rescale == 0:
        return v
    # v ← φ · v · std(v_cond) / std(v) + (1 - φ) · v
    frame = (-3, -2, -1)
    rescaled = v * (v_cond.std(frame, keepdim=True) / v.std(frame, keepdim=True))
    return rescale * rescaled + (1 - rescale) * v


class HeLinear(nn.Linear):
    """A linear layer with He initialisation, which keeps the variance of its input (He 2015).

    PyTorch's default lets a sixth of the variance through. After three layers an action is then a
    twentieth of its size, small beside the noise level it is added to, and is learned much later.
    Not in the paper.
    """

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        nn.init.zeros_(self.bias)


def action_embedding(action_dim: int, model_channels: int, init: str = "pytorch") -> nn.Sequential:
    """[..., A] -> [..., 4·model_channels]. Paper: section 4.2 and B.2.

    init  "pytorch", or "he": see `HeLinear`
    """
    linear = HeLinear if init == "he" else nn.Linear
    hidden = 4 * model_channels
    return nn.Sequential(
        linear(action_dim, model_channels), nn.SiLU(),
        linear(model_channels, hidden), nn.SiLU(), linear(hidden, hidden))


class MultiHotEmbedding(nn.Embedding):
    """Sum of the rows that a multi-hot vector selects: how keys and mouse bins (CS:GO) enter."""

    def forward(self, actions: Tensor) -> Tensor:  # [..., A] of 0 and 1
        return actions @ self.weight


def demo() -> None:
    """Guidance on two numbers, the masks that a network meets in training and at inference, and how
    much of an action a new embedding lets through."""
    v_cond, v_uncond = torch.tensor(3.0), torch.tensor(1.0)
    print("v_uncond = 1, v_cond = 3")
    for guidance in (0, 1, 2, 3):
        print(f"  guidance {guidance}: v = {guide(v_cond, v_uncond, guidance):.0f}")
    mask = drop_actions(torch.zeros(20_000, 4, 1), 0.2, torch.Generator().manual_seed(0))
    hidden = mask == 0
    print("masks of training        " + "   ".join("".join(f"{m:.0f}" for m in row)
                                                   for row in mask[:5].tolist()))
    print("masks of guidance        with the newest action 1111, without it 1110")
    alone = (mask[:, :3].all(dim=1) & hidden[:, 3]).float().mean()
    print(f"1110 in training         {alone:.1%} of the clips (0.8^3 * 0.2 = {0.8**3 * 0.2:.1%})")
    torch.manual_seed(0)
    small, large = (action_embedding(7, 64, init)(torch.randn(1000, 7)).std(dim=0).mean()
                    for init in ("pytorch", "he"))
    print(f"a new embedding          maps actions of standard deviation 1 to {small:.2f}; with He "
          f"initialisation to {large:.2f}")


if __name__ == "__main__":
    demo()
