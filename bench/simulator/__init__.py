"""A discrete-event simulation of engines behind the live proxy's own planner, balancer, fleet, breakers and rates.

Engines are simulated, decisions are not: `proxy.planning.plan.Planner` draws every plan, at the simulated time. A
scenario says who is there and what comes:

    model = models.QWEN3_VL_30B
    machines = [
        *(Machine(f"http://e{n}", Role.ENCODE, Encoder(model.vision(H100))) for n in range(4)),
        Machine("http://pd", BOTH, Engine(model.language(H100, ranks=4))),  # with vision=…: it can encode inline
    ]
    simulation = Simulation(machines, {Role.ENCODE: "affinity"}, seed=1, faults=[Kill("http://e0", at=3.0)])
    simulation.offer(Request((Text(500), Media("cat", 1280, 720)), output_tokens=100), at=0.0)
    results = simulation.run()             # or run(arrivals): an iterable of (at, request), in order of time
    results.mean("ttft"), results.percentile("encode", 99), results["e2e"]  # a numpy array, one number per request

Import each from the module of its kind: `simulation`, `machines`, `encoders`, `engines`, `requests`, `links`, `models`,
`faults`, `results`. A simulation is told what flags tell the proxy: `policies` (a name, or names by role), `sight` (of
predictions), `vision` (by which media are priced). A scenario is a function `run(report, arguments)` in `scenarios/`,
named in `bench.simulate.SCENARIOS`.

`requests` has what clients send, `models` what engines cost (Vision and Language are protocols: a measured model
replaces an analytic one), `faults` what breaks, `results` what is told of every request. All times are seconds.
"""
