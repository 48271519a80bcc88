"""What is known of optimizers, as data: classes, kinds of hyperparameters, roles of slots, quantised moments."""
