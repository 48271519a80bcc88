"""Facts about optimizers, as data: classes, kinds of hyperparameters, roles of slots, quantised moments."""
