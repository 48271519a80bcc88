"""Tools of others that read moments, fed with what the commands of ``docs/tools.md`` write.

``make test-tools`` makes an environment with bergson from the package index and with the sources of LESS and OTA-Merge,
which are on none; it needs the network, so CI does not run it. What is not installed is skipped.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_state_format.cli import run

pytestmark = [pytest.mark.tools, pytest.mark.filterwarnings("ignore")]

HIDDEN = 16


def net(peft: bool) -> Any:
    """A small Qwen2, with LoRA on two of its projections or to be trained as a whole."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    if not peft:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def batch(seed: int = 1) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens}


def trained(folder: Path, *, peft: bool, seed: int = 1) -> tuple[Any, dict[str, dict[str, torch.Tensor]]]:
    """A checkpoint in two groups, as transformers' Trainer made them up to 4.48; the model, and its moments by name."""
    model = net(peft)
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed, plain = ([p for n, p in trainable if ("bias" in n) is bias] for bias in (False, True))
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch(seed)).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return model, {name: optimizer.state[p] for name, p in model.named_parameters() if p.requires_grad}


def command(*arguments: object) -> None:
    with redirect_stdout(io.StringIO()):
        assert run([str(argument) for argument in arguments]) == 0


def test_less_takes_the_adam_gradients(tmp_path: Path) -> None:
    """LESS's own functions, on the ``optimizer.bin`` that it looks for next to the adapter."""
    less = pytest.importorskip("less.data_selection.collect_grad_reps")
    model, own = trained(tmp_path / "checkpoint-3", peft=True)
    command("convert", tmp_path / "checkpoint-3", tmp_path / "out", "--to", "accelerate", "--option", "fsdp")
    state = torch.load(tmp_path / "out" / "optimizer.bin", map_location="cpu")["state"]  # as its get_info.py does
    m, v = less.prepare_optimizer_state(model, state, torch.device("cpu"))
    assert torch.equal(m, torch.cat([slots["exp_avg"].reshape(-1) for slots in own.values()]))
    assert torch.equal(v, torch.cat([slots["exp_avg_sq"].reshape(-1) for slots in own.values()]))
    found = less.obtain_gradients_with_adam(model.train(False), batch(), m, v)
    assert found.shape == m.shape
    assert found.isfinite().all()
    assert found.any()


def test_ota_merge_merges_by_second_moments(tmp_path: Path) -> None:
    """Its task of merging one tensor, which opens the files of moments, against its formula: a weighted mean.

    The rest of mergekit 0.1.2 does not run with transformers 5, so no whole merge is made.
    """
    ota = pytest.importorskip("mergekit.merge_methods.ota")
    common, architecture = (pytest.importorskip(f"mergekit.{name}") for name in ("common", "architecture"))
    name = "model.layers.0.mlp.up_proj.weight"
    tensors, moments, told = {}, [], {}
    for seed, fine_tune in enumerate(("a", "b")):
        model, own = trained(tmp_path / fine_tune, peft=False, seed=seed)
        file = tmp_path / f"{fine_tune}.safetensors"
        command("export", tmp_path / fine_tune, file, "--slot", "exp_avg_sq")
        reference = common.ModelReference.model_validate(str(tmp_path / fine_tune))
        tensors[reference] = dict(model.named_parameters())[name].detach()
        told[reference] = common.ImmutableMap({"preconditioner_path": str(file)})
        moments.append(own[name]["exp_avg_sq"])
    task = ota.OTAMergeTask(
        gather_tensors=ota.MergeTensorInput.__args__[0](weight_info=common.ImmutableMap({})),
        tensor_parameters=common.ImmutableMap(told),
        epsilon=1e-12,
        normalise_mode="none",
        weight_info=architecture.WeightInfo(name=name),
        precond_power=0.5,
    )
    merged = task.execute(tensors)
    (p, q), (first, second) = (value.sqrt() for value in moments), tensors.values()
    expected = (p * first + q * second) / (p + q + 1e-12)
    assert torch.allclose(merged, expected, atol=1e-7)
    assert not torch.allclose(merged, (first + second) / 2, atol=1e-5)


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_bergson_normalizes_by_second_moments(tmp_path: Path, peft: bool) -> None:
    """Its ``load_from_optimizer``, which takes ids for places: the file has to be torch's own, in the model's order."""
    module = pytest.importorskip("bergson.utils.load_from_optimizer")
    model, own = trained(tmp_path / "checkpoint-3", peft=peft)
    command("convert", tmp_path / "checkpoint-3", tmp_path / "state.safetensors")
    written = tmp_path / "out" / "optimizer.pt"
    command("convert", tmp_path / "state.safetensors", written, "--to", "torch_optimizer")
    found = module.load_from_optimizer(model, str(written))
    matrices = {n: s["exp_avg_sq"] for n, s in own.items() if n.endswith(".weight") and s["exp_avg_sq"].dim() == 2}
    seen = 0
    for name, value in matrices.items():
        module_name = (
            name.removesuffix(".weight").removeprefix("base_model.").removeprefix("model." if not peft else "")
        )
        if module_name in found:
            assert torch.equal(found[module_name].weight_avg_sq, value), name
            seen += 1
    assert seen == len(found) > 0
