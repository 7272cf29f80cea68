"""What deploy/grafana ships: as its generators write it, and alerts that fire when they should."""

import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "deploy" / "grafana"
RULES = {"alerts.yml": "manta:", "alerts-ray.yml": "ray_manta_"}
WHO = 'model_name="m",engine="e"'
# What makes each alert fire, as promtool's series: from, step and count of values a minute apart.
FIRES = {
    "MantaGone": {},
    "MantaNoEngine": {'engines{model_name="other",state="healthy"}': "0x30"},
    "MantaEngineUnhealthy": {'engines{model_name="m",state="unhealthy"}': "2x30"},
    "MantaNoProgress": {f"num_requests_running{{{WHO}}}": "3x30", f"steps_total{{{WHO}}}": "7x30"},
    "MantaQueueGrowing": {f"num_requests_waiting{{{WHO}}}": "0+60x30"},
    "MantaFailovers": {'requests_moved_total{model_name="m",cause="lost"}': "0+1x30"},
    "MantaKvPressure": {f"num_preemptions_total{{{WHO}}}": "0+60x30"},
    "MantaErrors": {
        'http_requests_total{status="503"}': "0+6x30",
        'http_requests_total{status="200"}': "0+60x30",
    },
    "MantaRefusing": {
        'http_requests_total{status="429"}': "0+60x30",
        'http_requests_total{status="200"}': "0+60x30",
    },
    "MantaSlowTokens": {
        f'inter_token_latency_seconds_bucket{{{WHO},le="0.2"}}': "0+60x30",
        f'inter_token_latency_seconds_bucket{{{WHO},le="0.5"}}': "0+90x30",
        f'inter_token_latency_seconds_bucket{{{WHO},le="+Inf"}}': "0+90x30",
    },
    "MantaSlowFirstToken": {
        f'time_to_first_token_seconds_bucket{{{WHO},le="10"}}': "0+60x30",
        f'time_to_first_token_seconds_bucket{{{WHO},le="40"}}': "0+90x30",
        f'time_to_first_token_seconds_bucket{{{WHO},le="+Inf"}}': "0+90x30",
    },
}  # fmt: skip
# A server that is well; nothing but what a test changes may fire.
WELL = {
    'engines{model_name="m",state="healthy"}': "2x30",
    'engines{model_name="m",state="unhealthy"}': "0x30",
    'engines{model_name="removed",state="healthy"}': "0x30",
    'engines{model_name="removed",state="draining"}': "1x30",
    f"num_requests_running{{{WHO}}}": "3x30",
    f"num_requests_waiting{{{WHO}}}": "3x30",
    f"steps_total{{{WHO}}}": "0+600x30",
    f"num_preemptions_total{{{WHO}}}": "0+1x30",
    'requests_moved_total{model_name="m",cause="drained"}': "0+1x30",
    'http_requests_total{status="200"}': "0+60x30",
    'http_requests_total{status="429"}': "0+1x30",
    f'inter_token_latency_seconds_bucket{{{WHO},le="0.2"}}': "0+60x30",
    f'inter_token_latency_seconds_bucket{{{WHO},le="+Inf"}}': "0+60x30",
}


@pytest.mark.parametrize("tool", ["dashboards", "alerts"])
def test_files_are_what_the_generators_write(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = runpy.run_path(str(ROOT / "tools" / f"{tool}.py"))
    folder = made["FOLDER"]
    made["main"].__globals__["FOLDER"] = tmp_path
    made["main"]()
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == (4 if tool == "dashboards" else 2)
    for name in names:
        assert (tmp_path / name).read_text() == (folder / name).read_text(), f"run tools/{tool}.py"


def test_dashboards_are_whole_for_the_sdk() -> None:
    """It reads them back as they are; panels have room of their own, and queries no placeholder."""
    for file in sorted((SHIPPED / "dashboards").glob("*.json")):
        made = json.loads(file.read_text())
        read = Dashboard.from_json(json.loads(file.read_text()))
        assert json.loads(json.dumps(read, cls=JSONEncoder)) == made
        assert made["uid"] == file.stem
        taken: set[tuple[int, int]] = set()
        for panel in made["panels"]:
            at = panel["gridPos"]
            cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
            assert not cells & taken and max(x for x, _ in cells) < 24
            taken |= cells
            for target in panel.get("targets", ()):
                assert not re.search(r"[@#]|~\w|\[R\]", target["expr"]), target


def test_promtool_is_content_with_the_rules() -> None:
    files = [*RULES, "prometheus.yml"]
    for kind, name in zip(("rules", "rules", "config"), files, strict=True):
        command = ["promtool", "check", kind, str(SHIPPED / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("file", "prefix"), RULES.items())
def test_each_alert_fires_alone_when_it_should(file: str, prefix: str, tmp_path: Path) -> None:
    """promtool is told that none fires, and so names those that do."""
    rules = yaml.safe_load((SHIPPED / file).read_text())["groups"][0]["rules"]
    assert [rule["alert"] for rule in rules] == list(FIRES)
    cases = {name: WELL | changed for name, changed in FIRES.items()}
    cases |= {"none": WELL, "MantaGone": {}}
    tests = [
        {
            "name": f"case {name}.",
            "interval": "1m",
            "input_series": [{"series": prefix + n, "values": v} for n, v in series.items()],
            "alert_rule_test": [{"eval_time": "29m", "alertname": n} for n in FIRES],
        }
        for name, series in cases.items()
    ]
    file_of_tests = tmp_path / "test.yml"
    file_of_tests.write_text(json.dumps({"rule_files": [str(SHIPPED / file)], "tests": tests}))
    command = ["promtool", "test", "rules", str(file_of_tests)]
    done = subprocess.run(command, capture_output=True, text=True)
    fired = re.findall(r"name: case (\w+)\.,\s+alertname: (\w+)", done.stdout + done.stderr)
    assert sorted(fired) == sorted((name, name) for name in FIRES), done.stdout + done.stderr
