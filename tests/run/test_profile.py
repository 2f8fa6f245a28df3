"""Traces of single rollouts."""

from gspo import build, rl
from tests.tiny_runs import kept_compiles, rl_config  # noqa: F401 - a fixture


def test_the_rollouts_that_were_asked_for_are_traced_with_named_phases(tmp_path):
    # Catches a trace of another rollout, one that is never closed, and one in which nothing has a name.
    config = rl_config(tmp_path, profile_rollouts=(1,), **{"eval.every": 0, "checkpoint.every": 0})
    rl.train(build.rl_plan(config), tmp_path / "run")
    profile = tmp_path / "run" / "profile"
    assert [path.name for path in profile.iterdir()] == ["1"]
    (trace,) = profile.rglob("*.xplane.pb")
    content = trace.read_bytes()
    for name in (b"phase/rollout", b"phase/reward", b"phase/update"):
        assert name in content
    assert b"phase/eval" not in content  # that of the end, after the last rollout
