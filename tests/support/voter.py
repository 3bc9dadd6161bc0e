"""One balancer in a process of its own, on shared memory: reads commands, answers with what it chose.

`take ROLE PORT,PORT,… TOKENS` chooses among http://h:PORT and answers the port; `close N` returns the N-th lease taken;
`rows PORT,…` answers the rows of these. Arguments: descriptor, workers, worker, policy.
"""

from __future__ import annotations

import sys

from proxy.balancer.board import Board
from proxy.balancer.policy import Demand
from proxy.core import Role
from proxy.workers.segment import Segment
from tests.support.balancing import balancer, pool


def main() -> None:
    fd, workers, worker, policy = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    segment = Segment(fd)
    board = Board(segment.buffer, workers, worker, lambda: segment.locked(0))
    voting = balancer(policy, board)
    leases = []
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "take":
            role = Role.named(rest[0])
            candidates = pool((f"http://h:{port}" for port in rest[1].split(",")), role)
            leases.append(voting.take(role, candidates, Demand(int(rest[2]))))
            answer = leases[-1].instance.url.rpartition(":")[2]
        elif word == "close":
            leases[int(rest[0])].close()
            answer = "closed"
        else:
            answer = ",".join(str(board.row(f"http://h:{port}")) for port in rest[0].split(","))
        voting.ledger.check()
        print(answer, flush=True)


if __name__ == "__main__":
    main()
