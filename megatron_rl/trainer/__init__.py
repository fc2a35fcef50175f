"""The training loop, with the trainer, hooks and checks that it uses."""
