"""Environment variables that libraries read when they are loaded. A script imports this module before torch."""

import os

# Threads of OpenMP spin while they wait. On a machine that is busy with other work they take the core from whoever they
# wait for, which makes training several times slower; after 2000 rounds they give way.
os.environ.setdefault('GOMP_SPINCOUNT', '2000')

# Without HOME and a passwd entry, libraries would make a folder called ~ in the working directory. The root folder is
# the HOME that `docker run --user` gives to such a user.
if not os.path.isabs(os.path.expanduser('~')):  # noqa: PTH111, PTH117 - Path.home raises
    os.environ['HOME'] = os.sep
