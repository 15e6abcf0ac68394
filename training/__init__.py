"""Options and data come in; optimizers, schedules, metrics, checkpoints and plots go out. The loop is in train.py."""
