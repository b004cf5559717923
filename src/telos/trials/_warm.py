"""What takes seconds to import, once, in the server from which worker processes are forked."""

import torch

import telos.trials.runner  # noqa: F401

# threads would not survive the fork; with one there are none
torch.set_num_threads(1)
# torch imports its compiler with the first optimizer
torch.optim.AdamW([torch.zeros(1)])
