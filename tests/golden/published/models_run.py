"""What Lit-GPT, TinyLlama and OLMo write for tiny models of their own: ``models_run.py OUT FAMILY``. Run by make.sh.

``logits`` are the model's for ``ids``. For Lit-GPT and TinyLlama, ``held`` are the moments as their own converters of
weights would have them under Hugging Face's names. TinyLlama imports kernels that need a device; the two that it calls,
the rotary one (not in place, which torch 2.13 refuses) and xformers' SwiGLU, stand here as plain functions.
"""

import os
import sys
import types
from pathlib import Path

import torch

out, family = Path(sys.argv[1]), sys.argv[2]
out.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
ids = torch.randint(0, 32, (2, 8))


def trained(model, optimizer):
    for _ in range(3):
        rows = torch.randint(0, 32, (2, 8))
        result = model(rows)
        scores = getattr(result, "logits", result)
        torch.nn.functional.cross_entropy(scores.flatten(0, 1)[:, :32], rows.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def litgpt():
    import lightning
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama

    return saved_by_fabric(lightning, GPT(Config(head_size=4, **SIZES)), "lit_model.pth", copy_weights_llama)


class SwiGLU(torch.nn.Module):
    """As xformers has it without packed weights."""

    def __init__(self, size, hidden, bias, _pack_weights):
        super().__init__()
        self.w1, self.w2 = (torch.nn.Linear(size, hidden, bias=bias) for _ in range(2))
        self.w3 = torch.nn.Linear(hidden, size, bias=bias)

    def forward(self, x):
        return self.w3(torch.nn.functional.silu(self.w1(x)) * self.w2(x))


def rotated(first, second, cos, sin, first_out, second_out, conjugate):
    sin = -sin if conjugate else sin
    turned = first * cos - second * sin, first * sin + second * cos
    first_out.copy_(turned[0])
    second_out.copy_(turned[1])


def tinyllama():
    import lightning

    stubs = {
        "flash_attn": {"flash_attn_func": None}, "xformers": {}, "xformers.ops": {"SwiGLU": SwiGLU},
        "rotary_emb": {"apply_rotary": rotated}, "dropout_layer_norm": {}, "xentropy_cuda_lib": {},
    }
    for name, members in stubs.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
    sys.path.insert(0, os.path.join(os.environ["SOURCES"], "tinyllama"))
    from lit_gpt import GPT, Config
    from lit_gpt import model as module
    from scripts.convert_lit_checkpoint import copy_weights_llama

    rotate = module.apply_rotary_emb_func
    module.apply_rotary_emb_func = lambda x, cos, sin, interleaved, _: rotate(x, cos, sin, interleaved, False)
    model = GPT(Config(_norm_class="RMSNorm", _mlp_class="LLaMAMLP", **OLDER))
    return saved_by_fabric(lightning, model, "iter-000003-ckpt.pth", copy_weights_llama)


OLDER = {
    "n_embd": 16, "n_layer": 2, "n_head": 4, "n_query_groups": 2, "block_size": 16, "vocab_size": 32,
    "padded_vocab_size": 32, "bias": False, "intermediate_size": 24, "parallel_residual": False,
    "rotary_percentage": 1.0,
}
SIZES = {**OLDER, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP"}


def saved_by_fabric(lightning, model, file, copy_weights_llama):
    config = model.config
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    trained(model, optimizer)
    fabric.save(out / file, {"model": model, "optimizer": optimizer, "iter_num": 3, "step_count": 3})
    held = {}
    for slot in ("exp_avg", "exp_avg_sq"):
        moved = {}
        moments = {n: optimizer.state[p][slot] for n, p in model.module.named_parameters()}
        copy_weights_llama(config, moved, moments)
        for name, value in moved.items():
            held.setdefault(name, {})[slot] = value.clone()
    return {"held": held, "logits": model(ids).detach()}


def olmo(later):
    from olmo.checkpoint import save_state_dict
    from olmo.config import ActivationType, BlockType, InitFnType, LayerNormType, ModelConfig
    from olmo.model import OLMo
    from olmo.optim import AdamW, fix_optim_state_dict

    more = {}
    if later:
        more = {"norm_after": True, "attention_layer_norm": True, "layer_norm_with_affine": True,
                "attention_layer_norm_with_affine": True}
    model = OLMo(ModelConfig(
        d_model=16, n_heads=4, n_kv_heads=2, n_layers=2, mlp_hidden_size=48, activation_type=ActivationType.swiglu,
        block_type=BlockType.sequential, rope=True, layer_norm_type=LayerNormType.rms if later else
        LayerNormType.default, weight_tying=False, max_sequence_length=16, vocab_size=32, embedding_size=32,
        include_bias=False, bias_for_layer_norm=False, attention_dropout=0.0, residual_dropout=0.0,
        embedding_dropout=0.0, init_device="cpu", init_fn=InitFnType.normal, init_std=0.2,
        **{"layer_norm_with_affine": False, **more},
    ))
    named = dict(model.named_parameters())
    group = {"params": list(named.values()), "param_names": list(named), "name": "all", "sharded": False,
             "max_grad_norm": None, "max_grad_norm_ratio": None, "initial_lr": 1e-2}
    optimizer = trained(model, AdamW([group], lr=1e-2))
    save_state_dict(out, "model.pt", model.state_dict(), synchronize=False)
    save_state_dict(out, "optim.pt", fix_optim_state_dict(optimizer, optimizer.state_dict()), synchronize=False)
    held = {n: {s: optimizer.state[p][s] for s in ("exp_avg", "exp_avg_sq")} for n, p in named.items()}
    return {"held": held, "logits": model(ids).logits.detach()}


makers = {"litgpt": litgpt, "tinyllama": tinyllama, "olmo": lambda: olmo(False), "olmo2": lambda: olmo(True)}
made = makers[family]()
torch.save({**made, "ids": ids}, out / "expected.pt")
