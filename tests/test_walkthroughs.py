"""What a newcomer runs into, from the message to a resumed run: with the README, the guides and the messages alone.

Each starts from a real checkpoint of transformers' Trainer and ends in a run that goes on, compared with the run that
was not interrupted wherever the two can be equal. The messages on the way are asserted whole.
"""

from __future__ import annotations

import copy
import io
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

import lora_state_format as lsf
from lora_state_format.cli import run
from lora_state_format.errors import BindError
from lora_state_format.torch import load_optimizer, resize_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 3
LR = 1e-3
TARGETS = ["q_proj", "v_proj"]
PREFIX = "base_model.model.model.layers"


def base() -> Any:
    """The frozen model, of four layers; the same weights every time."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True,
        )
    )  # fmt: skip


def rows() -> list[dict[str, torch.Tensor]]:
    """What the Trainer trains on."""
    tokens = torch.randint(0, 64, (4 * STEPS, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trained(model: Any, folder: Path, **options: Any) -> Any:
    """Train with a plain Trainer; returns its optimizer."""
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=STEPS, save_steps=STEPS, learning_rate=LR,
        lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0, optim="adamw_torch", use_cpu=True,
        report_to=[], logging_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows())
    trainer.train()
    return trainer.optimizer.optimizer  # accelerate wraps it


class Run:
    """A checkpoint folder, and the model and optimizer as they were when it was written."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.optimizer = trained(model, folder)
        self.model = model
        self.folder = folder
        self.path = folder / f"checkpoint-{STEPS}"

    def uninterrupted(self, more: Callable[[Any, Any], None]) -> dict[str, torch.Tensor]:
        """Train copies of model and optimizer on; returns the weights."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        more(model, optimizer)
        return weights(model)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """LoRA of rank 8, as the plain Trainer leaves it."""
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    return Run(get_peft_model(base(), config), tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A full fine-tune."""
    return Run(base(), tmp_path_factory.mktemp("full"))


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: Any, lr: float = LR) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.0)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def more(model: Any, optimizer: Any, lr: float | None = None) -> None:
    """Train three more steps."""
    model.train()
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        tokens = torch.randint(0, 64, (4, 16), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def command(*arguments: object) -> tuple[int, str]:
    """Run a command; returns its exit code and all that it printed."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        code = run([str(argument) for argument in arguments])
    return code, out.getvalue()


def says(printed: str, expected: str) -> bool:
    """Whether a message is the expected one, where ``...`` stands for what differs from run to run."""
    return re.fullmatch(".+".join(map(re.escape, expected.split("..."))), printed) is not None


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- groups and adapters ------------------------------------------------------------------------------------------


def test_other_groups(lora: Run) -> None:
    """The founding error: two groups in the file, one in the optimizer."""
    model = PeftModel.from_pretrained(base(), lora.path, is_trainable=True)
    optimizer = adamw(model)
    saved = torch.load(lora.path / "optimizer.pt", weights_only=True)
    with pytest.raises(ValueError, match=r"^loaded state dict has a different number of parameter groups$"):
        optimizer.load_state_dict(saved)
    assert str(load_optimizer(optimizer, model, lora.path)) == (
        "restored 16/16 parameters, 2 slots each, step 3; weights match 16/16"
    )
    more(model, optimizer)
    assert equal(weights(model), lora.uninterrupted(more))


def test_a_renamed_adapter(lora: Run) -> None:
    model = PeftModel.from_pretrained(base(), lora.path, adapter_name="second", is_trainable=True)
    optimizer = adamw(model)
    assert str(load_optimizer(optimizer, model, lora.path)) == (
        "restored 16/16 parameters, 2 slots each, step 3; weights match 16/16"
    )
    more(model, optimizer)
    assert equal(
        {name.replace(".second.", ".default."): value for name, value in weights(model).items()},
        lora.uninterrupted(more),
    )


def test_frozen_by_mistake(lora: Run) -> None:
    """``is_trainable=True`` was forgotten: the message says which are frozen and what to do; both ways are gone."""
    model = PeftModel.from_pretrained(base(), lora.path)
    converted = lora.folder / "named.safetensors"
    lsf.convert(lora.path, converted, force=True)
    with pytest.raises(BindError) as caught:
        load_optimizer(torch.optim.AdamW(model.parameters()), model, converted)
    assert str(caught.value) == built_over_all(
        model,
        "16 of those that the file has are frozen, too: call requires_grad_(True) on them, or pass is_trainable=True "
        "to PeftModel.from_pretrained, and then ",
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for thawed in (model, PeftModel.from_pretrained(base(), lora.path, is_trainable=True)):
        optimizer = adamw(thawed)
        load_optimizer(optimizer, thawed, converted)
        more(thawed, optimizer)
        assert equal(weights(thawed), lora.uninterrupted(more))


def built_over_all(model: Any, remedy: str = "") -> str:
    """What is said of an optimizer over all parameters of a model with the adapter."""
    frozen = [(name, list(p.shape)) for name, p in model.named_parameters() if "lora_" not in name]
    shown = [f"    {name}  {shape}  (requires_grad=False)" for name, shape in frozen[:10]]
    hint = (
        f"hint: the optimizer was built over {len(frozen) + 16} parameters and holds {len(frozen)} frozen parameters, "
        f"which the saved one did not; {remedy}build it from [p for p in model.parameters() if p.requires_grad]"
    )
    return "\n".join(
        [
            f"optimizer state does not fit: 16 parameters saved, {len(frozen) + 16} in the optimizer",
            f"  in the optimizer, not in the file ({len(frozen)}):",
            *shown,
            f"    ... and {len(frozen) - 10} more",
            hint,
        ]
    )


def test_an_optimizer_over_all_parameters(lora: Run, tmp_path: Path) -> None:
    """``AdamW(model.parameters())``: refused with the count, and with the line that mends it."""
    model = PeftModel.from_pretrained(base(), lora.path, is_trainable=True)
    lsf.convert(lora.path, tmp_path / "named.safetensors")
    with pytest.raises(BindError) as caught:
        load_optimizer(torch.optim.AdamW(model.parameters(), lr=LR), model, tmp_path / "named.safetensors")
    assert str(caught.value) == built_over_all(model)
    optimizer = adamw(model)
    load_optimizer(optimizer, model, tmp_path / "named.safetensors")
    more(model, optimizer)
    assert equal(weights(model), lora.uninterrupted(more))


def test_another_rank(lora: Run, tmp_path: Path) -> None:
    """Rank 8 to 16, alpha / r as before: torch loads the state, and its next step fails."""
    torch.manual_seed(3)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    wider = get_peft_model(base(), config)
    code, printed = command("check", lora.path, "--model", model_folder(wider, tmp_path))
    pairs = zip(lora.model.named_parameters(), wider.named_parameters(), strict=True)
    shapes = [(name, list(new.shape), list(old.shape)) for (name, old), (_, new) in pairs if "lora_" in name]
    assert code == 1
    assert printed.splitlines() == [
        "optimizer state does not fit: 16 parameters saved, 16 in the optimizer",
        "  of another shape (16; the rank is 16 in the model and 8 in the file):",
        *(f"    {name}  {new} in the model, {old} in the file" for name, new, old in shapes[:10]),
        "    ... and 6 more",
        "hint: --mismatch resize cuts and pads the moments, for weights that were cut and padded alike",
        "hint: --mismatch fresh lets these parameters start without state",
    ]
    resize_adapter(wider, lora.path)
    tokens = rows()[0]["input_ids"][None]
    with torch.no_grad():
        before = copy.deepcopy(lora.model).eval()(input_ids=tokens).logits
        assert torch.allclose(wider.eval()(input_ids=tokens).logits, before, atol=1e-6)
    optimizer = adamw(wider)
    lsf.convert(lora.path, tmp_path / "named.safetensors")
    report = load_optimizer(optimizer, wider, tmp_path / "named.safetensors", mismatch="resize")
    assert report.restored == 16
    own = {name: lora.optimizer.state[p] for name, p in lora.model.named_parameters() if p.requires_grad}
    for name, parameter in wider.named_parameters():
        if parameter.requires_grad:
            slot, old = optimizer.state[parameter]["exp_avg"], own[name]["exp_avg"]
            assert torch.equal(slot[tuple(map(slice, old.shape))], old)
    more(wider, optimizer)
    assert all(value.isfinite().all() for value in weights(wider).values())


def model_folder(model: Any, folder: Path) -> Path:
    """A folder with the model's two configs."""
    model.config.save_pretrained(folder)
    shutil.copy(config_of(model, folder), folder / "adapter_config.json")
    config = folder / "config.json"
    text = config.read_text().replace('"architectures": null', '"architectures": ["Qwen2ForCausalLM"]')
    config.write_text(text)
    return folder


def config_of(model: Any, folder: Path) -> Path:
    model.peft_config["default"].save_pretrained(folder / "adapter")
    return folder / "adapter" / "adapter_config.json"


def test_layers_dropped(lora: Run, tmp_path: Path) -> None:
    """The last layer is cut off: what is gone is named, and left out on request."""
    model = PeftModel.from_pretrained(base(), lora.path, is_trainable=True)
    del model.base_model.model.model.layers[3]
    lsf.convert(lora.path, tmp_path / "named.safetensors")
    optimizer = adamw(model)
    with pytest.raises(BindError) as caught:
        load_optimizer(optimizer, model, tmp_path / "named.safetensors")
    assert str(caught.value).splitlines() == [
        "optimizer state does not fit: 16 parameters saved, 12 in the optimizer",
        "  in the file, not in the optimizer (4):",
        f"    {PREFIX}.3.self_attn.q_proj.lora_A.default.weight  [8, 16]",
        f"    {PREFIX}.3.self_attn.q_proj.lora_B.default.weight  [16, 8]",
        f"    {PREFIX}.3.self_attn.v_proj.lora_A.default.weight  [8, 16]",
        f"    {PREFIX}.3.self_attn.v_proj.lora_B.default.weight  [8, 8]",
        "hint: unexpected='carry' keeps their state for the next save",
        "hint: unexpected='ignore' drops it",
    ]
    assert load_optimizer(optimizer, model, tmp_path / "named.safetensors", unexpected="ignore").restored == 12
    assert len(optimizer.state) == 12


def test_a_new_learning_rate(lora: Run) -> None:
    model = PeftModel.from_pretrained(base(), lora.path, is_trainable=True)
    optimizer = adamw(model, lr=5e-4)
    load_optimizer(optimizer, model, lora.path, options={"lr": "current"})
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4]
    more(model, optimizer)
    assert equal(weights(model), lora.uninterrupted(lambda m, o: more(m, o, lr=5e-4)))


# --- files --------------------------------------------------------------------------------------------------------


def test_the_run_folder_instead_of_a_checkpoint(lora: Run, tmp_path: Path) -> None:
    code, printed = command("convert", lora.folder, tmp_path / "a.safetensors")
    assert code == 3
    assert printed == (
        f"error: {lora.folder}: no optimizer state in this folder itself; the newest folder in it that has one is "
        f"{lora.path}\n"
    )
    assert command("convert", lora.path, tmp_path / "a.safetensors")[0] == 0


def test_a_full_fine_tune_by_its_path_alone(full: Run, tmp_path: Path) -> None:
    """Names come from config.json next to it; Trainer's two groups become one."""
    target = tmp_path / "named.safetensors"
    code, printed = command("convert", full.path, target)
    assert code == 0, printed
    assert says(
        printed,
        f"converted {full.path} (torch_optimizer) to {target} (named)\n"
        "50 parameters in groups of [29, 21], step 3\n"
        "slots: step x 50, exp_avg x 50, exp_avg_sq x 50; 100 tensors, 84,096 bytes\n"
        "names: from a model rebuilt from its configs, in the order of rule 'trainer'\n"
        "how sure: partly: the weights rule out ... of 196 exchanges of two modules and ... of 11 other whole orders; "
        "... exchanges could go unnoticed\n"
        "weights: digests of 50 of 50 parameters kept with their state\n"
        "digest: ...\n",
    )
    model = Qwen2ForCausalLM.from_pretrained(full.path)
    optimizer = adamw(model)
    assert load_optimizer(optimizer, model, target).restored == len(trainable(model))
    more(model, optimizer)
    assert equal(weights(model), full.uninterrupted(more))


def test_a_model_that_was_partly_trained(tmp_path: Path) -> None:
    """Freeze tuning: the configs do not say what trained; the message asks, ``--trainable`` answers."""
    model = base()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("model.layers.2.", "model.norm.")))
    frozen = Run(model, tmp_path / "run")
    target = tmp_path / "named.safetensors"
    code, printed = command("convert", frozen.path, target)
    assert code == 4
    assert printed.splitlines()[-1] == (
        "  hint: if only a part of the model was trained, say which: --trainable REGEX for each part, or --names with "
        "a file of names in optimizer order"
    )
    patterns = ("--trainable", r"layers\.2\.", "--trainable", r"model\.norm\.")
    code, printed = command("convert", frozen.path, target, *patterns)
    assert code == 0, printed
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with lsf.open_state(target) as state:
        assert set(state) == names
        for name, parameter in model.named_parameters():
            if name in names:
                own = torch.from_numpy(state[name]["exp_avg"].numpy().copy())
                assert torch.equal(own, frozen.optimizer.state[parameter]["exp_avg"])
    code, printed = command("check", frozen.path, "--model", frozen.path, *patterns)
    assert (code, printed) == (0, f"fits: {len(names)}/{len(names)} parameters would be restored\n")
    code, printed = command("convert", frozen.path, target, "--force", "--trainable", "nosuch")
    assert code == 2
    assert printed == (
        f"error: 'nosuch' matches none of the model's {len(list(model.parameters()))} parameters; the first is "
        "'model.embed_tokens.weight'\n"
    )

    rebuilt = Qwen2ForCausalLM.from_pretrained(frozen.path)
    for name, parameter in rebuilt.named_parameters():
        parameter.requires_grad_(name in names)
    optimizer = adamw(rebuilt)
    load_optimizer(optimizer, rebuilt, target)
    more(rebuilt, optimizer)
    assert equal(weights(rebuilt), frozen.uninterrupted(more))


def test_trainable_where_it_does_not_apply(lora: Run, tmp_path: Path) -> None:
    code, printed = command("convert", lora.path, tmp_path / "a.safetensors", "--trainable", "layers")
    assert code == 2
    assert printed == (
        f"error: {lora.path}: which parameters were trained matters only for a model that is built from its configs, "
        "and the names come from the adapter file; leave --trainable out, or pass --names with the folder of "
        "config.json\n"
    )


def test_to_another_framework(lora: Run, tmp_path: Path) -> None:
    """A Trainer folder does not say its optimizer's class: it is asked for once, and then written."""
    target = tmp_path / "optimizer.safetensors"
    code, printed = command("convert", lora.path, target, "--to", "mlx", "--map", "mlx_lm")
    assert code != 0
    assert printed == "error: the state does not name its optimizer's class; pass it as --optimizer\n"
    assert command("convert", lora.path, target, "--to", "mlx", "--map", "mlx_lm", "--optimizer", "adamw")[0] == 0
    flax = tmp_path / "flax" / "opt_state.msgpack"
    flax.parent.mkdir()
    code, printed = command(
        "convert", lora.path, flax, "--to", "flax_msgpack", "--map", "flax_nnx", "--optimizer", "adamw"
    )
    assert code == 0, printed
    back = tmp_path / "back.safetensors"
    told = ["--map", "mlx_lm", "--optimizer", "adamw"]
    code, printed = command("convert", target, back, *told)
    assert code == 2
    assert printed.splitlines()[-1] == (
        f"error: {target}: the file does not say whether MLX's adamw corrected the bias of its moments; pass --option "
        "bias_correction=True, or False, which is MLX's default"
    )
    assert command("convert", target, back, *told, "--option", "bias_correction=True")[0] == 0
    own = {name: lora.optimizer.state[p]["exp_avg_sq"] for name, p in lora.model.named_parameters() if p.requires_grad}
    with lsf.open_state(back) as state:
        assert set(state) == set(own)
        for name, value in own.items():
            assert torch.equal(torch.from_numpy(state[name]["exp_avg_sq"].numpy().copy()), value)


# --- optimizers ---------------------------------------------------------------------------------------------------


def test_another_optimizer_class(lora: Run, tmp_path: Path) -> None:
    """From AdamW to Adam what both keep goes on; to SGD nothing does, and the message says why."""
    named = tmp_path / "named.safetensors"
    lsf.convert(lora.path, named, optimizer="torch.optim.adamw.AdamW")
    model = PeftModel.from_pretrained(base(), lora.path, is_trainable=True)
    with pytest.raises(BindError) as caught:
        load_optimizer(torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9), model, named)
    assert str(caught.value) == (
        "optimizer state does not fit: 16 parameters saved, 16 in the optimizer\n"
        "  written by torch.optim.adamw.AdamW, and the optimizer is torch.optim.sgd.SGD:\n"
        "    SGD never reads exp_avg, exp_avg_sq, step\n"
        "    SGD keeps momentum_buffer, which the file does not have\n"
        "    no translation from AdamW into SGD is known\n"
        "hint: mismatch_class='fresh' lets the parameters whose state does not serve start without state"
    )
    sgd = torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9)
    assert load_optimizer(sgd, model, named, mismatch_class="fresh").restored == 0
    adam = torch.optim.Adam(trainable(model), lr=LR)
    assert load_optimizer(adam, model, named, mismatch_class="translate").restored == 16
    more(model, adam)  # without weight decay both rules are one
    assert equal(weights(model), lora.uninterrupted(more))


@pytest.mark.parametrize("adapter_only", [False, True])
def test_model_and_optimizer_in_one_file(adapter_only: bool, lora: Run, tmp_path: Path) -> None:
    """``torch.save({"model": ..., "optimizer": ...})``: the weights in the file name its optimizer."""
    held = {name: value for name, value in lora.model.state_dict().items() if "lora_" in name or not adapter_only}
    torch.save({"model": held, "optimizer": lora.optimizer.state_dict()}, tmp_path / "last.pt")
    code, printed = command("convert", tmp_path / "last.pt", tmp_path / "named.safetensors")
    assert code == 0
    assert says(
        printed,
        f"converted {tmp_path}/last.pt (torch_optimizer) to {tmp_path}/named.safetensors (named)\n"
        "16 parameters in groups of [16, 0]\n"
        "slots: step x 16, exp_avg x 16, exp_avg_sq x 16; 32 tensors, 14,336 bytes\n"
        "names: from the checkpoint itself, in the order of rule 'trainer'\n"
        "how sure: confirmed: the weights rule out every exchange of two modules and all ... other whole orders\n"
        "weights: digests of 16 of 16 parameters kept with their state\n"
        "digest: ...\n",
    )
    model = PeftModel.from_pretrained(base(), lora.path, is_trainable=True)
    optimizer = adamw(model)
    load_optimizer(optimizer, model, tmp_path / "named.safetensors")
    more(model, optimizer)
    assert equal(weights(model), lora.uninterrupted(more))


def test_layers_renumbered(lora: Run, tmp_path: Path) -> None:
    """The first layer is cut off and the others move up: their bytes tell which is which."""
    lsf.convert(lora.path, tmp_path / "named.safetensors")
    model = PeftModel.from_pretrained(base(), lora.path, is_trainable=True)
    del model.base_model.model.model.layers[0]
    optimizer = adamw(model)
    with pytest.raises(BindError) as caught:
        load_optimizer(optimizer, model, tmp_path / "named.safetensors", unexpected="ignore")
    pairs = [
        f"    {PREFIX}.{layer}.self_attn.{rest}  was  {PREFIX}.{layer + 1}.self_attn.{rest}"
        for layer in range(3)
        for rest in (f"{module}.lora_{which}.default.weight" for module in TARGETS for which in "AB")
    ]
    assert str(caught.value).splitlines() == [
        "optimizer state does not fit: 16 parameters saved, 12 in the optimizer",
        "  the weights say that these are other parameters (12):",
        *pairs[:10],
        "    ... and 2 more",
        "hint: rename='weights' names them, and the other parameters of their modules, by these bytes",
    ]
    report = load_optimizer(optimizer, model, tmp_path / "named.safetensors", unexpected="ignore", rename="weights")
    assert report.restored == 12
    own = {name: lora.optimizer.state[p] for name, p in lora.model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = int(name.split(".")[4])
            before = name.replace(f"layers.{layer}.", f"layers.{layer + 1}.")
            assert torch.equal(optimizer.state[parameter]["exp_avg"], own[before]["exp_avg"])


# --- other tools --------------------------------------------------------------------------------------------------


def test_files_for_other_tools(lora: Run, tmp_path: Path) -> None:
    """The commands of docs/tools.md, and what a tool reads from what they write."""
    from safetensors.torch import load_file

    own = {name: lora.optimizer.state[p] for name, p in lora.model.named_parameters() if p.requires_grad}
    assert command("convert", lora.path, tmp_path / "out", "--to", "accelerate", "--option", "fsdp")[0] == 0
    (written,) = (tmp_path / "out").glob("*.bin") if (tmp_path / "out").is_dir() else [tmp_path / "out"]
    state = torch.load(written, weights_only=True)["state"]
    assert set(state) == set(own), "LESS looks moments up by the parameter's name"
    assert all(torch.equal(state[name]["exp_avg_sq"], slots["exp_avg_sq"]) for name, slots in own.items())

    assert command("export", lora.path, tmp_path / "v.safetensors", "--slot", "exp_avg_sq")[0] == 0
    exported = load_file(tmp_path / "v.safetensors")
    assert all(torch.equal(exported[name], slots["exp_avg_sq"]) for name, slots in own.items())

    lsf.convert(lora.path, tmp_path / "named.safetensors")
    back = tmp_path / "optimizer.pt"
    assert command("convert", tmp_path / "named.safetensors", back, "--to", "torch_optimizer")[0] == 0
    groups: list[dict[str, Any]] = [{"params": trainable(lora.model)}, {"params": []}]
    optimizer = torch.optim.AdamW(groups)
    optimizer.load_state_dict(torch.load(back, weights_only=True))
    for name, parameter in lora.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(optimizer.state[parameter]["exp_avg"], own[name]["exp_avg"])
