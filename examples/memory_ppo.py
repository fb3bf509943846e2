"""Balance a pole without being told how fast anything moves: PPO with a GRU, episodes ending inside rollouts.

    python examples/memory_ppo.py

CartPole with its two velocities hidden: from one observation nobody can tell which way the pole is falling, so a policy
has to remember (gymnasium; proximal policy optimization, Schulman 2017). A feed-forward policy of the same size is
trained beside it. Sixteen environments run side by side; their episodes end anywhere in a rollout. The fused GRU takes
each minibatch in one call, `reset` saying where rows begin anew, from a state that is learned, `reset_state`. The same
program on torch.nn, trained last, does what it has to do: it splits every minibatch into its episodes, pads them, and
puts the outputs together again. Environments begin anew when a run is resumed.
"""

from __future__ import annotations

import argparse
import collections
import copy
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from common import options, report, training
from common.options import ExampleError
from torch import Tensor, nn
from torch.nn import functional as F

import fused_rnn

FEATURES, ACTIONS, HIDDEN = 2, 2, 64
SCALE = (2.4, 0.21)  # m and rad at which an episode ends
SEEN = (0, 2)  # of x, dx/dt, angle, d angle/dt
DISCOUNT, TRACE, CLIP, VALUE_SHARE, ENTROPY_SHARE = 0.99, 0.95, 0.2, 0.5, 0.01
REWARD = 0.05  # of a step that the pole stands, for values of about 1
PASSES, PARTS = 4, 4  # over a rollout, and minibatches of each
ROLLOUTS_AN_EPOCH = 10


def by_episodes(layer: nn.GRU, x: Tensor, h: Tensor, is_first: Tensor, initial: Tensor) -> Tensor:
    """What `reset` does, by torch.nn: every episode, and every row's beginning, is a row of a padded batch.

    Shape:
        x (T, B, I), h (1, B, H), is_first (T, B), initial (1, 1, H) -> (T, B, H)
    """
    T, B = is_first.shape
    begins = is_first.T.clone()
    begins[:, 0] = True
    starts = begins.flatten().nonzero().squeeze(1)
    lengths = torch.diff(starts, append=starts.new_tensor([T * B]))
    goes_on = ~is_first.T.flatten()[starts]
    states = torch.where(goes_on.unsqueeze(1), h[0, starts // T], initial[0])
    episodes = x.transpose(0, 1).flatten(0, 1).split(lengths.tolist())
    output, _ = layer(nn.utils.rnn.pad_sequence(episodes), states.unsqueeze(0))
    there = torch.arange(len(output), device=x.device) < lengths.unsqueeze(1)
    return output.transpose(0, 1)[there].view(B, T, -1).transpose(0, 1)


class Policy(nn.Module):
    """Logits of the actions and the value of a state, by way of a GRU or of a dense layer of its size.

    Shape:
        x (T, B, 2), h (1, B, H), is_first (T, B) -> logits (T, B, 2), values (T, B), the next h
    """

    def __init__(self, *, remembers: bool) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES, HIDDEN)
        self.recurrent: Any = nn.GRU(HIDDEN, HIDDEN) if remembers else None
        self.dense = None if remembers else nn.Linear(HIDDEN, HIDDEN)
        self.initial: Any = nn.Parameter(torch.zeros(1, 1, HIDDEN)) if remembers else None
        self.actor, self.critic = nn.Linear(HIDDEN, ACTIONS), nn.Linear(HIDDEN, 1)
        with torch.no_grad():
            self.actor.weight.mul_(0.01)  # the first policy is a coin

    def forward(self, x: Tensor, h: Tensor, is_first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.tanh(self.encoder(x))
        if self.dense is not None:
            x = torch.tanh(self.dense(x))
        elif isinstance(self.recurrent, fused_rnn.GRU):
            x, h = self.recurrent(x, h, reset=is_first, reset_state=self.initial.expand_as(h))
        else:
            x = by_episodes(self.recurrent, x, h, is_first, self.initial)
            h = x[-1:]
        return self.actor(x), self.critic(x).squeeze(-1), h


class Rollout(NamedTuple):
    """T steps of B environments; h (1, B, H), else (T, B) and more."""

    x: Tensor  # (T, B, 2)
    h: Tensor  # that the first step began with
    is_first: Tensor  # bool: a new episode
    counts: Tensor  # bool: else the environment is between two episodes, and the action does nothing
    action: Tensor
    log_prob: Tensor
    advantage: Tensor
    target: Tensor  # of the value

    def rows(self, rows: Tensor) -> Rollout:
        return Rollout(*(of_all[:, rows] for of_all in self))


def advantages(reward: Tensor, value: Tensor, terminated: Tensor, ended: Tensor, last_value: Tensor) -> Tensor:
    """Generalized advantage estimates (Schulman 2016), (T, B); behind an episode's end nothing is added.

    terminated: the pole fell, and nothing is worth anything any more; ended: that, or the time is over.
    """
    found, after, next_value = [], torch.zeros_like(last_value), last_value
    for t in range(len(reward) - 1, -1, -1):
        error = reward[t] + DISCOUNT * next_value * ~terminated[t] - value[t]
        after = error + DISCOUNT * TRACE * after * ~ended[t]
        next_value = value[t]
        found.append(after)
    return torch.stack(found[::-1])


class Environments:
    """CartPole many times side by side, of which a policy sees position and angle."""

    def __init__(self, count: int, seed: int) -> None:
        try:
            import gymnasium
        except ImportError:
            raise ExampleError("needs gymnasium: pip install gymnasium") from None
        self.poles = gymnasium.make_vec("CartPole-v1", count, vectorization_mode="vector_entry_point")
        self.count = count
        self.x = self._seen(self.poles.reset(seed=seed)[0])
        self.is_first = torch.ones(count, dtype=torch.bool)
        self.counts = torch.ones(count, dtype=torch.bool)
        self.returns = torch.zeros(count)
        self.of_last: collections.deque[float] = collections.deque(maxlen=100)  # lengths of the last episodes

    def _seen(self, observed: Any) -> Tensor:
        return torch.from_numpy(observed)[:, SEEN] / torch.tensor(SCALE)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return reward, terminated and ended of each. The step behind an episode's end begins the next."""
        observed, reward, terminated, truncated, _ = self.poles.step(action.numpy())
        self.x, fell = self._seen(observed), torch.from_numpy(terminated)
        ended = fell | torch.from_numpy(truncated)
        self.is_first, self.counts = ~self.counts, ~ended
        self.returns = torch.where(self.is_first, 0, self.returns) + torch.from_numpy(reward)
        self.of_last += self.returns[ended].tolist()
        return REWARD * torch.from_numpy(reward), fell, ended


class MemoryPPO(training.Workload):
    title = "CartPole without its velocities"
    metric = "steps standing"
    unit = "PPO's loss + 1"
    clip = 0.5

    def __init__(self, name: str, arguments: argparse.Namespace, *, remembers: bool) -> None:
        self.name, self.remembers = name, remembers
        self.seed, self.device = arguments.seed, arguments.device
        self.length, self.environments = arguments.rollout, arguments.environments
        self.learning_rate = 1e-3
        self.last_step = arguments.epochs * self.steps_per_epoch
        self.published = "500 is the most"
        self.poles = Environments(self.environments, arguments.seed)
        self.generator = torch.Generator().manual_seed(arguments.seed)
        self.rollout: Rollout | None = None
        self.env_steps, self.acting_seconds = 0, 0.0

    @property
    def steps_per_epoch(self) -> int:
        return ROLLOUTS_AN_EPOCH * PASSES * PARTS

    def make_model(self) -> nn.Module:
        self.acting = Policy(remembers=self.remembers)  # converted in place, it is what the first learner trains
        self.h = torch.zeros(1, self.environments, HIDDEN)
        return self.acting

    def rate(self, step: int) -> float:
        return self.learning_rate * (1 - 0.9 * min(1, step / self.last_step))

    @torch.no_grad()
    def act(self) -> Rollout:
        """Let the policy act for a rollout, from where the last one ended."""
        poles, dtype = self.poles, next(self.acting.parameters()).dtype
        h = begin = self.h.to(self.device, dtype)
        steps = []
        for _ in range(self.length):
            x, is_first, counts = poles.x, poles.is_first, poles.counts
            logits, value, h = self.acting(x[None].to(self.device, dtype), h, is_first[None].to(self.device))
            log_probs = F.log_softmax(logits[0].float().cpu(), -1)
            action = torch.multinomial(log_probs.exp(), 1, generator=self.generator)
            log_prob = log_probs.gather(1, action).squeeze(1)
            of_step = poles.step(action.squeeze(1))
            steps.append((x, is_first, counts, action.squeeze(1), log_prob, value[0].float().cpu(), *of_step))
        x, is_first, counts, action, log_prob, value, *rest = (torch.stack(of_steps) for of_steps in zip(*steps))
        reward, terminated, ended = rest
        last = self.acting(poles.x[None].to(self.device, dtype), h, poles.is_first[None].to(self.device))[1]
        advantage = advantages(reward, value, terminated, ended, last[0].float().cpu())
        target = advantage + value
        chosen = advantage[counts]
        advantage = (advantage - chosen.mean()) / chosen.std()
        self.h = h
        self.env_steps += self.length * self.environments
        return Rollout(x, begin, is_first, counts, action, log_prob, advantage, target)

    def batch(self, step: int) -> Any:
        turn = step % (PASSES * PARTS)
        if turn == 0 or self.rollout is None:
            begin = time.perf_counter()
            self.rollout = self.act()
            self.acting_seconds += time.perf_counter() - begin
        generator = torch.Generator().manual_seed((self.seed << 24) + step // PARTS)
        order = torch.randperm(self.environments, generator=generator)
        return tuple(self.rollout.rows(order.chunk(PARTS)[turn % PARTS]))

    def loss(self, model: Any, batch: Any, memory: dict[str, Any]) -> Tensor:
        then = Rollout(*batch)
        logits, value, _ = model(then.x, then.h, then.is_first)
        log_probs = F.log_softmax(logits, -1)
        ratio = (log_probs.gather(-1, then.action.unsqueeze(-1)).squeeze(-1) - then.log_prob).exp()
        gain = torch.minimum(ratio * then.advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * then.advantage)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        each = VALUE_SHARE * (value - then.target).square() - gain - ENTROPY_SHARE * entropy
        # Of no effect but on the curves: they are compared by shares of the loss, which without it is about 0.
        return 1 + each[then.counts].mean()

    def evaluate(self, model: Any) -> dict[str, float]:
        """Of the last hundred episodes that ended while it was acting."""
        last = self.poles.of_last
        return {self.metric: sum(last) / len(last)} if last else {}

    def identity(self) -> dict[str, Any]:
        return {"environments": self.environments, "rollout": self.length}


def describe(outcome: training.Outcome, layers: str) -> list[str]:
    """A line of the table of whole programs: acting and learning."""
    workload: Any = outcome.workload
    learning = sum(outcome.learners[0].seconds)
    result = "-" if outcome.result is None else f"{outcome.result:.0f}"
    speed = workload.env_steps / (workload.acting_seconds + learning)
    times = [f"{seconds:.1f}" for seconds in (workload.acting_seconds, learning)]
    return [workload.name, layers, f"{workload.env_steps:,}", result, f"{speed:,.0f}", *times]


def run(arguments: argparse.Namespace) -> int:
    options.prepare(arguments)
    if arguments.environments < PARTS:
        raise ExampleError(f"--environments: expected at least {PARTS}, got {arguments.environments}")
    workloads = [MemoryPPO(f"ppo-{name}", arguments, remembers=name == "gru") for name in ("gru", "feed-forward")]
    outcomes: list[training.Outcome] = []
    status = report.run_all("memory_ppo", workloads, arguments, outcomes)
    layers = {
        "fused": "fused, one call a minibatch",
        "torch": "torch.nn, split by episodes",
    }
    rows = [["policy", "layers", "environment steps", MemoryPPO.metric, "a second", "s acting", "s learning"]]
    rows += [
        describe(outcome, text)
        for outcome, text in zip(outcomes, (layers[arguments.backend], "no recurrent one"), strict=False)
    ]
    if status == 0 and arguments.backend == "fused" and arguments.compare_steps:
        theirs = copy.copy(arguments)
        theirs.backend, theirs.out = "torch", arguments.out / "torch"
        workload = MemoryPPO("ppo-gru", theirs, remembers=True)
        print("\nthe same program on torch.nn")
        rows.insert(2, describe(training.run_workload(workload, theirs), layers["torch"]))
    print(f"\n{options.table(rows)}")
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; the exit status is that of `common.options.run_program`."""
    parser = options.make_parser("memory_ppo", str(__doc__).splitlines()[0], data="", epochs=15)
    group = parser.add_argument_group("the environments")
    group.add_argument(
        "--environments", type=options.positive_int, default=16, metavar="N", help="side by side (default: 16)"
    )
    group.add_argument(
        "--rollout", type=options.positive_int, default=128, metavar="T", help="steps between updates (default: 128)"
    )
    return options.run_program("memory_ppo", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
