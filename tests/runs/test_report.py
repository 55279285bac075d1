"""report.html: every panel, for whole, partial and hostile run folders, within its size, and safe to open."""

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sample_run import JOB, PARTIES, metric_rows, write_json, write_rows, write_sample_run

from fedllm.errors import ConfigError
from fedllm.runs.charts import Labels, Series, line_chart, number_text, round_ticks, tick_labels, ticks
from fedllm.runs.report import charts_of, write_report
from fedllm.runs.report_data import Metrics, read_run
from fedllm.runs.report_panels import seconds_text, size_text

PANELS = [
    "Comparison on one test set",
    "Round by round",
    "Parties",
    "Bytes",
    "Time",
    "Events",
    "Settings that took effect",
    "Provenance",
]
VOID = {"meta", "link"}
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</style><script>alert(2)</script>",
    "</title><svg onload=alert(3)>",
    "{{ 7 * 7 }}{% include 'report.css' %}",
    "javascript:alert(4)//`${5}`",
    "nul\x00 bell\x07 flip\u202egnp.exe surrogate\ud800 end",
    "x" * 400,
)


class Page(HTMLParser):
    """A parsed page that insists on balanced tags."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def text(self, tag: str) -> list[str]:
        return [data.strip() for name, data in self.texts if name == tag and data.strip()]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_sample_run(tmp_path / "run")


def rendered(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_the_report_is_a_file_in_the_run_folder_and_repeats_itself(run: Path) -> None:
    path = write_report(run)
    first = path.read_bytes()
    assert path == run / "report.html"
    assert write_report(run).read_bytes() == first


def test_verdict_comes_first_and_the_panels_in_their_order(run: Path) -> None:
    page = rendered(run)
    assert page.text("h2") == ["PARTIAL", *PANELS]
    assert "All 12 rounds were committed; south missed at least one." in page.text("p")
    assert "fedllm eval run" in page.text("code")


def test_comparison_shows_every_model_and_the_sentence(run: Path) -> None:
    page = rendered(run)
    cells = page.text("td")
    assert [name for name in page.text("bdi") if name in ("base model", "east alone", "federated", "pooled")]
    assert "75.8" in cells and "0.4520" in cells
    assert any(text.startswith("The federated model recovers 80 %") for text in page.text("p"))


def test_per_party_table_sums_the_metrics(run: Path) -> None:
    rows = [row for row in metric_rows(PARTIES, 12) if row["party"] == "south"]
    total = {name: sum(row["value"] for row in rows if row["name"] == name) for name in ("tokens", "bytes_up")}
    page = rendered(run)
    assert f"{total['tokens']:,}".replace(",", "\u202f") in page.text("td")
    assert size_text(total["bytes_up"]) in page.text("td")
    assert "1 \u00d7 ROUND_TIMEOUT" in page.text("span")


def test_failures_pauses_and_roll_backs_are_listed_and_routine_is_counted(run: Path) -> None:
    page = rendered(run)
    cells = page.text("td")
    assert {"Party failed", "Run paused", "Run resumed", "Rolled back"} <= set(cells)
    assert "Round committed" not in cells
    assert "after 3\u00a0min 20\u00a0s without work" in cells
    assert any(text.startswith("Rounds begun 13 times") for text in page.text("span"))


def test_settings_stand_with_their_origin_and_provenance_with_digests(run: Path) -> None:
    page = rendered(run)
    assert "job.yaml:9" in page.text("td")
    assert "flag" in page.text("td")
    assert "8 settings left at their default" in page.text("summary")
    assert "9e" * 32 in page.text("code")


def test_folders_of_the_job_file_are_not_shown(run: Path) -> None:
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    for row in config["values"]:
        row["origin"] = row["origin"].replace("job.yaml", "/home/ann/private/job.yaml")
    write_json(run / "config.json", config)
    page = rendered(run)
    assert "job.yaml:9" in page.text("td")
    assert "private" not in (run / "report.html").read_text(encoding="utf-8")


def test_a_party_has_one_colour_in_every_chart(run: Path) -> None:
    write_json(run / "parties.json", [{"party": party} for party in ("south", "north", "east")])
    rows = [row for row in metric_rows(PARTIES, 3) if not (row["party"] == "south" and row["name"] == "loss_nats")]
    write_rows(run / "metrics.jsonl", rows)
    charts = {chart.key: {name: css for css, name in chart.legend} for chart in charts_of(read_run(run))}
    assert charts["bytes"] == {"south": "s1", "north": "s2", "east": "s3"}
    assert charts["loss-train"] == {"all parties": "lead", "north": "s2", "east": "s3"}


def test_a_folder_with_only_a_job_says_what_is_not_available(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB, encoding="utf-8")
    page = rendered(tmp_path)
    assert page.text("h2") == ["NO VERDICT", *PANELS]
    assert sum(text.startswith("Not available:") for text in page.text("p")) == len(PANELS)
    assert "fedllm resume" in " ".join(page.text("code"))
    assert any("parties: [north, south, east]" in text for text in page.text("pre"))


@pytest.mark.parametrize("name", ["result", "comparison", "config", "provenance", "parties"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"rows": 3, "values": {}, "versions": []}'])
def test_a_file_that_is_missing_or_broken_does_not_break_the_report(run: Path, name: str, content: str) -> None:
    (run / f"{name}.json").write_text(content, encoding="utf-8")
    assert len(rendered(run).text("h2")) == 1 + len(PANELS)


def test_without_a_job_it_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="RUN_NOT_FOUND"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("status", "rounds", "shown"),
    [
        ("SUCCESS", 12, "SUCCESS"),
        ("PAUSED", 3, "PAUSED"),
        ("FAILED", 0, "FAILED"),
        ("SUCCESS", 0, "FAILED"),  # a run that did no work is no success
    ],
)
def test_verdicts(run: Path, status: str, rounds: int, shown: str) -> None:
    write_json(run / "result.json", {"status": status, "reason": "Why.", "next": "fedllm x", "rounds": rounds})
    assert rendered(run).text("h2")[0] == shown


def poisoned(run: Path) -> Path:
    """Return the sample run with hostile text in every string of every file."""

    def poison(value: object, seed: list[int]) -> object:
        if isinstance(value, dict):
            kept = {"status", "kind", "name", "split", "event", "time", "best_round"}
            return {
                key if key != "torch" else HOSTILE[0]: item if key in kept else poison(item, seed)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [poison(item, seed) for item in value]
        seed[0] += 1
        return HOSTILE[seed[0] % len(HOSTILE)] if isinstance(value, str) else value

    for path in run.glob("*.json"):
        write_json_escaped(path, poison(json.loads(path.read_text(encoding="utf-8")), [0]))
    names = dict(zip(PARTIES, HOSTILE, strict=False))
    for path in run.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        write_rows(path, [row | {"party": names.get(row["party"]), "detail": HOSTILE[2]} for row in rows])
    (run / "job.yaml").write_text("# </pre><script>alert(9)</script>\n", encoding="utf-8")
    return run


def write_json_escaped(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_hostile_strings_stay_text(run: Path) -> None:
    plain_tags = {tag for tag, _ in rendered(run).tags}
    html = write_report(poisoned(run)).read_text(encoding="utf-8")
    page = Page(html)
    assert {tag for tag, _ in page.tags} <= plain_tags
    assert not page.all("script") and not page.all("img")
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    for text in HOSTILE[:6]:
        assert text in "".join(data for _, data in page.texts)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\ud800]", html)
    (run / "config.json").unlink()
    assert not rendered(run).all("script")


def test_nothing_is_requested_and_nothing_can_run(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("href", "src", "action")]
    assert all(str(link).startswith(("#", "data:,")) for link in links)
    assert not re.search(r"https?://|url\(|@import|<script", html)


def test_links_labels_and_ids_hold_together(run: Path) -> None:
    page = rendered(run)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    named = [attrs["href"] for attrs in page.all("a")]
    assert {str(link).removeprefix("#") for link in named} <= set(ids)
    labelled = [attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs]
    assert {name for names in labelled for name in str(names).split()} <= set(ids)


def test_tables_and_charts_can_be_read_without_seeing_them(run: Path) -> None:
    page = rendered(run)
    charts = [attrs for attrs in page.all("svg") if attrs.get("role") == "img"]
    assert len(charts) == len(page.all("figure")) == 5
    assert page.text("desc")[0].startswith("federated model: 2.950 at round 0")
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(attrs.get("scope") in ("col", "row", "colgroup") for attrs in page.all("th"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and max(b - a for a, b in itertools.pairwise(levels)) == 1
    assert page.all("html") == [{"lang": "en"}]


def test_fifty_parties_and_two_hundred_rounds_fit_in_five_megabytes(tmp_path: Path) -> None:
    run = write_sample_run(tmp_path / "run", parties=[f"organisation-{i:02d}" for i in range(50)], num_rounds=200)
    path = write_report(run)
    assert path.stat().st_size < 5_000_000
    page = Page(path.read_text(encoding="utf-8"))
    assert page.text("bdi").count("organisation-49") >= 1
    assert "each of 50 parties" in page.text("bdi") and "43 other parties" in page.text("bdi")
    assert any("metrics.jsonl has all." in text for text in page.text("span"))


def test_many_rounds_are_thinned(tmp_path: Path) -> None:
    run = write_sample_run(tmp_path / "run", num_rounds=2_000)
    assert write_report(run).stat().st_size < 500_000


def test_bars_hold_the_sums_of_the_metrics(run: Path) -> None:
    rows = metric_rows(PARTIES, 12)
    charts = {chart.key: chart for chart in charts_of(read_run(run))}
    sent = [row["value"] for row in rows if row["round"] == 3 and row["name"] in ("bytes_up", "bytes_down")]
    number, shown = charts["bytes"].table.rows[3]
    assert (number, charts["bytes"].unit) == (3, "kB")
    assert sum(value or 0 for value in shown) == pytest.approx(sum(sent) / 1000)


def test_time_split_adds_up_to_the_servers_time(run: Path) -> None:
    rows = [row for row in metric_rows(PARTIES, 12) if row["round"] == 4]
    chart = next(chart for chart in charts_of(read_run(run)) if chart.key == "time")
    at_server = ("seconds_wait", "seconds_aggregate", "seconds_write")
    shown = dict(zip(chart.table.columns, chart.table.rows[4][1], strict=True))
    assert sum(value or 0 for value in shown.values()) == pytest.approx(
        sum(row["value"] for row in rows if row["name"] in at_server)
    )
    assert shown["compute"] == pytest.approx(sum(row["value"] for row in rows if row["name"] == "seconds_compute"))


def test_metrics_of_parties_in_their_own_files_are_read(run: Path) -> None:
    rows = metric_rows(PARTIES, 12)
    write_rows(run / "metrics.jsonl", [row for row in rows if row["party"] != "east"])
    before = rendered(run).text("td")
    own = run / "parties" / "east" / "metrics.jsonl"
    own.parent.mkdir(parents=True)
    write_rows(own, [row for row in rows if row["party"] == "east"])
    assert "216\u202f000" not in before
    assert "216\u202f000" in rendered(run).text("td")


def test_text_scores_by_round_are_drawn(run: Path) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for number in range(13):
            row = {"round": number, "party": None, "split": "common", "name": "rougeL", "value": 30.0 + number}
            file.write(json.dumps(row) + "\n")
    page = rendered(run)
    assert "Scores on the common test set" in page.text("h3")


def test_numbers_that_are_none_break_the_line_and_a_torn_row_is_passed_over(run: Path) -> None:
    rows = metric_rows(PARTIES, 6)
    for row in rows:
        if row["name"] == "loss_nats" and row["split"] == "common" and row["round"] == 3:
            row["value"] = None
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(text + '{"round": 7, "par', encoding="utf-8")
    chart = charts_of(read_run(run))[0]
    assert chart.lines[0].path.count("M") == 2
    assert chart.table.rows[3] == (3, [None])


def test_rows_of_a_round_are_added_up_for_seconds_and_bytes_only() -> None:
    row = {"round": 1, "party": "north", "split": None}
    twice = [row | {"name": name, "value": 2} for name in ("bytes_up", "steps") for _ in range(2)]
    metrics = Metrics.of([*twice, row | {"name": "bytes_up", "value": float("nan")}, {"round": "x"}])
    assert metrics.values("bytes_up", party="north") == {1: 4}
    assert metrics.values("steps", party="north") == {1: 2}


def test_a_line_starts_and_ends_at_the_places_by_hand() -> None:
    # Rounds 0 to 10 from x = 68 to 542; values 0 to 4 from y = 246 up to 14.
    chart = line_chart(Labels("k", "t", "u"), [Series("a", {0: 4.0, 5: 2.0, 10: 0.0}, "lead")])
    assert chart is not None
    assert chart.lines[0].path == "M68 14h0L305 130L542 246"
    assert [tick.label for tick in chart.y_ticks] == ["0", "1", "2", "3", "4"]
    assert chart.summary == "a: 4 at round 0, 0 at round 10; between 0 and 4 (u)."


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart(Labels("k", "t", "u"), [Series("a", {}, "lead")]) is None


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 4, ["0", "1", "2", "3", "4"]),
        (0.31, 0.52, ["0.30", "0.35", "0.40", "0.45", "0.50", "0.55"]),
        (0, 12, ["0.0", "2.5", "5.0", "7.5", "10.0", "12.5"]),
        (3, 3, ["1", "2", "3", "4", "5"]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float, labels: list[str]) -> None:
    found = ticks(low, high)
    assert tick_labels(found) == labels
    assert found[0] <= low and found[-1] >= high


@pytest.mark.parametrize("last", [0, 1, 7, 12, 200, 9999])
def test_round_ticks_are_rounds_and_few(last: int) -> None:
    found = round_ticks(list(range(last + 1)))
    assert 1 <= len(found) <= 9
    assert set(found) <= set(range(last + 1))


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (number_text(1234567), "1\u202f234\u202f567"),
        (number_text(0.4521), "0.4521"),
        (number_text(1e300), "1e+300"),
        (number_text(float("inf")), "\u2013"),
        (size_text(0), "0\u00a0B"),
        (size_text(1_500_000), "1.50\u00a0MB"),
        (size_text(999_600), "1000\u00a0kB"),
        (seconds_text(3.14159), "3.14\u00a0s"),
        (seconds_text(3723), "1\u00a0h 2\u00a0min"),
        (seconds_text(None), "\u2013"),
    ],
)
def test_numbers_are_written_with_their_units(shown: str, text: str) -> None:
    assert shown == text


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", [0, 1, 2], ids=["light", "dark", "print"])
def test_colours_meet_wcag_contrast_in_every_mode(mode: int) -> None:
    css = (Path(charts_of.__code__.co_filename).with_name("templates") / "report.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", re.findall(r":root \{(.*?)\n *\}", css, re.S)[mode]))
    texts = [(text, ground) for text in ("text", "soft", "link") for ground in ("page", "panel", "raised")]
    texts += [("text", "mark"), *((tone, f"{tone}-soft") for tone in ("good", "fair", "bad")), ("bad", "panel")]
    assert [pair for pair in texts if contrast(colours[pair[0]], colours[pair[1]]) < 4.5] == []
    drawn = [*(f"s{number}" for number in range(1, 9)), "muted-line", "bar"]
    assert [name for name in drawn if contrast(colours[name], colours["panel"]) < 3] == []
