"""One balancer in a process of its own, on shared memory: reads commands, answers with what it chose.

`take ROLE PORT,PORT,… TOKENS` chooses among http://h:PORT and answers the port; `close N` returns the N-th lease taken;
`rows PORT,…` answers the rows of these. Arguments: descriptor, workers, worker, policy.
"""

from __future__ import annotations

import sys

from proxy.balancer import POLICIES
from proxy.balancer.balance import Balancer
from proxy.balancer.board import Board
from proxy.core import Instance, Role
from proxy.segment import Segment


def main() -> None:
    fd, workers, worker, policy = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    segment = Segment(fd)
    board = Board(segment.buffer, workers, worker, lambda: segment.locked(0))
    balancer = Balancer({role: POLICIES[policy]() for role in Role}, board)
    leases = []
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "take":
            role = Role.named(rest[0])
            candidates = [Instance(f"http://h:{port}", role, "native") for port in rest[1].split(",")]
            leases.append(balancer.take(role, candidates, int(rest[2])))
            answer = leases[-1].instance.url.rpartition(":")[2]
        elif word == "close":
            leases[int(rest[0])].close()
            answer = "closed"
        else:
            answer = ",".join(str(board.row(f"http://h:{port}")) for port in rest[0].split(","))
        balancer.ledger.check()
        print(answer, flush=True)


if __name__ == "__main__":
    main()
