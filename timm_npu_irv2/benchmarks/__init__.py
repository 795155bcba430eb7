"""Costs of this network beside its peers: counted where possible, else measured alternately.

``train_scripts/benchmark.py`` is the command; each of its subcommands is a module here.
"""
