"""The pieces of train_scripts/train.py: options, processes, data, engine, checkpoints, report."""
