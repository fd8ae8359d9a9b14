from __future__ import annotations

from orchestrator import marked_yaml


def test_every_key_and_item_knows_its_line() -> None:
    marked = marked_yaml.read("a:\n  b: 1\n  c:\n    - x\n    - {d: 2}\n")
    assert marked.data == {"a": {"b": 1, "c": ["x", {"d": 2}]}}
    assert [marked.line(path) for path in (("a",), ("a", "b"), ("a", "c", 1), ("a", "c", 1, "d"))] == [1, 2, 5, 5]


def test_a_path_that_is_not_there_has_the_line_of_what_is_around_it() -> None:
    assert marked_yaml.read("a:\n  b: 1\n").line(("a", "missing", "deeper")) == 1


def test_a_key_written_twice_is_a_problem_and_the_first_one_counts() -> None:
    marked = marked_yaml.read("a: 1\nb: 2\na: 3\n")
    assert marked.data == {"a": 1, "b": 2}
    assert [(p.path, p.line, p.message) for p in marked.problems] == [(("a",), 3, "written twice; the first is on line 1")]


def test_a_syntax_error_is_a_problem_with_its_line() -> None:
    (problem,) = marked_yaml.read("a: 1\nb: [1, 2\n").problems
    assert (problem.line, problem.message) == (3, "not valid YAML: expected ',' or ']', but got '<stream end>'")


def test_dates_stay_what_was_written() -> None:
    assert marked_yaml.read("a: 2024-01-01\n").data == {"a": "2024-01-01"}


def test_an_anchor_that_refers_to_itself_does_not_hang() -> None:
    marked = marked_yaml.read("a: &x\n  b: *x\n")
    assert [p.message for p in marked.problems] == ["an anchor that contains itself"]
