"""Write what Paddle saves of a model and its optimizer, with what the optimizer held, by the names of the parameters."""

import sys
from pathlib import Path

import numpy as np
import paddle

FIELDS = {"moment1_0": "exp_avg", "moment2_0": "exp_avg_sq", "velocity_0": "momentum_buffer"}

folder = Path(sys.argv[1])
paddle.seed(0)


def write(name, make):
    model = paddle.nn.Sequential(paddle.nn.Linear(3, 4), paddle.nn.LayerNorm(4), paddle.nn.Linear(4, 2))
    model[2].bias.stop_gradient = True
    optimizer, scheduler = make(model)
    for _ in range(5):
        model(paddle.randn([5, 3])).pow(2).mean().backward()
        optimizer.step()
        optimizer.clear_grad()
        if scheduler is not None:
            scheduler.step()
    (folder / name).mkdir(parents=True)
    paddle.save(model.state_dict(), str(folder / name / "model.pdparams"))
    paddle.save(optimizer.state_dict(), str(folder / name / "model.pdopt"))
    names = {tensor.name: key for key, tensor in model.state_dict().items()}
    held = {}
    for key, value in optimizer.state_dict().items():
        tensor = next((name for name in names if key.startswith(f"{name}_")), None)
        field = FIELDS.get(key.removeprefix(f"{tensor}_"))
        if field is not None:
            held[f"{names[tensor]}:{field}"] = value.numpy()
    np.savez(folder / name / "expected.npz", **held)


def adamw(model):
    scheduler = paddle.optimizer.lr.StepDecay(0.01, 2)
    return paddle.optimizer.AdamW(scheduler, beta2=0.95, parameters=model.parameters(), weight_decay=0.1), scheduler


write("adamw", adamw)
write("momentum", lambda model: (paddle.optimizer.Momentum(0.1, 0.9, parameters=model.parameters()), None))
