"""Mistakes at the command line: one line, exit code 2, nothing overwritten. The scripts run in this process."""

import os
import re
import signal
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from gspo import build
from gspo.run import cli
from gspo.run.workdir import hold_workdir
from tests.tiny_runs import ROOT, command, contents, kept_compiles  # noqa: F401 - fixtures

CONFIG_FILE = """
from tests.tiny_runs import rl_config, sft_config


def get_config(kind="rl"):
    return {{"rl": rl_config, "sft": sft_config}}[kind]({folder!r})
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """--config=FILE of a tiny run; "FILE:sft" is one of supervised fine-tuning."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "config.py").write_text(CONFIG_FILE.format(folder=str(folder)))
    return f"--config={folder}/config.py"


def refused(result, *words):
    """The line that a refused command printed, without "error: "."""
    code, _, stderr = result
    assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1, (code, stderr)
    for word in words:
        assert re.search(word, stderr), (word, stderr)
    return stderr


# ---------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(("arguments", "words"), [
    (["--config.objective.epsilonn=0.2"], "config.objective.epsilonn: no such field; did you mean "
                                          "config.objective.epsilon?"),
    (["--config.epsilon=0.2"], "config.epsilon: no such field; did you mean config.objective.epsilon?"),
    (["--config.num_promts", "2"], "config.num_promts: no such field; did you mean config.num_prompts?"),
    (["--config.seed=1", "--config.zzz.qqq=2"], "config.zzz.qqq: no such field$"),
    (["--config.num_prompts=many"], "config.num_prompts=many: invalid literal for int"),
    (["--config.num_prompts=1.5"], "config.num_prompts=1.5: invalid literal for int"),
    (["--config.optimizer.learning_rate=fast"], "config.optimizer.learning_rate=fast: could not convert string to "
                                                "float"),
    (["--config.objective.epsilon=x"], "config.objective.epsilon=x: could not convert string to float"),
    (["--config.checkpoint.keep_best=maybe"], "config.checkpoint.keep_best=maybe: .*Non-boolean"),
    (["--config.objective=0.2"], "config.objective=0.2: Failed to parse"),
    (["--config.num_prompts"], "Missing value for flag --config.num_prompts"),
    (["--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
    (["--confg.seed=1"], "Unknown command line flag 'confg.seed'"),
    (["seed=1"], "unexpected argument 'seed=1'; fields are set as --config.a.b=value"),
], ids=lambda value: value[-1] if isinstance(value, list) else "")  # fmt: skip
def test_a_mistake_in_the_flags_is_one_line_that_names_the_field(command, config, tmp_path, arguments, words):  # noqa: F811
    # Catches a traceback of the flags library, a field that is silently ignored, a suggestion that is not the nearest
    # name.
    refused(command("rl", config, f"--workdir={tmp_path}/run", *arguments), words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "--config is missing; pass --config=configs/NAME.py"),
    (["--config="], "--config is missing"),
    (["--config"], "--config is missing"),
    (["--config=configs/nowhere.py"], "--config=configs/nowhere.py: there is no such file"),
    (["--config=configs"], "--config=configs: there is no such file"),
    (["--config", "configs/quickstart.py"], "it has no field 'num_rollouts', so it was made for another script"),
    (["--config.seed=1", "--config=configs/gspo_running_sum.py"], "--config.seed=1 in argv before a value for "
                                                                  "--config"),
])  # fmt: skip
def test_a_config_that_is_not_there_or_not_for_this_script_is_one_line(command, tmp_path, arguments, words):  # noqa: F811
    # Catches a default config taken silently, and a KeyError from the middle of the program.
    refused(command("rl", f"--workdir={tmp_path}/run", *arguments), words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("text", "words"), [
    ("def get_config(:\n", "SyntaxError: invalid syntax .*line 1"),
    ("import nothing_of_that_name\n", "line 1: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    ("def get_config():\n    rate = 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
    ("from configs import base\n\n\ndef get_config():\n    config = base.rl()\n    config.model.widht.x = 3\n    "
     "return config\n",
     "line 6: AttributeError: .*widht"),
    ("def get_config():\n    return {'a': 1}['b']\n", "line 2: KeyError: 'b'"),
    ("def get_config(kind):\n    pass\n", "TypeError: get_config.. missing 1 required positional argument: 'kind'"),
    ("def get_config():\n    pass\n", "returned NoneType instead of a ConfigDict"),
    ("def get_konfig():\n    pass\n", "KeyError: 'get_config'"),
], ids=["syntax", "import", "exception", "attribute", "key", "argument", "None", "no function"])  # fmt: skip
def test_a_mistake_in_a_config_file_is_one_line_with_its_place(command, tmp_path, text, words):  # noqa: F811
    # Catches a traceback through the flags library, or a mistake in the file blamed on the overrides.
    (tmp_path / "mine.py").write_text(text)
    refused(
        command("rl", f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run", "--config.num_promts=2"),
        words,
        "mine.py",
    )
    assert not (tmp_path / "run").exists()


def test_a_missing_workdir_is_one_line(command, config):  # noqa: F811
    # Catches a run that lands in the current folder.
    refused(command("rl", config), "--workdir is missing; pass --workdir=runs/NAME")
    refused(command("rl", config, "--workdir="), "--workdir is missing")


def test_help_names_the_flags_and_an_example(command):  # noqa: F811
    # Catches --help answered with "--config is missing".
    code, stdout, _ = command("sft", "--help")
    assert code == 0 and "python experiments/sft.py --config=" in stdout and "--workdir" in stdout


# ---------------------------------------------------------------------------------------------------- fields


RL_MISTAKES = [
    ("num_generations=1", "num_generations=1: .*use 2 or more"),
    ("num_prompts=0", "num_prompts=0: must be positive"),
    ("updates_per_rollout=3", "updates_per_rollout=3: must divide the 16 rows of a rollout .*num_prompts=4 x "
                              "num_generations=4"),
    ("micro_batch_size=3", "micro_batch_size=3: must divide the 8 rows of a minibatch"),
    ("micro_batch_size=-1", "micro_batch_size=-1: must divide"),
    ("mesh.data=3", "num_prompts=4: not divisible by the 3 devices"),
    ("mesh.data=16", "mesh: .*needs 16 devices .*but there are 8"),
    ("max_prompt_length=3", "8 of 14 prompts are longer than max_prompt_length=3 tokens .longest 4.: raise it, or "
                            "set .*'drop'"),
    ("max_prompt_length=1 overlong_prompts=drop", "14 of 14 prompts are longer .*none is left"),
    ("overlong_prompts=cut", "overlong_prompts='cut' should be 'error' or 'drop'"),
    ("max_completion_length=0", "max_completion_length=0: must be positive"),
    ("task.name=jsonl:/nowhere/data.jsonl", "task.name='jsonl:/nowhere/data.jsonl': there is no file"),
    ("task.name=jsonl:{folder}/empty.jsonl", "empty.jsonl': split 'train' is an empty data set"),
    ("task.eval_split=test", "training and evaluation would read the same lines; .*task.eval_split='train'"),
    ("task.name=running_sums", "task.name='running_sums': unknown.*did you mean 'running_sum'"),
    ("task.name=tfds:gsm8k", "task.name='tfds:gsm8k': not in {folder}; set TFDS_DATA_DIR .*or prepare it there once "
                             "with: python -c"),
    ("task.name=running_sum task.train_split=dev", "task.train_split.*running_sum has 'train' and 'test', not 'dev'"),
    ("rewards=exact_mach", "no reward named 'exact_mach'; choose from task, exact_match"),
    ("rewards=('task','task')", "rewards=.*: name each of them once"),
    ("rewards=nowhere:f", "rewards: 'nowhere:f': importing 'nowhere' in .* failed: ModuleNotFoundError"),
    ("rewards=math_verify", 'rewards: "math_verify" (needs an optional package: pip install|computes with what)'),
    ("reward_weights=(1.0,2.0)", "reward_weights: 2 weights for 1 rewards"),
    ("rewards_max_errors=2.0", "rewards_max_errors=2.0: is a share"),
    ("reward_workers=-1", "reward_workers=-1: must be >= 0"),
    ("eval.reward=exact_mach", "eval.reward: no reward named 'exact_mach'"),
    ("eval.top_p=0.0", "eval.top_p=0.0: must be in"),
    ("num_iterations=0", "num_iterations=0: must be positive"),
    ("stop_strings=('',)", "stop_strings=.*: give texts that are not empty"),
    ("task.system_prompt=Think.", "tokenizer=.* has no chat template"),
    ("task.name=dataset:/nowhere", "task.name='dataset:/nowhere', split 'train': not found .*no such folder"),
    ("tokenizer=chars:", "tokenizer='chars:': the alphabet is empty"),
    ("tokenizer=runs/nowhere", "tokenizer='runs/nowhere': unknown"),
    ("tokenizer=chars:01", "tokenizer='chars:01': character '=' of .* is not in the alphabet"),
    ("objective.preset=gspoo", "objective.preset: no 'gspoo'; did you mean 'gspo'"),
    ("objective.importance_sampling_level=sequences", "importance_sampling_level: no 'sequences'; did you mean "
                                                      "'sequence'"),
    ("objective.epsilon=-0.1", "objective.epsilon: -0.1 will not do"),
    ("objective.sampler_is=tis", "objective.sampler_is: .*old_logps='learner'"),
    ("reward_kl_coef=-0.1", "reward_kl_coef=-0.1: must not be negative .0: no penalty"),
    ("advantage_weight_neg=-1.0", "advantage_weight_neg=-1.0: must not be negative"),
    ("entropy_target=2.0 entropy_step=-0.1", "entropy_step=-0.1: must not be negative"),
    ("scale_rewards=std", "scale_rewards='std': choose one of group, batch, none"),
    ("scale_rewards=none critic.enable=true", "scale_rewards='none': a critic .critic.enable. stands in for"),
    ("num_generations=1 scale_rewards=reinforce++ filter_groups.enable=true", "filter_groups.enable: one completion "),
    ("num_generations=1 critic.enable=true filter_groups.enable=true", "filter_groups.enable: one completion is never"),
    ("old_logps=both", "old_logps='both': choose one of sampler, learner"),
    ("router_replay.mode=R1", "router_replay.mode='R1': choose one of disabled, R2, R3"),
    ("router_replay.mode=R3 model.num_experts=0 model.d_ff=8", "router_replay.mode.*a dense model has no route"),
    ("temperature=0.0", "temperature=0.0: "),
    ("sync_ref_model=true", "sync_ref_model: nothing reads the reference"),
    ("overlong_buffer.len=6", "overlong_buffer.len=6: must be in 0..5"),
    ("optimizer.schedule=cosin", "schedule='cosin' is unknown: did you mean 'cosine'"),
    ("optimizer.learning_rate=-1.0", "learning_rate=-1.0 must be zero or more"),
    ("model.num_heads=3 model.num_kv_heads=2", "model.num_heads=3: must be a multiple of num_kv_heads=2"),
    ("model.moe_backend=fast", "model.moe_backend='fast': choose one of"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last=0: "),
    ("log.wandb=true", "wandb was asked for but wandb is not installed"),
    ("init_from=/nowhere", "init_from=/nowhere: no such folder"),
]  # fmt: skip
SFT_MISTAKES = [
    ("micro_batch_size=3", "micro_batch_size=3: must divide the 8 rows of a batch .batch_size"),
    ("batch_size=0", "batch_size=0: must be positive"),
    ("num_updates=0", "num_updates=0: must be positive"),
    ("max_completion_length=1", "14 of 14 demonstrations are longer than max_completion_length=1"),
    ("max_prompt_length=3", "8 of 14 prompts are longer than max_prompt_length=3"),
    ("task.name=jsonl:{folder}/undemonstrated.jsonl", "has no demonstrations"),
    ("task.eval_split=test", "training and evaluation would read the same lines; .*task.eval_split='train'"),
    ("init_from={folder}", "init_from=.*: no checkpoint can be read in it"),
    ("target_pass_at_1=1.5", "target_pass_at_1=1.5: must be in .0, 1.; None: no target"),
    ("target_pass_at_1=0.5 eval.every=0", "target_pass_at_1=0.5: set eval.every, to look at it"),
    ("router_aux_loss_coef=0.1 model.num_experts=0 model.d_ff=8", "router_aux_loss_coef.*a dense model has no routers"),
    ("router_z_loss_coef=-0.1", "router_z_loss_coef=-0.1: must not be negative"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "changes", "words"),
    [("rl", *case) for case in RL_MISTAKES] + [("sft", *case) for case in SFT_MISTAKES],
    ids=lambda text: text.split(" ")[0].replace("{folder}/", "") if "=" in text[:40] else "",
)
def test_a_mistake_in_a_field_is_one_line_that_names_it(command, config, tmp_path, script, changes, words, monkeypatch):  # noqa: F811
    # Catches a mistake that shows only after minutes of compilation, or as a traceback, and one that leaves a claimed
    # workdir behind.
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "undemonstrated.jsonl").write_text('{"prompt": "0=", "answer": "0"}\n')
    overrides = [f"--config.{change.format(folder=tmp_path)}" for change in changes.split(" ")]
    refused(
        command(script, f"{config}:{script}", f"--workdir={tmp_path}/run", *overrides),
        words.replace("{folder}", str(tmp_path)),
    )
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_workdir_that_cannot_be_written_is_one_line(command, config, tmp_path):  # noqa: F811
    # Catches a run that fails at its first checkpoint, and a file in the way that is replaced.
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        refused(command("rl", config, f"--workdir={path}"), f"--workdir={path} cannot be used")
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------- the whole program


def test_a_run_can_be_started_and_its_workdir_defends_itself(command, config, tmp_path):  # noqa: F811
    # Catches a script that does not pass its flags on, and a refused command that has changed the workdir already.
    workdir = f"--workdir={tmp_path}/run"
    code, stdout, stderr = command("rl", config, workdir, "--config.num_rollouts=1")
    assert (code, stderr) == (0, "") and "RL 1/1" in stdout and (tmp_path / "run" / "checkpoints" / "1").is_dir()
    before = contents(tmp_path / "run")
    refused(
        command("rl", config, workdir),
        "config.json differs from .*num_rollouts: saved 1, now 3",
        "--allow_changed_config",
    )
    refused(
        command("rl", config, workdir, "--config.model.num_layers=2", "--allow_changed_config"),
        r"model\.num_layers=2: the run in .* was trained with 1",
    )
    refused(command("rl", config, workdir, "--config.num_promts=2", "--allow_changed_config"), "no such field")
    assert contents(tmp_path / "run") == before


def test_a_second_run_in_a_workdir_is_refused_and_what_only_reads_it_is_not(command, config, tmp_path):  # noqa: F811
    # Catches two runs whose metrics interleave without a word, and an evaluation that has to wait for the end of a run.
    workdir = f"--workdir={tmp_path}/run"
    assert command("rl", config, workdir, "--config.num_rollouts=1")[0] == 0
    before = {name: data for name, data in contents(tmp_path / "run").items() if name != "LOCK"}
    with hold_workdir(tmp_path / "run", {}, allow_changed_config=True):
        for script, kind in (("rl", config), ("sft", f"{config}:sft")):
            told = refused(command(script, kind, workdir, "--allow_changed_config"), "is in use: process [0-9]+ on")
            assert f"process {os.getpid()} on" in told
        code, stdout, stderr = command("evaluate", config, workdir)
        assert (code, stderr) == (0, "") and '"step": 1' in stdout
    after = {name: data for name, data in contents(tmp_path / "run").items() if name != "LOCK"}
    assert before == after


def test_a_process_ends_with_exit_code_2_and_without_a_traceback(tmp_path):
    # Catches an exit code or a traceback that only the real interpreter shows.
    command_line = [
        sys.executable,
        "experiments/rl.py",
        "--config=configs/gspo_running_sum.py",
        f"--workdir={tmp_path}/run",
    ]
    done = subprocess.run([*command_line, "--config.num_generations=1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: num_generations=1: group advantages compare completions of a prompt; use 2 or more\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("given", "options"), [
    (["task.name=jsonl:a/{split}.jsonl"], {}),
    (["task.name=jsonl:a.jsonl", "task.options.prompt_field=question", "task.options.size=8"],
     {"prompt_field": "question", "size": 8}),
    (["task.name=jsonl:a.jsonl", "task.options={'size':9}"], {"size": 9}),
    (["task.name jsonl:a.jsonl", "task.options.size 8", "task.options.sure=false"], {"size": 8, "sure": False}),
    (["task.name running_sum"], {"num_digits": 12, "modulus": 10, "error_rate": 0.12}),
    (["task.name=running_sum", "task.options.num_digits=5"], {"num_digits": 5, "modulus": 10, "error_rate": 0.12}),
    (["task.options.num_digits=5"], {"num_digits": 5, "modulus": 10, "error_rate": 0.12}),
])  # fmt: skip
def test_the_options_of_a_config_are_those_of_its_own_task(given, options, command, tmp_path, monkeypatch):  # noqa: F811
    # Catches data of one's own that are refused for the toy's number of digits, and an option that cannot be given.
    seen = []
    monkeypatch.setattr(cli, "run", lambda main, needs, run=cli.run: run(
        lambda: seen.append(cli.FLAGS.config.task.options.to_dict()), needs=needs))  # fmt: skip
    flags = [part for field in given for part in f"--config.{field}".split(" ")]
    told = command("rl", f"--config={ROOT / 'configs' / 'gspo_running_sum.py'}", f"--workdir={tmp_path}", *flags)
    assert told[0] == 0 and seen == [options]
    assert cli._with_own_options(["x", "--config.a=1"], ConfigDict({"a": 2})) == ["x", "--config.a=1"]


def test_the_leaves_of_a_config_have_dotted_names():
    # Catches sections listed as fields, or their fields without the prefix: what suggestions are chosen from.
    assert build.leaf_fields(ConfigDict({"a": 1, "b": {"c": {"d": (2,)}, "e": None}})) == ["a", "b.c.d", "b.e"]


# ---------------------------------------------------------------------------------------------------- signals


def test_a_stop_signal_is_noted_and_leaves_with_the_code_that_shells_expect(capsys):
    # Catches a signal that ends the process between two updates, an exit code of success, handlers that outlive the
    # loop.
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with cli.StopSignal() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            assert stop.leave("saved").code == code
        assert capsys.readouterr().err == f"stopped by {signal.Signals(number).name}: saved\n"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_ctrl_c_ends_the_run_at_once():
    # Catches a user who cannot get out of a long compilation.
    with pytest.raises(KeyboardInterrupt), cli.StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
