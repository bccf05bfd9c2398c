"""The questions: a room for each, started by `python -m experiments.NAME`."""

READING_ORDER = (  # from what the review saw to what it left open
    "init_sensitivity learning_rate training_steps covariate_shift loss_surface whitening "
    "transform scale_invariance audit signal_propagation batch_noise regularization ensemble "
    "population_stats imagenet"
).split()
