"""Simulate whole deployments with the live proxy's own decisions, one scenario at a time.

See `bench.simulator` for what is simulated and how, and each scenario's module for what it shows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

from bench.report import Report, add_arguments
from bench.simulator.plots import PICTURES
from bench.simulator.scenarios import decider, planner, policies, scale, seed000, seed001

SCENARIOS: Mapping[str, Callable[[Report, argparse.Namespace], None]] = {
    "seed000": seed000.run,
    "seed001": seed001.run,
    "policies": policies.run,
    "decider": decider.run,
    "scale": scale.run,
    "planner": planner.run,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.simulate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenario", choices=SCENARIOS, required=True)
    parser.add_argument("--runs", type=int, default=None, help="repeats with other arrivals; default: the scenario's")
    parser.add_argument("--requests", type=int, default=None, help="of each run; default: the scenario's")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    report = Report(f"simulate {arguments.scenario}", picture=PICTURES[arguments.scenario])
    SCENARIOS[arguments.scenario](report, arguments)
    sys.exit(report.emit(arguments))


if __name__ == "__main__":
    main()
