"""What a scaling policy adds to what the members negotiate. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from chaos_mpi.autoscale.policy import Decision, ScaleInputs, ScalePolicy
from chaos_mpi.membership import Agenda, Join, Limits, Outcome, Proposal, View, negotiate


def decide(policy: ScalePolicy, agenda: Agenda, view: View, limits: Limits) -> Decision:
    """What the policy wants; nothing as long as no list of hosts is agreed on."""
    if agenda.hosts is None:
        return Decision()
    joining = tuple(join.host for join in (*agenda.joins, *agenda.replicating))
    return policy.decide(ScaleInputs(view.members, joining, agenda.hosts, limits))


def with_failed(agenda: Agenda, joins: Iterable[Join]) -> Agenda:
    """The agenda after these joins were given up."""
    hosts = [join.host for join in joins if join.host]
    return replace(agenda, hosts=agenda.hosts.with_failed(hosts)) if agenda.hosts is not None and hosts else agenda


def settle(
    policy: ScalePolicy, before: Agenda, outcome: Outcome, view: View, limits: Limits
) -> tuple[Outcome, Decision]:
    """The outcome of a negotiation with what the policy wants now, and that.

    The policy has its turn when the members have nothing else to do at this boundary; else it has it at the next one.

    Args:
        policy: the rule for the size.
        before: the agenda that the members negotiated on.
        outcome: of the members' proposals.
        view: the members that took part.
        limits: as in the negotiation.
    """
    given_up = [join for join in before.joins if join.id in outcome.refused]
    outcome = replace(outcome, agenda=with_failed(outcome.agenda, given_up))
    changes = (outcome.start, outcome.admit, outcome.leave, outcome.cut, outcome.activate, outcome.move, outcome.stop)
    if any(changes):
        return outcome, Decision()
    agenda = outcome.agenda
    decision = decide(policy, agenda, view, limits)
    if not decision.changes_something:
        return outcome, decision
    # Every id is settled at once, and the next ones begin with a higher number.
    ids = [f"scale-{len(agenda.settled)}-{n}" for n in range(len(decision.leaves) + len(decision.joins))]
    wanted = [("leave", member, "") for member in decision.leaves] + [("join", "", host) for host in decision.joins]
    proposals = [Proposal(kind, id_, member, host) for id_, (kind, member, host) in zip(ids, wanted, strict=True)]
    scaled = negotiate(agenda, view, [proposals], limits)
    assert agenda.hosts is not None
    hosts = agenda.hosts.with_started(decision.joins)
    refused = {**outcome.refused, **scaled.refused}
    return replace(scaled, agenda=replace(scaled.agenda, hosts=hosts), refused=refused), decision
