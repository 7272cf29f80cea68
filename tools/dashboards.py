"""Writes the Grafana dashboards of deploy/grafana, with Grafana's SDK: python tools/dashboards.py

In queries ``@name`` is an engine's metric, of the chosen models and engines, ``#name`` one that
ingress replicas have of the chosen models, ``~name`` one that is of no model, and ``[R]`` the
interval that suits the plot's resolution.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models

FOLDER = Path(__file__).resolve().parents[1] / "deploy" / "grafana" / "dashboards"
# Names from manta's own /metrics, the same with ?names=prometheus, and from Ray's agents.
PREFIXES = ("manta:", "manta_", "ray_manta_")
MODEL = 'model_name=~"$model"'
CHOSEN = {"@": f'{MODEL},engine=~"$engine"', "#": MODEL, "~": ""}
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
COLUMNS = 24
By = tuple[str, str]  # a query and the legend of its series


@dataclass(frozen=True)
class Panel:
    """One panel. ``big`` is a number with a small plot; ``most`` ends the axis."""

    title: str
    unit: str
    queries: tuple[By, ...]
    note: str = ""
    big: bool = False
    stacked: bool = False
    most: float | None = None
    red_from: float | None = None


Rows = dict[str, list[Panel]]


def quantiles(name: str, by: str = "", shown: str = "", among: tuple[int, ...] = (50, 99)) -> tuple:
    """Queries for percentiles of a histogram, by further labels."""
    labels = ", ".join(filter(None, ("le", by)))
    return tuple(
        (f"histogram_quantile({q / 100:g}, sum by ({labels}) (rate({name}_bucket[R])))",
         f"{shown} p{q}".strip())
        for q in among
    )  # fmt: skip


def mean(name: str, legend: str) -> By:
    """The mean of what a histogram observed."""
    return f"sum(rate({name}_sum[R])) / sum(rate({name}_count[R]))", legend


TOKENS = Panel("Tokens", "cps", (
    ("sum(rate(@generation_tokens_total[R]))", "generated"),
    ("sum(rate(@prompt_tokens_by_source_total{source=\"local_compute\"}[R]))", "prompt, computed"),
    ("sum(rate(@prompt_tokens_cached_total[R]))", "prompt, cached"),
), "Tokens a second.")  # fmt: skip
FIRST_TOKEN = Panel(
    "Time to first token", "s",
    quantiles("@time_to_first_token_seconds", among=(50, 90, 99)), "Arrival to first token.",
)  # fmt: skip
INTER_TOKEN = Panel(
    "Time between tokens", "s", quantiles("@inter_token_latency_seconds", among=(50, 90, 99))
)
ROOM = Panel("KV blocks in use", "percentunit", (
    ("sum(@kv_blocks_used) / sum(@kv_blocks)", "device"),
    ("sum(@cpu_kv_blocks_used) / (sum(@cpu_kv_blocks) > 0)", "CPU"),
), most=1)  # fmt: skip
REQUESTS = Panel("Sequences", "short", (
    ("sum(@num_requests_running)", "running"), ("sum(@num_requests_waiting)", "waiting"),
))  # fmt: skip
PREEMPTIONS = Panel("Preemptions", "cps", (
    ("sum by (kind) (rate(@preemptions_by_kind_total[R]))", "{{kind}}"),
), "Requests set aside, a second: swapped to CPU blocks, or computed again.")  # fmt: skip
PREFIX_HITS = Panel("Prefix cache hits", "percentunit", (
    ("sum(rate(@prefix_cache_hits_total[R])) / sum(rate(@prefix_cache_queries_total[R]))", "hits"),
), "Prompt tokens found in the cache, of those looked up.", most=1)  # fmt: skip
ERRORS = '(sum(rate(#http_requests_total{status=~"5.."}[R])) or vector(0))'

OVERVIEW: Rows = {
    "Now": [
        Panel("Tokens generated", "cps", TOKENS.queries[:1], big=True),
        Panel("Running", "short", REQUESTS.queries[:1], big=True),
        Panel("Waiting", "short", REQUESTS.queries[1:], big=True, red_from=100),
        Panel("Time to first token, p99", "s", FIRST_TOKEN.queries[2:], big=True, red_from=5),
        Panel("Between tokens, p99", "s", INTER_TOKEN.queries[2:], big=True, red_from=0.2),
        Panel("KV blocks in use", "percentunit", ROOM.queries[:1], big=True, red_from=0.95),
        Panel("Answers 5xx", "percentunit", (
            (f"{ERRORS} / sum(rate(#http_requests_total[R]))", "5xx"),
        ), big=True, red_from=0.01),
        Panel("Engines that make progress", "short", (
            ("sum(min by (model_name) (#engines{state=\"healthy\"}))", "healthy"),
        ), big=True),
    ],
    "Speed": [TOKENS, FIRST_TOKEN, INTER_TOKEN],
    "Load": [
        REQUESTS,
        Panel("Time in the queue", "s", quantiles("@request_queue_time_seconds")),
        Panel("Completions", "cps", (
            ("sum by (finished_reason) (rate(@request_success_total[R]))", "{{finished_reason}}"),
        ), "Finished completions a second, by reason.", stacked=True),
    ],
    "Memory": [ROOM, PREFIX_HITS, PREEMPTIONS],
    "Failures": [
        Panel("Answers", "cps", (
            ("sum by (status) (rate(#http_requests_total[R]))", "{{status}}"),
        ), "HTTP answers a second; 499 is a client that went.", stacked=True),
        Panel("Engines", "short", (
            ("sum by (state) (max by (model_name, state) (#engines))", "{{state}}"),
        ), stacked=True),
        Panel("Requests moved", "cps", (
            ("sum by (cause) (rate(#requests_moved_total[R]))", "{{cause}}"),
        ), "Requests that went on with another engine, a second."),
        Panel("Time of a move", "s", quantiles("#failover_seconds"),
              "From the failure to the next token."),
    ],
}  # fmt: skip

ENGINE: Rows = {
    "Steps": [
        Panel("Time of a step", "s", quantiles("@step_time_seconds", "engine", "{{engine}}")),
        Panel("Steps", "cps", (
            ("sum by (engine) (rate(@steps_total[R]))", "{{engine}}"),
        ), "Steps a second. None while sequences run: the engine hangs."),
        Panel("Tokens in a step", "short", (
            ("(sum by (engine) (rate(@prompt_tokens_total[R])) + sum by (engine)"
             " (rate(@generation_tokens_total[R]))) / sum by (engine) (rate(@steps_total[R]))",
             "{{engine}}"),
        )),
    ],
    "Sequences": [
        Panel("Running", "short", (("sum by (engine) (@num_requests_running)", "{{engine}}"),)),
        Panel("Waiting", "short", (("sum by (engine) (@num_requests_waiting)", "{{engine}}"),)),
        Panel("Tokens generated", "cps", (
            ("sum by (engine) (rate(@generation_tokens_total[R]))", "{{engine}}"),
        )),
    ],
    "KV blocks": [
        Panel("Device blocks in use", "percentunit", (
            ("max by (engine) (@kv_cache_usage_perc)", "{{engine}}"),
        ), most=1),
        Panel("CPU blocks in use", "short", (
            ("sum by (engine) (@cpu_kv_blocks_used)", "{{engine}}"),
            ("sum(@cpu_kv_blocks)", "all there are"),
        )),
        Panel("Cached blocks moved", "cps", (
            ("sum(rate(@demoted_blocks_total[R]))", "to the CPU"),
            ("sum(rate(@promoted_blocks_total[R]))", "back"),
        )),
        Panel("Prompt tokens", "cps", (
            ("sum by (source) (rate(@prompt_tokens_by_source_total[R]))", "{{source}}"),
        ), "By where their keys and values came from.", stacked=True),
    ],
    "Preemption": [
        Panel("Preemptions", "cps", (
            ("sum by (kind, priority) (rate(@preemptions_by_kind_total[R]))",
             "{{kind}}, priority {{priority}}"),
        )),
        Panel("Swapped", "Bps", (
            ("sum(rate(@swapped_out_bytes_total[R]))", "out"),
            ("sum(rate(@swapped_in_bytes_total[R]))", "in"),
        )),
        Panel("Tokens computed again", "cps", (
            ("sum by (engine) (rate(@recomputed_tokens_total[R]))", "{{engine}}"),
        )),
    ],
    "Requests": [
        Panel("Where the time goes", "s", (
            mean("@request_queue_time_seconds", "queue"),
            mean("@request_prefill_time_seconds", "prefill"),
            mean("@request_decode_time_seconds", "decode"),
        ), "Means of completions that finished.", stacked=True),
        Panel("Whole requests", "s", quantiles("@e2e_request_latency_seconds")),
        Panel("Tokens of a request", "short", (
            *quantiles("@request_prompt_tokens", shown="prompt", among=(50, 95)),
            *quantiles("@request_generation_tokens", shown="generated", among=(50, 95)),
        )),
        Panel("Refused", "cps", (
            ("sum by (reason) (rate(@admission_rejections_total[R]))", "{{reason}}"),
        )),
    ],
    "Setup": [
        Panel("Device blocks", "short", (
            ("sum by (engine) (@kv_blocks)", "{{engine}}"),
        ), big=True),
        Panel("CPU blocks", "short", (
            ("sum by (engine) (@cpu_kv_blocks)", "{{engine}}"),
        ), big=True),
        Panel("Same tokens in any batch", "bool_yes_no", (
            ("min by (engine) (@batch_invariant)", "{{engine}}"),
        ), big=True),
    ],
}  # fmt: skip

ROUTER: Rows = {
    "Requests": [
        Panel("Answers", "cps", (
            ("sum by (handler, status) (rate(#http_requests_total[R]))", "{{handler}} {{status}}"),
        ), stacked=True),
        Panel("Under way", "short", (
            ("sum by (ingress) (~router_requests_in_flight)", "{{ingress}}"),
        )),
        Panel("Answers by model", "cps", (
            ('sum by (model_name) (rate(#http_requests_total{model_name!=""}[R]))',
             "{{model_name}}"),
        ), stacked=True),
        Panel("Clients that went", "cps", (
            ('sum(rate(#http_requests_total{status="499"}[R])) or vector(0)', "499"),
        )),
    ],
    "Stages": [
        Panel("Check, template, tokens: p99", "s", quantiles(
            '#router_stage_seconds', "stage", "{{stage}}", among=(99,)
        ), "Time of a request in each stage of the router."),
        Panel("The router's own time of a request", "s", (
            ('sum by (stage) (rate(#router_stage_seconds_sum{stage=~"validate|template|tokenize|'
             'stream"}[R])) / sum by (stage) (rate(#router_stage_seconds_count{stage=~"validate|'
             'template|tokenize|stream"}[R]))', "{{stage}}"),
        ), "Means.", stacked=True),
        Panel("Busy", "percentunit", (
            ('sum by (ingress) (rate(#router_stage_seconds_sum{stage=~"validate|template|tokenize|'
             'stream"}[R]))', "{{ingress}}"),
        ), "Seconds of these stages a second: near 1, add --num-ingress-replicas."),
    ],
    "Refused": [
        Panel("By the engines", "cps", (
            ("sum by (reason) (rate(@admission_rejections_total[R]))", "{{reason}}"),
        )),
        Panel("Answers 4xx and 5xx", "cps", (
            ('sum by (status) (rate(#http_requests_total{status=~"[45].."}[R]))', "{{status}}"),
        ), stacked=True),
    ],
}  # fmt: skip


def node(name: str, by: str = "instance") -> By:
    """A gauge of Ray's nodes."""
    return f"sum by ({by}) (ray_{name})", " ".join(f"{{{{{label}}}}}" for label in by.split(", "))


GPU = "instance, GpuIndex"
CLUSTER: Rows = {
    "GPUs": [
        Panel("Busy", "percent", (node("node_gpus_utilization", GPU),), most=100),
        Panel("Memory", "mbytes", (node("node_gram_used", GPU),)),
        Panel("Power", "mwatt", (node("node_gpu_power_milliwatts", GPU),)),
        Panel("Temperature", "celsius", (node("node_gpu_temperature_celsius", GPU),)),
    ],
    "Nodes": [
        Panel("CPU", "percent", (node("node_cpu_utilization"),), most=100),
        Panel("Memory", "percentunit", (
            ("sum by (instance) (ray_node_mem_used) / sum by (instance) (ray_node_mem_total)",
             "{{instance}}"),
        ), most=1),
        Panel("Network", "Bps", (
            ("sum by (instance) (ray_node_network_receive_speed)", "{{instance}} in"),
            ("sum by (instance) (ray_node_network_send_speed)", "{{instance}} out"),
        )),
        Panel("Disk in use", "percentunit", (
            ("sum by (instance) (ray_node_disk_usage) / sum by (instance) (ray_node_disk_usage +"
             " ray_node_disk_free)", "{{instance}}"),
        ), most=1),
    ],
    "Ray": [
        Panel("Actors", "short", (
            ('sum by (State) (ray_actors{Source="gcs"} > 0)', "{{State}}"),
        )),
        Panel("Resources taken", "short", (
            ('sum by (Name) (ray_resources{State="USED",Name=~"CPU|GPU"})', "{{Name}}"),
            ('sum by (Name) (ray_resources{Name=~"CPU|GPU"})', "{{Name}}, all there is"),
        )),
        Panel("CPU of processes", "percent", (node("component_cpu_percentage", "Component"),)),
        Panel("Memory of processes", "mbytes", (node("component_rss_mb", "Component"),)),
    ],
}  # fmt: skip
DASHBOARDS = {
    "manta-overview": ("manta: overview", OVERVIEW),
    "manta-engine": ("manta: one engine", ENGINE),
    "manta-router": ("manta: router", ROUTER),
    "manta-cluster": ("manta: hardware and cluster", CLUSTER),
}


def query(text: str) -> str:
    """A query as Grafana is to have it."""

    def chosen(match: re.Match[str]) -> str:
        labels = ",".join(filter(None, (CHOSEN[match[1]], match[3])))
        return f"${{prefix}}{match[2]}" + (f"{{{labels}}}" if labels else "")

    text = re.sub(r"([@#~])(\w+)(?:\{([^}]*)\})?", chosen, text)
    return text.replace("[R]", "[$__rate_interval]")


def build_panel(panel: Panel, width: int) -> builders.Panel:
    """The panel as the SDK has it."""
    made = stat.Panel() if panel.big else timeseries.Panel()
    made.title(panel.title).description(panel.note).datasource(SOURCE)
    made.unit(panel.unit).min(0).span(width).height(4 if panel.big else 8)
    if panel.most is not None:
        made.max(panel.most)
    for text, legend in panel.queries:
        made.with_target(prometheus.Dataquery().expr(query(text)).legend_format(legend))
    if isinstance(made, stat.Panel):
        steps = [models.Threshold(value=None, color="green")]
        if panel.red_from is not None:
            steps.append(models.Threshold(value=panel.red_from, color="red"))
        thresholds = builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE)
        made.thresholds(thresholds.steps(steps))
        made.graph_mode(common.BigValueGraphMode.AREA)
        made.reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        return made
    made.fill_opacity(30 if panel.stacked else 8).line_width(1)
    made.show_points(common.VisibilityMode.NEVER).span_nulls(60_000.0)
    if panel.stacked:
        made.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    return made


def variables(engines: bool) -> list[builders.QueryVariable]:
    """What is chosen at the top of a dashboard."""
    prefix = builders.CustomVariable("prefix").label("Names").values(", ".join(PREFIXES))
    first = PREFIXES[0]
    found = [
        builders.DatasourceVariable("datasource").label("Source").type("prometheus"),
        prefix.current(models.VariableOption(selected=True, text=first, value=first)),
    ]
    every = models.VariableOption(selected=True, text="All", value="$__all")
    asked = [
        ("model", "Model", "label_values(${prefix}kv_blocks, model_name)"),
        ("engine", "Engine", 'label_values(${prefix}kv_blocks{model_name=~"$model"}, engine)'),
    ]
    for name, label, text in asked if engines else ():
        variable = builders.QueryVariable(name).label(label).query(text).datasource(SOURCE)
        variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).current(every)
        found.append(variable.multi(True).include_all(True).all_value(".*"))
    return found


def build(uid: str, title: str, rows: Rows) -> models.Dashboard:
    """A dashboard."""
    made = builders.Dashboard(title).uid(uid).tags(["manta"]).refresh("10s").time("now-30m", "now")
    made.timezone("browser").tooltip(models.DashboardCursorSync.CROSSHAIR)
    made.variables(variables(engines=rows is not CLUSTER))
    link = builders.DashboardLink("manta").type(models.DashboardLinkType.DASHBOARDS)
    made.link(link.tags(["manta"]).as_dropdown(True).keep_time(True).include_vars(True))
    for name, panels in rows.items():
        made.with_row(builders.Row(name))
        for panel in panels:
            made.with_panel(build_panel(panel, COLUMNS // len(panels)))
    return made.build()


def main() -> None:
    """Write them all."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for uid, (title, rows) in DASHBOARDS.items():
        text = json.dumps(build(uid, title, rows), cls=JSONEncoder, indent=1, sort_keys=True)
        (FOLDER / f"{uid}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
