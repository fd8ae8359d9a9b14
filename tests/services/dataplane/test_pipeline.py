"""The cut of a pipeline into segments, first on pipelines with a sentence each, then on random DAGs against the contract."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from services.dataplane.pipeline import REQUEST, Pipeline, Segment, Step, name_of, segments, step_of, topological


def pipeline(steps: dict[str, dict[str, str]], outputs: dict[str, str]) -> Pipeline:
    made = tuple(Step(id=name, service=f"{name}-svc", inputs=inputs) for name, inputs in steps.items())
    return Pipeline(name="p", deadline_s=0.2, epsilon=0.01, steps=made, outputs=outputs)


def cut(steps: dict[str, dict[str, str]], outputs: dict[str, str]) -> list[list[str]]:
    return [[step.id for step in segment.steps] for segment in segments(pipeline(steps, outputs))]


EMBED = pipeline(
    {
        "tokenise": {"text": "request.text"},
        "encode": {"input_ids": "tokenise.input_ids", "attention_mask": "tokenise.attention_mask"},
        "pool": {"last_hidden_state": "encode.last_hidden_state", "attention_mask": "tokenise.attention_mask"},
    },
    {"embedding": "pool.embedding", "token_count": "tokenise.token_count"},
)

CLASSIFY = pipeline(
    {
        "tokenise": {"text": "request.text"},
        "encode": {"input_ids": "tokenise.input_ids", "attention_mask": "tokenise.attention_mask"},
        "pool": {"last_hidden_state": "encode.last_hidden_state", "attention_mask": "tokenise.attention_mask"},
        "tokenise-labels": {"text": "request.labels"},
        "encode-labels": {"input_ids": "tokenise-labels.input_ids", "attention_mask": "tokenise-labels.attention_mask"},
        "pool-labels": {
            "last_hidden_state": "encode-labels.last_hidden_state",
            "attention_mask": "tokenise-labels.attention_mask",
        },
        "classify": {
            "embedding": "pool.embedding",
            "label_embeddings": "pool-labels.embedding",
            "labels": "request.labels",
        },
    },
    {"label": "classify.label", "scores": "classify.scores"},
)


def test_a_chain_whose_last_step_also_takes_from_the_first_is_one_segment() -> None:
    (segment,) = segments(EMBED)
    assert [step.id for step in segment.steps] == ["tokenise", "encode", "pool"]
    assert segment.sends == ("request.text",)
    assert set(segment.returns) == {"pool.embedding", "tokenise.token_count"}
    assert segment.parents == frozenset()


def test_each_hop_of_the_chain_carries_what_is_still_needed_and_no_more() -> None:
    (segment,) = segments(EMBED)
    assert set(segment.keeps[0]) == {"tokenise.input_ids", "tokenise.attention_mask", "tokenise.token_count"}
    assert set(segment.keeps[1]) == {"encode.last_hidden_state", "tokenise.attention_mask", "tokenise.token_count"}
    assert set(segment.keeps[2]) == {"pool.embedding", "tokenise.token_count"}


def test_two_branches_that_meet_are_three_segments() -> None:
    text, labels, meeting = segments(CLASSIFY)
    assert [step.id for step in text.steps] == ["tokenise", "encode", "pool"]
    assert [step.id for step in labels.steps] == ["tokenise-labels", "encode-labels", "pool-labels"]
    assert [step.id for step in meeting.steps] == ["classify"]
    assert (text.parents, labels.parents, meeting.parents) == (frozenset(), frozenset(), frozenset({0, 1}))
    assert (text.sends, labels.sends) == (("request.text",), ("request.labels",))
    assert (text.returns, labels.returns) == (("pool.embedding",), ("pool-labels.embedding",))
    assert set(meeting.sends) == {"pool.embedding", "pool-labels.embedding", "request.labels"}
    assert set(meeting.returns) == {"classify.label", "classify.scores"}


@pytest.mark.parametrize(
    ("sentence", "steps", "expected"),
    [
        ("one step is one segment", {"a": {"x": "request.x"}}, [["a"]]),
        (
            "two steps that share only the request run at once",
            {"a": {"x": "request.x"}, "b": {"x": "request.x"}},
            [["a"], ["b"]],
        ),
        (
            "a chain may take from the request at every step",
            {"a": {"x": "request.x"}, "b": {"x": "a.y", "z": "request.z"}},
            [["a", "b"]],
        ),
        (
            "at a fork the chain ends, since one branch must not wait for the other",
            {"a": {"x": "request.x"}, "b": {"x": "a.y"}, "c": {"x": "a.y"}},
            [["a"], ["b"], ["c"]],
        ),
        (
            "a diamond is a fork and a join",
            {"a": {"x": "request.x"}, "b": {"x": "a.y"}, "c": {"x": "a.y"}, "d": {"x": "b.y", "z": "c.y"}},
            [["a"], ["b"], ["c"], ["d"]],
        ),
        (
            "a step that takes from two of the chain, and nobody else does, stays in it",
            {"a": {"x": "request.x"}, "b": {"x": "a.y"}, "c": {"x": "b.y", "z": "a.y"}, "d": {"x": "c.y", "z": "a.y"}},
            [["a", "b", "c", "d"]],
        ),
        (
            "who takes from the chain and from another branch waits at the gateway, and keeps nobody in the chain waiting",
            {"a": {"x": "request.x"}, "b": {"x": "a.y"}, "o": {"x": "request.x"}, "j": {"x": "b.y", "z": "o.y"}},
            [["a", "b"], ["o"], ["j"]],
        ),
        (
            "a join that needs the chain's first step does not hold the chain's second, which it needs as well",
            {"a": {"x": "request.x"}, "o": {"x": "request.x"}, "b": {"x": "a.y"}, "j": {"x": "a.y", "w": "b.y", "z": "o.y"}},
            [["a", "b"], ["o"], ["j"]],
        ),
        (
            "a join that needs only the first step would be kept waiting by the second",
            {"a": {"x": "request.x"}, "o": {"x": "request.x"}, "b": {"x": "a.y"}, "j": {"x": "a.y", "z": "o.y"}},
            [["a"], ["o"], ["b"], ["j"]],
        ),
        (
            "the order in the file does not matter",
            {"c": {"x": "b.y"}, "b": {"x": "a.y"}, "a": {"x": "request.x"}},
            [["a", "b", "c"]],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_cuts(sentence: str, steps: dict[str, dict[str, str]], expected: list[list[str]]) -> None:
    del sentence
    last = list(steps)[-1]
    assert cut(steps, {"out": f"{last}.y"}) == expected


def test_an_output_in_the_middle_of_a_chain_rides_along_to_its_end() -> None:
    (segment,) = segments(pipeline({"a": {"x": "request.x"}, "b": {"x": "a.y"}}, {"first": "a.y", "second": "b.y"}))
    assert set(segment.returns) == {"a.y", "b.y"}
    assert set(segment.keeps[0]) == {"a.y"}


def test_an_output_may_be_a_tensor_of_the_request() -> None:
    made = pipeline({"a": {"x": "request.x"}}, {"y": "a.y", "back": "request.q"})
    assert made.request_names == ("x", "q")
    (segment,) = segments(made)
    assert segment.returns == ("a.y",)


def test_request_names_are_in_order_of_first_use_without_repeats() -> None:
    assert CLASSIFY.request_names == ("text", "labels")
    assert EMBED.request_names == ("text",)


def test_references_fall_into_step_and_name() -> None:
    assert (step_of("encode.last_hidden_state"), name_of("encode.last_hidden_state")) == ("encode", "last_hidden_state")


@pytest.mark.parametrize(
    ("sentence", "steps", "outputs", "because"),
    [
        ("a cycle of two", {"a": {"x": "b.y"}, "b": {"x": "a.y"}}, {"o": "a.y"}, "cycle: a, b"),
        ("a step that waits for itself", {"a": {"x": "a.y"}}, {"o": "a.y"}, "cycle: a"),
        (
            "only those in or behind the cycle are named",
            {"s": {"x": "request.x"}, "a": {"x": "b.y", "z": "s.y"}, "b": {"x": "a.y"}},
            {"o": "a.y"},
            "cycle: a, b",
        ),
        ("an unknown step", {"a": {"x": "b.y"}}, {"o": "a.y"}, "'b.y'"),
        ("an unknown step in the outputs", {"a": {"x": "request.x"}}, {"o": "b.y"}, "'b.y'"),
        ("a reference without a step", {"a": {"x": "text"}}, {"o": "a.y"}, "'text'"),
        ("a reference without a name", {"a": {"x": "request."}}, {"o": "a.y"}, "'request.'"),
        ("a reference with two dots", {"a": {"x": "request.x.y"}}, {"o": "a.y"}, "'request.x.y'"),
        ("a step called request", {"request": {"x": "request.x"}}, {"o": "request.y"}, "unique"),
        ("no steps", {}, {"o": "request.x"}, "at least 1"),
        ("no outputs", {"a": {"x": "request.x"}}, {}, "at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pipelines_that_are_refused(
    sentence: str, steps: dict[str, dict[str, str]], outputs: dict[str, str], because: str
) -> None:
    del sentence
    with pytest.raises(ValidationError, match=because):
        pipeline(steps, outputs)


def test_two_steps_of_one_id_are_refused() -> None:
    step = Step(id="a", service="s", inputs={"x": "request.x"})
    with pytest.raises(ValidationError, match="unique"):
        Pipeline(name="p", deadline_s=1, epsilon=0.1, steps=(step, step), outputs={"o": "a.y"})


@pytest.mark.parametrize("field", [{"deadline_s": 0}, {"deadline_s": -1}, {"epsilon": 0}, {"epsilon": 1}, {"dead_line_s": 1}])
def test_fields_out_of_range_or_misspelt_are_refused(field: dict[str, float]) -> None:
    good = EMBED.model_dump()
    Pipeline.model_validate(good)
    with pytest.raises(ValidationError, match=next(iter(field))):
        Pipeline.model_validate(good | field)


# --- random DAGs ----------------------------------------------------------------------------------------------------------


@st.composite
def dags(draw: st.DrawFn) -> Pipeline:
    count = draw(st.integers(1, 9))
    ids = [f"s{i}" for i in range(count)]
    steps: dict[str, dict[str, str]] = {}
    for i, name in enumerate(ids):
        sources = [REQUEST, *ids[:i]]
        refs = draw(st.lists(st.tuples(st.sampled_from(sources), st.sampled_from("pq")), min_size=1, max_size=3))
        steps[name] = {f"in{j}": f"{source}.{tensor}" for j, (source, tensor) in enumerate(refs)}
    order = draw(st.permutations(ids))
    outputs = draw(st.lists(st.sampled_from([*ids, REQUEST]), min_size=1, max_size=3))
    return pipeline({name: steps[name] for name in order}, {f"out{j}": f"{name}.p" for j, name in enumerate(outputs)})


@settings(max_examples=80, deadline=None)
@given(dags())
def test_every_step_is_in_exactly_one_segment_in_an_order_that_can_run(made: Pipeline) -> None:
    done: set[str] = set()
    for index, segment in enumerate(segments(made)):
        assert all(parent < index for parent in segment.parents)
        for step in segment.steps:
            assert step.parents <= done
            assert step.id not in done
            done.add(step.id)
    assert done == {step.id for step in made.steps}


@settings(max_examples=80, deadline=None)
@given(dags())
def test_walking_the_segments_by_what_they_send_carry_and_return_gives_every_hop_its_tensors(made: Pipeline) -> None:
    cut_up = segments(made)
    bag = {f"{REQUEST}.{name}" for name in made.request_names}
    answered: list[set[str]] = []
    for segment in cut_up:
        # What the gateway can have by then: the request and what the parents, and theirs, have returned.
        known = {ref for ref in bag if step_of(ref) == REQUEST} | _returned(segment, cut_up, answered)
        assert set(segment.sends) <= known
        answered.append(_walk(segment))
        bag |= answered[-1]
    assert set(made.outputs.values()) <= bag


def _returned(segment: Segment, cut_up: tuple[Segment, ...], answered: list[set[str]]) -> set[str]:
    found: set[str] = set()
    left = set(segment.parents)
    while left:
        parent = left.pop()
        found |= answered[parent]
        left |= cut_up[parent].parents
    return found


def _walk(segment: Segment) -> set[str]:
    """What the last stage answers with, where every stage passes on only what it was told to keep."""
    with_it = set(segment.sends)
    for index, step in enumerate(segment.steps):
        assert set(step.inputs.values()) <= with_it
        carried = segment.keeps[index]
        assert len(set(carried)) == len(carried)
        assert all(ref in with_it or step_of(ref) == step.id for ref in carried)
        later = {ref for s in segment.steps[index + 1 :] for ref in s.inputs.values()}
        assert set(carried) <= later | set(segment.returns), "carries what nobody needs"
        with_it = set(carried)
    assert with_it == set(segment.returns)
    return with_it


@settings(max_examples=80, deadline=None)
@given(dags())
def test_the_parents_of_a_segment_are_exactly_those_it_takes_from(made: Pipeline) -> None:
    cut_up = segments(made)
    owner = {step.id: index for index, segment in enumerate(cut_up) for step in segment.steps}
    for index, segment in enumerate(cut_up):
        sources = {owner[parent] for step in segment.steps for parent in step.parents}
        assert segment.parents == sources - {index}


@settings(max_examples=80, deadline=None)
@given(dags())
def test_nobody_is_kept_waiting_by_a_chain(made: Pipeline) -> None:
    # Whoever takes a tensor from the middle of a chain, outside of it, also waits for the chain's end.
    by_id = {step.id: step for step in made.steps}

    def needs(step: Step) -> set[str]:
        return set(step.parents).union(*(needs(by_id[parent]) for parent in step.parents))

    for segment in segments(made):
        inside = {step.id for step in segment.steps}
        for step in made.steps:
            if step.id not in inside and step.parents & inside:
                assert segment.steps[-1].id in needs(step)


@settings(max_examples=60, deadline=None)
@given(dags())
def test_topological_order_is_stable(made: Pipeline) -> None:
    order = topological(made.steps)
    assert topological(order) == order
    places = {step.id: i for i, step in enumerate(order)}
    assert all(places[parent] < places[step.id] for step in made.steps for parent in step.parents)
