"""Policies with a memory: sb3-contrib, torchrl, rsl-rl, tianshou."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .program import KEYWORD, PATCH, Program, Running, training_step

FIELD = "reinforcement learning"


def _agent(environments: int) -> Any:
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    environment = make_vec_env("CartPole-v1", n_envs=environments, seed=0)
    return RecurrentPPO("MlpLstmPolicy", environment, n_steps=128, n_epochs=1, seed=0, device="cpu")


def sb3_train() -> Running:
    agent = _agent(environments=2)
    # As learn() begins; the rollout stays the same for every update.
    _, callback = agent._setup_learn(total_timesteps=256)
    agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, n_rollout_steps=128)
    observations = torch.as_tensor(agent.rollout_buffer.observations[:64, 0])
    states = (torch.zeros(1, 1, 256), torch.zeros(1, 1, 256))

    def step() -> list[float]:
        agent.train()
        recorded = agent.logger.name_to_value
        return [recorded["train/value_loss"] + recorded["train/policy_gradient_loss"]]

    def outputs() -> list[Tensor]:
        starts = torch.zeros(len(observations))
        distribution, _ = agent.policy.get_distribution(observations, states, starts)
        return [distribution.distribution.logits, agent.policy.predict_values(observations, states, starts)]

    return Running(agent.policy, step, outputs)


def sb3_predict() -> Running:
    agent = _agent(environments=16)
    observations, going_on = agent.env.reset(), np.zeros(16, dtype=bool)
    _, first = agent.predict(observations, episode_start=~going_on)

    def step() -> Any:
        return agent.predict(observations, state=first, episode_start=going_on, deterministic=True)

    return Running(agent.policy, step, step)


def torchrl_lstm(layers: ModuleType) -> Running:
    from tensordict import TensorDict
    from torchrl.modules import LSTMModule, set_recurrent_mode

    core = LSTMModule(lstm=layers.LSTM(64, 128, batch_first=True), in_key="observation", out_key="features")
    return _torchrl(core, nn.Linear(128, 1), TensorDict, set_recurrent_mode)


def torchrl_gru() -> Running:
    from tensordict import TensorDict
    from torchrl.modules import GRUModule, set_recurrent_mode

    core = GRUModule(input_size=64, hidden_size=128, in_key="observation", out_key="features")
    return _torchrl(core, nn.Linear(128, 1), TensorDict, set_recurrent_mode)


def _torchrl(core: Any, head: nn.Module, TensorDict: Any, set_recurrent_mode: Any) -> Running:
    """A critic on collected data: 16 environments, 64 steps, in which episodes end at different times."""
    observations, targets = torch.randn(16, 64, 64), torch.randn(16, 64, 1)
    begins = torch.rand(16, 64, 1) < 0.03
    begins[:, 0] = True
    model = nn.ModuleList([core, head])

    def outputs() -> Tensor:
        with set_recurrent_mode(True):
            data = core(TensorDict({"observation": observations, "is_init": begins}, [16, 64]))
        return head(data["features"])

    return Running(model, training_step(model, lambda: nn.functional.mse_loss(outputs(), targets)), outputs)


def rsl_rl_update() -> Running:
    from rsl_rl.algorithms import PPO
    from rsl_rl.models import RNNModel
    from rsl_rl.storage import RolloutStorage
    from tensordict import TensorDict

    environments, steps, actions = 64, 24, 12

    def observe() -> TensorDict:
        return TensorDict({"policy": torch.randn(environments, 48)}, [environments])

    observation = observe()
    sets = {"actor": ["policy"], "critic": ["policy"]}
    options: dict[str, Any] = {"rnn_type": "gru", "rnn_hidden_dim": 256, "hidden_dims": [256, 128]}
    gaussian = {"class_name": "GaussianDistribution", "init_std": 1.0}
    actor = RNNModel(observation, sets, "actor", actions, distribution_cfg=gaussian, **options)
    critic = RNNModel(observation, sets, "critic", 1, **options)
    storage = RolloutStorage("rl", environments, steps, observation, [actions])
    algorithm = PPO(actor, critic, storage, num_learning_epochs=1, num_mini_batches=4, schedule="fixed")
    with torch.inference_mode():
        for _ in range(steps):
            algorithm.act(observation)
            observation, done = observe(), torch.rand(environments) < 0.02
            algorithm.process_env_step(observation, torch.randn(environments), done, {})
        algorithm.compute_returns(observation)
    fixed = observe()

    def outputs() -> list[Tensor]:
        for model in (actor, critic):
            model.reset()
        return [model(fixed) for model in (actor, critic) for _ in range(3)]

    return Running(nn.ModuleList([actor, critic]), algorithm.update, outputs)


def tianshou_recurrent() -> Running:
    from tianshou.utils.net.common import Recurrent

    network = Recurrent(layer_num=1, state_shape=8, action_shape=4, hidden_layer_size=128)
    stacked, returns, chosen = torch.randn(64, 16, 8), torch.randn(64), torch.randint(4, (64,))

    def loss() -> Tensor:
        values, _ = network(stacked)
        return nn.functional.mse_loss(values[torch.arange(64), chosen], returns)

    return Running(network, training_step(network, loss), lambda: network(stacked)[0])


PROGRAMS = (
    Program(
        name="sb3-contrib RecurrentPPO",
        field=FIELD,
        requires=("sb3-contrib", "stable-baselines3", "gymnasium"),
        way=PATCH,
        timed="`train()`: an epoch over 2 x 128 steps of CartPole",
        build=sb3_train,
        note=(
            "The agent is built under the patch; loading with `RecurrentPPO.load` builds one too. CartPole's "
            "episodes are short, so much of the update runs step by step: the package resets states in a Python "
            "loop."
        ),
    ),
    Program(
        name="sb3-contrib predict",
        field=FIELD,
        requires=("sb3-contrib", "stable-baselines3", "gymnasium"),
        way=PATCH,
        timed="`predict()`: a step of 16 environments",
        build=sb3_predict,
        trains=False,
        note="As above; a large part of it is the package's own Python.",
    ),
    Program(
        name="torchrl LSTMModule",
        field=FIELD,
        requires=("torchrl", "tensordict"),
        way=KEYWORD,
        timed="a training step on 16 x 64 steps with resets",
        build=torchrl_lstm,
        note=(
            "`LSTMModule(lstm=fused_rnn.LSTM(..., batch_first=True))`. For a layer that is no `nn.LSTM` the "
            "module uses `mask=`, which fused layers have, instead of packing."
        ),
    ),
    Program(
        name="torchrl GRUModule",
        field=FIELD,
        requires=("torchrl", "tensordict"),
        way=PATCH,
        timed="a training step on 16 x 64 steps with resets",
        build=torchrl_gru,
        note=(
            "Built under the patch. Its Python-based layers (`python_based=True`) derive from `nn.RNNBase` and "
            "stay as they are."
        ),
    ),
    Program(
        name="rsl-rl PPO",
        field=FIELD,
        requires=("rsl-rl-lib", "tensordict"),
        way=PATCH,
        timed="`update()`: an epoch over 64 x 24 steps, GRU",
        build=rsl_rl_update,
        note=(
            "Models are built under the patch. `as_jit()` of a model asks for `nn.GRU`: call it under the patch, "
            "or on `revert(model, inplace=False)`; outside it raises `NotImplementedError: Unsupported RNN type`."
        ),
    ),
    Program(
        name="tianshou Recurrent",
        field=FIELD,
        requires=("tianshou",),
        way=PATCH,
        timed="a training step on 64 stacks of 16 observations",
        build=tianshou_recurrent,
        note=("The network is built under the patch; algorithms and buffers take it as any other."),
    ),
)
