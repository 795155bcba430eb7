"""The addresses on which a process, and the store of its run, listen."""

import contextlib
import os
import socket
import sys
from pathlib import Path


def listening_addresses():
    """Return the local addresses of this process's listening sockets, and of those on MASTER_PORT."""
    links = []
    for path in Path('/proc/self/fd').iterdir():
        with contextlib.suppress(OSError):  # a file that another thread closes
            links.append(str(path.readlink()))
    own = {link.removeprefix('socket:[').rstrip(']') for link in links if link.startswith('socket:[')}
    found = set()
    # A table that changes while it is read may lack lines, so each is read more than once.
    for family, table in ((socket.AF_INET, 'tcp'), (socket.AF_INET6, 'tcp6')) * 3:
        for line in Path(f'/proc/net/{table}').read_text().splitlines()[1:]:
            address, state, inode = (line.split()[index] for index in (1, 3, 9))
            host, _, port = address.rpartition(':')
            if state == '0A' and (inode in own or int(port, 16) == int(os.environ['MASTER_PORT'])):  # 0A: it listens
                words = [bytes.fromhex(host[i:i + 8])[::-1] for i in range(0, len(host), 8)]
                found.add(socket.inet_ntop(family, b''.join(words)))
    return sorted(found)


if __name__ == '__main__':
    if '--join' in sys.argv:
        from timm_npu_irv2.distributed import barrier, initialize

        world = initialize('cpu')
        barrier(world)
        addresses = listening_addresses()
        barrier(world)  # nobody ends, and closes its sockets, before the other has looked
    else:
        addresses = listening_addresses()
    # In one piece: torchrun starts Python without a buffer, and the processes share a pipe.
    sys.stdout.write(' '.join([os.environ['TORCHELASTIC_RUN_ID'], *addresses]) + '\n')
