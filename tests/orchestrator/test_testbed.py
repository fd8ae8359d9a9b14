from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import testbed as testbeds
from orchestrator.core import Target
from orchestrator.errors import TestbedInvalid
from tests.orchestrator.examples import TESTBED, load

SHIPPED = sorted((Path(__file__).parents[2] / "deploy" / "testbeds").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_testbed_we_ship_is_valid(path: Path) -> None:
    assert testbeds.load(path).testbed.workload


def test_quantities_arrive_in_seconds_and_bytes() -> None:
    testbed = load().testbed
    assert testbed.pipelines["embed"].deadline == 0.3
    assert testbed.nodes["edge-1"].memory == 2**30
    assert testbed.links[0].bandwidth == 125e6
    assert testbed.targets()["tokenise"] == Target(1, 1)
    assert testbed.latencies_s() == {("edge-1", "edge-2"): 0.001, ("edge-2", "edge-1"): 0.001}
    assert testbed.flows() == {("tokenise", "encode"), ("encode", "pool")}
    assert testbed.gateway_node == "edge-1"


def test_a_replica_may_use_a_whole_core_where_nothing_is_said() -> None:
    testbed = load(TESTBED.replace("stage: encode, cpus: 0.5", "stage: encode, cpus: 1.5, replicas: 1")
                   .replace("memory: 128MiB, replicas: 2", "memory: 128MiB")
                   .replace(POOL, POOL + ", cpu_limit: 0.25")).testbed  # fmt: skip
    limits = {name: service.cpus_at_most for name, service in testbed.services.items()}
    assert limits == {"tokenise": 1.0, "encode": 1.5, "pool": 0.25}


def test_precisions_have_the_short_names_of_the_command_line_too() -> None:
    testbed = load(
        TESTBED.replace("[float32, int8]", "[fp32, fp16, int8]").replace("stage: encode", "stage: encode, precision: fp16")
    ).testbed
    assert testbed.models["tiny"].precisions == ("float32", "float16", "int8")
    assert testbed.services["encode"].precision == "float16"


def test_a_fused_service_is_a_stage_named_after_its_members() -> None:
    testbed = load(TESTBED.replace("stage: pool,", "stages: [encode, pool],")).testbed
    assert testbed.services["pool"].stage == "encode-pool"
    assert testbed.services["pool"].members == ("encode", "pool")
    assert testbed.services["encode"].members == ("encode",)


POOL = "pool: {model: tiny, stage: pool, cpus: 0.1, memory: 64MiB"
ENCODE_STEP = "{id: encode, service: encode}"
EVERY_MISTAKE = [
    ("edge-1: {cpus: 2,", "edge-1: {cpu: 2,", "3: nodes.edge-1.cpu: unknown field; did you mean cpus?"),
    ("edge-1: {cpus: 2,", "edge-1: {cpus: 2, color: red,",
     "3: nodes.edge-1.color: unknown field; there are cpus, memory, gpus"),
    ("name: small", "name: Small", "1: name: 'Small' must be lower-case letters, digits, - and _, and start with a letter"),
    ("name: small\n", "", "1: name: is missing"),
    ("cpus: 2, memory: 1GiB}\n  edge-2", "cpus: 0, memory: 1GiB}\n  edge-2",
     "3: nodes.edge-1.cpus: 0 is out of range: input should be greater than 0"),
    ("cpus: 2, memory: 1GiB}\n  edge-2", "cpus: many, memory: 1GiB}\n  edge-2",
     "3: nodes.edge-1.cpus: 'many': input should be a valid number, unable to parse string as a number"),
    ("edge-1: {cpus: 2, memory: 1GiB}", "edge-1: {cpus: 2, memory: 1Gb}",
     "3: nodes.edge-1.memory: unknown unit 'Gb' (that is bits); write it like 512MiB or 4GiB"),
    ("latency: 1ms,", "latency: 1ms, latency: 2ms,", "6: links[0].latency: written twice; the first is on line 6"),
    ("latency: 1ms", "latency: 1", "6: links[0].latency: 1 has no unit; write it like 300ms or 1.5s"),
    ("bandwidth: 1Gb/s", "bandwidth: 1Gb",
     "6: links[0].bandwidth: unknown unit 'Gb'; write it like 1Gb/s (bits) or 125MB/s (bytes)"),
    ("[edge-1, edge-2]", "[edge-1, edge-3]", "6: links[0].between: there is no node 'edge-3'; did you mean edge-2?"),
    ("[edge-1, edge-2]", "[edge-1, edge-1]", "6: links[0].between: links 'edge-1' to itself; a node needs no link to itself"),
    ("[edge-1, edge-2], latency: 1ms, bandwidth: 1Gb/s}",
     "[edge-1, edge-2], latency: 1ms, bandwidth: 1Gb/s}\n  - {between: [edge-2, edge-1], latency: 1ms, bandwidth: 1Gb/s}",
     "7: links[1].between: edge-2 and edge-1 are linked already; one link serves both directions"),
    ("[float32, int8]", "[float32, int4]",
     "8: models.tiny.precisions[1]: 'int4' is not one of float32, float16, int8; did you mean int8?"),
    ("{model: tiny, stage: pool", "{model: tinny, stage: pool",
     "12: services.pool.model: there is no model 'tinny'; did you mean tiny?"),
    (POOL, POOL + ", nodes: [edge-9]", "12: services.pool.nodes: there is no node 'edge-9'; did you mean edge-2?"),
    ("source: minilm,", "source: minilm, cut: 0,",
     "8: models.tiny.cut: 0 is out of range: input should be greater than or equal to 1"),
    ("{model: tiny, stage: pool,", "{model: tiny,", "12: services.pool.stage: is missing"),
    ("stage: pool,", "stage: pool, stages: [encode, pool],",
     "12: services.pool.stages: there is also stage: pool; name one stage, or the stages that are fused"),
    ("stage: pool,", "stages: [pool],",
     "12: services.pool.stages: one stage has nothing to be fused with; write stage: pool"),
    ("stage: pool,", "stages: [encode, pool, encode],", "12: services.pool.stages[2]: 'encode' is there already"),
    ("deadline: 300ms", "deadline: 300ms\n    token_deadline: 0s",
     "16: pipelines.embed.token_deadline: '0s' is out of range: input should be greater than 0"),
    (POOL, POOL + ", replicas: 0", "12: services.pool.replicas: 0 is out of range: input should be greater than or equal to 1"),
    (POOL, POOL + ", floor: 2", "12: services.pool.floor: 2 is more than the 1 replicas asked for"),
    (POOL, POOL.replace("0.1", "4"),
     "12: services.pool.cpus: one replica needs 4, but the largest node it may use, edge-1, has 2"),
    (POOL, POOL.replace("64MiB", "4GiB"),
     "12: services.pool.memory: one replica needs 4096 MiB, but the largest node it may use, edge-1, has 1024 MiB"),
    (POOL, POOL + ", gpus: 1", "12: services.pool.gpus: one replica needs 1, but no node it may use has more than 0"),
    (POOL, POOL + ", cpu_limit: 0.05", "12: services.pool.cpu_limit: 0.05 is less than the 0.1 cpus it reserves"),
    ("deadline: 300ms", "deadline: 0ms", "15: pipelines.embed.deadline: '0ms' is out of range: input should be greater than 0"),
    ("epsilon: 0.05", "epsilon: 1.5", "16: pipelines.embed.epsilon: 1.5 is out of range: input should be less than 1"),
    (ENCODE_STEP, "{id: encode, service: encod}",
     "19: pipelines.embed.steps[1].service: there is no service 'encod'; did you mean encode?"),
    (ENCODE_STEP, "{id: tokenise, service: encode}", "19: pipelines.embed.steps[1].id: there is already a step 'tokenise'"),
    (ENCODE_STEP, "{id: request, service: encode}",
     "19: pipelines.embed.steps[1].id: 'request' stands for the request; call the step something else"),
    (ENCODE_STEP, "{id: encode, service: encode, after: pool}",
     "19: pipelines.embed.steps[1].after: no step 'pool' comes before this one"),
    ("request.text", "reqest.text",
     "18: pipelines.embed.steps[0].inputs.text: there is no step 'reqest'; did you mean request?"),
    ("request.text", "text", "18: pipelines.embed.steps[0].inputs.text: 'text' must be request.NAME or STEP.OUTPUT"),
    ("request.text", "pool.embedding",
     "20: pipelines.embed.steps: the steps wait for each other in a cycle: tokenise -> pool -> tokenise"),
    ("pool.embedding}", "pol.embedding}",
     "21: pipelines.embed.outputs.embedding: there is no step 'pol'; did you mean pool?"),
    ("gateway: {port: 0}", "gateway: {port: 0, node: edge-7}",
     "22: gateway.node: there is no node 'edge-7'; did you mean edge-2?"),
    ("gateway: {port: 0}", "gateway: {port: 99999}",
     "22: gateway.port: 99999 is out of range: input should be less than or equal to 65535"),
    ("embed: \"poisson", "embedd: \"poisson", "24: workload.embedd: there is no pipeline 'embedd'; did you mean embed?"),
    ("control: {slot: 100ms, policy: manual}", "control: {slot: 1ms}",
     "23: control.slot: '1ms' is out of range: input should be greater than or equal to 0.05"),
    ("control: {slot: 100ms, policy: manual}", "control: [100ms]",
     "23: control: ['100ms']: input should be a valid dictionary or instance of ControlSection"),
    ("pipelines:\n", "pipelines: [\n", "15: document: not valid YAML: expected ',' or ']', but got ':'"),
]  # fmt: skip


@pytest.mark.parametrize(("good", "bad", "message"), EVERY_MISTAKE, ids=[message for _, _, message in EVERY_MISTAKE])
def test_a_mistake_is_named_with_its_line_field_and_what_was_meant(good: str, bad: str, message: str) -> None:
    text = TESTBED.replace(good, bad, 1)
    if "cycle" in message:
        text = text.replace(
            "{id: pool, service: pool}", "{id: pool, service: pool, inputs: {attention_mask: tokenise.attention_mask}}"
        )
        message = message.replace("20:", "17:")
    with pytest.raises(TestbedInvalid) as caught:
        load(text)
    assert caught.value.problems == (f"small.yaml:{message}",)


def test_all_mistakes_are_listed_in_the_order_of_the_file() -> None:
    text = TESTBED.replace("epsilon: 0.05", "epsilon: 2").replace("cpus: 0.5", "cpus: -1").replace("300ms", "300")
    with pytest.raises(TestbedInvalid) as caught:
        load(text)
    assert [problem.split(": ")[1] for problem in caught.value.problems] == [
        "services.encode.cpus", "pipelines.embed.deadline", "pipelines.embed.epsilon",
    ]  # fmt: skip


def test_services_that_do_not_fit_together_name_what_lacks_and_the_smallest_relaxation() -> None:
    with pytest.raises(TestbedInvalid) as caught:
        load(TESTBED.replace("replicas: 2}", "replicas: 9}"))
    assert caught.value.problems == (
        "small.yaml:9: services: no node has room for replica 9 of 9 of encode (0.5 cpus and 128 MiB): edge-1 lacks 0.5 cpus; "
        "edge-2 lacks 0.5 cpus. The smallest relaxation: give edge-1 0.5 cpus more, or ask for 8",
    )


def test_a_workload_that_is_no_arrival_process_says_how_to_write_one() -> None:
    with pytest.raises(TestbedInvalid, match=r"^small.yaml:24: workload.embed: .*poisson"):
        load(TESTBED.replace("poisson:20", "poison:20"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\xff\xfe", "cannot be read: not UTF-8"),
        (b"", "1: document: must be a mapping with name, nodes, models, services and pipelines"),
        (b"- 1\n", "1: document: must be a mapping with name, nodes, models, services and pipelines"),
    ],
)
def test_a_file_that_is_no_testbed_says_so(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TestbedInvalid) as caught:
        testbeds.load(path)
    assert str(caught.value).endswith(problem)
