"""A simulated world as what there is to scale: what a policy is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping

from orchestrator.core import Target
from orchestrator.scaling import site
from orchestrator.scaling.site import Law, Site
from orchestrator.simulator.world import Stage, World


def site_of(world: World, targets: Mapping[str, Target], slot_s: float, stale_after_s: float = 5.0) -> Site:
    """What a policy may know of a world: capacities, profiles and promises, and nothing of the tasks to come.

    Args:
        world: what is simulated.
        targets: where every service begins; where core services stay.
        slot_s: time between two decisions [s].
        stale_after_s: a signal older than this says nothing [s].
    """
    everywhere = tuple(node.name for node in world.nodes)
    hop_s = site.hop_times(
        (world.gateway_node or everywhere[0],),
        {name: stage.service.nodes or everywhere for name, stage in world.stages.items()},
        world.links,
        {name: stage.input_bytes for name, stage in world.stages.items()},
        world.delays.hop_s,
    )
    return Site(
        services=tuple(world.services.values()),
        nodes=world.nodes,
        targets=targets,
        flows=world.flows,
        latencies_s={pair: link.latency_s for pair, link in world.links.items()},
        stale_after_s=stale_after_s,
        laws={name: law_of(stage) for name, stage in world.stages.items()},
        promises={name: site.promise(pipeline, hop_s) for name, pipeline in world.pipelines.items()},
        prices=world.prices,
        slot_s=slot_s,
    )


def law_of(stage: Stage) -> Law:
    """What a profile of a simulated stage would say."""
    return site.law(
        stage.law,
        float(math.prod(stage.lengths)),
        cv2=stage.noise.cv2,
        max_batch=stage.max_batch,
        slots=stage.slots,
        start_s=stage.start_s,
    )
