"""What a load would do: the live side, the values of hyperparameters, and the plan. Pure data; no tensor is read."""
