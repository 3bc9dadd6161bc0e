from random import Random

import orjson

from bench.fuzzing.mutation import mutated

BODY = orjson.dumps({"messages": [{"role": "user", "content": "hello"}], "n": 3, "stream": True})


def changes(data: bytes, count: int = 500) -> list[bytes]:
    dice = Random(7)
    return [mutated(data, dice) for _ in range(count)]


def readable(data: bytes) -> bool:
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    return True


def test_most_inputs_are_new_and_the_same_dice_give_the_same() -> None:
    found = changes(BODY)
    assert len(set(found)) > 350 and BODY in found and found == changes(BODY)


def test_some_of_what_was_json_still_is() -> None:
    left = [data for data in changes(BODY) if readable(data) and data != BODY]
    assert len(left) > 50 and any(b"9223372036854775808" in data for data in left)


def test_anything_may_be_damaged() -> None:
    assert len(set(changes(b""))) > 20
    assert all(len(data) < 200_000 for data in changes(bytes(2000)))
