import json
import sys
from pathlib import Path

import pytest

from bench import dialects
from bench.dialects import FOUR, OURS, ROUTERS, SCRIPTS, Contender, Figures, Peers
from bench.report import Report
from bench.scripted.candidates import Fleet, Options

FLEET = Fleet(("http://e:1",), ("http://p:2",), ("http://d:3",))
SIZES = {FOUR: 1000}


def figures(factor: float, encode: int = 1000, rest: int = 1) -> Figures:
    cpu = [0.01 * factor * drift for drift in (1.0, 3.0, 2.0)]
    return Figures(cpu, {"encode": encode, "prefill": rest, "decode": rest})


def of(family: str) -> Contender:
    return next(one for one in OURS if one.family == family)


def told(results: dict[Contender, Figures]) -> Report:
    report = Report("dialects")
    dialects.tell(report, {(contender, FOUR): found for contender, found in results.items()}, SIZES)
    return report


def test_bytes_are_told_by_the_requests_own() -> None:
    report = told({of("native"): figures(1), of("ascend"): figures(1, rest=1000)})
    assert [row["sent_by_request"] for row in report.rows] == [1.0, 3.0]
    assert [(bar.value, bar.holds) for bar in report.bars] == [(0.002, True)]


def test_media_that_reach_prefill_of_our_own_break_the_bar() -> None:
    assert [bar.holds for bar in told({of("native"): figures(1, rest=400)}).bars] == [False]


def test_each_family_is_compared_with_its_own_proxies_within_a_repeat() -> None:
    slower = figures(4)
    slower.cpu[2] *= 100
    report = told(
        {of("vllm"): figures(1), ROUTERS[0]: slower, ROUTERS[1]: figures(9), SCRIPTS["vllm-epd"]: figures(0.5)}
    )
    assert {bar.name.rpartition(" by ")[2]: (bar.value, bar.holds) for bar in report.bars} == {
        "vllm-router's": (0.25, True),
        "vllm-epd's": (2.0, False),
    }


def test_requests_are_of_the_sizes_promised() -> None:
    assert [round(len(load.body) / (1 << 20), 1) for load in dialects.workloads()] == [4.0, 5.3]


def test_scripts_are_told_their_engines() -> None:
    assert dialects._urls(FLEET, 9)[:6] == [
        *("--encode-servers-urls", "http://e:1", "--prefill-servers-urls", "http://p:2"),
        *("--decode-servers-urls", "http://d:3"),
    ]
    bare = Fleet((), FLEET.prefill, FLEET.decode)
    assert dialects._hosts(bare, 9) == [
        *("--host", "127.0.0.1", "--port", "9", "--prefiller-hosts", "127.0.0.1", "--prefiller-ports", "2"),
        *("--decoder-hosts", "127.0.0.1", "--decoder-ports", "3"),
    ]


def test_only_what_is_here_is_measured(tmp_path: Path) -> None:
    peers = Peers(Options(tmp_path), {"ascend-epd": tmp_path / "x.py"})
    names = [one.name for one in dialects.contenders(Report("dialects"), ["ascend"], peers)]
    assert names == ["triptych", "triptych, prefill first", "ascend-epd"]


def test_a_small_run_prints_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    status = dialects.main(["--json", "--repeats", "1", "--scale", "0.05", "--families", "vllm,ascend"])
    printed = json.loads(capsys.readouterr().out)
    ours = [row for row in printed["rows"] if row["proxy"].startswith("triptych")]
    assert len(ours) == 2 * sum(one.family in ("vllm", "ascend") for one in OURS)
    sent = {(row["family"], row["proxy"]): row["sent_by_request"] for row in ours}
    assert sent == {
        ("vllm", "triptych"): 2.0,
        ("vllm", "triptych, embeddings kept"): 1.0,
        ("ascend", "triptych"): 3.0,
        ("ascend", "triptych, prefill first"): 3.0,
    }
    assert status == (0 if all(bar["holds"] for bar in printed["bars"]) else 1)


def test_a_script_that_ends_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "proxy.py"
    script.write_text("raise SystemExit('no such module')")
    flags = ["--repeats", "1", "--scale", "0.05", "--families", "ascend", "--script-python", sys.executable]
    assert dialects.main([*flags, "--script", f"ascend-epd={script}"]) == 2
    assert "no such module" in capsys.readouterr().err


def test_an_unknown_script_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dialects.main(["--script", "caddy=x.py"])
    assert "'caddy' is none of" in capsys.readouterr().err
