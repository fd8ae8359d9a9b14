from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from orchestrator.core import Placement, Replica
from orchestrator.costs import Cost
from orchestrator.metrics import Metrics


def read(metrics: Metrics) -> dict[tuple[str, ...], float]:
    text = metrics.exposition().decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_replicas_are_shown_by_state_and_vanish_when_they_are_gone() -> None:
    metrics = Metrics()
    metrics.show([Replica("p-1", "pool", "a", "ready", 1, 1)], Placement({"pool": {"a": 2}}, {}))
    values = read(metrics)
    assert values["espalier_replicas", "a", "pool", "ready"] == 1
    assert values["espalier_replicas", "a", "pool", "desired"] == 2
    metrics.show([], None)
    assert not any(key[0] == "espalier_replicas" for key in read(metrics))


def test_failures_are_counted_by_place_from_zero_on() -> None:
    metrics = Metrics()
    metrics.show([Replica("p-1", "pool", "a", "starting", 1, 1)], None)
    assert read(metrics)["espalier_replica_failures_total", "a", "pool"] == 0
    for total in (1, 3):
        metrics.failed({("pool", "a"): total})
    assert read(metrics)["espalier_replica_failures_total", "a", "pool"] == 3


def test_standbys_let_out_are_counted_by_what_came_of_it() -> None:
    metrics = Metrics()
    for result in ("ok", "again", "refused", "ok"):
        metrics.let_out("pool", result)
    values = read(metrics)
    assert values["espalier_controller_let_out_total", "ok", "pool"] == 2
    assert values["espalier_controller_let_out_total", "refused", "pool"] == 1


def test_the_telemetry_in_use_and_what_was_promised_are_shown_as_they_are_now() -> None:
    metrics = Metrics()
    for source, pipeline in (("http://a:1", "rank"), ("http://b:1", "embed")):
        metrics.telemetry({source: 0.5}, {"prometheus": 1, "scrape": 0})
        metrics.promises({pipeline: (0.3, 0.05)})
    values = read(metrics)
    assert (values["espalier_controller_sources", "prometheus"], values["espalier_controller_sources", "scrape"]) == (1, 0)
    assert values["espalier_controller_signal_age_seconds", "http://b:1"] == 0.5
    assert (values["espalier_pipeline_deadline_seconds", "embed"], values["espalier_pipeline_epsilon", "embed"]) == (0.3, 0.05)
    assert not any(key[-1] in {"http://a:1", "rank"} for key in values), "what is not there any more disappears"


def test_counters_follow_the_totals_they_are_given() -> None:
    metrics = Metrics()
    for total, cost in ((2, 1.0), (5, 4.0)):
        metrics.runtime_acted({("start", "ok"): total})
        metrics.spent(Cost(replicas=cost))
    values = read(metrics)
    assert values["espalier_controller_actions_total", "start", "ok"] == 5
    assert values["espalier_cost_total", "replicas"] == 4.0
    assert values["espalier_build_info", "", "0.1.0"] == 1
