"""Writes the dashboards beside it: `make dashboards`. A test compares what is committed with what this writes.

Long, because a dashboard is one list of panels.

One for the engineer on duty (is it still robust?), one for a model in depth, one for the sidecar's own health.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

Query = tuple[str, str]  # PromQL, legend
Step = tuple[float | None, str]  # from which value, colour; None: from the beginning

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
MODEL = 'model=~"$model"'
VERSION = 'model=~"$model",version=~"$version"'
OURS = "Robustness.+|QueryAttack.+|Detector.+|ResponseCacheHit"  # alerts, in rules/robustness.yaml
ROUNDS = "10m"  # rates are of this long at least, because the sidecar counts by rounds: a minute each, searches five
GOOD, BAD, NOTICE, PLAIN = "green", "red", "orange", "blue"


def band(mean_upper: str, ratio: str, mean_lower: str, stretch_upper: str) -> list[Query]:
    """A figure in recent rounds, the bounds of its mean over the last W, and what some of these prove."""
    legends = {mean_upper: " mean, upper", ratio: "", mean_lower: " mean, lower", stretch_upper: " some rounds, upper"}
    return [
        (f"max by (version) ({metric}{{{VERSION}}})", f"live {{{{version}}}}{text}") for metric, text in legends.items()
    ]


def rate(metric: str, labels: str = MODEL, by: str = "model, via") -> str:
    return f"sum by ({by}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def quantile(share: float, metric: str, by: str, labels: str = MODEL) -> str:
    """From the buckets of a classic histogram."""
    return f"histogram_quantile({share}, {rate(metric, labels, f'le, {by}' if by else 'le')})"


def _finish(
    panel: Any,
    title: str,
    description: str,
    queries: Sequence[Query],
    *,
    instant: bool,
    width: int,
    shape: PromQueryFormat = PromQueryFormat.TIME_SERIES,
) -> Any:
    panel.title(title).description(description).datasource(SOURCE).span(width)
    for number, (expression, legend) in enumerate(queries):
        target = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + number))
        target.format(shape)
        panel.with_target(target.instant() if instant else target.range())
    return panel


def _steps(steps: Sequence[Step]) -> dashboard.ThresholdsConfig:
    return (
        dashboard.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(value=value, color=color) for value, color in steps])
    )


def fact(
    title: str,
    description: str,
    *queries: Query,
    steps: Sequence[Step] = ((None, PLAIN),),
    words: dict[int, str] | None = None,
    unit: str = "none",
    names: bool = False,
    width: int = 4,
) -> Any:
    """The value of now in one word or number, its colour by `steps`. names: the legend is shown."""
    shown = shapes.BigValueTextMode.NAME if names else shapes.BigValueTextMode.AUTO
    panel = stat.Panel().unit(unit).thresholds(_steps(steps)).text_mode(shown).height(5)
    panel.color_mode(shapes.BigValueColorMode.BACKGROUND).graph_mode(shapes.BigValueGraphMode.NONE)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).no_value("no data")
    if words:
        options = {str(value): models.ValueMappingResult(text=word) for value, word in words.items()}
        panel.mappings([models.ValueMap(options=options)])
    return _finish(panel, title, description, queries, instant=True, width=width)


def course(
    title: str, description: str, *queries: Query, unit: str = "percentunit", width: int = 12, stacked: bool = False
) -> Any:
    """How it went. Bounds are thin, what the gate asserted is dashed."""
    panel = timeseries.Panel().unit(unit).height(9).fill_opacity(20 if stacked else 0).line_width(2)
    panel.show_points(shapes.VisibilityMode.NEVER).axis_soft_min(0)
    panel.legend(
        common.VizLegendOptions()
        .display_mode(shapes.LegendDisplayMode.TABLE)
        .placement(shapes.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull"])
    )
    panel.tooltip(common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI))
    if stacked:
        panel.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL))
    if unit == "percentunit":
        panel.axis_soft_max(1)
    if any("robustness_" in query and "$__rate_interval" in query for query, _ in queries):
        panel.interval(ROUNDS)
    panel.override_by_regexp("/(lower|upper)$/", [models.DynamicConfigValue("custom.lineWidth", 1)])
    dashes = {"fill": "dash", "dash": [8, 8]}
    panel.override_by_regexp("/^gate/", [models.DynamicConfigValue("custom.lineStyle", dashes)])
    return _finish(panel, title, description, queries, instant=False, width=width)


def bars(title: str, description: str, *queries: Query) -> Any:
    """Shares beside each other."""
    panel = bargauge.Panel().unit("percentunit").min(0).max(1).height(9).thresholds(_steps([(None, PLAIN)]))
    panel.orientation(shapes.VizOrientation.HORIZONTAL).display_mode(shapes.BarGaugeDisplayMode.BASIC)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return _finish(panel, title, description, queries, instant=True, width=12)


def rows(title: str, description: str, query: str, *, width: int = 24) -> Any:
    """Labels as columns, without those of the scrape."""
    exclude = dict.fromkeys(["Time", "Value", "__name__", "instance", "job", "pod", "container"], True)
    panel = table.Panel().height(6).show_header(True)
    panel.with_transformation(models.DataTransformerConfig(id_val="organize", options={"excludeByName": exclude}))
    return _finish(panel, title, description, [(query, "")], instant=True, width=width, shape=PromQueryFormat.TABLE)


def board(uid: str, title: str, description: str, *parts: Any, version: str | None = None) -> models.Dashboard:
    """parts: panels, and rows' titles. version: the metric that knows a model's versions, where one is to be chosen."""
    made = dashboard.Dashboard(title).uid(uid).description(description).tags(["dfmcl"]).editable()
    made.refresh("1m").time("now-24h", "now").timezone("browser").tooltip(models.DashboardCursorSync.CROSSHAIR)
    made.link(
        dashboard.DashboardLink("Others").type(models.DashboardLinkType.DASHBOARDS).tags(["dfmcl"]).keep_time(True)
    )
    made.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    made.with_variable(_variable("model", "robustness_probe_interval_seconds"))
    if version:
        made.with_variable(_variable("version", f'{version}{{model=~"$model"}}'))
    number = 0
    for part in parts:
        if isinstance(part, str):
            made.with_row(dashboard.Row(part))
        else:
            number += 1
            made.with_panel(part.id(number))
    return made.build()


def _variable(name: str, series: str) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(name.capitalize()).query(f"label_values({series}, {name})")
    variable.datasource(SOURCE).refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
    variable.sort(models.VariableSort.NUMERICAL_DESC).multi(True).include_all(True)
    return variable


def overview() -> models.Dashboard:
    """The one to look at first."""
    current = "unless on (namespace, job, model, version) model_version:robustness_target_superseded:bool"
    return board(
        "dfmcl-robustness",
        "Robustness overview",
        "Is what is served still robust, and how is it with users?",
        "Is it still robust?",
        fact(
            "Alerts",
            "Alerts about robustness that fire now, pages and tickets. 0 is good.",
            (
                f'count(ALERTS{{alertname=~"{OURS}",alertstate="firing"}}) or vector(0)',
                "firing",
            ),
            steps=[(None, GOOD), (1, BAD)],
        ),
        fact(
            "Loss of robustness",
            "PROVEN: an answer is not the gate's, or a bound that errs once in 100 months says that the model "
            "resisted less than was asserted, on average over some of the last rounds. Not proven is not the same as "
            "robust: see the bounds below.",
            (f"max by (model) (robustness_loss_proven{{{MODEL}}} {current})", "{{model}}"),
            steps=[(None, GOOD), (1, BAD)],
            words={0: "not proven", 1: "PROVEN"},
        ),
        fact(
            "Verdict of the gate",
            "What the gate said of the version that answers. Anything but passed pages.",
            (
                f"max by (model, version, state) (robustness_gate_state{{{MODEL}}} {current}) == 1",
                "{{version}}: {{state}}",
            ),
            names=True,
        )
        .override_by_regexp("/: passed$/", _colour(GOOD))
        .override_by_regexp("/: (failed|inconclusive|suspect|missing|invalid|expired)$/", _colour(BAD)),
        fact(
            "Integrity",
            "Whether the endpoint answered the gate's own images in the last round as the gate saw. A fact, no "
            "statistic.",
            (f"min by (model) (robustness_target_integrity{{{MODEL}}} {current})", "{{model}}"),
            steps=[(None, BAD), (1, GOOD)],
            words={0: "MISMATCH", 1: "as gated"},
        ),
        fact(
            "Answers",
            "Whether the last round got an answer, straight from Triton and through the gateway.",
            (f"min by (model, via) (robustness_target_up{{{MODEL}}})", "{{via}}"),
            steps=[(None, BAD), (1, GOOD)],
            words={0: "DOWN", 1: "up"},
        ),
        fact(
            "Last success",
            "Age of the last round that succeeded. What all the other panels say is that old. Three intervals are "
            "stale.",
            (f"time() - max by (model, via) (robustness_probe_last_success_timestamp_seconds{{{MODEL}}})", "{{via}}"),
            unit="s",
        ),
        "How robust?",
        course(
            "Upper bound of robust accuracy: worst case of the live attacks",
            "Share of images that are right and that no live attack flips. Attackers with gradients do better, so "
            "the truth lies below: the gate's white-box figure (dashed) is the one that counts. Thin lines: bounds of "
            "the mean over the last W rounds (W: Robustness of a model), and of the mean over some of these. Once even "
            "the latter is below the threshold, the policy is certainly broken.",
            *band(
                "robustness_worst_case_accuracy_mean_upper_ratio",
                "robustness_worst_case_accuracy_ratio",
                "robustness_worst_case_accuracy_mean_lower_ratio",
                "robustness_worst_case_accuracy_stretch_upper_ratio",
            ),
            (f"max by (version) (robustness_gate_accuracy_ratio{{{VERSION}}})", "gate, white box {{version}}"),
            (f"max by (version) (robustness_gate_threshold_ratio{{{VERSION}}})", "gate, threshold {{version}}"),
        ),
        course(
            "Accuracy on unchanged images",
            "What is right without any attack in recent rounds, beside bounds of its mean over the last W rounds, "
            "which hold however often one looks; dashed: the gate's figure and the policy's threshold.",
            *band(
                "robustness_clean_accuracy_mean_upper_ratio",
                "robustness_clean_accuracy_ratio",
                "robustness_clean_accuracy_mean_lower_ratio",
                "robustness_clean_accuracy_stretch_upper_ratio",
            ),
            (f"max by (version) (robustness_gate_clean_accuracy_ratio{{{VERSION}}})", "gate {{version}}"),
            (f"max by (version) (robustness_gate_clean_threshold_ratio{{{VERSION}}})", "gate, threshold {{version}}"),
        ),
        "Users",
        course(
            "Requests",
            "Classifications of users by outcome, the sidecar's left out. Refused is the asker's fault, failed is "
            "ours.",
            ("sum by (outcome) (rate(gateway_request_duration_seconds_count[$__rate_interval]))", "{{outcome}}"),
            unit="reqps",
            width=8,
            stacked=True,
        ),
        course(
            "Time to an answer",
            "From a request that is whole to its answer, at the gateway.",
            (quantile(0.5, "gateway_request_duration_seconds_bucket", "", 'outcome="ok"'), "median"),
            (quantile(0.99, "gateway_request_duration_seconds_bucket", "", 'outcome="ok"'), "99 %"),
            unit="s",
            width=8,
        ),
        course(
            "Images of users and of the sidecar",
            "How much of the load is the sidecar's. Its budget bounds it.",
            ("sum(rate(gateway_images_total[$__rate_interval]))", "users"),
            (rate("robustness_probe_images_total"), "sidecar, via {{via}}"),
            unit="cps",
            width=8,
        ),
        version="robustness_clean_samples_total",
    )


def _colour(name: str) -> list[models.DynamicConfigValue]:
    return [models.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": name})]


def model() -> models.Dashboard:
    """What each attack achieves, beside what the gate recorded."""
    live, gate = "max by (attack, version)", "max by (version)"
    return board(
        "dfmcl-robustness-model",
        "Robustness of a model",
        "Each attack, live and at the gate.",
        "Live and at the gate",
        course(
            "Accuracy under each attack: upper bounds of robust accuracy",
            "The last 20 rounds of each attack. Dashed: the same attack with the same surrogates at the gate, where "
            "recorded. Each alone is an upper bound of robust accuracy.",
            (f"{live} (robustness_robust_accuracy_ratio{{{VERSION}}})", "{{attack}} {{version}}"),
            (f"{live} (robustness_gate_transfer_accuracy_ratio{{{VERSION}}})", "gate {{attack}} {{version}}"),
        ),
        course(
            "Bounds under each attack",
            "Between upper and lower lies the mean accuracy over the last W rounds (beside); below the third lies the "
            "mean over some of these. They err once in 100 months, all together. Dashed: the lower bound of the gate. "
            "Once the third is below it, a loss is proven, reason transfer.",
            (
                f"{live} (robustness_robust_accuracy_mean_upper_ratio{{{VERSION}}})",
                "{{attack}} {{version}} mean, upper",
            ),
            (
                f"{live} (robustness_robust_accuracy_mean_lower_ratio{{{VERSION}}})",
                "{{attack}} {{version}} mean, lower",
            ),
            (
                f"{live} (robustness_robust_accuracy_stretch_upper_ratio{{{VERSION}}})",
                "{{attack}} {{version}} some rounds, upper",
            ),
            (
                f"{live} (robustness_gate_transfer_accuracy_lower_ratio{{{VERSION}}})",
                "gate {{attack}} {{version}} lower",
            ),
        ),
        course(
            "Rounds that the bounds are about",
            "W: the longest window of rounds that ends now and shows no change, 8,192 at most. It falls after a drop "
            "or a rise, and grows while nothing changes.",
            (f"{gate} (robustness_worst_case_accuracy_mean_rounds{{{VERSION}}})", "worst case {{version}}"),
            (f"{gate} (robustness_clean_accuracy_mean_rounds{{{VERSION}}})", "unchanged {{version}}"),
            (f"{live} (robustness_robust_accuracy_mean_rounds{{{VERSION}}})", "{{attack}} {{version}}"),
            unit="none",
        ),
        course(
            "Six hours of each attack, and what the gate leads to expect",
            "What the ticket RobustnessDegraded looks at: live accuracy over six hours; dashed: the gate's lower "
            "bound for the attack or, where it recorded none, the threshold.",
            (
                f"{live} (model_version_attack:robustness_attack_correct:ratio_increase6h{{{VERSION}}})",
                "{{attack}} {{version}}",
            ),
            (
                f"{live} (model_version_attack:robustness_gate_expected:ratio{{{VERSION}}})",
                "gate {{attack}} {{version}}",
            ),
        ),
        course(
            "Success of each attack",
            "Share of the images that are right without attack and wrong with it, over the last 20 rounds.",
            (f"{live} (robustness_attack_success_ratio{{{VERSION}}})", "{{attack}} {{version}}"),
        ),
        "Figures of now",
        bars(
            "Attested figures, and live ones",
            "The gate attacks with gradients, the sidecar without: the live figure under attack is larger by nature. "
            "On unchanged images both should agree.",
            (f"{gate} (robustness_gate_accuracy_ratio{{{VERSION}}})", "gate, robust, white box {{version}}"),
            (f"{gate} (robustness_worst_case_accuracy_ratio{{{VERSION}}})", "live, worst case of transfer {{version}}"),
            (f"{gate} (robustness_gate_clean_accuracy_ratio{{{VERSION}}})", "gate, unchanged {{version}}"),
            (f"{gate} (robustness_clean_accuracy_ratio{{{VERSION}}})", "live, unchanged {{version}}"),
        ),
        bars(
            "Bounds of the attested figures",
            "Of the gate's own run: what it asserts is the lower bound.",
            (f"{gate} (robustness_gate_accuracy_lower_ratio{{{VERSION}}})", "gate, robust, lower {{version}}"),
            (f"{gate} (robustness_gate_accuracy_upper_ratio{{{VERSION}}})", "gate, robust, upper {{version}}"),
            (f"{gate} (robustness_gate_clean_accuracy_lower_ratio{{{VERSION}}})", "gate, unchanged, lower {{version}}"),
            (f"{gate} (robustness_gate_clean_accuracy_upper_ratio{{{VERSION}}})", "gate, unchanged, upper {{version}}"),
            (
                f"max by (attack, version) (robustness_gate_transfer_accuracy_upper_ratio{{{VERSION}}})",
                "gate, {{attack}}, upper",
            ),
        ),
        "Is it the artefact that was gated?",
        course(
            "Replay: largest difference to the gate's logits",
            "In units of the tolerance: above 1 is a mismatch, and a page.",
            (f"max by (version) (robustness_replay_difference_ratio{{{VERSION}}})", "{{version}}"),
            unit="none",
        ),
        course(
            "Replayed images",
            "Images of the gate that were sent again, and how many of them were answered otherwise.",
            (rate("robustness_replay_samples_total", VERSION, "version"), "replayed {{version}}"),
            (rate("robustness_replay_mismatches_total", VERSION, "version"), "otherwise {{version}}"),
            unit="cps",
        ),
        fact(
            "Signature",
            "Whether a signature of a trusted key holds now.",
            (f"min by (version) (robustness_gate_verified{{{VERSION}}})", "{{version}}"),
            steps=[(None, BAD), (1, GOOD)],
            words={0: "does not hold", 1: "holds"},
        ),
        fact(
            "Verdict expires in",
            "After that the version counts as ungated.",
            (f"min by (version) (robustness_gate_expires_timestamp_seconds{{{VERSION}}}) - time()", "{{version}}"),
            steps=[(None, BAD), (0, NOTICE), (7 * 86400, GOOD)],
            unit="s",
        ),
        fact(
            "Age of the verdict",
            "Since the gate ran.",
            (f"time() - max by (version) (robustness_gate_evaluated_timestamp_seconds{{{VERSION}}})", "{{version}}"),
            unit="s",
        ),
        fact(
            "Loss proven, by reason",
            "Which of the four proofs holds: an answer that is not the gate's, the threshold, an attack's own "
            "record, or accuracy without attack.",
            (f"max by (reason) (robustness_loss_proven{{{VERSION}}})", "{{reason}}"),
            steps=[(None, GOOD), (1, BAD)],
            words={0: "no", 1: "PROVEN"},
            width=12,
        ),
        rows("Served artefact", "What was promoted, by digest.", f"robustness_target_info{{{VERSION}}}"),
        rows("Attacks", "What is behind the short names.", "robustness_attack_info"),
        "What the figures rest on",
        course(
            "Images an hour",
            "Unchanged and under each attack. Bounds narrow with their root.",
            (f"3600 * {rate('robustness_clean_samples_total', VERSION, 'version')}", "unchanged {{version}}"),
            (f"3600 * {rate('robustness_attack_samples_total', VERSION, 'attack, version')}", "{{attack}} {{version}}"),
            unit="none",
        ),
        course(
            "Success of each attack, over the panel's interval",
            "The counters' own ratio: it has no memory of 20 rounds, and more noise.",
            (
                f"{rate('robustness_attack_successes_total', VERSION, 'attack, version')} / "
                f"{rate('robustness_attack_attempts_total', VERSION, 'attack, version')}",
                "{{attack}} {{version}}",
            ),
        ),
        course(
            "Queries an image",
            "Of the attacks that only ask, through the gateway, as an outsider would.",
            (
                f"{rate('robustness_attack_queries_total', VERSION, 'attack, version')} / "
                f"on (attack, version) {rate('robustness_attack_attempts_total', VERSION, 'attack, version')}",
                "{{attack}} {{version}}",
            ),
            unit="none",
            width=24,
        ),
        version="robustness_clean_samples_total",
    )


def health() -> models.Dashboard:
    """Can what the others show be relied on?"""
    return board(
        "dfmcl-probe-health",
        "Probe health",
        "Whether the sidecar and the gateway's detector do their work.",
        "Rounds",
        course(
            "Rounds",
            "Begun, straight to Triton and through the gateway.",
            (f"3600 * {rate('robustness_probe_rounds_total')}", "{{via}}"),
            (f"3600 / max by (model, via) (robustness_probe_interval_seconds{{{MODEL}}})", "planned, {{via}}"),
            unit="none",
            width=8,
        ),
        course(
            "Failures an hour, by reason",
            "A round that fails counts for nothing. version_changed is a promotion in its middle, and harmless.",
            (f"3600 * {rate('robustness_probe_round_failures_total', MODEL, 'via, reason')}", "{{via}}: {{reason}}"),
            unit="none",
            width=8,
            stacked=True,
        ),
        course(
            "Skips an hour, by reason",
            "Rounds that were due: the budget was spent, users came first, or the pause file was there.",
            (f"3600 * {rate('robustness_probe_rounds_skipped_total', MODEL, 'via, reason')}", "{{via}}: {{reason}}"),
            unit="none",
            width=8,
            stacked=True,
        ),
        fact(
            "Paused",
            "The kill switch: nothing is sent while the pause file is there.",
            (f"max by (model) (robustness_probe_paused{{{MODEL}}})", "{{model}}"),
            steps=[(None, GOOD), (1, NOTICE)],
            words={0: "no", 1: "PAUSED"},
        ),
        fact(
            "Prepared rounds",
            "Crafted ahead and ready to send: crafting does not delay them.",
            (f"min by (model) (robustness_probe_prepared_rounds{{{MODEL}}})", "{{model}}"),
        ),
        fact(
            "Low priority",
            "Whether the server lets users overtake the sidecar's requests. If not, the budget alone keeps them small.",
            (f"min by (model) (robustness_probe_low_priority{{{MODEL}}})", "{{model}}"),
            words={0: "no", 1: "yes"},
        ),
        fact(
            "Not on record",
            "Rounds since the start that could not be written to disk.",
            (f"sum by (model) (robustness_probe_record_failures_total{{{MODEL}}})", "{{model}}"),
            steps=[(None, GOOD), (1, NOTICE)],
        ),
        fact(
            "Calls for help",
            "What the sidecar asked for after a proven loss, since its start.",
            (f"sum by (action, outcome) (robustness_mitigations_total{{{MODEL}}})", "{{action}} {{outcome}}"),
        ),
        fact(
            "Last attempt",
            "Age of the last round that was begun.",
            (f"time() - max by (model, via) (robustness_probe_last_attempt_timestamp_seconds{{{MODEL}}})", "{{via}}"),
            unit="s",
        ),
        "Cost",
        course(
            "Budget",
            "Images in the current window, and how many may be sent in it.",
            (f"max by (model) (robustness_probe_query_budget_used{{{MODEL}}})", "used"),
            (f"max by (model) (robustness_probe_query_budget{{{MODEL}}})", "budget"),
            unit="none",
            width=8,
        ),
        course(
            "Length of a round",
            "From its first request to its last answer.",
            (quantile(0.5, "robustness_probe_round_duration_seconds_bucket", "via"), "median, {{via}}"),
            (quantile(0.9, "robustness_probe_round_duration_seconds_bucket", "via"), "90 %, {{via}}"),
            (f"max by (via) (robustness_probe_last_round_duration_seconds{{{MODEL}}})", "last, {{via}}"),
            unit="s",
            width=8,
        ),
        course(
            "Length of a request",
            "As the sidecar sees it. When it is much longer than usual, rounds are broken off or give way.",
            (quantile(0.5, "robustness_probe_query_duration_seconds_bucket", "via"), "median, {{via}}"),
            (quantile(0.99, "robustness_probe_query_duration_seconds_bucket", "via"), "99 %, {{via}}"),
            unit="s",
            width=8,
        ),
        course(
            "Requests",
            "Sent by the sidecar.",
            (rate("robustness_probe_queries_total"), "{{via}}"),
            unit="reqps",
        ),
        course(
            "Requests that failed, by reason",
            "Nothing is asked twice within a round.",
            (rate("robustness_probe_query_failures_total", MODEL, "via, reason"), "{{via}}: {{reason}}"),
            unit="reqps",
            stacked=True,
        ),
        fact(
            "Window of the budget",
            "How long it takes until what was spent is given back.",
            (f"max by (model) (robustness_probe_query_budget_window_seconds{{{MODEL}}})", "{{model}}"),
            unit="s",
            width=6,
        ),
        rows("Sidecar", "Which build tells all this.", "robustness_build_info", width=18),
        "The gateway's detector of attacks by queries",
        fact(
            "Suspected campaigns",
            "Keys that ask about many images that hardly differ. The gateway's log names them.",
            ("sum by (detector) (gateway_detection_campaigns_active)", "{{detector}}"),
            steps=[(None, GOOD), (1, NOTICE)],
            width=6,
        ),
        course(
            "Images examined, and not",
            "Users' and the canary's. Dropped: the queue was full; failed: a bug. Answers are not affected.",
            ("sum(rate(gateway_detection_images_total[$__rate_interval]))", "users"),
            ("sum(rate(gateway_detection_canary_images_total[$__rate_interval]))", "canary"),
            ("sum(rate(gateway_detection_dropped_total[$__rate_interval]))", "dropped"),
            ("sum(rate(gateway_detection_failures_total[$__rate_interval]))", "failed"),
            unit="cps",
            width=9,
        ),
        course(
            "Time to examine an image",
            "In a thread of its own, after the answer.",
            (quantile(0.5, "gateway_detection_seconds_bucket", "", ""), "median"),
            (quantile(0.99, "gateway_detection_seconds_bucket", "", ""), "99 %"),
            unit="s",
            width=9,
        ),
        course(
            "Share of near-duplicates among users' images",
            "By detector. What is usual for your clients; a campaign stands out from it.",
            (
                "sum by (detector) (rate(gateway_detection_matches_total[$__rate_interval])) / on () group_left () "
                "sum(rate(gateway_detection_images_total[$__rate_interval]))",
                "{{detector}}",
            ),
        ),
        course(
            "Share of the canary's images that are recognised",
            "attack: the sidecar's own attacks by queries; most should be recognised. benign: its harmless images; "
            "none should be.",
            (
                "sum by (probe, detector) (rate(gateway_detection_canary_matches_total[$__rate_interval])) "
                "/ on (probe) group_left () "
                "(sum by (probe) (rate(gateway_detection_canary_images_total[$__rate_interval])) "
                "- sum by (probe) (rate(gateway_detection_canary_repeats_total[$__rate_interval])))",
                "{{probe}}: {{detector}}",
            ),
        ),
    )


BOARDS = {"robustness-overview": overview, "robustness-model": model, "probe-health": health}


def main(folder: Path) -> None:
    """Write them all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in BOARDS.items():
        text = JSONEncoder(sort_keys=True, indent=2).encode(make())
        (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("dashboards"))
