"""The tower of the README as data: each file, its floor, and the rule that imports go down only."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first. A file imports from files above it in this list, never from one below it.
TOWER = [
    "types", "checks", "masked",
    "parallel.sharding", "parallel.peers", "parallel.distributed",
    "objectives.ratios", "objectives.kl", "objectives.surrogates", "objectives.corrections", "objectives.aggregations",
    "objectives.advantages", "objectives.diagnostics", "objectives.presets", "objectives.compose",
    "objectives.pairs", "objectives",
    "model.adapters", "model.columns", "model.rope", "model.attention", "model.cache", "model.packing",
    "model.routing", "model.experts", "model.dispatch", "model.moe", "model.spec",
    "model.layers", "model.transformer", "model.upcycle",
    "model.distribution", "model.head",
    "learning.microbatch", "learning.optim", "learning.mismatch",
    "learning.decoded", "learning.refill", "learning.sampler", "learning.scores",
    "learning.drift", "learning.learner", "learning.critic", "learning.rewards", "learning.state", "learning.agreement",
    "data.example", "data.hf_tokenizer", "data.tokenizer", "data.rewards",
    "data.math_answers", "data.user_rewards", "data.reward_pool",
    "data.tasks.task", "data.tasks.rows", "data.tasks.running_sum", "data.tasks.arithmetic", "data.tasks.reasoning",
    "data.tasks.tfds", "data.tasks.jsonl", "data.tasks.dataset",
    "data.tasks", "data.scoring", "data.batches", "data.preferences",
    "run.disk", "run.machine", "run.seal", "run.writers", "run.tokens", "run.progress", "run.profile",
    "run.stored", "run.checkpoint", "run.identity", "run.workdir",
    "hf.rope", "hf.derived", "hf.rows", "hf.families", "hf.folder", "hf.classifier", "hf.peft", "hf.start_folder",
    "hf.gguf_file", "hf.gguf_tokenizer",
    "report.hlo", "report.collectives", "report.origins", "report.matmuls", "report.program",
    "report.plots", "report.tables", "report.calibration", "report.measure", "report.flops", "report.speed",
    "held", "plans", "supervised_plans", "build", "run.cli", "critic_source", "steps", "policy", "generate",
    "reward_source", "collect", "evaluate", "resume", "judge", "label", "record", "supervised", "sft", "pairs",
    "reward_model", "dpo", "rl",
    "report.view.pack", "report.view.page", "report.view.serve",
    "report.campaign", "report.arms", "report.ledger", "report.evidence", "report.bands",
    "report.gradients", "report.recorded", "report.lab", "report.frames", "report.aot",
    "report.verdicts", "report.workload", "report.cases",
]  # fmt: skip
CONFIG_READERS = ("build",)


def modules() -> dict[str, Path]:
    package = ROOT / "gspo"
    names = {path: ".".join(path.relative_to(package).with_suffix("").parts) for path in package.rglob("*.py")}
    doors = {path for path, name in names.items() if name.endswith(".__init__") and path.stat().st_size}
    return {
        name.removesuffix(".__init__"): path
        for path, name in names.items()
        if path in doors or not name.endswith("__init__")
    }


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything that the file imports, `from a import b` as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it out"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down_the_tower_only(name):
    # Catches a lower floor that reaches up (a loss that reads a config, a sampler that knows the loop), and a file
    # nobody placed.
    assert name in TOWER, f"gspo/{name} has no place in the tower"
    for imported in imports_of(modules()[name]):
        if imported.startswith("gspo."):
            known = [other for other in TOWER if imported == f"gspo.{other}" or imported.startswith(f"gspo.{other}.")]
            assert known, f"{name} imports {imported}, which is not in the tower"
            assert TOWER.index(max(known, key=len)) < TOWER.index(name), (
                f"{name} imports {imported}, which stands above it"
            )


@pytest.mark.parametrize("name", sorted(modules()))
def test_configs_are_read_in_one_place(name):
    # Catches a library function that takes a config where a plan or plain keywords would do.
    if name not in CONFIG_READERS:
        assert not any("ml_collections" in imported for imported in imports_of(modules()[name]))


def test_configs_import_nothing_but_ml_collections_and_each_other():
    # Catches a config that drags the library, and with it jax, into reading a file of numbers.
    for path in (ROOT / "configs").glob("*.py"):
        for imported in imports_of(path):
            root = imported.split(".")[0]
            allowed = root in ("ml_collections", "configs") or root in sys.stdlib_module_names
            assert allowed, f"{path.name} imports {imported}"


@pytest.mark.parametrize(
    "path", sorted([*(ROOT / "experiments").glob("*.py"), *(ROOT / "scripts").glob("*.py")]), ids=lambda p: p.name
)
def test_experiments_and_scripts_import_the_library_and_not_each_other(path):
    # Catches a helper that is borrowed from the script next door, which ends in a search path that is changed.
    siblings = {other.stem for folder in ("experiments", "scripts") for other in (ROOT / folder).glob("*.py")}
    own = (f"experiments.{path.stem}_",)  # paper.py has its claims and its figures in files of their own
    for imported in imports_of(path):
        if imported.startswith(own):
            continue
        assert imported.split(".")[0] not in siblings | {"experiments", "scripts"}, f"{path.name} imports {imported}"
    assert "sys.path" not in path.read_text()


def test_nothing_but_the_listed_folders_stands_at_the_root():
    # Catches drift of the layout: a src/, a utils/, a second docs tree.
    tracked = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert tracked <= {"gspo", "configs", "experiments", "scripts", "tests", "runs", "build", "gspo.egg-info"} | {
        name for name in tracked if name == "__pycache__"
    }


@pytest.mark.parametrize("path", sorted((ROOT / "gspo").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    # Catches growth past what a reader can hold: 400 lines a file, 80 a function.
    text = path.read_text()
    assert len(text.splitlines()) <= 400, f"{path.name} is longer than 400 lines: split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 80, f"{path.name}: {node.name} has {length} lines, more than 80: split it"
