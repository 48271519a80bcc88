"""Write what MindSpore saves of a model and its optimizer, with what the optimizer held, by the names of the parameters."""

import sys
from pathlib import Path

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

FIELDS = {
    "adam_m": "exp_avg", "adam_v": "exp_avg_sq", "moment1": "exp_avg", "moment2": "exp_avg_sq",
    "moments": "momentum_buffer", "accum": "momentum_buffer",
}  # fmt: skip

folder = Path(sys.argv[1])
mindspore.set_device("CPU")
mindspore.set_seed(0)


def write(name, cls, **options):
    model = nn.SequentialCell(nn.Dense(3, 4), nn.LayerNorm((4,)), nn.Dense(4, 2))
    model[2].bias.requires_grad = False
    optimizer = cls(model.trainable_params(), learning_rate=0.01, **options)
    gradients = mindspore.value_and_grad(lambda x: ops.reduce_mean(ops.square(model(x))), None, optimizer.parameters)
    for step in range(5):
        optimizer(gradients(Tensor(np.random.RandomState(step).randn(5, 3).astype(np.float32)))[1])
    (folder / name).mkdir(parents=True)
    trained = nn.TrainOneStepCell(nn.WithLossCell(model, nn.MSELoss()), optimizer)
    mindspore.save_checkpoint(trained, str(folder / name / "model"), format="safetensors")
    (folder / name / "model.safetensors").chmod(0o644)
    held = {}
    for parameter in optimizer.get_parameters():
        kind, _, rest = parameter.name.partition(".")
        if kind in FIELDS:
            held[f"{rest}:{FIELDS[kind]}"] = parameter.asnumpy()
    np.savez(folder / name / "expected.npz", **held)


write("adam", nn.Adam)
write("adamw", nn.AdamWeightDecay, weight_decay=0.1)
write("momentum", nn.Momentum, momentum=0.9)
write("sgd", nn.SGD, momentum=0.9)
