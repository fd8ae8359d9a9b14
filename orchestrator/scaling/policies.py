"""The policies there are, by the name that a decision log calls them. A new policy is one line here.

A policy is a frozen dataclass: its fields are its parameters, and all of them survive JSON (`parameters` has types for those
that JSON has no shape for).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from orchestrator.core import ScalingPolicy
from orchestrator.scaling.algorithm1 import Algorithm1
from orchestrator.scaling.controller import Lyapunov, MeanDelay, NoLyapunov
from orchestrator.scaling.hpa import Hpa, Keda
from orchestrator.scaling.inferline import InferLine
from orchestrator.scaling.kpa import Kpa
from orchestrator.scaling.manual import Manual
from orchestrator.scaling.oracle import Oracle
from orchestrator.scaling.ray import Ray
from orchestrator.scaling.site import Site
from orchestrator.scaling.square_root import SquareRoot, Static

POLICIES: Mapping[str, type[ScalingPolicy[Any]]] = {
    "manual": Manual,
    "static": Static,
    "hpa": Hpa,
    "keda": Keda,
    "kpa": Kpa,
    "ray": Ray,
    "inferline": InferLine,
    "algorithm1": Algorithm1,
    "oracle": Oracle,
    "square_root": SquareRoot,
    "lyapunov": Lyapunov,
    "no_lyapunov": NoLyapunov,
    "mean_delay": MeanDelay,
}


def make(name: str, site: Site, **options: Any) -> ScalingPolicy[Any]:
    """The policy of that name for a site.

    Args:
        name: one of `POLICIES`.
        site: what there is to scale.
        options: parameters of the policy; those that are not given are its defaults.

    Raises:
        ValueError: there is no such policy, or it has no such parameter, or not with such a value.
    """
    if name not in POLICIES:
        raise ValueError(f"there is no policy {name!r}; there are {', '.join(POLICIES)}")
    kind: Any = POLICIES[name]
    parameters = {field.name for field in dataclasses.fields(kind)}
    for key in options:
        if key not in parameters - {"site"}:
            free = ", ".join(field.name for field in dataclasses.fields(kind) if field.name != "site") or "none"
            raise ValueError(f"policy {name} has no parameter {key!r}; its parameters are: {free}")
    try:
        policy: ScalingPolicy[Any] = TypeAdapter(kind).validate_python({"site": site, **options})
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"parameter {'.'.join(map(str, first['loc']))} of policy {name}: {first['msg']}") from None
    return policy


def describe(policy: ScalingPolicy[Any]) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a policy, as JSON values.

    Raises:
        KeyError: it is not one of `POLICIES`.
    """
    names = {kind: name for name, kind in POLICIES.items()}
    parameters: dict[str, Any] = TypeAdapter(type(policy)).dump_python(policy, mode="json")
    return names[type(policy)], parameters


def build(name: str, parameters: Mapping[str, Any]) -> ScalingPolicy[Any]:
    """The policy that `describe` described.

    Raises:
        ValueError: there is no such policy, or it has other parameters.
    """
    if name not in POLICIES:
        raise ValueError(f"there is no policy {name!r} in this version; it has {', '.join(POLICIES)}")
    try:
        policy: ScalingPolicy[Any] = TypeAdapter(POLICIES[name]).validate_python(parameters)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"parameter {'.'.join(map(str, first['loc']))} of policy {name}: {first['msg']}") from None
    if describe(policy)[1] != parameters:
        raise ValueError(f"policy {name} of this version has other parameters than the log's")
    return policy
