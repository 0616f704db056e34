"""`run --report page.html`: one self-contained page, whatever is in the report."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fusepass.__main__ import main
from fusepass.reports.collector import Collector
from fusepass.reports.page import RangeTime, page, range_times
from fusepass.reports.report import GraphReport, SiteReport

SOURCE = "model.py:12 forward: return (a < b).softmax(-1) @ v"
LABEL = "fusepass 0: causal, sdpa, model.py:12"
REJECTED = (("flash2", "no GPU <here>"),)
FUSED = SiteReport("m", True, "attention(B=2)", "causal", "sdpa", None, SOURCE, REJECTED, 0.5, LABEL)
LEFT = SiteReport("n", False, "", "", None, "the softmax runs over <another> axis & more", None)
SCRIPT = """
import sys, torch
def attention(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v
q = torch.randn(2, 4, 8, 16)
torch.compile(attention)(q, q, q)
print(sys.argv[1:])
sys.exit(3 if "--fail" in sys.argv else 0)
"""


class Checked(HTMLParser):
    """Every tag is closed, and nothing is loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.opened

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag not in ("script", "link", "img", "iframe") and not dict(attrs).keys() & {"src", "href"}
        if tag != "meta":
            self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.opened or self.opened[-1] != "style":
            self.text += data
        else:
            assert "url(" not in data and "@import" not in data


def test_a_page_says_everything() -> None:
    graphs = [GraphReport([FUSED, FUSED, LEFT], 0.25, 40, ["a note <of> care"], ["mask"])]
    times = {LABEL: RangeTime(6, 12.0, 3.0), f"{LABEL}, backward": RangeTime(6, 8.0, 0.0)}
    shown = Checked(page(Collector(graphs), "train <1>.py", 12.5, times)).text
    for words in (
        "train <1>.py", "2 of 3 attention sites fused (sdpa), 1 left as it was", "causal", "× 2", "sdpa",
        "model.py:12", "return (a < b).softmax(-1) @ v", "no GPU <here>", "attention(B=2)", "not recognised",
        "the softmax runs over <another> axis & more", "source unknown", "a note <of> care", "mask", "12.5 s",
        "250 ms", "40 ms in 24 calls, 6 ms on the GPU", "fusepass 0: causal, sdpa, model.py:12",
    ):  # fmt: skip
        assert words in shown, words


@pytest.mark.parametrize(
    "graphs", [[], [GraphReport(nodes=3)], [GraphReport([LEFT])], [GraphReport([FUSED])]]
)
def test_a_page_of_little(graphs: list[GraphReport]) -> None:
    text = page(Collector(graphs), "x")
    shown = Checked(text).text
    assert "whole run" not in shown
    assert ("Left as it was" in shown) == any(not s.fused for g in graphs for s in g.sites)
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text


@pytest.mark.parametrize("arguments", [[], ["--profile"]])
def test_run_writes_a_page(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["pytest"])
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments, "--report", "out.html", "script.py", "--fail", "--report", "mine.html"])
    assert ended.value.code == 3, "a page is written of runs that fail, too"
    assert "['--fail', '--report', 'mine.html']" in capsys.readouterr().out, "the script's own"
    shown = Checked((tmp_path / "out.html").read_text(encoding="utf-8")).text
    assert "1 of 1 attention site fused (sdpa)" in shown and "script.py:4" in shown
    assert bool(re.search(r"ms in 1 calls", shown)) == ("--profile" in arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--profile", "script.py"], "expected --report FILE.html"),
        (["run", "--report", "nowhere/out.html", "script.py"], "there is no folder 'nowhere'"),
        (["run", "--report", "out.html", "nothing.py"], "'nothing.py'"),
    ],
)
def test_errors(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_times_are_those_of_fused_sites() -> None:
    class Event:
        def __init__(self, key: str, count: int, cpu: float, device: float, kind: str) -> None:
            self.key, self.count, self.cpu_time_total, self.device_time_total = key, count, cpu, device
            self.device_type = f"DeviceType.{kind}"

    times = range_times(
        [
            Event("aten::mm", 9, 1.0, 1.0, "CPU"),
            Event("fusepass 0: causal", 3, 6000.0, 2000.0, "CPU"),
            Event("fusepass 0: causal", 3, 0.0, 1500.0, "CUDA"),
        ]
    )
    assert times == {"fusepass 0: causal": RangeTime(3, 6.0, 2.0)}
