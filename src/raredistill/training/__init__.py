"""The training of one network: devices, loop, objectives, optimisers, resuming."""
