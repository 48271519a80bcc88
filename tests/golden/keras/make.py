"""Write models with optimizers as Keras 3 saves them, and what each optimizer's variables held by their own names."""

import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"
import keras
import numpy as np

folder = Path(sys.argv[1])
folder.mkdir(parents=True)
keras.utils.set_random_seed(0)
inputs = np.random.rand(16, 4).astype("float32")
expected = {}


def dense():
    layers = keras.layers
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, name="first"), layers.BatchNormalization(), layers.Dense(4), layers.Dense(2)]
    )


def attention():
    at = keras.Input((4, 8))
    return keras.Model(at, keras.layers.Dense(2)(keras.layers.MultiHeadAttention(2, 4)(at, at)))


def train(name, model, optimizer, suffixes):
    model.compile(optimizer, "mse")
    data = inputs if len(model.input_shape) == 2 else np.random.rand(16, 4, 8).astype("float32")
    model.fit(data, np.zeros((16, *model.output_shape[1:]), "float32"), epochs=2, verbose=0)
    for suffix in suffixes:
        path = folder / f"{name}{suffix}"
        model.save_weights(path) if "weights" in suffix else model.save(path)
    for variable in model.optimizer.variables:
        expected[f"{name}|{variable.path.partition('/')[2]}"] = variable.numpy()


train("adamw", dense(), keras.optimizers.AdamW(1e-2, weight_decay=0.1), (".keras", ".h5", ".weights.h5"))
train("attention", attention(), keras.optimizers.Adam(), (".keras",))
np.savez_compressed(folder / "expected.npz", **{key.replace("/", "~"): value for key, value in expected.items()})
