"""What a search does, as one frozen record, with the published numbers as named presets.

Where the rStar-Math paper and its public code differ, or where a third way is better, the choice is a field and its
default gives the reason. `compat="rstar"` (see `rstar_settings`) repeats the public code, its faults included.
"""

import dataclasses

GUIDANCE = ("terminal", "ppm")
UNVISITED = ("first", "zero")
CHOICES = ("value", "votes")
STOPS = ("rollouts", "decided", "confident")
ERRORS = ("keep", "discard")
COMPAT = ("", "rstar")


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """Settings of one search (rStar-Math, section 3.2; numbers of section 3.4).

    rollouts counts from the first rollout of the tree: a tree of 16 goes on to 64 by asking for 64.
    unvisited: "first" gives a never visited child an infinite bound (the formula read literally, as in textbooks);
        "zero" gives it 0, as the public code does. Default "first": without a PPM, "zero" repeats the first child that
        once succeeded until its subtree is used up, so siblings, which preference pairs need, stay unvisited. With a
        PPM every child starts with one visit and the two are the same.
    score_visits: visits the PPM's first score counts for. 1 as in the public code, which keeps Q inside [-1, 1]; 0 as
        in the paper's equation 3, where the score is added to the sum only.
    dead_end: value backed up where a rollout ends without an answer; None backs up nothing (paper and code).
    errors: "keep" a step whose code failed as a leaf of value -1 (code), or "discard" it (paper). It is never selected
        either way, and keeping it leaves evidence for reports and for the baseline data of the ablation.
    answers_kept: distinct answers kept of one expansion. 1 as in the public code: answers to one printed result nearly
        always agree, and each kept one counts as a visit.
    prior: weight of the policy's own probability in the bound (PUCT); 0 as published.
    choose: the answer a search settles on: the answer node of highest Q ("value", the public code), or by "votes".
    stop: "rollouts" takes all; "decided" ends when the rest cannot change the choice; "confident" ends when the leading
        answer stays ahead with probability `confidence` (a Beta posterior over the two leading answers). Both count
        votes, so in evaluation they need choose="votes": by value a later answer may always score higher. For
        annotation the default must be "rollouts": Q-values want every visit.
    """

    rollouts: int = 16
    candidates: int = 8
    max_depth: int = 16  # steps a trajectory may have, the answer included
    exploration: float = 2.0  # c of UCT
    use_gold: bool = True  # answers are graded and +-1 is backed up; False in evaluation
    guidance: str = "terminal"  # terminal: outcomes alone (rounds 1, 2) | ppm: its score first
    max_errors: int = 1  # failed steps in a row that end a trajectory
    unvisited: str = "first"
    score_visits: int = 1
    dead_end: float | None = None
    errors: str = "keep"
    answers_kept: int = 1
    prior: float = 0.0
    choose: str = "value"
    stop: str = "rollouts"
    confidence: float = 0.95
    widen: bool = False
    output_characters: int = 1024  # of a program's output that the policy is shown
    compat: str = ""
    seed: int = 0
    round: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("guidance", GUIDANCE),
            ("unvisited", UNVISITED),
            ("choose", CHOICES),
            ("stop", STOPS),
            ("errors", ERRORS),
            ("compat", COMPAT),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"search.{name}={getattr(self, name)!r}: known are {', '.join(map(repr, known))}"
                )
        for name in ("rollouts", "candidates", "max_depth", "max_errors", "answers_kept"):
            if getattr(self, name) < 1:
                raise ValueError(f"search.{name}={getattr(self, name)}: must be at least 1")
        if self.score_visits not in (0, 1):
            raise ValueError(f"search.score_visits={self.score_visits}: must be 0 or 1")
        if self.stop == "confident" and self.choose != "votes":
            raise ValueError("search.stop='confident' counts votes: set search.choose='votes' too")
        if self.stop == "decided" and self.choose == "value" and not self.use_gold:
            raise ValueError(
                "search.stop='decided' ends by value where an answer is known to be right; a preference model's score "
                "stays below 1, so it would never end a search: set search.choose='votes' too"
            )
        if not 0.5 < self.confidence < 1:
            raise ValueError(f"search.confidence={self.confidence}: must lie between 0.5 and 1")
        if self.compat:
            self._check_compat()

    def _check_compat(self) -> None:
        for name, value in RSTAR.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"search.{name}={getattr(self, name)!r}: compat='rstar' needs {value!r}; start from rstar_settings"
                )


# What the public code does wherever there is a choice.
RSTAR = {
    "compat": "rstar",
    "unvisited": "zero",
    "score_visits": 1,
    "dead_end": None,
    "errors": "keep",
    "answers_kept": 1,
    "prior": 0.0,
    "choose": "value",
    "stop": "rollouts",
    "widen": False,
    "output_characters": 1024,
}


def rstar_settings(**fields) -> SearchSettings:
    """Settings under which a search repeats the public rStar-Math code (commit b3c1846), its faults included."""
    return SearchSettings(**(fields | RSTAR))


# rStar-Math, section 3.4 and its test protocol; 236B bootstrap policies are allowed one failed step.
PRESETS = {
    "round1": SearchSettings(rollouts=8, candidates=5, max_errors=2, round=1),
    "round2": SearchSettings(rollouts=16, candidates=8, round=2),
    "round3": SearchSettings(rollouts=16, candidates=8, guidance="ppm", round=3),
    "round4": SearchSettings(rollouts=16, candidates=16, guidance="ppm", round=4),
    "test": SearchSettings(rollouts=12, candidates=32, guidance="ppm", use_gold=False),
}
EXTRA_ROLLOUTS = (64, 128)  # round 4, for problems still unsolved
TEST_SEARCHES = 64  # complete searches a problem in the published protocol
TEST_TOP_K = 4  # of them, by PPM score, that vote


def preset(name: str) -> SearchSettings:
    """One of PRESETS. Raises ValueError naming the known ones."""
    if name not in PRESETS:
        raise ValueError(f"no search preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def more_rollouts(done: int, solved: bool, schedule: tuple[int, ...] = EXTRA_ROLLOUTS) -> int:
    """Rollouts an unsolved tree goes on to (16 -> 64 -> 128), or 0 when it is solved or has had them all."""
    return 0 if solved else next((total for total in schedule if total > done), 0)
