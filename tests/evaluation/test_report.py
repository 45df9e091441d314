"""The report: what it shows, that it needs nothing but a browser, and how a real one takes it."""

import http.client
import json
import math
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, DemoRun

from orpo_lite import api
from orpo_lite.errors import CheckpointError, RecipeError
from orpo_lite.evaluation import charts, report
from orpo_lite.evaluation.run_record import RunRecord
from orpo_lite.runs.folder import locked
from orpo_lite.runs.records import read_metrics

HOSTILE = (
    "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> & $x_1$"
)
SHARE = {"value": 0.71, "low": 0.65, "high": 0.77}
VERDICT: dict[str, Any] = {
    "pairs": 200,
    "prompts": 100,
    "held_out": True,
    "data": "pairs.jsonl",
    "models": [
        {
            "name": name,
            "accuracy": SHARE,
            "margin": {"value": -0.5, "low": -0.6, "high": 1},
            "log_odds": 0.5,
            "shorter_chosen": {"pairs": 80, "accuracy": SHARE},
        }
        for name in ("base", "tuned")
    ],
    "comparisons": [
        {
            "model": "tuned",
            "against": "base",
            "outcome": "cannot tell",
            "decided_by": "accuracy",
            "differences": {"accuracy": SHARE},
            "shorter_chosen": {},
            "pairs_needed": 1200,
            "text": "cannot tell with 200 pairs",
        }
    ],
    "length_rule": {"accuracy": SHARE, "pairs": 200},
}
PLAN = {"peak_bytes": 3 * 2**30, "needed_bytes": 4 * 2**30}


def planted_rows(steps: int, *, every: int) -> list[dict[str, Any]]:
    """The metrics of a run on a GPU, with noise and one step that was not finite."""
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    for step in range(steps + 1):
        fall = math.exp(-4 * step / steps)
        names = ("loss", "nll_loss", "logps/chosen", "logps/rejected", "log_odds_chosen")
        row: dict[str, Any] = {n: s * fall + rng.gauss(0, 0.1) for n, s in zip(names, (2, 2, -1, 3, -2), strict=True)}  # fmt: skip
        row |= {"rewards/accuracies": 1 - fall / 2, "rewards/margins": 0.1 - fall / 10}
        if step:
            extra = {"grad_norm": rng.random(), "learning_rate": 1e-4 * fall, "memory_gib": 2.5}
            extra |= {"tokens_per_second": 9000 + rng.random(), "memory_reserved_gib": 2.9}
            rows.append({"step": step, **row, **extra})
        if step == steps // 2:
            rows[-1] |= {"loss": None, "grad_norm": None}
        if step % every == 0:
            rows.append({"step": step, **{f"eval_{key}": value for key, value in row.items()}})
    return rows


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def run(
    one_training: tuple[Path, list[Any], Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run with all that a report shows: 10,000 steps, verdict, plan, answers that are HTML."""
    path = tmp_path_factory.mktemp("report") / "a <b>run</b> & $x$"
    shutil.copytree(one_training[0] / "run", path, ignore=shutil.ignore_patterns("checkpoints"))
    write_rows(path / "metrics.jsonl", planted_rows(10_000, every=500))
    (path / "verdict.json").write_text(json.dumps(VERDICT), encoding="utf-8")
    (path / "plan.json").write_text(json.dumps(PLAN), encoding="utf-8")
    (path / "result.json").write_text('{"steps": 10000, "kept_step": 9500}', encoding="utf-8")
    answer = {"prompt": HOSTILE, "before": HOSTILE, "after": f"after {HOSTILE}", "temperature": 0.7}
    write_rows(path / "samples.jsonl", [{"source": s, **answer} for s in ("neutral", "held-out")])
    return path


@pytest.fixture(scope="module")
def written(run: Path) -> tuple[Path, float]:
    """Its report, and the seconds of the processor that it took."""
    began = time.process_time()
    file = report.report(run).file
    return file, time.process_time() - began


@pytest.fixture(scope="module")
def page(written: tuple[Path, float]) -> Path:
    return written[0]


# --- the file


def test_a_report_of_10_000_steps_is_small_quick_and_loads_nothing(
    run: Path, written: tuple[Path, float]
) -> None:
    file, seconds = written
    assert seconds < 5
    assert file == run / "report.html"
    text = file.read_text(encoding="utf-8")
    assert len(text.encode()) < 1e6
    assert "<script" not in text
    assert "#00000" not in text  # a stand-in for a colour of the style sheet
    assert "default-src 'none'" in text
    assert set(re.findall(r"(?:src|href)=\"([^#\"][^\"]*)\"", text)) == {"data:,"}
    again = report.make_page([RunRecord.read(run)])
    assert again == text  # the same bytes from the same run


def test_a_long_line_keeps_its_extremes_and_gaps() -> None:
    rng = random.Random(1)
    values = [rng.gauss(0, 1) for _ in range(20_000)]
    values[7_001], values[9_001], values[12_345] = 50.0, -50.0, math.nan
    x, y = charts.extremes(range(20_000), values)
    assert len(x) < 1_000
    assert {50.0, -50.0} < set(y)
    assert math.isnan(y[[*x].index(12_345)])
    assert (x[0], x[-1]) == (0, 19_999)
    line = charts.Line("training", range(40), [float(v) for v in range(40)], 0, 0)
    means, width = line.smooth
    assert width == 3
    assert means[20] == pytest.approx(20)  # the mean of 19, 20, 21
    assert means[0] == pytest.approx(0.5)  # of those that there are


def test_the_report_shows_every_part_and_escapes_all_texts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<img" not in text
    assert text.count("&lt;script&gt;") >= 6
    for part in (
        "Cannot tell",
        "cannot tell with 200 pairs",
        '71.0% <span class="interval">65.0 to 77.0</span>',
        "The loss is not finite at 1 step, first at step 5000.",
        "of the planned 3.00 GiB",
        "planned peak of tensors",
        "Answers to 1 held-out prompts",
        "training.learning_rate",
        "small.yaml:",
        "command line",
        "transformers",
    ):
        assert part in text, part
    for chart in (*report.SPECS, report.MEMORY):
        assert f'id="chart-{chart.key}"' in text


def test_a_copy_for_others_hides_texts_of_the_data_and_paths(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "draw", lambda chart: f"<svg>{chart.key}</svg>")
    text = report.report(run, to=tmp_path / "copy.html", data_texts=False).file.read_text("utf-8")
    assert "held-out prompts" not in text
    assert str(run.parent) not in text
    for setting in ("model.model_name_or_path", "data.dataset_name"):
        value = RunRecord.read(run).settings[setting]
        assert value not in text
        assert Path(value).name in text


def test_several_runs_are_overlaid_and_their_differing_settings_named(
    trained: Any, workspace: Path, run: Path, call: Callable[..., Answer]
) -> None:
    shutil.copytree(workspace / "run", workspace / "other")
    lock = json.loads((workspace / "other" / "lock.json").read_text("utf-8"))
    lock["recipe"]["lora.r"] = 4
    (workspace / "other" / "lock.json").write_text(json.dumps(lock), encoding="utf-8")
    (workspace / "other" / "result.json").unlink()
    with (workspace / "other" / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write("broken\n")
    code, said, complaint = call("report", "run", "other")
    assert code == 0, complaint
    assert "note: other/metrics.jsonl: 1 line cannot be read" in said
    assert "run:   Train longer." in said
    assert "other:   The training was stopped before its end. Continue it." in said
    code, _, complaint = call("report", "run", "--to", "pairs.jsonl")
    assert (code, "is not a report" in complaint) == (2, True)
    assert call("report", "run", "--to", "report.html")[0] == 0  # a report may be replaced
    assert call("report", "run", "--to", ".")[0] == 2
    with locked(workspace / "other"):
        assert RunRecord.read(workspace / "other").state == "training"
    call("report", "run", "other")
    assert "too few steps to tell" in said
    assert said.rstrip().endswith("wrote report.html; open it in a browser")
    text = (workspace / "report.html").read_text(encoding="utf-8")
    differing = text[text.index('id="runs"') : text.index('id="curves"')]
    assert re.findall(r'<tr><th scope="row">([\w.]+)', differing) == ["folder", "steps", "lora.r"]
    svg = text[text.index("<svg") : text.index("</svg>")]
    assert "<code>orpo-lite train --resume other</code>" in text
    assert {"A run", "B other"} <= set(re.findall(r">([AB] \w+)</text>", svg))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("verdict.json", '{"models": [7, {"name": 3}], "comparisons": {"a": 1}}'),
        ("verdict.json", "{"),
        ("samples.jsonl", '{"prompt": 7}\n'),
        ("data.json", "[]"),
        ("data.json", '{"tokens": 1, "dropped": [], "cut": null, "format": 3}'),
        ("plan.json", '{"peak_bytes": "x"}'),
        ("lock.json", "{}"),
        ("metrics.jsonl", '{"step": 1, "loss": 2.0}\nbroken\n{"step": 2, "loss": 1'),
        ("metrics.jsonl", ""),
    ],
)
def test_a_damaged_file_is_a_note_not_a_fault(
    trained: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setattr(report, "draw", lambda chart: f"<svg>{chart.key}</svg>")
    (workspace / "run" / name).write_text(text, encoding="utf-8")
    record = RunRecord.read(workspace / "run")
    page = report.make_page([record])
    is_readable = '"step": 1' not in text and text.endswith("}") and name != "lock.json"
    assert bool(record.notes) != is_readable
    assert all(note.split(":")[0].endswith(name) for note in record.notes)
    assert "Notes on the files" in page or is_readable
    if name == "metrics.jsonl" and text:
        assert "1 line cannot be read" in page  # the last line is still being written


def test_what_is_no_run_is_refused(tmp_path: Path, call: Callable[..., Answer]) -> None:
    with pytest.raises(CheckpointError, match="has no recipe"):
        report.report(tmp_path)
    with pytest.raises(RecipeError, match="0 runs"):
        report.report()
    code, _, complaint = call("report", str(tmp_path), "--port", "8000")
    assert code == 2
    assert "without --live" in complaint


# --- in a training


def test_a_training_writes_the_report(demo_run: DemoRun) -> None:
    text = (demo_run.run / "report.html").read_text(encoding="utf-8")
    assert "Healthy" in text
    assert "report.html" in demo_run.printed


def test_a_report_after_evaluations_is_rare_and_its_failure_harmless(
    trained: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = [update for update in trained[0] if update.kind in ("eval", "step")]
    evaluations = sum(update.kind == "eval" for update in updates)
    written: list[float] = []
    clock = [0.0]
    cost = [0.1]

    def later(path: Path) -> None:
        clock[0] += cost[0]
        written.append(clock[0])
        if cost[0] > 1:
            raise OSError("disk full")

    def slowly(seconds: float) -> Iterator[Any]:
        for update in updates:
            clock[0] += seconds
            yield update

    monkeypatch.setattr(api, "report", later)
    monkeypatch.setattr(api.time, "monotonic", lambda: clock[0])
    assert [*api._with_reports(slowly(0.1), workspace)] == updates
    assert written == []  # matplotlib is not loaded in a training of seconds
    assert [*api._with_reports(slowly(300), workspace)] == updates
    assert len(written) == evaluations > 1
    written.clear()
    cost[0] = 2.0
    notes = [u for u in api._with_reports(slowly(300), workspace) if u.kind == "note"]
    assert len(written) == len(notes) == 1
    assert notes[0].text == f"{api.NO_REPORT}: disk full"


# --- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")  # fmt: skip
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SIZES = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, started once."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield chromium
        chromium.close()


class Tab:
    """A page in the browser, with what it asked for and what it complained of."""

    def __init__(self, browser: Any, url: str, width: int = 1280, scheme: str = "light") -> None:
        size = {"width": width, "height": 900}
        self.context = browser.new_context(viewport=size, color_scheme=scheme)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)

    def faults(self) -> list[str]:
        """What axe-core finds that is serious or critical."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright")
        found = axe.Axe().run(self.page).response["violations"]
        return [
            f"{fault['id']}: {fault['nodes'][0]['html']}"
            for fault in found
            if fault["impact"] in ("serious", "critical")
        ]


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_a_browser_shows_it_without_a_request_or_a_complaint(
    browser: Any, page: Path, width: int, scheme: str
) -> None:
    tab = Tab(browser, page.as_uri(), width, scheme)
    with tab.context:
        assert tab.requests == [page.as_uri()]
        # Everything is shown, also what is folded.
        tab.page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
        pictures = tab.page.locator(".chart svg").all()
        assert len(pictures) == len(report.SPECS) + 1
        for picture in pictures:
            box = picture.bounding_box()
            assert box["width"] > 250
            assert box["height"] > 140
        assert tab.page.title() == f"{page.parent.name} – orpo-lite report"
        assert tab.page.locator(".answer .text").first.inner_text() == HOSTILE
        back = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(16, 19, 23)") == (scheme == "dark")
        assert tab.faults() == []
        assert tab.complaints == []
        assert tab.requests == [page.as_uri()]


def test_the_keyboard_reaches_and_opens_each_part(browser: Any, page: Path) -> None:
    tab = Tab(browser, page.as_uri())
    with tab.context:
        parts = tab.page.locator("details").count()
        opened = 0
        first = ""
        for _ in range(30 + 3 * parts):
            tab.page.keyboard.press("Tab")
            focused = tab.page.evaluate(
                "[document.activeElement.tagName, document.activeElement.textContent]"
            )
            first = first or focused[1]
            if focused[0] == "SUMMARY":
                tab.page.keyboard.press("Enter")
                opened += 1
            if opened == parts:
                break
        assert first == "Skip to the report"
        assert tab.page.locator("details[open]").count() == parts > 10


@pytest.mark.long
def test_live_follows_the_run_and_ends_calmly(
    browser: Any, trained: Any, workspace: Path, call: Callable[..., Answer]
) -> None:
    path = workspace / "run"
    rows = read_metrics(path)
    result = (path / "result.json").read_text("utf-8")
    (path / "result.json").unlink()
    write_rows(path / "metrics.jsonl", rows[:3])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, complaint = call("report", "run", "--live", "--port", str(port))
    assert code == 2
    assert "cannot be used (Address already in use)" in complaint
    (again,) = re.findall(r"fix: orpo-lite (report run --live --port \d+)", complaint)
    command = [sys.executable, "-P", "-m", "orpo_lite", *again.split()]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        lines = iter(server.stdout.readline, "")
        url = next(found[0] for line in lines if (found := re.findall(r"http://\S+", line)))
        training = ExitStack()
        training.enter_context(locked(path))
        tab = Tab(browser, url)
        with tab.context, training:
            assert "live: step" in tab.page.locator(".product").inner_text()
            summary = tab.page.locator("#values-loss summary")
            summary.click()
            tab.page.evaluate("window.scrollTo(0, 400)")
            write_rows(path / "metrics.jsonl", rows)
            (path / "result.json").write_text(result, "utf-8")
            tab.page.get_by_text("the run has finished").wait_for(timeout=30_000)
            assert tab.page.locator("#values-loss").get_attribute("open") is not None
            assert tab.page.evaluate("window.scrollY") == 400
            assert tab.complaints == []
            assert {request.partition("?")[0] for request in tab.requests} == {
                f"{url}/",
                f"{url}/body",
            }
        host, port = url.removeprefix("http://").split(":")
        for name, status in (("evil.example", 403), (f"localhost:{port}", 200)):
            connection = http.client.HTTPConnection(host, int(port), timeout=10)
            connection.request("GET", "/", headers={"Host": name})
            assert connection.getresponse().status == status
            connection.close()
    finally:
        server.send_signal(signal.SIGINT)
        said, complaint = server.communicate(timeout=30)
    assert server.returncode == 0
    assert complaint.strip() == "the report is no longer served; the run is not affected"
    assert "the training has ended" in said
