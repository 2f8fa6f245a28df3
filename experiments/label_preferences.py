"""Preferences by a judge: a reward, or a language model that is asked which of two completions is the better one:

    python experiments/label_preferences.py --config=configs/labels_tiny.py --workdir=runs/preferences \\
        --config.init_from=runs/cold

Leaves <split>.jsonl and labels.json in the workdir; a reward model takes them by
--config.task.name='jsonl:runs/preferences/{split}.jsonl'.
"""

from gspo import build, label
from gspo.run import cli


def main() -> None:
    flags = cli.FLAGS
    plan = build.label_plan(flags.config, flags.workdir)
    made = label.label(plan, flags.workdir, allow_changed_config=flags.allow_changed_config)
    for split, found in made.items():
        left_out = ", ".join(f"{count} had {why}" for why, count in found["left_out"].items()) or "none left out"
        numbers = ", ".join(f"{name} {found[name]:.3f}" for name in ("firm", "mean", "std") if name in found)
        print(f"{split}: {found['pairs']} pairs of {found['prompts']} prompts ({left_out}); {numbers}")


if __name__ == "__main__":
    cli.define_flags()
    cli.run(main, needs="label_temperature")
