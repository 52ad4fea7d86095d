"""Bytes of a tenant in all: of its waiting tapes and contributions, over all its sessions, models and replicas."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import pytest_asyncio

from instruments.replicas import HIDDEN, INPUTS, ROWS, Client, draw, open_on, refusal
from rnn_engine import SGD, TanhNetwork
from service.domain.limits_policy import TenantLimits
from service.domain.tapes import tape_to_bytes
from service.domain.types import (
    DiscardGradients,
    InitialWeights,
    ModelKey,
    ModelSpec,
    NewEpoch,
    OnExists,
    Reduction,
    Selector,
    SessionKey,
    Update,
    Version,
)
from service.settings import Limits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from instruments.replicas import Replica
    from tests.domain.conftest import ReplicaMaker

    Drop = Callable[["Scene"], Awaitable[object]]

USUAL = TenantLimits.from_limits(Limits())


class Policy:
    """The bounds of one tenant, which may change; everyone else has none."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.bounds = USUAL

    def of(self, tenant: str) -> TenantLimits:
        """Return the quotas of a tenant."""
        return self.bounds if tenant == self.tenant else USUAL


class Scene(NamedTuple):
    """Two replicas, and a tenant with two sessions on two models.

    Attributes:
        gradient_bytes: Of a gradient.
        tape_bytes: Of the tape of a chunk.
    """

    replicas: tuple[Replica, Replica]
    policy: Policy
    first: Client
    second: Client
    other: Client
    rng: np.random.Generator
    gradient_bytes: int
    tape_bytes: int

    async def train(self, client: Client) -> None:
        """Send a chunk that keeps its tape."""
        await client.forward(draw(self.rng), train=True)

    async def contribute(self, client: Client) -> None:
        """Leave a contribution."""
        await self.train(client)
        await client.backward(draw(self.rng, size=HIDDEN))


@pytest_asyncio.fixture
async def scene(make_replica: ReplicaMaker, tenant: str, rng: np.random.Generator) -> Scene:
    """The scene; nobody has a bound yet."""
    policy = Policy(tenant)
    replicas = (await make_replica(policy=policy), await make_replica(policy=policy))
    clients = []
    for owner, name in ((tenant, "a"), (tenant, "b"), (f"{tenant}-other", "a")):
        spec = ModelSpec(name, TanhNetwork(INPUTS, HIDDEN), "float32", SGD())
        await replicas[0].models.create(owner, spec, InitialWeights(), request_id="")
        opened = await open_on(replicas[0], owner, name, name)
        clients.append(Client(replicas, owner, name, opened.session.epoch))
    tape = tape_to_bytes(Version(1, bytes(16)), draw(rng), np.zeros((ROWS, HIDDEN), "float32"))
    gradient_bytes = 4 * (INPUTS * HIDDEN + HIDDEN * HIDDEN + HIDDEN)
    first, second, other = clients
    return Scene(replicas, policy, first, second, other, rng, gradient_bytes, len(tape))


@pytest.mark.parametrize(("more", "fits"), [(-1, False), (0, True), (1, True)])
async def test_tapes_of_all_sessions_are_counted_together(
    scene: Scene,
    more: int,
    fits: bool,  # noqa: FBT001
) -> None:
    """Two tapes of two sessions, served by two replicas, need the bytes of two; another tenant is not counted."""
    scene.policy.bounds = replace(USUAL, tape_bytes_per_tenant=2 * scene.tape_bytes + more)
    await scene.train(scene.first)
    await scene.train(scene.other)
    if fits:
        await scene.train(scene.second)
    refused = await refusal(scene.train(scene.second))
    limit = str(2 * scene.tape_bytes + more)
    assert refused.reason == "TAPE_QUOTA"
    assert refused.metadata == {"quota": "tape_bytes_per_tenant", "limit": limit}
    await scene.train(scene.other)


async def test_a_refused_chunk_was_not_applied_and_can_be_sent_in_another_mode(
    scene: Scene,
) -> None:
    """The session stands where it stood: the same number goes to a chunk that keeps no tape."""
    scene.policy.bounds = replace(USUAL, tape_bytes_per_tenant=1)
    await refusal(scene.train(scene.first))
    assert (await scene.first.forward(draw(scene.rng))).chunk_seq == 1


async def test_a_chunk_sent_again_is_answered_at_the_bound(scene: Scene) -> None:
    """A replay needs no room, on the replica that applied it and on the other one."""
    scene.policy.bounds = replace(USUAL, tape_bytes_per_tenant=scene.tape_bytes)
    chunk = scene.first.chunk(draw(scene.rng), train=True)
    for replica, is_replayed in zip(
        (*scene.replicas, scene.replicas[0]), (False, True, True), strict=True
    ):
        done = await replica.recurrence.forward(scene.first.tenant, chunk)
        assert done.replayed is is_replayed


async def backward(scene: Scene) -> None:
    """Send the Backward of the first session's chunk."""
    await scene.first.backward(draw(scene.rng, size=HIDDEN))


async def discard(scene: Scene) -> None:
    """Discard what waits of the first session."""
    client = scene.first
    op = DiscardGradients("a", (Selector("a", client.epoch, (1,)),))
    await scene.replicas[1].waiting.discard(client.tenant, op)


async def reset(scene: Scene) -> None:
    """Begin a new epoch of the first session."""
    client = scene.first
    op = NewEpoch("a", None, client.epoch, None, "", 0)
    await scene.replicas[1].sessions.begin_epoch(client.tenant, op)


async def open_again(scene: Scene) -> None:
    """Open the first session again, from the beginning."""
    client = scene.first
    await open_on(scene.replicas[1], client.tenant, "a", "a", on_exists=OnExists.RESET)


async def close(scene: Scene) -> None:
    """Close the first session."""
    await scene.replicas[1].sessions.close(SessionKey(scene.first.tenant, "a"), 0)


@pytest.mark.parametrize("drop", [backward, discard, reset, open_again, close])
async def test_a_tape_that_waits_no_more_makes_room(scene: Scene, drop: Drop) -> None:
    """Whatever ends its waiting, and on whichever replica: at once there is room for another session's."""
    scene.policy.bounds = replace(USUAL, tape_bytes_per_tenant=scene.tape_bytes)
    await scene.train(scene.first)
    await refusal(scene.train(scene.second))
    await drop(scene)
    await scene.train(scene.second)
    assert (await refusal(scene.train(scene.second))).reason == "TAPE_QUOTA"


@pytest.mark.parametrize(("more", "fits"), [(-1, False), (0, True), (1, True)])
async def test_contributions_to_all_models_are_counted_together(
    scene: Scene,
    more: int,
    fits: bool,  # noqa: FBT001
) -> None:
    """Two gradients of two models need the bytes of two; another tenant is not counted."""
    bound = 2 * scene.gradient_bytes + more
    scene.policy.bounds = replace(USUAL, contribution_bytes_per_tenant=bound)
    await scene.contribute(scene.first)
    await scene.contribute(scene.other)
    if fits:
        await scene.contribute(scene.second)
    refused = await refusal(scene.contribute(scene.second))
    assert refused.reason == "TAPE_QUOTA"
    assert refused.metadata == {"quota": "contribution_bytes_per_tenant", "limit": str(bound)}
    await scene.contribute(scene.other)


async def test_a_backward_sent_again_is_answered_at_the_bound(scene: Scene) -> None:
    """Its gradient is recorded already, and needs no room of its own."""
    scene.policy.bounds = replace(USUAL, contribution_bytes_per_tenant=scene.gradient_bytes)
    await scene.train(scene.first)
    dhs = draw(scene.rng, size=HIDDEN)
    for is_replayed in (False, True, True):
        assert (await scene.first.backward(dhs)).replayed is is_replayed


async def update(scene: Scene) -> None:
    """Make a step from the first session's contribution."""
    await scene.first.update("a", "r")


async def delete(scene: Scene) -> None:
    """Delete the first model."""
    await scene.replicas[1].models.delete(ModelKey(scene.first.tenant, "a"), allow_missing=False)


@pytest.mark.parametrize("drop", [update, discard, delete])
async def test_a_contribution_that_waits_no_more_makes_room(scene: Scene, drop: Drop) -> None:
    """Whatever ends its waiting, and on whichever replica: at once there is room for another model's."""
    scene.policy.bounds = replace(USUAL, contribution_bytes_per_tenant=scene.gradient_bytes)
    await scene.contribute(scene.first)
    await refusal(scene.contribute(scene.second))
    await drop(scene)
    await scene.second.backward(draw(scene.rng, size=HIDDEN))
    assert (await refusal(scene.contribute(scene.second))).reason == "TAPE_QUOTA"


async def test_a_backward_with_its_own_update_needs_room_for_a_moment(scene: Scene) -> None:
    """One after the other, each finds the room that the one before has left."""
    scene.policy.bounds = replace(USUAL, contribution_bytes_per_tenant=scene.gradient_bytes)
    for number in range(3):
        await scene.train(scene.first)
        own = Selector("a", scene.first.epoch, (scene.first.chunk_seq,))
        step = Update("a", (own,), Reduction.SUM, None, 0.0, None, f"r{number}")
        await scene.first.backward(draw(scene.rng, size=HIDDEN), update=step)


async def test_a_bound_that_changes_holds_from_then_on(scene: Scene) -> None:
    """What waited before there was a bound is not counted, and without one everything has room."""
    await scene.train(scene.first)
    scene.policy.bounds = replace(USUAL, tape_bytes_per_tenant=scene.tape_bytes)
    await scene.train(scene.first)
    await refusal(scene.train(scene.first))
    scene.policy.bounds = USUAL
    await scene.train(scene.first)
