"""The protocol's rules, and in which world it shows when one is left out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    Attributes:
        name: Names it for `--broken`.
        text: What it says.
        reason: What goes wrong without it.
        world: Where the model notices.
        seed: Where to begin there, so that it notices soon.
    """

    name: str
    text: str
    reason: str
    world: str
    seed: int = 0


RULES = (
    # How a chunk is applied, and how a step is made.
    Rule(
        "commit-id",
        "The commit compares the token of the state that was computed from.",
        "After lost writes a chunk would continue a state that it was not computed from.",
        "lost writes beside a rival on the session",
        seed=253,
    ),
    Rule(
        "token",
        "A chunk names the token of the answer before it, a Backward that of its Forward.",
        "A chunk of another writer would be continued in silence.",
        "lost writes beside a rival on the session",
        seed=13,
    ),
    Rule(
        "digest",
        "A chunk that is sent again is compared by its content.",
        "Another writer's chunk under the same number would be answered as ours.",
        "lost writes beside rivals",
    ),
    Rule(
        "version-digest",
        "A weights version is named by number and digest.",
        "After lost writes the same number would come back with other weights.",
        "lost writes beside rivals",
        seed=35,
    ),
    Rule(
        "recorded-name",
        "The name of a recorded contribution is remembered after the step.",
        "A late duplicate of its Backward would record it again.",
        "lost replies",
    ),
    Rule(
        "request-id",
        "An Update is remembered by its request id.",
        "An Update whose answer was lost would be refused though its step was made.",
        "lost replies",
    ),
    Rule(
        "one-read",
        "Request id, head and contributions are read by one script.",
        "A late duplicate would find the contributions gone and refuse a step that was made.",
        "lost replies",
    ),
    Rule(
        "exact-names",
        "An Update names its contributions and the head that it expects.",
        "A step that is made again after a loss would take others.",
        "rivals",
    ),
    Rule(
        "pinned-replay",
        "A Forward that is sent again names the version that its first answer named.",
        "A chunk that was lost would be applied with newer weights.",
        "lost writes",
    ),
    Rule(
        "gap-on-backward",
        "A Backward above the session's chunk_seq is a gap, not a missing tape.",
        "A lost chunk would not be healed.",
        "lost writes",
    ),
    # Old age.
    Rule(
        "age",
        "A session that is absent has expired if its last answer is older than its ttl; "
        "only a younger one was lost and is begun again.",
        "When the marker has gone, healing would bring back what expired or was closed.",
        "days of sleep",
    ),
    Rule(
        "suspend-clock",
        "Age is measured by a clock that runs on while the machine is suspended.",
        "A client that wakes up would take its last answer for younger than it is.",
        "days of sleep",
    ),
    Rule(
        "age-of-every-entry",
        "Age also holds back the opening of a session that an Update's healing would send.",
        "Healing the model would bring back a session that has ended.",
        "days of sleep and lost writes",
        seed=71,
    ),
    Rule(
        "closed-marker",
        "The marker of a closed session lives as long as that of one that expired.",
        "With a ttl of days a closed session would be taken for a lost one that is young.",
        "days of sleep beside others",
    ),
    Rule(
        "longest-marker",
        "A marker never gets a shorter time to live than it had.",
        "After a reset with a short ttl, a client of the epoch before would begin that again.",
        "days of sleep beside others",
        seed=24,
    ),
    Rule(
        "skip-held",
        "Healing sends a Backward again only if the version that its Update made is lost.",
        "A Forward that is sent again makes a new tape, and when the name is forgotten the "
        "gradient would be recorded twice.",
        "hours of sleep and lost writes",
    ),
    Rule(
        "held-digest",
        "A version counts as present only if its number and, where it is still kept, its digest agree.",
        "Our step would be taken for made where another step has taken its number.",
        "lost writes beside rivals",
    ),
    Rule(
        "same-round",
        "A Backward that is sent again is followed by its Update in the same round.",
        "The version that later chunks need would not come back.",
        "lost writes",
    ),
    Rule(
        "unclaimed-age",
        "A Backward without a known Update, recorded longer ago than a name is remembered, is sent "
        "again only while the head is the one that was known before it.",
        "Somebody else's Update may have consumed it, and its name may be forgotten.",
        "hours of sleep and lost writes beside others",
        seed=104,
    ),
    Rule(
        "doubt-age",
        "An Update whose outcome has been unknown for longer than a request id is remembered is "
        "not sent again unless the head is still the one that it expects.",
        "It would be refused, and reported as not made, though it was.",
        "hours of sleep",
    ),
    Rule(
        "counted-answer",
        "TAPE_MISSING with counted=true is an answer: the contribution waits.",
        "A contribution whose answer was lost would wait for ever, or be consumed by somebody else's Update.",
        "hours of sleep",
    ),
    # A conflict.
    Rule(
        "conflict-loss",
        "VERSION_CONFLICT with a head below the expected version, or of its number and another "
        "digest, is a loss.",
        "A trainer whose step was lost could not go on.",
        "lost writes",
    ),
    Rule(
        "conflict-truth",
        "VERSION_CONFLICT with a head above the expected version, which is still kept, is raised at "
        "once.",
        "The log would be sent again though nothing was lost.",
        "rivals",
    ),
    # A store that is full or refuses.
    Rule(
        "refused-unknown",
        "A refusal decided before the session was read (STORE_FULL, OVERLOADED) says nothing "
        "about an earlier attempt of unknown outcome.",
        "The caller would send other data under a number that was used.",
        "a full store",
    ),
    Rule(
        "doubt-of-operation",
        "Whether an attempt's outcome is unknown is remembered with the operation, not with a call.",
        "Asked again, the first attempt's refusal would be taken for the outcome of both.",
        "a full store",
    ),
    Rule(
        "doubt-through-healing",
        "Healing does not settle what is unknown of the operation that it was made for.",
        "An attempt from before may still be carried out once its place has been healed.",
        "a full store that lost writes",
        seed=1442,
    ),
    Rule(
        "raised-inside",
        "An error raised inside a script leaves the outcome unknown; only a command that was "
        "refused as a whole was not applied.",
        "The caller would send other data under a number that was used.",
        "a full store",
    ),
    Rule(
        "begun-reported",
        "An epoch that has begun is reported, even if the tenant's list cannot be brought up to date.",
        "The session would be fenced off by its own reset.",
        "a full store",
    ),
    Rule(
        "recorded-reported",
        "A Backward whose contribution was recorded says so, whatever became of its Update.",
        "Other gradients would be refused as SEQ_REUSED, and the recorded ones would wait for somebody else's Update.",
        "a full store",
    ),
    Rule(
        "read-before-full",
        "What a full store refuses is tried as a read before the answer: STORE_FULL is only for what was not done.",
        "A chunk that was applied would be refused as if it had not been.",
        "a full store",
    ),
    Rule(
        "staged-refusal",
        "A refused write of staged parts is STORE_FULL at once.",
        "The script would find nothing staged, and the replica would try again until the caller's "
        "deadline and blame other writers.",
        "a nearly full store",
    ),
)


class Rules:
    """The rules in force.

    Args:
        without: Names the rule that is left out; empty: none.
    """

    def __init__(self, without: str = "") -> None:
        if without and without not in {rule.name for rule in RULES}:
            raise ValueError(f"no such rule: {without}")
        self.without = without

    def on(self, name: str) -> bool:
        """Return whether a rule is in force."""
        return name != self.without
