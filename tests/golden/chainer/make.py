"""Write what Chainer's serializers save of an optimizer and a model, and of a trainer; with the live state next to it."""

import sys
from pathlib import Path

import chainer
import numpy as np

folder = Path(sys.argv[1])
folder.mkdir(parents=True)


class Net(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.body = chainer.Sequential(chainer.links.Linear(3, 4), chainer.links.Linear(4, 4))
            self.head = chainer.links.Linear(4, 2)

    def __call__(self, x):
        return self.head(chainer.functions.relu(self.body(x)))


def trained(optimizer):
    np.random.seed(0)
    model = Net()
    optimizer.setup(model)
    for _ in range(3):
        x = np.random.rand(5, 3).astype(np.float32)
        model.cleargrads()
        chainer.functions.sum(model(x) ** 2).backward()
        optimizer.update()
    return model, optimizer


expected = {}
for name, made in {"adam": chainer.optimizers.Adam(1e-2), "sgd": chainer.optimizers.MomentumSGD(1e-2, 0.9)}.items():
    model, optimizer = trained(made)
    chainer.serializers.save_npz(str(folder / f"{name}.npz"), optimizer, compression=False)
    chainer.serializers.save_npz(str(folder / f"{name}_model.npz"), model, compression=False)
    for path, parameter in model.namedparams():
        for slot, value in parameter.update_rule.state.items():
            expected[f"{name}:{path[1:]}:{slot}"] = value
chainer.serializers.save_npz(str(folder / "compressed.npz"), optimizer)
train = chainer.datasets.TupleDataset(np.random.rand(8, 3).astype(np.float32), np.random.randint(0, 2, 8))
model = chainer.links.Classifier(Net())
optimizer = chainer.optimizers.Adam().setup(model)
updater = chainer.training.StandardUpdater(chainer.iterators.SerialIterator(train, 4), optimizer)
trainer = chainer.training.Trainer(updater, (2, "iteration"), out=str(folder))
trainer.run()
chainer.serializers.save_npz(str(folder / "snapshot.npz"), trainer, compression=False)
for path, parameter in model.namedparams():
    for slot, value in parameter.update_rule.state.items():
        expected[f"snapshot:{path[1:]}:{slot}"] = value
np.savez(str(folder / "expected.npz"), **{key.replace("/", "|"): value for key, value in expected.items()})
