import subprocess
import sys
from pathlib import Path

from tests.support.checkpoints import checkpoint


def test_the_command_writes_a_folder_and_says_where(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    command = [sys.executable, "-m", "engines.checkpoint", "--family", "qwen2_vl", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert str(out) in done.stdout
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (checkpoint("qwen2_vl") / weights).read_bytes()
