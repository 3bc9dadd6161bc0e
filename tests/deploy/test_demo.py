import subprocess
import sys

import pytest

from deploy.demo import durations, messages, pictures, verdict


def test_the_smoke_test_compares_a_whole_deployment_with_the_reference() -> None:
    command = [sys.executable, "-m", "deploy.demo", "--smoke", "--family", "qwen2_5_vl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "route    E-P-D; encode=127.0.0.1:" in done.stdout
    assert all(f"{stage} " in done.stdout for stage in ("stages   encode", "prefill", "ttft", "decode"))
    assert "smoke    ok" in done.stdout


def test_another_answer_than_the_reference_s_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict("same", "same") == 0
    assert verdict("this", "that") == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown
    assert "'this'" in shown
    assert "'that'" in shown


def test_the_request_carries_two_real_files_of_two_formats() -> None:
    (png, _), (jpeg, _) = pictures()
    assert png.startswith(b"\x89PNG")
    assert jpeg.startswith(b"\xff\xd8")
    kinds = [part["type"] for part in messages()[0]["content"]]
    assert kinds == ["image_url", "image_url", "text"]


def test_stages_are_read_from_the_header() -> None:
    assert durations("encode;dur=12.3, ttft;dur=60.0") == [("encode", "12.3"), ("ttft", "60.0")]
    assert durations("") == []
