"""What is claimed, as data: each claim is a weighted sum of arms of configs/paper_cpu.py, with the smallest effect that
counts.

Written down and committed before the runs that judge it, but where it says "asked afterwards". `gspo.report.evidence`
says how a verdict is reached, and what a collapse is. Numbers are those of the paper's figures and sections (GSPO,
arXiv 2507.18071, unless said otherwise).
"""

from gspo.report.evidence import Claim

PASS, AREA, COLLAPSED = "held-out pass@1", "area under the reward", "collapsed"
CLIPPED = "orders of magnitude of clipped tokens"
COUNTS = 0.05  # of pass@1 or of reward: less does not count


def lead(better: str, worse: str) -> dict[str, float]:
    return {better: 1.0, worse: -1.0}


def interaction(moe: str, dense: str) -> dict[str, float]:
    """What GSPO gains over GRPO on the one model more than on the other."""
    return lead(f"{moe} GSPO", f"{moe} GRPO") | {f"{dense} GSPO": -1.0, f"{dense} GRPO": 1.0}


CLAIMS = []
for s in ("A", "B"):
    moe, figure = f"{s} MoE", f"curves_{s.lower()}"
    CLAIMS += [
        Claim(f"1a {s}", "GSPO ends above GRPO with Routing Replay", "Fig. 1", figure, PASS,
              lead(f"{moe} GSPO", f"{moe} GRPO+R2"), COUNTS),
        Claim(f"1b {s}", "GSPO is above GRPO with Routing Replay during training", "Fig. 1", figure, AREA,
              lead(f"{moe} GSPO", f"{moe} GRPO+R2"), COUNTS),
        Claim(f"1c {s}", "GSPO ends above GRPO without replay", "Fig. 1, 3", figure, PASS,
              lead(f"{moe} GSPO", f"{moe} GRPO"), COUNTS),
        Claim(f"1d {s}", "GSPO loses nothing without replay", "§5.3", figure, PASS,
              lead(f"{moe} GSPO", f"{moe} GSPO+R2"), -COUNTS),
        Claim(f"2a {s}", "GSPO clips ten times as many tokens as GRPO, or more", "Fig. 2", figure, CLIPPED,
              lead(f"{moe} GSPO", f"{moe} GRPO"), 1.0),
        Claim(f"3a {s}", "GRPO ends lower without Routing Replay", "Fig. 3", figure, PASS,
              lead(f"{moe} GRPO+R2", f"{moe} GRPO"), COUNTS),
        Claim(f"3b {s}", "GRPO collapses more often without Routing Replay", "Fig. 3", figure, COLLAPSED,
              lead(f"{moe} GRPO", f"{moe} GRPO+R2"), 0.2),
        Claim(f"5a {s}", "GSPO gains more over GRPO on the MoE than on its dense twin", "§5.3", figure, PASS,
              interaction(moe, f"{s} dense"), COUNTS),
        Claim(f"5b {s}", "the same during training", "§5.3", figure, AREA, interaction(moe, f"{s} dense"), COUNTS),
        Claim(f"5c {s}", "dense GRPO is healthy: it ends no lower than dense GSPO", "implied", figure, PASS,
              lead(f"{s} dense GRPO", f"{s} dense GSPO"), -COUNTS),
    ]  # fmt: skip
# Written down when the sweep had been run, before these runs were: each method at its own best rate and range.
CLAIMS += [
    Claim("1a best", "the same, each at its own best: GSPO ends above GRPO with Routing Replay", "Fig. 1", "best", PASS,
          lead("best MoE GSPO", "best MoE GRPO+R2"), COUNTS),
    Claim("1b best", "and during training", "Fig. 1", "best", AREA, lead("best MoE GSPO", "best MoE GRPO+R2"), COUNTS),
    Claim("1c best", "GSPO ends above GRPO without replay, each at its own best", "Fig. 1, 3", "best", PASS,
          lead("best MoE GSPO", "best MoE GRPO"), COUNTS),
    Claim("3a best", "GRPO ends lower without Routing Replay, at its best", "Fig. 3", "best", PASS,
          lead("best MoE GRPO+R2", "best MoE GRPO"), COUNTS),
    Claim("5a best", "GSPO gains more over GRPO on the MoE than on its twin, each at its own best", "§5.3", "best",
          PASS, interaction("best MoE", "best dense"), COUNTS),
    Claim("5b best", "the same during training", "§5.3", "best", AREA, interaction("best MoE", "best dense"), COUNTS),
]  # fmt: skip
for power in (-2, 2):
    kind = "narrower" if power < 0 else "wider"
    CLAIMS.append(
        Claim(f"2b {kind}", f"the same with ranges four times {kind}", "§5.2", "clips", CLIPPED,
              lead(f"B MoE GSPO clip 2^{power}", f"B MoE GRPO clip 2^{power}"), 1.0)
    )  # fmt: skip
CLAIMS += [
    Claim("4a", "more experts change in deeper models, over a rollout", "§5.3", "depth", "experts changed per rollout",
          lead("8 layers GRPO", "2 layers GRPO"), 0.01),
    Claim("4b", "more experts change in deeper models, by one update", "§5.3", "depth", "experts changed per update",
          lead("8 layers GRPO", "2 layers GRPO"), 0.002),
    # Asked when 4a and 4b had been judged: with 8 layers GRPO collapses on every seed, and what has collapsed no longer
    # moves.
    Claim("4a after", "the same in the first five rollouts, which nothing has collapsed in (asked afterwards)", "§5.3",
          "depth", "experts changed per rollout at the start", lead("8 layers GRPO", "2 layers GRPO"), 0.01),
    Claim("4b after", "the same in the first five rollouts (asked afterwards)", "§5.3",
          "depth", "experts changed per update at the start", lead("8 layers GRPO", "2 layers GRPO"), 0.002),
    Claim("4c", "one update changes a tenth of the experts", "§5.3", "curves_b", "experts changed per update",
          {"B MoE GRPO": 1.0}, 0.1),
    Claim("6a", "variance of log s falls as 1/length: eightfold from 8 to 64 digits", "derived", "length",
          "log10 of the variance of log s", lead("8 digits GRPO", "64 digits GRPO"), 0.8),
    Claim("6b", "GSPO's lead grows with length", "§4.1", "length", PASS,
          lead("64 digits GSPO", "64 digits GRPO") | {"8 digits GSPO": -1.0, "8 digits GRPO": 1.0}, COUNTS),
    Claim("7a", "without normalisation one range clips more, the longer the sequence", "§4.1", "length", CLIPPED,
          lead("64 digits sum", "8 digits sum"), 0.3),
    Claim("7b", "without normalisation learning is worse at 64 digits", "§4.1", "length", PASS,
          lead("64 digits GSPO", "64 digits sum"), COUNTS),
    *(Claim(f"8a {n}", f"replay (R2) helps GRPO at {n} updates per rollout", "2512.01374", "staleness", PASS,
            lead(f"{n} updates GRPO+R2", f"{n} updates GRPO"), COUNTS) for n in (2, 4, 8, 16)),
    *(Claim(f"8b {n}", f"R3 is better than R2 at {n} updates per rollout, under mismatch", "2512.01374", "mismatch",
            PASS, lead(f"{n} updates mismatch GRPO+R3", f"{n} updates mismatch GRPO+R2"), COUNTS) for n in (4, 8)),
    Claim("8c", "R2 is better than R3 at 2 updates per rollout, under mismatch", "2512.01374", "mismatch", PASS,
          lead("2 updates mismatch GRPO+R2", "2 updates mismatch GRPO+R3"), COUNTS),
    Claim("8d", "GRPO fails at one update per rollout under mismatch", "2510.11370", "mismatch", PASS,
          lead("1 updates GRPO", "1 updates mismatch GRPO"), COUNTS),
    Claim("9a", "GSPO may take the sampler's log-probs for the old ones", "§5.4", "old_logps", PASS,
          lead("old by sampler GSPO", "old by learner GSPO"), -COUNTS),
    Claim("9b", "GRPO may not", "§5.4, implied", "old_logps", PASS,
          lead("old by learner GRPO", "old by sampler GRPO"), COUNTS),
    Claim("10a", "going back does not help: GRPO falls again from the checkpoint before", "§3", "again", COLLAPSED,
          {"again GRPO": 1.0}, 0.2),
    Claim("10b", "nor does a narrower range", "§3", "again", PASS, lead("again GRPO", "again GRPO narrow"), -COUNTS),
    Claim("10c", "from that checkpoint GSPO ends above GRPO", "implied", "again", PASS,
          lead("again GSPO", "again GRPO"), COUNTS),
    Claim("11a", "GRPO falls as its routers move more", "§5.3", "dose", PASS,
          lead("router x1 GRPO", "router x20 GRPO"), COUNTS),
    Claim("11b", "and not because some weights move more: the placebo costs it less", "control", "dose", PASS,
          lead("router x1 GRPO", "router x20 GRPO") | {"query x1 MoE GRPO": -1.0, "query x20 MoE GRPO": 1.0}, COUNTS),
    Claim("11c", "GSPO falls less than GRPO as routers move more", "§5.3", "dose", PASS,
          lead("router x1 GRPO", "router x20 GRPO") | {"router x1 GSPO": -1.0, "router x20 GSPO": 1.0}, COUNTS),
    Claim("11d", "replay cures what the routers do to GRPO", "§5.3", "dose", PASS,
          lead("router x20 GRPO+R2", "router x20 GRPO"), COUNTS),
    # Asked when 5a B had been judged: is it there without what setting B was found by?
    *(Claim(f"5a x{n} after", f"the interaction, routers at {n} times the rate (asked afterwards)", "control", "dose",
            PASS, interaction(f"router x{n}", "B dense"), COUNTS) for n in (1, 3, 10)),
    Claim("5a placebo after", "the interaction, with the queries of both at 20 times the rate (asked afterwards)",
          "control", "dose", PASS, interaction("query x20 MoE", "query x20 dense"), COUNTS),
    Claim("12", "GSPO-token is GSPO", "eq. 13-17", "objectives", PASS, lead("B MoE gspo_token", "B MoE GSPO"), -COUNTS),
]  # fmt: skip
