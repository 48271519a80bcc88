"""Write what RLlib's learner saves of itself, with what its optimizer held, by the names of its module's parameters."""

import shutil
import sys
from pathlib import Path

import gymnasium
import numpy as np
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

folder = Path(sys.argv[1])
torch.manual_seed(0)
config = PPOConfig().environment("CartPole-v1").rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[8, 8]))
learner = config.build_learner(env=gymnasium.make("CartPole-v1"))
learner.build()
module = learner.module["default_policy"]
optimizer = learner.get_optimizer()
for _ in range(2):
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
whole = folder.resolve().parent / "whole"
learner.save_to_path(str(whole))
kept = folder / "learner_group" / "learner"
(kept / "rl_module" / "default_policy").mkdir(parents=True)
for name in ("state.pkl", "metadata.json", "rl_module/default_policy/module_state.pkl"):
    shutil.copy(whole / name, kept / name)
shutil.rmtree(whole)
names = {id(parameter): name for name, parameter in module.named_parameters()}
held = {
    f"{names[id(parameter)]}:{slot}": np.array(value)
    for parameter in optimizer.param_groups[0]["params"]
    for slot, value in optimizer.state[parameter].items()
}
np.savez(folder / "expected.npz", **held)
