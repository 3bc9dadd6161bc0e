from bench.simulator.clock import Clock


def test_events_run_in_order_of_time_and_then_of_asking() -> None:
    clock, seen = Clock(), []
    clock.at(2.0, lambda name: seen.append((clock.now, name)), "late")
    for name in "abc":
        clock.after(1.0, lambda name: seen.append((clock.now, name)), name)
    clock.run()
    assert seen == [(1.0, "a"), (1.0, "b"), (1.0, "c"), (2.0, "late")]


def test_an_event_may_ask_for_others_and_the_past_is_now() -> None:
    clock, seen = Clock(), []

    def again() -> None:
        seen.append(clock.now)
        if len(seen) < 3:
            clock.at(0.5, again)

    clock.at(1.0, again)
    clock.run()
    assert seen == [1.0, 1.0, 1.0]
