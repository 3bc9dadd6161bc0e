from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from engines.store import records
from engines.store.records import BadRecord
from tests.support.checkpoints import checkpoint

META, ROWS = b'{"tokens": 3}', bytes(range(250))


def sealed(key: str = "k", meta: bytes = META, rows: bytes = ROWS) -> bytearray:
    record = bytearray(records.size(meta, len(rows)))
    records.seal(memoryview(record), key, meta, memoryview(rows))
    return record


@pytest.mark.parametrize("meta", [b"", META, b"x" * 20, b"x" * 21, b"x" * 500])
def test_a_record_opens_to_what_was_sealed_with_rows_where_any_dtype_may_lie(meta: bytes) -> None:
    record = sealed(meta=meta)
    opened = records.opened(memoryview(record), "k")
    assert (opened.meta, bytes(opened.rows)) == (meta, ROWS)
    assert (len(record) - len(ROWS)) % 64 == 0


@pytest.mark.parametrize("at", [0, 9, 20, 50, 200])
def test_a_record_with_any_wrong_byte_does_not_open(at: int) -> None:
    record = sealed()
    record[at] ^= 1
    with pytest.raises(BadRecord):
        records.opened(memoryview(record), "k")


@pytest.mark.parametrize("length", [0, 10, 43, 44, 64, 200])
def test_a_record_that_was_cut_does_not_open(length: int) -> None:
    with pytest.raises(BadRecord):
        records.opened(memoryview(sealed()[:length]), "k")


def test_a_record_of_another_key_does_not_open() -> None:
    with pytest.raises(BadRecord):
        records.opened(memoryview(sealed("other")), "k")


def test_a_key_is_of_one_model_one_dtype_and_one_content() -> None:
    keys = {records.key(*parts) for parts in (("m", "f", "h"), ("n", "f", "h"), ("m", "g", "h"), ("m", "f", "i"))}
    assert len(keys) == 4
    assert records.key("m", "f", "h") in keys


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen2_vl"), tmp_path / "copy"))


def test_a_copy_in_more_files_is_the_same_model(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors, reverse=True)
    parts = {"b.safetensors": names[::2], "a.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, copy / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert records.fingerprint(copy) == records.fingerprint(checkpoint("qwen2_vl"))


def test_other_weights_of_the_tower_are_another_model_and_those_of_the_language_model_are_not(copy: Path) -> None:
    before = records.fingerprint(copy)
    tensors = load_file(copy / "model.safetensors")
    language = next(name for name in tensors if "layers.0.mlp" in name)
    vision = next(name for name in tensors if "visual.blocks.0" in name)
    tensors[language].view(-1)[-1] += 1
    save_file(tensors, copy / "model.safetensors")
    assert records.fingerprint(copy) == before
    tensors[vision].view(-1)[-1] += 1
    save_file(tensors, copy / "model.safetensors")
    assert records.fingerprint(copy) != before


def test_another_release_may_do_everything_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    before = records.fingerprint(checkpoint("qwen2_vl"))
    monkeypatch.setattr(records, "version", lambda _: "99")
    assert records.fingerprint(checkpoint("qwen2_vl")) != before


def test_pixels_prepared_another_way_are_another_model(copy: Path) -> None:
    before = records.fingerprint(copy)
    file = copy / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7))
    assert records.fingerprint(copy) == before
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": [0.5, 0.5, 0.5]}))
    assert records.fingerprint(copy) != before
