from bench.simulator.requests import Media, Request, Text


def test_a_request_tells_its_media_and_text_apart() -> None:
    cat, dog = Media("cat", 100, 50), Media("dog", 10, 10)
    request = Request((Text(5), cat, Text(7, "question"), dog))
    assert request.media == (cat, dog)
    assert request.text_tokens == 12
