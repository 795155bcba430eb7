"""What this network costs beside its peers: counted where it can be counted, measured alternately where it can't.

``train_scripts/benchmark.py`` is the command; each of its subcommands is a module here.
"""
