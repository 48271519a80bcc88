"""What torchtune's LoRA recipe writes, with one optimizer and with one per parameter, and what they held. Run by make.sh."""

import sys
from pathlib import Path

import torch
from torchtune import training
from torchtune.models.llama3 import lora_llama3
from torchtune.modules.peft import get_adapter_params, get_adapter_state_dict, set_trainable_params
from torchtune.training.memory import OptimizerInBackwardWrapper, register_optim_in_bwd_hooks

out = Path(sys.argv[1])


def build():
    torch.manual_seed(0)
    model = lora_llama3(
        ["q_proj", "v_proj"], vocab_size=16, num_layers=2, num_heads=2, num_kv_heads=1, embed_dim=8, max_seq_len=16,
        intermediate_dim=12, lora_rank=2, lora_alpha=4,
    )
    set_trainable_params(model, get_adapter_params(model))
    return model


def loss(model, seed):
    torch.manual_seed(seed)
    return model(torch.randint(0, 16, (2, 6))).float().logsumexp(-1).mean()


def recipe(optimizer):
    return {
        training.OPT_KEY: optimizer, training.SEED_KEY: 0, training.EPOCHS_KEY: 1, training.TOTAL_EPOCHS_KEY: 2,
        training.MAX_STEPS_KEY: 3,
    }


model = build()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for seed in range(3):
    loss(model, seed).backward()
    optimizer.step()
    optimizer.zero_grad()
names = {id(p): n for n, p in model.named_parameters()}
held = {names[id(p)]: dict(s) for p, s in optimizer.state.items()}
folder = out / "epoch_0"
folder.mkdir(parents=True)
state = training.get_full_optimizer_state_dict(model, optimizer, True, device=torch.device("cpu"))
torch.save(recipe(state), folder / "recipe_state.pt")
torch.save(get_adapter_state_dict(model.state_dict()), folder / "adapter_model.pt")

model = build()
trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
optimizers = {p: torch.optim.AdamW([p], lr=1e-3) for _, p in trained}
register_optim_in_bwd_hooks(model, optimizers)
wrapper = OptimizerInBackwardWrapper({name: optimizers[p] for name, p in trained})
for seed in range(3):
    loss(model, seed).backward()
folder = out / "in_backward"
folder.mkdir()
torch.save(recipe(wrapper.state_dict()), folder / "recipe_state.pt")
alone = {name: dict(optimizers[p].state[p]) for name, p in trained}
torch.save({"one": held, "in_backward": alone}, out / "expected.pt")
