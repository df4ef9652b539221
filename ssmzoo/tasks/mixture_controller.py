"""Birdie's controller: a small model of the rewards that chooses the mixture of objectives during training.

At every validation there is a loss per configuration. The losses l_t and the mixture a_t that is trained on after them
are one step of a sequence; what the model predicts there are the rewards of the change from l_t to l_{t+1}
(tasks/objectives/birdie.py):

    reward_t = tanh(W_r RNN(W_l RMSNorm(l) + W_a RMSNorm(a))_t)          RNN: layers of Gated SSM

It is trained on all steps so far, then asked what each of many random mixtures would bring now: the mean of a class's
configurations, summed over the classes. The mean of the best ones is the next mixture.

k configurations, t validations. Source: Blouir et al. 2024 (arXiv 2411.01030), section 3.3 and appendix A.5.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.layers.decoder import Block, Decoder
from ssmzoo.layers.mixers.gated_ssm import GatedSSM
from ssmzoo.layers.norm import RMSNorm
from ssmzoo.layers.state import select_rows
from ssmzoo.tasks.objectives.birdie import reward


@dataclass
class ControllerSettings:
    """The defaults suit a run of minutes on a laptop; the paper's values stand behind them.

    uniform_steps    optimiser steps before which the mixture stays as it begins (250)
    hidden, layers   width and depth of the reward model (256, 4)
    updates, lr, weight_decay   of its AdamW at every validation (200; 5e-4 and 0.1 are the released code's)
    candidates, best how many random mixtures are judged, and how many of them averaged (2048, 8)
    """

    uniform_steps: int = 100
    hidden: int = 64
    layers: int = 2
    updates: int = 60
    lr: float = 3e-3
    weight_decay: float = 0.1
    candidates: int = 2048
    best: int = 8

    def __post_init__(self):
        least = {"uniform_steps": 0, "hidden": 1, "layers": 1, "updates": 1, "candidates": 1, "best": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"task.controller.{name} = {value}; it must be a whole number, at least {low}")
        if self.best > self.candidates or self.lr <= 0:
            raise ValueError(
                f"task.controller: best = {self.best} of candidates = {self.candidates}, lr = {self.lr}; best may not "
                f"exceed candidates, and lr must be positive"
            )


class RewardModel(nn.Module):
    """losses, actions (b t k) -> predicted rewards (b t k) in [-1, 1], state."""

    def __init__(self, k: int, hidden: int, layers: int):
        super().__init__()
        self.loss_norm, self.action_norm = RMSNorm(k), RMSNorm(k)
        self.loss_in, self.action_in = nn.Linear(k, hidden), nn.Linear(k, hidden)
        blocks = [Block(hidden, {"mixer": GatedSSM(hidden, hidden)}, norm=RMSNorm) for _ in range(layers)]
        self.decoder = Decoder(nn.Identity(), blocks, RMSNorm(hidden))
        self.head = nn.Linear(hidden, k)

    def forward(self, losses: Tensor, actions: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        x = self.loss_in(self.loss_norm(losses)) + self.action_in(self.action_norm(actions))
        hidden, state, _ = self.decoder(x, state)
        return torch.tanh(self.head(hidden)), state


class MixtureController:
    """Losses in, the next mixture out; `state_dict` holds all of it, so that a run continues bitwise.

    kinds   the class of every configuration; seed: of its random numbers, which touch no other generator's
    """

    def __init__(self, kinds: list[str], settings: ControllerSettings, seed: int = 0):
        self.settings, self.seed, self.k = settings, seed, len(kinds)
        counts = Counter(kinds)
        self.share = torch.tensor([1 / counts[kind] for kind in kinds])  # (k) so that classes count alike
        self.losses: list[list[float]] = []  # t rows of k
        self.actions: list[list[float]] = []  # what was trained on after each of them; one fewer while choosing
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = RewardModel(self.k, settings.hidden, settings.layers)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)

    def choose(self, step: int, losses: list[float], current: list[float]) -> list[float]:
        """The mixture (k, sums to 1) to train on after `losses` (k, nats) were measured at an optimiser step."""
        self.losses.append(list(losses))
        action = list(current)
        if step >= self.settings.uniform_steps and len(self.losses) > 1 and self.k > 1:
            with torch.inference_mode(False), torch.enable_grad():
                self._learn()
            action = self._best()
        self.actions.append(action)
        return action

    def rewards(self) -> Tensor:
        """Of every action but the one at work, (t-1 k)."""
        losses = torch.tensor(self.losses)
        return reward(losses[:-1], losses[1:])

    def _learn(self) -> None:
        losses, actions, wanted = torch.tensor(self.losses[:-1]), torch.tensor(self.actions), self.rewards()
        for _ in range(self.settings.updates):
            predicted, _ = self.model(losses[None], actions[None])
            error = (predicted[0] - wanted).square().mean()
            self.optimiser.zero_grad()
            error.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()

    @torch.no_grad()
    def _best(self) -> list[float]:
        n, generator = self.settings.candidates, torch.Generator().manual_seed(self.seed + len(self.losses))
        candidates = torch.rand(n, self.k, generator=generator)
        candidates = candidates / candidates.sum(1, keepdim=True)
        _, state = self.model(torch.tensor(self.losses[:-1])[None], torch.tensor(self.actions)[None])
        state = select_rows(state, torch.zeros(n, dtype=torch.long))  # the history, once for every candidate
        now = torch.tensor(self.losses[-1]).expand(n, 1, self.k)
        predicted, _ = self.model(now, candidates[:, None], state)
        worth = (predicted[:, 0] * self.share).sum(1)
        chosen = candidates[worth.topk(self.settings.best).indices].mean(0).double()
        return (chosen / chosen.sum()).tolist()

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": self.losses,
            "actions": self.actions,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.actions = ([list(row) for row in state[key]] for key in ("losses", "actions"))
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
