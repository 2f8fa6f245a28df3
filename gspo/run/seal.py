"""Seals: digests by which a damaged checkpoint is known before anything is read from it.

Orbax and TensorStore do not notice a flipped bit, and answer a truncated file with hundreds of lines on stderr.

Every process of a run digests the files that it wrote itself, into <step>/SEAL.<process>; before a checkpoint is read,
the processes divide what the seals list evenly among them, however many wrote it. So no host ever reads all of it.
A file is digested in blocks, which makes an even share of files of any size. A seal is JSON:

    {"ocdbt.process_0/d/34a0": {"size": bytes, "blocks": [digest of the first BLOCK bytes, of the next, ...]}, ...}

Checkpoints of earlier versions have one file SEAL, {name: digest of the whole file}.
"""

import concurrent.futures
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from gspo.run.disk import write_whole

BLOCK = 16 << 20
CHUNK = 1 << 20  # read at once


class Block(NamedTuple):
    """What one digest is of: bytes start..start+length of a file that is `size` bytes long; None where an earlier
    version did not note it."""

    name: str
    size: int | None
    start: int
    length: int
    digest: str


def write_seal(step_dir: Path, process: int) -> None:
    """Digests the files that `process` wrote, once the folder is complete. Raises OSError."""
    files = (path for path in sorted(step_dir.rglob("*")) if path.is_file() and not path.name.startswith("SEAL"))
    names = [str(path.relative_to(step_dir)) for path in files]
    sizes = {name: (step_dir / name).stat().st_size for name in names if writer_of(name) == process}
    blocks = [Block(name, size, start, min(BLOCK, size - start), "")
              for name, size in sizes.items() for start in range(0, max(size, 1), BLOCK)]  # fmt: skip
    seal = {name: {"size": size, "blocks": []} for name, size in sizes.items()}
    for block, digest in zip(blocks, _digests(step_dir, blocks), strict=True):
        seal[block.name]["blocks"].append(digest)
    write_whole(step_dir / f"SEAL.{process}", json.dumps(seal, indent=0))


def check_seal(step_dir: Path, process: int = 0, processes: int = 1) -> None:
    """Reads the share of `process` out of `processes`, and nothing of a folder without a seal. Raises ValueError or
    FileNotFoundError if one of its files is not what it was when the checkpoint was complete."""
    share = _share(_sealed(step_dir), process, processes)
    for block in share:
        if block.size is not None and (step_dir / block.name).stat().st_size != block.size:
            raise ValueError(f"{block.name} is damaged: its size has changed")
    for block, digest in zip(share, _digests(step_dir, share), strict=True):
        if digest != block.digest:
            raise ValueError(f"{block.name} is damaged")


def writer_of(name: str) -> int:
    """The process that writes a file of a checkpoint: Orbax names what each process writes by its number, as in
    state/ocdbt.process_1/d/34a0, and the first process writes the rest."""
    found = re.search(r"(?:^|/)(?:ocdbt\.)?process_(\d+)(?:/|$)", name)
    return int(found.group(1)) if found else 0


def _sealed(step_dir: Path) -> list[Block]:
    """The blocks of all seals of a folder, those of one process after those of another."""
    if (step_dir / "SEAL").exists():
        whole = json.loads((step_dir / "SEAL").read_text())
        return [Block(name, None, 0, (step_dir / name).stat().st_size, digest) for name, digest in whole.items()]
    seals = sorted(step_dir.glob("SEAL.*[0-9]"), key=lambda path: int(path.suffix[1:]))
    return [Block(name, file["size"], i * BLOCK, min(BLOCK, file["size"] - i * BLOCK), digest)
            for seal in seals for name, file in json.loads(seal.read_text()).items()
            for i, digest in enumerate(file["blocks"])]  # fmt: skip


def _share(blocks: list[Block], process: int, processes: int) -> list[Block]:
    """Neighbours whose bytes are about one of `processes` equal parts: mostly what the process wrote itself."""
    total = sum(block.length + 1 for block in blocks)  # + 1: empty files, too, belong to somebody
    share, before = [], 0
    for block in blocks:
        if (2 * before + block.length + 1) * processes // (2 * total) == process:  # by the middle of the block
            share.append(block)
        before += block.length + 1
    return share


def _digests(step_dir: Path, blocks: list[Block]) -> list[str]:
    """The digest of each block as it is on disk now. Raises FileNotFoundError."""

    def digest(block: Block) -> str:
        result, left = hashlib.blake2b(digest_size=64), block.length
        with open(step_dir / block.name, "rb") as file:
            file.seek(block.start)
            while left and (chunk := file.read(min(CHUNK, left))):
                result.update(chunk)
                left -= len(chunk)
        return result.hexdigest()[:32]

    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing leaves the interpreter lock
        return list(pool.map(digest, blocks))
