import asyncio

from engines.transfer.tasks import Tasks


async def test_close_ends_what_runs_and_leaves_nothing():
    tasks = Tasks()
    ended = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    tasks.spawn(work())
    await asyncio.sleep(0)
    await tasks.close()
    assert ended == [True]
    assert len(tasks) == 0


async def test_an_error_is_logged_and_does_not_touch_the_others(caplog):
    tasks = Tasks()

    async def fail():
        raise RuntimeError("broken")

    other = tasks.spawn(asyncio.sleep(0.05, "fine"))
    tasks.spawn(fail())
    assert await other == "fine"
    assert "broken" in caplog.text
    assert len(tasks) == 0
